# SPDX-License-Identifier: Apache-2.0
"""Exits of a guest that has Xen's interfaces: the table of handlers that its vCPUs have in place of the plain one."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Final

from softkvm.kvm.x86.exceptions import X86Exception, inject_emulated_exception
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm import exits
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.exits import Handler
from softkvm.kvm.x86.svm.svm import skip_emulated_instruction
from softkvm.kvm.x86.xen import hypercall_page, hypercalls, upcall

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U32: Final = (1 << 32) - 1


def msr_interception(vcpu: Vcpu) -> int:
    """RDMSR and WRMSR; one of the latter places the hypercall page, whatever else the register is."""
    gpr = vcpu.gpr
    index = gpr[1] & _U32
    if index != vcpu.vm.xen.config.msr or not vcpu.q[V.EXIT_INFO_1] & 1:
        return exits.msr_interception(vcpu)
    data = (gpr[2] & _U32) << 32 | gpr[0] & _U32
    if not hypercall_page.write_msr(vcpu, index, data):
        return exits.msr_refused(vcpu, index, data, write=True)
    return skip_emulated_instruction(vcpu)


def vmmcall_interception(vcpu: Vcpu) -> int:
    """VMMCALL."""
    if not vcpu.vm.xen.intercepts_hypercalls:
        return exits.vmmcall_interception(vcpu)
    try:
        done = hypercalls.emulate_hypercall(vcpu, skip_emulated_instruction)
    except X86Exception as exception:  # from one of Hyper-V's
        inject_emulated_exception(vcpu, exception)
        return 1
    return skip_emulated_instruction(vcpu) if done else 0


def _looking_for_upcalls(handler: Handler) -> Handler:
    """Return a handler that looks behind it whether an upcall is pending, which guest and userspace just write.

    Once KVM waits for the guest to take interrupts there is nothing more to ask for.
    """

    @wraps(handler)
    def looking(vcpu: Vcpu) -> int:
        result = handler(vcpu)
        if result and not vcpu.irq_window and upcall.is_pending(vcpu):
            vcpu.make_request(KVM_REQ_EVENT)
        return result

    return looking


def xen_exit_handlers(*, upcalls: bool) -> dict[int, Handler]:
    """Return the table of handlers as it is now, with those that differ; with *upcalls* all do."""
    handlers = exits.EXIT_HANDLERS | {V.EXIT_MSR: msr_interception, V.EXIT_VMMCALL: vmmcall_interception}
    if upcalls:
        handlers = {code: _looking_for_upcalls(handler) for code, handler in handlers.items()}
    return handlers
