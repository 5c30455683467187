# SPDX-License-Identifier: Apache-2.0
"""The IOAPIC against the 82093AA datasheet, delivering to real local APICs."""

import ctypes
import errno

import pytest
from tests.support.interrupts import Board

from softkvm import abi
from softkvm.kvm.x86.irqchip.ioapic import IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED, IRQ_IGNORED

BASE = 0xFEC00000
MASK, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11
LDR = 0xD0
PIN = 14


class IoApicBench(Board):
    """Accesses as a guest makes them."""

    def read(self, register: int) -> int:
        assert self.chips.ioapic is not None
        self.chips.ioapic.io_write(BASE, 4, register)
        return self.chips.ioapic.io_read(BASE + 0x10, 4)

    def write(self, register: int, value: int) -> None:
        assert self.chips.ioapic is not None
        self.chips.ioapic.io_write(BASE, 4, register)
        self.chips.ioapic.io_write(BASE + 0x10, 4, value)

    def entry(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin) | self.read(0x11 + 2 * pin) << 32

    def route(self, low: int, dest: int = 0, pin: int = PIN) -> None:
        self.write(0x11 + 2 * pin, dest << 24)
        self.write(0x10 + 2 * pin, low)

    def line(self, level: int, pin: int = PIN, source: int = 0) -> int:
        assert self.chips.ioapic is not None
        return self.chips.ioapic.set_pin(pin, level, source)

    def take(self, cpu: int = 0) -> int:
        """Take an interrupt, without ending it."""
        return self.lapics[cpu].get_interrupt()


@pytest.fixture
def bench() -> IoApicBench:
    return IoApicBench(2)


def test_registers_after_reset(bench: IoApicBench) -> None:
    assert bench.read(0) == 0
    assert bench.read(1) == 0x00170011  # version 11h, 24 entries
    for pin in range(24):
        assert bench.entry(pin) == MASK
    assert bench.read(0x40) == 0


def test_id_has_four_bits_and_arbitration_follows(bench: IoApicBench) -> None:
    bench.write(0, 0xFFFFFFFF)
    assert bench.read(0) == bench.read(2) == 0x0F000000
    bench.write(1, 0)
    bench.write(2, 0)
    assert bench.read(1) == 0x00170011
    assert bench.read(2) == 0x0F000000


def test_entry_keeps_its_writable_bits(bench: IoApicBench) -> None:
    bench.write(0x10, 0xFFFFFFFF)
    bench.write(0x11, 0xFFFFFFFF)
    assert bench.entry(0) == 0xFF00_0000_0001_AFFF


def test_select_register_reads_back_and_narrow_reads_are_cut(bench: IoApicBench) -> None:
    ioapic = bench.chips.ioapic
    assert ioapic is not None
    ioapic.io_write(BASE, 4, 0x101)
    assert ioapic.io_read(BASE, 4) == 1
    assert ioapic.io_read(BASE + 0x10, 1) == 0x11
    assert ioapic.io_read(BASE + 0x20, 4) == 0
    assert ioapic.io_write(BASE + 0x20, 4, 1)


def test_edge_is_sent_once(bench: IoApicBench) -> None:
    bench.route(0x41)
    assert bench.line(1) == 1
    assert bench.take() == 0x41
    assert bench.line(1) == IRQ_COALESCED
    bench.lapic.eoi()
    assert bench.take() == -1
    bench.line(0)
    assert bench.line(1) == 1
    assert bench.take() == 0x41


def test_edge_on_a_masked_pin_is_lost(bench: IoApicBench) -> None:
    bench.route(0x41 | MASK)
    assert bench.line(1) == IRQ_IGNORED
    bench.line(0)
    bench.route(0x41)
    assert bench.take() == -1


def test_level_sets_remote_irr_until_eoi(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL)
    assert bench.line(1) == 1
    assert bench.entry(PIN) & REMOTE_IRR
    assert bench.line(1) == IRQ_IGNORED  # as Linux 6.18 answers
    assert bench.take() == 0x41
    bench.line(0)
    assert bench.entry(PIN) & REMOTE_IRR
    bench.lapic.eoi()
    assert not bench.entry(PIN) & REMOTE_IRR
    assert bench.take() == -1


def test_level_still_asserted_is_sent_again_at_eoi(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL)
    bench.line(1)
    for _ in range(3):
        assert bench.take() == 0x41
        bench.lapic.eoi()
    bench.line(0)
    assert bench.take() == 0x41  # was sent before the line fell
    bench.lapic.eoi()
    assert bench.take() == -1


def test_level_asserted_while_masked_is_sent_when_unmasked(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL | MASK)
    assert bench.line(1) == IRQ_IGNORED
    bench.route(0x41 | LEVEL)
    assert bench.take() == 0x41


def test_level_masked_during_service_is_not_sent_at_eoi(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL)
    bench.line(1)
    bench.take()
    bench.route(0x41 | LEVEL | MASK)
    bench.lapic.eoi()
    assert bench.take() == -1
    assert not bench.entry(PIN) & REMOTE_IRR
    bench.route(0x41 | LEVEL)
    assert bench.take() == 0x41


