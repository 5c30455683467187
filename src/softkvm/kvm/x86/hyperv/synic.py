# SPDX-License-Identifier: Apache-2.0
"""The synthetic interrupt controller of one virtual processor: messages, events and 16 interrupt sources (TLFS, 11).

Messages of timers are delivered here, those of ports and all events by userspace, which learns of the pages from
KVM_EXIT_HYPERV_SYNIC and raises a source by a GSI that is routed to it (KVM_IRQ_ROUTING_HV_SINT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import run_page
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_FIXED
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.irqchip.seams import IRQ_IGNORED
from softkvm.kvm.x86.requests import KVM_REQ_HV_EXIT

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

_PAGE_SIZE: Final = 4096
_PAGE_MASK: Final = ~0xFFF
_FLAGS_AT: Final = run_page.index(abi.hv_message, "message_flags", 1)


def _vector_of(sint: int) -> int:
    """Return the vector that a source raises, -1 while it is masked."""
    return -1 if sint & abi.HV_SYNIC_SINT_MASKED else sint & abi.HV_SYNIC_SINT_VECTOR_MASK


class SynicLapic(Lapic):
    """The local APIC of a processor that has an active SynIC, which sees its EOIs and has interrupts without any.

    A processor's APIC becomes one when userspace enables KVM_CAP_HYPERV_SYNIC: all others pay nothing for it.
    """

    synic: Synic

    def get_interrupt(self) -> int:
        """Acknowledge the deliverable interrupt; one with AutoEOI is never in service."""
        vector = super().get_interrupt()
        if vector >= 0 and self.synic.auto_eoi_vectors >> vector & 1:
            self.isr &= ~(1 << vector)
            self.update_ppr()
        return vector

    def eoi(self) -> None:
        """End the service of the highest vector; tell the SynIC if it is one of its sources'."""
        vector = self.isr.bit_length() - 1
        super().eoi()
        if vector >= 0 and self.synic.vectors >> vector & 1:
            self.synic.eoi(vector)


