# SPDX-License-Identifier: Apache-2.0
"""A vCPU that may run with AVIC (:mod:`.svm.avic`): what it does beside what every vCPU of x86 does.

It is a class of its own, so that vCPUs of VMs without it do nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from softkvm import abi
from softkvm.kvm.state import BLOCKING, IN_GUEST_MODE
from softkvm.kvm.tlb import request_flush
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicv_lapic import ApicvLapic, ApicvPvEoi, AvicLapic, InhibitedLapic
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm.avic import PHYSICAL_VALID, Inhibit
from softkvm.kvm.x86.svm.vmcb import V_TPR
from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls

if TYPE_CHECKING:
    from softkvm.kvm.state import VcpuState
    from softkvm.kvm.x86.state import VmState
    from softkvm.kvm.x86.svm.avic import Avic


class AvicVcpu(VcpuIoctls):
    """A vCPU of a VM that has AVIC."""

    def __init__(self, vm: VmState, vcpu_id: int) -> None:
        assert vm.avic is not None
        self.avic: Avic = vm.avic
        self.backing_page = vm.machine.alloc_page()
        #: :meth:`update_apicv` has been asked for.
        self._apicv_update_asked = False
        #: The permission map has the registers of x2APIC mode exit.
        self.x2avic_msrs_intercepted = True
        #: This vCPU's interrupt window keeps the VM from AVIC.
        self._window_counted = False
        super().__init__(vm, vcpu_id)
        assert self.pv_eoi is not None
        self.pv_eoi.__class__ = ApicvPvEoi
        self.avic.last_id = max(self.avic.last_id, vcpu_id)
        for other in vm.vcpus:
            cast("AvicVcpu", other).request_apicv_update()
        self.update_apicv()

    def create_apic(self, apic_map: ApicMap) -> Lapic:
        """One that can change to :class:`AvicLapic` and back."""
        return InhibitedLapic(self, apic_map, self.vm.machine, self.backing_page)

    # --- activation ----------------------------------------------------------------------------------

    def request_apicv_update(self) -> None:
        """Have :meth:`update_apicv` run before the vCPU enters the guest again. Any thread."""
        if not self._apicv_update_asked:
            self._apicv_update_asked = True
            self.call_soon(self.update_apicv)

    def update_apicv(self) -> None:
        """Begin to use AVIC, or end it; on the vCPU's thread, or while the vCPU stands."""
        self._apicv_update_asked = False
        apic, avic = self.apic, self.avic
        wanted = avic.activated and apic is not None and apic.hw_enabled and apic.sw_enabled
        if isinstance(apic, InhibitedLapic) and wanted:
            apic.activate()
        elif isinstance(apic, AvicLapic) and not wanted:
            self._deactivate(apic)
        if isinstance(apic, AvicLapic):
            avic.init_vmcb(self)
            avic.physical_table[self.vcpu_id] = avic.entry(self)
            self.flush_tlb_guest()
            self.make_request(KVM_REQ_EVENT)
        avic.update_access_page()

    def _deactivate(self, apic: AvicLapic) -> None:
        # Not valid any more, but a sender that has found it valid goes on with the page: who sends to several has sent
        # to all, or to none and leaves the guest.
        self.avic.physical_table[self.vcpu_id] &= ~PHYSICAL_VALID
        # Who has read the entry before is done with it outside of the guest.
        request_flush(other for other in self.vm.vcpus if other is not self)
        apic.deactivate()
        self.avic.clear_vmcb(self)
        self.flush_tlb_guest()
        self.make_request(KVM_REQ_EVENT)

    # --- interrupts ----------------------------------------------------------------------------------

    def ring(self, sender: VcpuState | None = None) -> None:
        """The IRR in the page has another bit: the processor looks there by itself, and a halted vCPU is woken."""
        mode = self.mode
        if mode == IN_GUEST_MODE:
            self.cpu.ring()
        elif mode == BLOCKING:
            if sender is None or not sender.running:
                self.cpu.ring()
            else:
                sender.cpu.kick_at_entry(self.cpu)

    def _handle_event(self) -> None:
        """As for any vCPU; an interrupt window needs V_IRQ, which is nothing while AVIC is in force."""
        super()._handle_event()
        if self.irq_window is not self._window_counted and (self._window_counted or isinstance(self.apic, AvicLapic)):
            self._window_counted = self.irq_window
            self.avic.set_irq_window(self.irq_window)
            self.update_apicv()

    def _update_cr8_intercept(self, apic: Lapic) -> None:
        """With AVIC the processor knows of interrupts that wait for the priority to fall."""
        if isinstance(apic, AvicLapic):
            self.b[V_TPR] = self.b[V_TPR] & 0xF0 | apic.cr8
        else:
            super()._update_cr8_intercept(apic)

    # --- what is against it --------------------------------------------------------------------------

    def apic_base_changed(self) -> None:
        """Another mode, or another page."""
        super().apic_base_changed()
        if isinstance(self.apic, ApicvLapic):
            self.avic.recalculate()
            self.update_apicv()

    def deliver_sipi_vector(self, vector: int) -> None:
        """The vCPU begins to run: its accesses to the APIC are emulated until software enables that."""
        super().deliver_sipi_vector(vector)
        self.request_apicv_update()

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE."""
        super().set_mp_state(state)
        self.avic.update_access_page()

    def set_guest_debug(self, debug: abi.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        super().set_guest_debug(debug)
        blocked = any(vcpu.guest_debug & abi.KVM_GUESTDBG_BLOCKIRQ for vcpu in self.vm.vcpus)
        self.avic.set_inhibit(Inhibit.BLOCKIRQ, blocked)

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR."""
        super().set_vapic_addr(vapic_addr)
        self.avic.recalculate()

    def tpr_access_reporting(self, enabled: int, flags: int = 0) -> None:
        """KVM_TPR_ACCESS_REPORTING."""
        super().tpr_access_reporting(enabled, flags)
        self.avic.recalculate()
