# SPDX-License-Identifier: Apache-2.0
"""Emulated loops, flags in AH, XLAT, fences, RDPID, and the fast system calls of Intel-compatible guests."""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.kvm.x86 import msr_index, msrs
from softkvm.kvm.x86.emulate.alu import signed
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import REG, Insn, Operand
from softkvm.kvm.x86.exceptions import X86Exception, gp
from softkvm.kvm.x86.features import X86_FEATURE_RDPID
from softkvm.kvm.x86.svm import vmcb as V

#: SF, ZF, AF, PF and CF: what LAHF and SAHF move.
_AH_FLAGS: Final = 0xD5
_RBX: Final = 3
_RCX: Final = 1
_RDX: Final = 2
_RSP: Final = 4
_U32: Final = (1 << 32) - 1


# --- loops -------------------------------------------------------------------------------------


@handler("loop", "loope", "loopne")
def loop(e: Emulator, i: Insn) -> None:
    """Count RCX down by the address size; jump while it isn't zero and ZF is as asked for."""
    left = e.gpr[_RCX] - 1 & i.address_mask
    zero = bool(e.q[V.RFLAGS] & abi.X86_EFLAGS_ZF)
    if left and (i.mnemonic == "loop" or zero == (i.mnemonic == "loope")):
        e.jump(i.ops[0].value + e.q[V.RIP], i.ops[0].size)
    e.write(Operand(REG, i.address_size, _RCX), left)


@handler("jcxz", "jecxz", "jrcxz")
def jump_without_count(e: Emulator, i: Insn) -> None:
    """Jump if the counter of the address size is zero."""
    if not e.gpr[_RCX] & i.address_mask:
        e.jump(i.ops[0].value + e.q[V.RIP], i.ops[0].size)


# --- odds and ends -----------------------------------------------------------------------------


@handler("lahf")
def lahf(e: Emulator, i: Insn) -> None:
    """Load AH with the status flags; bit 1 reads as one."""
    e.write(Operand(REG, 1, 0, 8), e.q[V.RFLAGS] & _AH_FLAGS | 2)


@handler("sahf")
def sahf(e: Emulator, i: Insn) -> None:
    """Store AH into the status flags."""
    e.set_flags(_AH_FLAGS, e.gpr[0] >> 8 & _AH_FLAGS)


@handler("xlatb")
def xlat(e: Emulator, i: Insn) -> None:
    """Look AL up in the table at RBX."""
    offset = e.gpr[_RBX] + (e.gpr[0] & 0xFF) & i.address_mask
    value = e.read_linear(e.linearize(i.segment, offset, 1, write=False), 1)
    e.write(Operand(REG, 1, 0), value[0])


@handler("bound")
def bound(e: Emulator, i: Insn) -> None:
    """Raise #BR unless a signed index lies within the two bounds in memory."""
    op = i.ops[0]
    bits = op.size * 8
    data = e.read_linear(e.memory_address(i, 2 * op.size, write=False), 2 * op.size)
    lower, upper = (signed(int.from_bytes(part, "little"), bits) for part in (data[: op.size], data[op.size :]))
    if not lower <= signed(e.read(op), bits) <= upper:
        raise X86Exception(abi.BR_VECTOR)


@handler("lfence", "mfence", "sfence")
def fence(e: Emulator, i: Insn) -> None:
    """Fences: emulated accesses are in order."""


@handler("rdpid")
def rdpid(e: Emulator, i: Insn) -> None:
    """Read TSC_AUX; #UD if the guest's CPUID lacks RDPID."""
    if not e.vcpu.cpuid.has(X86_FEATURE_RDPID):
        raise X86Exception(abi.UD_VECTOR)
    e.write(i.ops[0], e.vcpu.tsc_aux & _U32)


# --- SYSENTER and SYSEXIT ----------------------------------------------------------------------

_CODE: Final = V.SEG_P | V.SEG_S | V.SEG_G | 0xB
_DATA: Final = V.SEG_P | V.SEG_S | V.SEG_G | V.SEG_DB | 3


def _flat(e: Emulator, cs: int, ss: int, cpl: int, *, code64: bool) -> None:
    """Load CS and SS with flat segments of a privilege level."""
    vcpu = e.vcpu
    dpl = cpl << V.SEG_DPL_SHIFT
    width = V.SEG_L if code64 else V.SEG_DB
    vcpu.vmcb.set_segment(V.CS_OFFSET, cs & 0xFFFC | cpl, _CODE | dpl | width, _U32, 0)
    vcpu.vmcb.set_segment(V.SS_OFFSET, ss & 0xFFFC | cpl, _DATA | dpl, _U32, 0)
    vcpu.b[V.CPL] = cpl


def _sysenter_cs(e: Emulator) -> int:
    """Return the selector of SYSENTER_CS; the instructions need protected mode and one that isn't null.

    AMD's processors don't have them in long mode, Intel's do. KVM gives them to guests that take themselves for an
    Intel, whose 32-bit programs use SYSENTER under a 64-bit kernel; in 64-bit code they stay undefined.
    """
    vcpu = e.vcpu
    if vcpu.efer & abi.EFER_LMA and not vcpu.cpuid.intel_compatible:
        raise X86Exception(abi.UD_VECTOR)
    cs = e.q[V.SYSENTER_CS] & 0xFFFC
    if not vcpu.cr0 & abi.X86_CR0_PE or not cs:
        raise gp()
    return cs


def _msr(e: Emulator, index: int) -> int:
    value = msrs.get_msr(e.vcpu, index, host=True)
    assert value is not None
    return value


@handler("sysenter")
def sysenter(e: Emulator, i: Insn) -> None:
    """Enter CPL 0 at SYSENTER_EIP: 64-bit code in long mode (SDM vol. 2, SYSENTER)."""
    cs = _sysenter_cs(e)
    vcpu = e.vcpu
    if vcpu.is_64bit_code():
        raise X86Exception(abi.UD_VECTOR)
    long_mode = bool(vcpu.efer & abi.EFER_LMA)
    mask = (1 << 64) - 1 if long_mode else _U32
    _flat(e, cs, cs + 8, 0, code64=long_mode)
    e.set_flags(abi.X86_EFLAGS_VM | abi.X86_EFLAGS_IF | abi.X86_EFLAGS_RF, 0)
    e.gpr[_RSP] = _msr(e, msr_index.MSR_IA32_SYSENTER_ESP) & mask
    _go(e, _msr(e, msr_index.MSR_IA32_SYSENTER_EIP) & mask)


@handler("sysexit", "sysexitq")
def sysexit(e: Emulator, i: Insn) -> None:
    """Return to CPL 3 at RDX with the stack RCX; with REX.W to 64-bit code (SDM vol. 2, SYSEXIT)."""
    cs = _sysenter_cs(e)
    vcpu = e.vcpu
    if vcpu.b[V.CPL]:
        raise gp()
    rip, rsp = e.gpr[_RDX], e.gpr[_RCX]
    if i.rex_w:
        e.linearize(V.CS_OFFSET, rip, 1, write=False)  # #GP(0) unless canonical
        e.linearize(V.CS_OFFSET, rsp, 1, write=False)
        _flat(e, cs + 32, cs + 40, 3, code64=True)
    else:
        rip &= _U32
        rsp &= _U32
        _flat(e, cs + 16, cs + 24, 3, code64=False)
    e.gpr[_RSP] = rsp
    _go(e, rip)


def _go(e: Emulator, rip: int) -> None:
    e.q[V.RIP] = rip
    e.vcpu.b[V.INT_STATE_B] = 0
    e.rip_written = e.branched = True
