# SPDX-License-Identifier: Apache-2.0
"""Guest debugging: KVM_SET_GUEST_DEBUG, KVM_EXIT_DEBUG, debug registers (KVM API, section 4)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.exceptions import (
    DR6_ACTIVE_LOW,
    queue_exception,
    queue_exception_p,
)
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


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
    dr6 = vcpu.guest_dr6
    vcpu.guest_debug = control if control & abi.KVM_GUESTDBG_ENABLE else 0
    hardware = bool(vcpu.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP)
    for n in range(4):
        vcpu.effective_db[n] = debug.arch.debugreg[n] if hardware else db[n]
    vcpu.saved_db = db if hardware else None
    vcpu.guest_debug_dr7 = debug.arch.debugreg[7] if hardware else 0
    # Whoever #DB is for, DR6 tells of one exception: the guest's own waits apart, and it is shown no other.
    debugger = bool(vcpu.guest_debug & (abi.KVM_GUESTDBG_USE_HW_BP | abi.KVM_GUESTDBG_SINGLESTEP))
    vcpu.saved_dr6 = dr6 if debugger else None
    vcpu.q[V.DR6] = DR6_ACTIVE_LOW if debugger else dr6
    vcpu.d[V.INTERCEPT_DR] = V.DR_ALL if debugger else 0
    vcpu.guest_dr7 = dr7
    vcpu.update_dr7()
    vcpu.set_rflags(rflags)
    svm.set_exception_intercepts(vcpu)


def _code_breakpoints(address: int, dr7: int, registers: Sequence[int] | memoryview) -> int:
    """Return the DR6 bits of the instruction breakpoints that ``dr7`` enables at a linear address."""
    hits = 0
    for n in range(4):
        execute = not dr7 >> 16 + 4 * n & 0xF
        if execute and dr7 >> 2 * n & 3 and registers[n] == address:
            hits |= 1 << n
    return hits


def check_code_breakpoint(vcpu: Vcpu) -> int | None:
    """Look for a breakpoint on an instruction that the processor never sees because KVM emulates it.

    Returns what the exit handler returns, None to go on. RF inhibits the guest's own breakpoints; so does the
    shadow of MOV SS on Intel's processors, but not on AMD's.
    """
    address = svm.linear_rip(vcpu)
    if vcpu.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP:
        hits = _code_breakpoints(address, vcpu.guest_debug_dr7, vcpu.effective_db)
        if hits:
            vcpu.exit_debug(abi.DB_VECTOR, hits | DR6_ACTIVE_LOW, address)
            return 0
    inhibited = vcpu.get_rflags() & abi.X86_EFLAGS_RF or (
        vcpu.cpuid.intel_compatible and vcpu.b[V.INT_STATE_B] & V.INTERRUPT_SHADOW
    )
    if not inhibited:
        hits = _code_breakpoints(address, vcpu.guest_dr7, vcpu.db)
        if hits:
            queue_exception_p(vcpu, abi.DB_VECTOR, hits)
            return 1
    return None


def get_debugregs(vcpu: Vcpu) -> abi.kvm_debugregs:
    """KVM_GET_DEBUGREGS."""
    regs = abi.kvm_debugregs()
    for n in range(4):
        regs.db[n] = vcpu.db[n]
    regs.dr6 = vcpu.guest_dr6
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
    vcpu.guest_dr6 = regs.dr6
    vcpu.guest_dr7 = regs.dr7
    vcpu.update_dr7()
