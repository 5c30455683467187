# SPDX-License-Identifier: Apache-2.0
"""A vCPU's performance counters: what is common to AMD's and Intel's (``arch/x86/kvm/pmu.c``).

A guest's counter (``Pmc``) that counts has an event (:mod:`.perf_event`), which counts in the silicon. So it costs
nothing to enter a guest, whatever is counted: a counter is looked at again (:func:`reprogram_counter`) when an MSR of
its own, the global control or the filter changes, and if that makes no difference to the event, the event goes on. An
overflow changes nothing about it, either: the guest gets its interrupt, and the event goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm.abi import X86_CR0_PE, X86_CR4_PCE
from softkvm.kvm.x86.irqchip.apicdef import APIC_LVTPC
from softkvm.kvm.x86.pmu.event_filter import EVENTSEL_EVENT, EVENTSEL_UMASK
from softkvm.kvm.x86.pmu.perf_event import COUNTERS, WIDTH, HostCounters, PerfEvent
from softkvm.kvm.x86.requests import KVM_REQ_PMU
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

# Bits of an event select register (APM vol. 2, 13.2.1; SDM vol. 3, 20.2.1).
EVENTSEL_USR: Final = 1 << 16
EVENTSEL_OS: Final = 1 << 17
EVENTSEL_EDGE: Final = 1 << 18
EVENTSEL_INT: Final = 1 << 20
EVENTSEL_ENABLE: Final = 1 << 22
EVENTSEL_INV: Final = 1 << 23
EVENTSEL_CMASK: Final = 0xFF << 24
#: What of it says what is counted, on either vendor's processors.
RAW_EVENT: Final = EVENTSEL_EVENT | EVENTSEL_UMASK | EVENTSEL_EDGE | EVENTSEL_INV | EVENTSEL_CMASK

#: Where the fixed counters' bits begin in the global registers.
FIXED_PMC_BASE: Final = 32
#: Fields of IA32_FIXED_CTR_CTRL.
_FIXED_OS: Final = 1 << 0
_FIXED_USR: Final = 1 << 1
_FIXED_PMI: Final = 1 << 3

#: Reads of an MSR, and writes of it: by (data, host) to False for #GP.
Access = tuple[Callable[[], int], Callable[[int, bool], bool]]


class PmuCapability(NamedTuple):
    """What a guest's PMU can have (``x86_pmu_capability``)."""

    counters_gp: int
    counters_fixed: int
    width: int


class Pmc:
    """One of a guest's counters (``struct kvm_pmc``)."""

    __slots__ = ("counter", "current", "event", "eventsel", "fixed", "idx", "intr", "pmu")

    def __init__(self, pmu: Pmu, idx: int, *, fixed: bool = False) -> None:
        self.pmu = pmu
        #: Its bit in the global registers.
        self.idx = idx
        self.fixed = fixed
        self.counter = 0
        self.eventsel = 0
        self.intr = False
        #: What is being counted by its event, 0: nothing. Once it has one it keeps it.
        self.current = 0
        self.event: PerfEvent | None = None

    @property
    def width(self) -> int:
        """Its bits."""
        return self.pmu.width_fixed if self.fixed else self.pmu.width_gp

    @property
    def control(self) -> int:
        """Its field of IA32_FIXED_CTR_CTRL."""
        return self.pmu.fixed_ctr_ctrl >> 4 * (self.idx - FIXED_PMC_BASE) & 0xF

    def read(self) -> int:
        """Return the count (``pmc_read_counter``)."""
        count = self.counter
        if self.current:
            assert self.event is not None
            count += self.event.read()
        return count & (1 << self.width) - 1

    def write(self, value: int) -> None:
        """Set the count (``pmc_write_counter``)."""
        self.counter = value & (1 << self.width) - 1
        if self.current:
            assert self.event is not None
            self.event.check_overflow()
            self.event.set_period(self.period())

    def period(self) -> int:
        """Return how many events are left until it overflows (``get_sample_period``)."""
        return (1 << self.width) - self.counter

    def overflow(self) -> None:
        """It has overflowed (``kvm_perf_overflow``): note it, interrupt the guest if it wants that."""
        pmu = self.pmu
        pmu.global_status |= 1 << self.idx
        if self.width < WIDTH or pmu.reprograms_always:
            # The silicon's own counter would overflow too late the next time.
            pmu.request_reprogram(1 << self.idx)
        if self.intr:
            deliver_pmi(pmu.vcpu)

    def selection(self) -> int:
        """Return what the guest wants to have counted, as PERF_CTL; 0: nothing, or nothing that it may."""
        pmu = self.pmu
        if pmu.has_global_ctrl and not pmu.global_ctrl >> self.idx & 1:
            return 0
        event_filter = pmu.vcpu.vm.pmu_event_filter
        if self.fixed:
            control = self.control
            if not control & (_FIXED_OS | _FIXED_USR):
                return 0
            if event_filter is not None and not event_filter.allows_fixed(self.idx - FIXED_PMC_BASE):
                return 0
            select = self.eventsel | (EVENTSEL_OS if control & _FIXED_OS else 0)
            return (
                select | (EVENTSEL_USR if control & _FIXED_USR else 0) | (EVENTSEL_INT if control & _FIXED_PMI else 0)
            )
        if not self.eventsel & EVENTSEL_ENABLE:
            return 0
        if event_filter is not None and not event_filter.allows(self.eventsel & pmu.event_mask):
            return 0
        return self.eventsel & (pmu.raw_event_mask | EVENTSEL_USR | EVENTSEL_OS | EVENTSEL_INT) | EVENTSEL_ENABLE

    def matches(self, event: int) -> bool:
        """Tell whether it counts ``event`` at the guest's privilege level, edges and masks aside."""
        if not self.current or (self.current ^ event) & (EVENTSEL_EVENT | EVENTSEL_UMASK):
            return False
        return bool(self.current & (EVENTSEL_USR if self.pmu.vcpu.b[V.CPL] else EVENTSEL_OS))


