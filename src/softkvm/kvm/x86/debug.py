# SPDX-License-Identifier: Apache-2.0
"""Guest debugging: KVM_SET_GUEST_DEBUG, KVM_EXIT_DEBUG, debug registers (KVM API, section 4)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86 import io, svm
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.exceptions import DR7_BP_EN_MASK, queue_exception

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_state import VcpuState as Vcpu

_RUN_DEBUG_EXCEPTION: Final = 32 // 4  # d
_RUN_DEBUG_PC: Final = 40 // 8  # q
_RUN_DEBUG_DR6: Final = 48 // 8  # q
_RUN_DEBUG_DR7: Final = 56 // 8  # q


def exit_debug(vcpu: Vcpu, exception: int, dr6: int, pc: int) -> None:
    """Describe a KVM_EXIT_DEBUG."""
    vcpu.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_DEBUG
    vcpu.run_d[_RUN_DEBUG_EXCEPTION] = exception
    vcpu.run_q[_RUN_DEBUG_PC] = pc
    vcpu.run_q[_RUN_DEBUG_DR6] = dr6
    vcpu.run_q[_RUN_DEBUG_DR7] = vcpu.q[V.DR7]


def set_guest_debug(vcpu: Vcpu, debug: abi.kvm_guest_debug) -> None:
    """KVM_SET_GUEST_DEBUG: EBUSY when an exception to inject meets a pending one."""
    control = debug.control
    if control & (abi.KVM_GUESTDBG_INJECT_DB | abi.KVM_GUESTDBG_INJECT_BP):
        if vcpu.exception.pending:
            raise kvm_error(errno.EBUSY, "control asks for an exception while another is pending")
        queue_exception(vcpu, abi.DB_VECTOR if control & abi.KVM_GUESTDBG_INJECT_DB else abi.BP_VECTOR)
    # The guest's own flags and debug registers, without what the debugger added before.
    rflags = vcpu.get_rflags()
    dr7 = vcpu.guest_dr7
    db = list(vcpu.db)
    vcpu.guest_debug = control if control & abi.KVM_GUESTDBG_ENABLE else 0
    hardware = bool(vcpu.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP)
    for n in range(4):
        vcpu.effective_db[n] = debug.arch.debugreg[n] if hardware else db[n]
    vcpu.saved_db = db if hardware else None
    vcpu.guest_debug_dr7 = debug.arch.debugreg[7] if hardware else 0
    vcpu.d[V.INTERCEPT_DR] = V.DR_ALL if hardware else 0
    vcpu.guest_dr7 = dr7
    update_dr7(vcpu)
    if vcpu.guest_debug & abi.KVM_GUESTDBG_SINGLESTEP:
        vcpu.singlestep_rip = svm.linear_rip(vcpu)
    vcpu.set_rflags(rflags)
    svm.set_exception_intercepts(vcpu)


def update_dr7(vcpu: Vcpu) -> None:
    """Load DR7 with the debugger's value while it owns the breakpoints, else with the guest's."""
    if vcpu.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP:
        vcpu.q[V.DR7] = vcpu.guest_debug_dr7 & ~(1 << 13) | 0x400
    else:
        vcpu.q[V.DR7] = vcpu.own_dr7


def breakpoints_enabled(vcpu: Vcpu) -> bool:
    """Tell whether any hardware breakpoint is armed."""
    return bool(vcpu.q[V.DR7] & DR7_BP_EN_MASK)


def get_debugregs(vcpu: Vcpu) -> abi.kvm_debugregs:
    """KVM_GET_DEBUGREGS."""
    regs = abi.kvm_debugregs()
    for n in range(4):
        regs.db[n] = vcpu.db[n]
    regs.dr6 = vcpu.q[V.DR6]
    regs.dr7 = vcpu.guest_dr7
    return regs


def set_debugregs(vcpu: Vcpu, regs: abi.kvm_debugregs) -> None:
    """KVM_SET_DEBUGREGS: EINVAL for flags or 64-bit values."""
    if regs.flags:
        raise kvm_error(errno.EINVAL, f"flags={regs.flags:#x}, expected 0")
    for name in ("dr6", "dr7"):
        if getattr(regs, name) >> 32:
            raise kvm_error(errno.EINVAL, f"{name}={getattr(regs, name):#x}, expected 32 bits")
    for n in range(4):
        vcpu.db[n] = regs.db[n]
    vcpu.q[V.DR6] = regs.dr6
    vcpu.guest_dr7 = regs.dr7
    vcpu.update_dr7()
