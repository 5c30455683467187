# SPDX-License-Identifier: Apache-2.0
"""Random accesses to all chips at once: nothing is raised, and what must always hold does."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.interrupts import Board

from softkvm.kvm.irq.io_bus import IoBus

PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61)
EDGES = (0, 1, 0x0F, 0x10, 0x1FF, 0x8041, 0x10700, 0x44041, 0x4C041, 0x400EF, 0x7FFFFFFF, 0xFFFFFFFF)
value32 = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**32 - 1))
value64 = st.one_of(value32, st.integers(0, 2**64 - 1))
cpu = st.integers(0, 2)

ACCESSES = st.one_of(
    st.tuples(st.just("port"), st.sampled_from(PORTS), st.integers(0, 255)),
    st.tuples(st.just("ioapic"), st.integers(0, 0x40), value32),
    st.tuples(st.just("mmio"), cpu, st.integers(0, 0x3F), value32),
    st.tuples(st.just("msr"), cpu, st.integers(0x800, 0x840), value64),
    st.tuples(st.just("base"), cpu, st.sampled_from((0xFEE00000, 0xFEE00800, 0xFEE00C00, 0xFEE00400))),
    st.tuples(st.just("line"), st.integers(0, 24), st.integers(0, 1)),
    st.tuples(st.just("msi"), value32, value32, value32),
    st.tuples(st.just("deadline"), cpu, value64),
    st.tuples(st.just("time"), st.integers(0, 10**9)),
    st.tuples(st.just("take"), cpu),
    st.tuples(st.just("restore"), cpu),
)


class RandomMachine(Board):
    """Performs accesses and checks what must hold after each."""

    def __init__(self) -> None:
        super().__init__(3)
        self.pio, self.mmio = IoBus(), IoBus()
        self.chips.attach(self.pio, self.mmio)
        self.chips.create_pit(1, self.pio)

    def perform(self, kind: str, *args: int) -> None:
        getattr(self, f"_{kind}")(*args)
        for lapic in self.lapics:
            vector = lapic.has_interrupt()
            assert vector == -1 or vector & 0xF0 > lapic.ppr
            assert not (lapic.irr | lapic.isr) & 0xFFFF
            assert lapic.irr < 1 << 256
            assert lapic.isr < 1 << 256
            assert lapic.vcpu.timer_ns == lapic.next_deadline_ns  # type: ignore[attr-defined]

    def _port(self, port: int, value: int) -> None:
        self.pio.write(port, 1, value)
        read = self.pio.read(port, 1)
        assert read is not None
        assert 0 <= read <= 0xFF

    def _ioapic(self, register: int, value: int) -> None:
        self.mmio.write(0xFEC00000, 4, register)
        self.mmio.write(0xFEC00010, 4, value)
        read = self.mmio.read(0xFEC00010, 4)
        assert read is not None
        assert 0 <= read <= 0xFFFFFFFF

    def _mmio(self, cpu: int, register: int, value: int) -> None:
        self.lapics[cpu].mmio_write(register * 16, 4, value)
        assert 0 <= self.lapics[cpu].mmio_read(register * 16, 4) <= 0xFFFFFFFF

    def _msr(self, cpu: int, index: int, value: int) -> None:
        self.lapics[cpu].msr_write(index, value)
        read = self.lapics[cpu].msr_read(index)
        assert read is None or 0 <= read < 1 << 64

    def _base(self, cpu: int, base: int) -> None:
        lapic = self.lapics[cpu]
        before = lapic.apic_base
        assert lapic.set_base(base) or lapic.apic_base == before

    def _line(self, gsi: int, level: int) -> None:
        assert self.chips.set_gsi(gsi, level) >= -1

    def _msi(self, address_lo: int, address_hi: int, data: int) -> None:
        assert -1 <= self.chips.routing.set_msi(address_lo, address_hi, data) <= 3

    def _deadline(self, cpu: int, tsc: int) -> None:
        self.lapics[cpu].set_tsc_deadline(tsc)

    def _time(self, ns: int) -> None:
        self.advance(ns)
        for lapic in self.lapics:
            lapic.inject_timer_irqs()
            lapic.accept_events()
            deadline = lapic.next_deadline_ns
            assert deadline == 0 or deadline > self.clock()

    def _take(self, cpu: int) -> None:
        lapic = self.lapics[cpu]
        if self.chips.cpu_has_interrupt(lapic):
            assert 0 <= self.chips.cpu_get_interrupt(lapic) <= 255
        lapic.eoi()

    def _restore(self, cpu: int) -> None:
        lapic = self.lapics[cpu]
        state = lapic.get_state()
        lapic.set_state(state)
        after = lapic.get_state()
        assert after[0x80:0x280] == state[0x80:0x280]
        assert after[0x320:0x3F0] == state[0x320:0x3F0]
        for chip in range(3):
            saved = self.chips.get_irqchip(chip)
            self.chips.set_irqchip(saved)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACCESSES, max_size=60))
def test_any_sequence_of_accesses_is_survived(accesses: list[tuple[str, int]]) -> None:
    machine = RandomMachine()
    for access in accesses:
        machine.perform(*access)
