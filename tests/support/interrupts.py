# SPDX-License-Identifier: Apache-2.0
"""A vCPU without a processor and a clock that stands still, for the tests of the interrupt chips."""

from collections.abc import Callable

from softkvm.abi import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
from softkvm.kvm.x86.irqchip.lapic import Lapic

SPIV = 0xF0


class FakeClock:
    """Nanoseconds that pass when the test says so."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, ns: int) -> None:
        self.now_ns += ns


class FakeVcpu:
    """Notes what its local APIC asks for."""

    def __init__(self, vcpu_id: int = 0, tsc_offset: int = 0) -> None:
        self.vcpu_id = vcpu_id
        self.mp_state = KVM_MP_STATE_UNINITIALIZED if vcpu_id else KVM_MP_STATE_RUNNABLE
        self.tsc_offset = tsc_offset
        self.timer_ns = 0
        self.blocked = False
        self.calls: list[str] = []
        self.lapic: Lapic | None = None

    def request_event(self, sender: object = None) -> None:
        self.calls.append("event")

    def set_apic_timer(self, deadline_ns: int) -> None:
        self.timer_ns = deadline_ns

    def tsc_deadline_to_ns(self, guest_tsc: int) -> int:
        return guest_tsc - self.tsc_offset

    def inject_nmi(self, sender: object = None) -> None:
        self.calls.append("nmi")

    def inject_smi(self) -> None:
        self.calls.append("smi")

    def report_tpr_access(self, *, write: bool) -> None:
        self.calls.append("tpr write" if write else "tpr read")

    def apic_software_enabled(self) -> None:
        pass

    def apic_base_changed(self) -> None:
        self.calls.append("base")

    def init_signal_blocked(self) -> bool:
        return self.blocked

    def vcpu_reset(self, init_event: bool) -> None:
        self.calls.append(f"reset {init_event}")
        if self.lapic is not None:
            self.lapic.reset(init_event)

    def deliver_sipi_vector(self, vector: int) -> None:
        self.calls.append(f"sipi {vector:#x}")

    def count(self, call: str) -> int:
        return self.calls.count(call)


class Board:
    """Interrupt chips with some vCPUs, their local APICs enabled by software."""

    def __init__(
        self,
        cpus: int = 1,
        *,
        split: bool = False,
        enabled: bool = True,
        eoi_exit: Callable[[int, int], None] | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.chips = KernelIrqchip(self.clock, split=split, eoi_exit=eoi_exit, thread=False)
        self.vcpus = [FakeVcpu(number) for number in range(cpus)]
        self.lapics = [Lapic(vcpu, self.chips.apic_map, self.clock) for vcpu in self.vcpus]
        for vcpu, lapic in zip(self.vcpus, self.lapics, strict=True):
            vcpu.lapic = lapic
            if enabled:
                lapic.mmio_write(SPIV, 4, 0x1FF)

    @property
    def lapic(self) -> Lapic:
        """The first local APIC."""
        return self.lapics[0]

    def x2apic(self) -> None:
        """Bring all local APICs into x2APIC mode."""
        for lapic in self.lapics:
            assert lapic.set_base(lapic.apic_base | 0x400)

    def advance(self, ns: int) -> None:
        """Let time pass, and run the machine's timers."""
        self.clock.advance(ns)
        self.chips.timers.run()

    def pending(self) -> list[int]:
        """Return for each local APIC the vector it would deliver, or -1."""
        return [lapic.has_interrupt() for lapic in self.lapics]
