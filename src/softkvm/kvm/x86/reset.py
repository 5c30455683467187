# SPDX-License-Identifier: Apache-2.0
"""RESET and INIT (``kvm_vcpu_reset``; SDM vol. 3, table 9-1; APM vol. 2, 14.1.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm.x86 import fpu, msrs
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm import svm

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def vcpu_reset(vcpu: Vcpu, init_event: bool) -> None:
    """Put *vcpu* into the state after RESET, or after INIT with *init_event*."""
    vcpu.init_event = init_event
    vcpu.exception.clear()
    vcpu.interrupt_injected = False
    vcpu.injecting = False
    vcpu.nmi_pending = vcpu.nmi_queued = 0
    vcpu.nmi_injected = False
    vcpu.nmi_singlestep = False
    vcpu.set_nmi_mask(False)
    if vcpu.apic is not None:
        vcpu.apic.reset(init_event)
    kvmclock.reset(vcpu)
    if not init_event:
        msrs.set_misc_features_enables(vcpu, 0)
        fpu.reset(vcpu)
        vcpu.tsc_aux = 0
    vcpu.umwait_control = 0
    for n in range(16):
        vcpu.gpr[n] = 0
    leaf = vcpu.cpuid.leaf(1, 0)
    vcpu.gpr[2] = leaf[0] if leaf is not None else 0x600
    for n in range(4):
        vcpu.db[n] = 0  # the guest's: a debugger keeps its own
    svm.init_vmcb(vcpu)
    if vcpu.apic is not None and vcpu.apic.apicv_active:
        assert vcpu.vm.avic is not None
        vcpu.vm.avic.init_vmcb(vcpu)
    vcpu.guest_dr7 = 0x400
    vcpu.update_dr7()
    vcpu.make_request(KVM_REQ_EVENT)