class Pmu:
    """A vCPU's performance monitoring unit (``struct kvm_pmu``); ``version`` 0: there is none."""

    __slots__ = (
        "all_pmcs",
        "branch_event",
        "event_mask",
        "fixed",
        "fixed_ctr_ctrl",
        "global_ctrl",
        "global_rsvd",
        "global_status",
        "gp",
        "host",
        "instruction_event",
        "msrs",
        "raw_event_mask",
        "rdpmc_to_pmc",
        "reprogram_pmi",
        "reprograms_always",
        "silicon_event",
        "vcpu",
        "version",
        "width_fixed",
        "width_gp",
    )

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.host = HostCounters(vcpu.rq)
        self.reprograms_always = vcpu.vm.params.pmu_reprogram_always
        self.gp: list[Pmc] = []
        self.fixed: list[Pmc] = []
        self.clear()

    def clear(self) -> None:
        """Have no counters and no registers."""
        for pmc in (*self.gp, *self.fixed):
            pause_counter(pmc)
            release_event(pmc)
        self.version = 0
        self.gp = []
        self.fixed = []
        self.all_pmcs: dict[int, Pmc] = {}
        self.width_gp = self.width_fixed = WIDTH
        self.fixed_ctr_ctrl = 0
        self.global_ctrl = self.global_status = 0
        self.global_rsvd = ~0
        self.reprogram_pmi = 0
        self.raw_event_mask = RAW_EVENT
        self.event_mask = EVENTSEL_EVENT | EVENTSEL_UMASK
        #: Index -> how an MSR is accessed.
        self.msrs: dict[int, Access] = {}
        #: What RDPMC's index names.
        self.rdpmc_to_pmc: Callable[[int], Pmc | None] = lambda index: None
        #: An event select register as the silicon has it.
        self.silicon_event: Callable[[int], int] = lambda select: select
        #: What KVM counts for instructions that it carries out (``kvm_pmu_eventsel``).
        self.instruction_event = self.branch_event = 0

    def set_counters(self, gp: int, fixed: int = 0) -> None:
        """Have so many counters."""
        self.gp = [Pmc(self, n) for n in range(gp)]
        self.fixed = [Pmc(self, FIXED_PMC_BASE + n, fixed=True) for n in range(fixed)]
        assert gp + fixed <= COUNTERS
        self.all_pmcs = {pmc.idx: pmc for pmc in (*self.gp, *self.fixed)}
        self.global_rsvd = ~sum(1 << idx for idx in self.all_pmcs)

    @property
    def has_global_ctrl(self) -> bool:
        """Whether there are global registers (``kvm_pmu_has_perf_global_ctrl``)."""
        return self.version > 1

    def request_reprogram(self, bits: int) -> None:
        """Have counters looked at before the guest is entered."""
        self.reprogram_pmi |= bits
        self.vcpu.make_request(KVM_REQ_PMU)

    def read_global_status(self) -> int:
        """Return which counters have overflowed."""
        self.host.take_overflows()
        return self.global_status

    def write_global_status(self, data: int) -> bool:
        """Set it, as userspace may."""
        if data & self.global_rsvd:
            return False
        self.host.take_overflows()
        self.global_status = data
        return True

    def clear_global_status(self, data: int, host: bool) -> None:
        """Clear bits of it."""
        if not host:
            self.host.take_overflows()
            self.global_status &= ~data

    def write_global_ctrl(self, data: int) -> None:
        """Enable and disable counters."""
        changed = self.global_ctrl ^ data
        self.global_ctrl = data
        reprogram_counters(self, changed)

    def write_eventsel(self, pmc: Pmc, data: int) -> None:
        """Have a general counter count something else."""
        if data != pmc.eventsel:
            pmc.eventsel = data
            reprogram_counter(pmc)
            update_instruction_counting(self)