class Synic:
    """One virtual processor's SynIC. Its thread only, but for :meth:`set_irq`."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        #: Userspace has enabled it (KVM_CAP_HYPERV_SYNIC).
        self.active = False
        #: Pages stay as the guest has them when it enables them (KVM_CAP_HYPERV_SYNIC2).
        self.dont_zero_pages = False
        self.control = 0
        self.version = abi.HV_SYNIC_VERSION_1
        self.evt_page = 0
        self.msg_page = 0
        self.sints = [abi.HV_SYNIC_SINT_MASKED] * abi.HV_SYNIC_SINT_COUNT
        #: GSIs that are routed to a source.
        self.gsis: dict[int, int] = {}
        #: Vectors that some source raises, and those of them with AutoEOI: bitmaps.
        self.vectors = 0
        self.auto_eoi_vectors = 0
        #: Called with a source whose message slot may be free again.
        self.on_ack: Callable[[int], None] = lambda sint: None

    def activate(self, *, dont_zero_pages: bool) -> None:
        """KVM_CAP_HYPERV_SYNIC, or SYNIC2 with *dont_zero_pages*; there is a local APIC in KVM."""
        apic = self._vcpu.apic
        assert apic is not None
        self.active = True
        self.dont_zero_pages = dont_zero_pages
        self.control = abi.HV_SYNIC_CONTROL_ENABLE
        avic = self._vcpu.vm.avic
        if avic is not None:
            avic.synic_activated(self._vcpu)
        apic.__class__ = SynicLapic
        assert isinstance(apic, SynicLapic)
        apic.synic = self

    # --- MSRs (False stands for #GP) -----------------------------------------------------------------

    def may_write(self, data: int, host: bool) -> bool:
        """Whether an MSR may be written: with an active SynIC; the host may always write the zeros that were there."""
        return self.active or (host and not data)

    def write_control(self, data: int, host: bool) -> bool:
        """HV_X64_MSR_SCONTROL."""
        self.control = data
        self._tell_userspace(abi.HV_X64_MSR_SCONTROL, host)
        return True

    def write_evt_page(self, data: int, host: bool) -> bool:
        """HV_X64_MSR_SIEFP: the page of event flags."""
        if data & abi.HV_SYNIC_SIEFP_ENABLE and not self._clear_page(data, host):
            return False
        self.evt_page = data
        self._tell_userspace(abi.HV_X64_MSR_SIEFP, host)
        return True

    def write_msg_page(self, data: int, host: bool) -> bool:
        """HV_X64_MSR_SIMP: the page of messages."""
        if data & abi.HV_SYNIC_SIMP_ENABLE and not self._clear_page(data, host):
            return False
        self.msg_page = data
        self._tell_userspace(abi.HV_X64_MSR_SIMP, host)
        return True

    def write_eom(self) -> None:
        """HV_X64_MSR_EOM: the guest has emptied message slots."""
        if self.active:
            for sint in range(abi.HV_SYNIC_SINT_COUNT):
                self._acked(sint)

    def write_sint(self, sint: int, data: int, host: bool) -> bool:
        """HV_X64_MSR_SINTn; a vector below 16 only masked, or by the host."""
        vector = data & abi.HV_SYNIC_SINT_VECTOR_MASK
        if vector < abi.HV_SYNIC_FIRST_VALID_VECTOR and not host and not data & abi.HV_SYNIC_SINT_MASKED:
            return False
        self.sints[sint] = data
        vectors = auto_eoi = 0
        for value in self.sints:
            vector = _vector_of(value)
            if vector >= abi.HV_SYNIC_FIRST_VALID_VECTOR:
                vectors |= 1 << vector
                auto_eoi |= 1 << vector if value & abi.HV_SYNIC_SINT_AUTO_EOI else 0
        self.vectors, self.auto_eoi_vectors = vectors, auto_eoi
        return True

    def _clear_page(self, data: int, host: bool) -> bool:
        if host or self.dont_zero_pages:
            return True
        return write_guest(self._vcpu.vm, data & _PAGE_MASK, bytes(_PAGE_SIZE))

    def _tell_userspace(self, msr: int, host: bool) -> None:
        """Have KVM_RUN end with KVM_EXIT_HYPERV_SYNIC behind the guest's WRMSR."""
        if not host:
            vp = self._vcpu.hyperv
            assert vp is not None
            vp.exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_SYNIC)
            vp.exit.u.synic = abi.kvm_hyperv_exit_synic(
                msr=msr, control=self.control, evt_page=self.evt_page, msg_page=self.msg_page
            )
            self._vcpu.make_request(KVM_REQ_HV_EXIT)

    # --- interrupts and messages -----------------------------------------------------------------------

    def set_irq(self, sint: int) -> int:
        """Raise a source, any thread: as :meth:`IrqRouting.set_gsi` returns; ignored while masked."""
        apic = self._vcpu.apic
        vector = _vector_of(self.sints[sint]) if sint < len(self.sints) else -1
        if apic is None or vector < 0:
            return IRQ_IGNORED
        return apic.accept_irq(APIC_DM_FIXED, vector)

    def eoi(self, vector: int) -> None:
        """The guest has ended the interrupt of the sources with this vector."""
        for sint, value in enumerate(self.sints):
            if _vector_of(value) == vector:
                self._acked(sint)

    def _acked(self, sint: int) -> None:
        self.on_ack(sint)
        gsi = self.gsis.get(sint)
        if gsi is not None and self._vcpu.chips is not None:
            self._vcpu.chips.routing.notify_acked_gsi(gsi)

    def deliver_message(self, sint: int, message: bytes, *, retry: bool) -> bool:
        """Put a message into a source's slot and raise it; on the vCPU's thread, so all at once for the guest.

        False if it has to come again: the slot is in use, which its flag tells the guest to report by EOM. Without
        *retry* a message that finds it in use is dropped.
        """
        if not self.msg_page & abi.HV_SYNIC_SIMP_ENABLE:
            return False
        vm = self._vcpu.vm
        slot = (self.msg_page & _PAGE_MASK) + sint * abi.HV_MESSAGE_SIZE
        kind = read_guest(vm, slot, 4)
        if kind is None:
            return False
        if int.from_bytes(kind, "little") != abi.HVMSG_NONE:
            if retry:
                write_guest(vm, slot + _FLAGS_AT, bytes([abi.HV_MESSAGE_FLAG_PENDING]))
            return not retry
        return write_guest(vm, slot, message) and self.set_irq(sint) > 0


def find(vm: Vm, vp_index: int) -> Synic | None:
    """Return the active SynIC of the virtual processor with an index."""
    for vcpu in vm.vcpus:
        vp = vcpu.hyperv
        if vp is not None and vp.index == vp_index:
            return vp.synic if vp.synic.active else None
    return None


def set_sint(vm: Vm, vp_index: int, sint: int) -> int:
    """Raise a source that a GSI is routed to; ignored without such a processor or an active SynIC of its."""
    synic = find(vm, vp_index)
    return IRQ_IGNORED if synic is None else synic.set_irq(sint)


def routing_changed(vm: Vm) -> None:
    """Note which GSI each source of the active SynICs has in a new table: its notifiers learn of EOIs."""
    assert vm.chips is not None
    for gsi, (vp_index, sint) in vm.chips.routing.sints.items():
        synic = find(vm, vp_index)
        if synic is not None and sint < abi.HV_SYNIC_SINT_COUNT:
            synic.gsis[sint] = gsi
