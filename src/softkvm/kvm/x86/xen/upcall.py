# SPDX-License-Identifier: Apache-2.0
"""Upcalls: how a vCPU is told of event channels.

With a vector of the VM's the interrupt has no chip behind it: it is there for as long as ``evtchn_upcall_pending`` of
the vCPU's ``vcpu_info`` is set, which the guest clears, and is taken like one of the PIC's. With a vector of the vCPU's
its local APIC takes it, once for each time that something becomes pending.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_FIXED
from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
from softkvm.kvm.x86.xen.layout import EVTCHN_UPCALL_PENDING

if TYPE_CHECKING:
    from softkvm.kvm.x86.irqchip.lapic import Lapic
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm


def may_come(vcpu: Vcpu) -> bool:
    """Tell whether the vCPU may have upcalls by the VM's vector."""
    xen = vcpu.vm.xen
    return bool(xen.config.msr and xen.upcall_vector and vcpu.xen.vcpu_info is not None and vcpu.apic is not None)


def is_pending(vcpu: Vcpu) -> bool:
    """Tell whether there is an upcall to be taken by the VM's vector; without a ``vcpu_info`` there is none."""
    info = vcpu.xen.vcpu_info
    if info is None or not may_come(vcpu):
        return False
    flag = info.read(EVTCHN_UPCALL_PENDING, 1)
    return flag is not None and flag != b"\0"


def bring(vcpu: Vcpu, sender: Vcpu | None = None) -> None:
    """Something has become pending in the vCPU's ``vcpu_info``: let it have the interrupt; any thread."""
    if vcpu.xen.upcall_vector:
        if vcpu.apic is not None:
            by = sender.apic.vcpu if sender is not None and sender.apic is not None else None
            vcpu.apic.accept_irq(APIC_DM_FIXED, vcpu.xen.upcall_vector, sender=by)
    else:
        vcpu.request_event(sender)


class XenIrqchip(KernelIrqchip):
    """The chips of a VM that has a vector for upcalls."""

    def has_extint(self, lapic: Lapic) -> bool:
        """Whether there is an interrupt that no local APIC knows of, an upcall among them."""
        return is_pending(cast("Vcpu", lapic.vcpu)) or super().has_extint(lapic)

    def cpu_get_interrupt(self, lapic: Lapic) -> int:
        """Acknowledge the next interrupt: an upcall comes first, and is still there behind it."""
        vcpu = cast("Vcpu", lapic.vcpu)
        return vcpu.vm.xen.upcall_vector if is_pending(vcpu) else super().cpu_get_interrupt(lapic)


def set_vector(vm: Vm, vector: int) -> None:
    """Have upcalls come by *vector*; 0: no more. vCPUs choose their handlers of exits, which look for upcalls."""
    vm.xen.upcall_vector = vector
    install(vm)
    for vcpu in vm.vcpus:
        vcpu.call_soon(vcpu.choose_exit_handlers)


def install(vm: Vm) -> None:
    """Let the chips, if they are there already, know of upcalls."""
    if vm.chips is not None and vm.xen.upcall_vector:
        vm.chips.__class__ = XenIrqchip