def reprogram_counter(pmc: Pmc) -> None:
    """Bring a counter's event up to date; nothing to do if it is (``reprogram_counter``)."""
    pmu = pmc.pmu
    select = pmc.selection()
    if select == pmc.current and not pmu.reprograms_always:
        if select and pmc.width < WIDTH:
            pmc.write(pmc.read())
        return
    pause_counter(pmc)
    if pmu.reprograms_always:
        release_event(pmc)
    if select:
        if pmc.event is None:
            pmc.event = PerfEvent(pmu.host, pmc.overflow)
        pmc.intr = bool(select & EVENTSEL_INT)
        pmc.current = select
        # Narrow counters have to be programmed anew at each overflow, whoever wants to know of it.
        interrupt = EVENTSEL_INT if pmc.width < WIDTH else select & EVENTSEL_INT
        pmc.event.enable(pmu.silicon_event(select) & ~EVENTSEL_INT | interrupt | EVENTSEL_ENABLE, pmc.period())


def pause_counter(pmc: Pmc) -> None:
    """Stop counting, and keep the count and the event (``pmc_pause_counter``)."""
    if pmc.current:
        assert pmc.event is not None
        pmc.counter = pmc.counter + pmc.event.pause() & (1 << pmc.width) - 1
        pmc.current = 0


def release_event(pmc: Pmc) -> None:
    """Give a paused counter's event back (``pmc_release_perf_event``)."""
    if pmc.event is not None:
        pmc.event.release()
        pmc.event = None


def update_instruction_counting(pmu: Pmu) -> None:
    """Tell the vCPU whether a counter may count what KVM carries out in the guest's place.

    Global control, which a guest writes twice in each of its counters' interrupts, makes no difference.
    """
    counted = pmu.instruction_event, pmu.branch_event
    gp = any(pmc.eventsel & EVENTSEL_ENABLE and pmc.eventsel & pmu.event_mask in counted for pmc in pmu.gp)
    pmu.vcpu.counts_instructions(gp or any(pmc.control and pmc.eventsel in counted for pmc in pmu.fixed))


def reprogram_counters(pmu: Pmu, bits: int) -> None:
    """Bring the events of the counters in a mask up to date."""
    for idx, pmc in pmu.all_pmcs.items():
        if bits >> idx & 1:
            reprogram_counter(pmc)


def handle_event(vcpu: Vcpu) -> None:
    """KVM_REQ_PMU: bring up to date what has been asked for (``kvm_pmu_handle_event``)."""
    pmu = vcpu.pmu
    bits, pmu.reprogram_pmi = pmu.reprogram_pmi, 0
    reprogram_counters(pmu, bits)


def filter_changed(vcpu: Vcpu) -> None:
    """The VM's filter is another one: look at all counters; vCPU thread only."""
    reprogram_counters(vcpu.pmu, ~0)


def deliver_pmi(vcpu: Vcpu) -> None:
    """Interrupt the guest by its local APIC (``kvm_pmu_deliver_pmi``)."""
    if vcpu.apic is not None:
        vcpu.apic.local_deliver(APIC_LVTPC)


def nmi(vcpu: Vcpu) -> None:
    """The processor's counters have overflowed, or it is another NMI of the host's."""
    vcpu.pmu.host.take_overflows()


def trigger_event(vcpu: Vcpu, event: int) -> None:
    """KVM has carried out what counts as ``event`` in the guest's place (``kvm_pmu_trigger_event``)."""
    for pmc in vcpu.pmu.all_pmcs.values():
        if pmc.event is not None and pmc.matches(event):
            pmc.event.add()


def trigger_instruction(vcpu: Vcpu) -> None:
    """An instruction has been carried out."""
    trigger_event(vcpu, vcpu.pmu.instruction_event)


def trigger_branch(vcpu: Vcpu) -> None:
    """It was a branch."""
    trigger_event(vcpu, vcpu.pmu.branch_event)


def rdpmc(vcpu: Vcpu, index: int) -> int | None:
    """Return what RDPMC reads; None for #GP (``kvm_pmu_rdpmc``)."""
    pmu = vcpu.pmu
    pmc = pmu.rdpmc_to_pmc(index)
    if pmc is None:
        return None
    if not vcpu.cr4 & X86_CR4_PCE and vcpu.b[V.CPL] and vcpu.cr0 & X86_CR0_PE:
        return None
    return pmc.read()


def refresh(vcpu: Vcpu) -> None:
    """Follow the guest's CPUID, with all counters as after a reset (``kvm_pmu_refresh``)."""
    from softkvm.kvm.x86.pmu import amd, intel

    pmu = vcpu.pmu
    pmu.clear()
    vcpu.counts_instructions(False)
    if vcpu.vm.enable_pmu:
        if not intel.refresh(pmu):
            amd.refresh(pmu)
        # Counters are enabled after a reset, for software that knows none of the global control.
        if pmu.has_global_ctrl:
            pmu.global_ctrl = (1 << len(pmu.gp)) - 1


def register(read: Callable[[], int], write: Callable[[int, bool], bool]) -> Access:
    """Return the access to an MSR."""
    return read, write


def counter_msr(pmc: Pmc) -> Access:
    """A counter that takes any value."""

    def write(data: int, host: bool) -> bool:
        pmc.write(data)
        return True

    return pmc.read, write


def eventsel_msr(pmc: Pmc, write: Callable[[Pmc, int], bool]) -> Access:
    """An event select register."""
    return partial(getattr, pmc, "eventsel"), lambda data, host: write(pmc, data)
