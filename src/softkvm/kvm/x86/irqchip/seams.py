# SPDX-License-Identifier: Apache-2.0
"""What the interrupt chips ask of the vCPUs, of the clock and of each other.

The chips (:mod:`.lapic`, :mod:`.ioapic`,
:mod:`.i8259`, :mod:`.i8254`) know nothing of the vCPU but this protocol,
so they are tested without a processor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

Clock = Callable[[], int]
"""Nanoseconds of a monotonic clock; ``softkvm._softcpu.clock_ns`` in a real machine."""

MaskNotifier = Callable[[bool], None]
"""Called with the new state of a pin's mask; no chip's lock is held."""

#: The PIT's interrupt source, behind those of every architecture (:mod:`softkvm.kvm.irq.irqchip`).
KVM_PIT_IRQ_SOURCE_ID = 2

# What driving a pin or a GSI returns, the status of KVM_IRQ_LINE_STATUS; a positive number counts the vCPUs that it was
# delivered to.
IRQ_IGNORED = -1  # masked, or nobody there
IRQ_COALESCED = 0  # was pending already


class LapicIrq(NamedTuple):
    """One interrupt message on its way to local APICs (SDM vol. 3, 11.6.1 and 11.11)."""

    vector: int
    delivery_mode: int = 0  # APIC_DM_*, in its place in the ICR
    logical: bool = False
    level: bool = True  # asserted
    level_triggered: bool = False
    dest: int = 0
    redirection_hint: bool = False


class ApicVcpu(Protocol):
    """A vCPU, as its local APIC sees it. All methods may be called from any thread unless they say otherwise."""

    @property
    def vcpu_id(self) -> int: ...

    mp_state: int  # KVM_MP_STATE_*

    def request_event(self, sender: Any = None) -> None:
        """Look at pending interrupts and events before the next guest instruction: KVM_REQ_EVENT and a kick.

        *sender* is the vCPU on whose thread this happens, if one sent the interrupt.
        """

    def set_apic_timer(self, deadline_ns: int) -> None:
        """Arm the vCPU's own timer: a kick when the clock reaches *deadline_ns*; 0 disarms."""

    def tsc_deadline_to_ns(self, guest_tsc: int) -> int:
        """Return the clock's value when the guest's TSC reaches *guest_tsc*, rounded up."""

    def inject_nmi(self, sender: Any = None) -> None:
        """Queue an NMI and kick."""

    def inject_smi(self) -> None:
        """Take an SMI."""

    def report_tpr_access(self, *, write: bool) -> None:
        """Tell userspace that the instruction under way accesses the task-priority register. vCPU thread only."""

    def apic_software_enabled(self) -> None:
        """Software has enabled the APIC: what could not be delivered may be now."""

    def apic_base_changed(self) -> None:
        """IA32_APIC_BASE has changed: CPUID.1:EDX.APIC follows, and so do intercepts of x2APIC MSRs and TPR."""

    def init_signal_blocked(self) -> bool:
        """Whether INIT has to wait now: in SMM, or with the global interrupt flag clear. vCPU thread only."""

    def vcpu_reset(self, init_event: bool) -> None:
        """Put the vCPU into its reset state, its APIC included (``lapic.reset(init_event)``). vCPU thread only."""

    def deliver_sipi_vector(self, vector: int) -> None:
        """Start at CS:IP = *vector* << 8 : 0. vCPU thread only."""


class EoiTarget(Protocol):
    """What an EOI of a local APIC is broadcast to: the IOAPIC."""

    handled_vectors: int  # bit n: some pin uses vector n

    def update_eoi(self, vector: int, level_triggered: bool, vcpu_id: int) -> None:
        """Pass on that the local APIC of *vcpu_id* ended the service of *vector*."""
