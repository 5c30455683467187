# SPDX-License-Identifier: Apache-2.0
"""The exits of #DB and #BP: whose they are, the guest's, its debugger's or KVM's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.x86.exceptions import DR6_ACTIVE_LOW, DR6_BS, queue_exception_p
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def db_interception(vcpu: Vcpu) -> int:
    """#DB: the guest's, its debugger's, or the step that opens an NMI window."""
    q = vcpu.q
    dr6 = q[V.DR6] ^ DR6_ACTIVE_LOW
    if vcpu.nmi_singlestep and not vcpu.guest_debug & (abi.KVM_GUESTDBG_SINGLESTEP | abi.KVM_GUESTDBG_USE_HW_BP):
        svm.disable_nmi_singlestep(vcpu)
        vcpu.make_request(KVM_REQ_EVENT)
        if not vcpu.nmi_singlestep_guest_rflags & abi.X86_EFLAGS_TF:
            q[V.DR6] &= ~DR6_BS
            return 1
    elif not vcpu.guest_debug & (abi.KVM_GUESTDBG_SINGLESTEP | abi.KVM_GUESTDBG_USE_HW_BP):
        queue_exception_p(vcpu, abi.DB_VECTOR, dr6)
        return 1
    if vcpu.guest_debug & (abi.KVM_GUESTDBG_SINGLESTEP | abi.KVM_GUESTDBG_USE_HW_BP):
        vcpu.exit_debug(abi.DB_VECTOR, q[V.DR6], svm.linear_rip(vcpu))
        q[V.DR6] = DR6_ACTIVE_LOW  # the next one's is its own
        return 0
    queue_exception_p(vcpu, abi.DB_VECTOR, dr6)
    return 1


def bp_interception(vcpu: Vcpu) -> int:
    """INT3 while the debugger has software breakpoints."""
    vcpu.exit_debug(abi.BP_VECTOR, 0, svm.linear_rip(vcpu))
    return 0