def test_line_is_the_or_of_its_sources(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL)
    bench.line(1, source=0)
    bench.line(1, source=2)
    bench.line(0, source=0)
    bench.take()
    bench.lapic.eoi()
    assert bench.take() == 0x41
    bench.line(0, source=2)
    bench.lapic.eoi()
    assert bench.take() == -1


def test_remote_irr_is_read_only_but_edge_mode_clears_it(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL | REMOTE_IRR)
    assert not bench.entry(PIN) & REMOTE_IRR
    bench.line(1)
    bench.write(0x10 + 2 * PIN, 0x41 | LEVEL)
    assert bench.entry(PIN) & REMOTE_IRR
    bench.line(0)
    bench.write(0x10 + 2 * PIN, 0x41 | MASK)
    assert not bench.entry(PIN) & REMOTE_IRR


def test_physical_and_logical_destinations(bench: IoApicBench) -> None:
    bench.route(0x41, dest=1)
    bench.line(1)
    assert bench.pending() == [-1, 0x41]
    bench.lapics[0].mmio_write(LDR, 4, 0x01 << 24)
    bench.lapics[1].mmio_write(LDR, 4, 0x02 << 24)
    bench.route(0x42 | LOGICAL, dest=3, pin=3)
    assert bench.line(1, pin=3) == 2
    assert bench.pending() == [0x42, 0x42]
    bench.route(0x43, dest=9, pin=4)
    assert bench.line(1, pin=4) == IRQ_IGNORED


def test_nmi_delivery_mode(bench: IoApicBench) -> None:
    bench.route(4 << 8, dest=1)
    bench.line(1)
    assert bench.vcpus[1].calls[-1] == "nmi"


def test_two_level_pins_with_one_vector_are_both_ended(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL, pin=5)
    bench.route(0x41 | LEVEL, pin=6)
    bench.line(1, pin=5)
    bench.line(1, pin=6)
    bench.line(0, pin=5)
    bench.line(0, pin=6)
    bench.take()
    bench.lapic.eoi()
    assert not (bench.entry(5) | bench.entry(6)) & REMOTE_IRR


def test_line_that_nobody_lowers_is_slowed_down(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL)
    bench.line(1)
    served = 0
    for _ in range(2):  # as many each time
        while bench.take() == 0x41:
            bench.lapic.eoi()
            served += 1
            assert served <= IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT
        assert served == IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT
        bench.advance(10_000_000)
        served = 0
    assert bench.take() == 0x41


def test_state_round_trip_sends_what_is_asserted(bench: IoApicBench) -> None:
    bench.route(0x41 | LEVEL, dest=1)
    bench.write(0, 3 << 24)
    bench.write(0x12, 0x10030)
    bench.line(1)  # sent: remote IRR
    state = bench.chips.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    ioapic = state.chip.ioapic
    assert (ioapic.base_address, ioapic.ioregsel, ioapic.id, ioapic.irr) == (BASE, 0x12, 3, 1 << PIN)
    fields = ioapic.redirtbl[PIN].fields
    assert (fields.vector, fields.trig_mode, fields.remote_irr, fields.dest_id) == (0x41, 1, 1, 1)
    other = IoApicBench(2)
    other.chips.set_irqchip(state)
    assert bytes(other.chips.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)) == bytes(state)
    assert other.pending() == [-1, -1]  # not twice: the local APIC's state has it
    other.lapics[1].set_state(bench.lapics[1].get_state())
    assert other.take(1) == 0x41
    other.lapics[1].eoi()
    assert other.take(1) == 0x41  # still asserted
    assert ctypes.sizeof(ioapic) == 216


def test_edge_that_was_sent_is_not_sent_again_by_a_restore(bench: IoApicBench) -> None:
    bench.route(0x41)
    bench.line(1)
    state = bench.chips.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    assert state.chip.ioapic.irr == 0
    other = IoApicBench(2)
    other.chips.set_irqchip(state)
    assert other.pending() == [-1, -1]


def test_bad_states() -> None:
    bench = IoApicBench()
    with pytest.raises(OSError) as error:
        bench.chips.get_irqchip(3)
    assert error.value.errno == errno.EINVAL
    state = abi.kvm_irqchip.from_buffer_copy(b"\xff" * ctypes.sizeof(abi.kvm_irqchip))
    with pytest.raises(OSError) as error:
        bench.chips.set_irqchip(state)
    assert error.value.errno == errno.EINVAL, "there is no such chip"
    state.chip_id = abi.KVM_IRQCHIP_IOAPIC
    bench.chips.set_irqchip(state)
    assert bench.entry(0) == 0xFF00_0000_0001_FFFF
    with pytest.raises(OSError) as error:
        Board(split=True).chips.get_irqchip(0)
    assert error.value.errno == errno.ENXIO


def test_any_register_and_value_is_survived(bench: IoApicBench) -> None:
    for value in (0, 1, 0x8041, 0xFFFFFFFF):
        for register in range(0x100):
            bench.write(register, value)
            bench.read(register)
        for pin in range(24):
            bench.line(1, pin=pin)
            bench.line(0, pin=pin)
