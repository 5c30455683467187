# SPDX-License-Identifier: Apache-2.0
"""Emulated x87 control, FXSAVE and FXRSTOR, and MXCSR (APM vol. 2, 11.4.4; vol. 5)."""

from __future__ import annotations

import struct
from typing import Final

from softkvm import abi
from softkvm.kvm.x86 import fpu
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import Insn
from softkvm.kvm.x86.exceptions import X86Exception, gp
from softkvm.kvm.x86.register_block import FCS_W, FCW_W, FDS_W, FOP_W, FSW_W, MXCSR_D

_AREA_SIZE: Final = 512
_XMM: Final = 160
_HEAD: Final = struct.Struct("<HHBBHQQII")


def _available(e: Emulator) -> None:
    """Raise #NM while CR0.EM or CR0.TS is set."""
    if e.vcpu.cr0 & (abi.X86_CR0_EM | abi.X86_CR0_TS):
        raise X86Exception(abi.NM_VECTOR)


def check_sse(e: Emulator) -> None:
    """Raise #UD or #NM as the state of CR0 and CR4 demands (APM vol. 2, 11.3)."""
    cr0 = e.vcpu.cr0
    if cr0 & abi.X86_CR0_EM or not e.vcpu.cr4 & abi.X86_CR4_OSFXSR:
        raise X86Exception(abi.UD_VECTOR)
    if cr0 & abi.X86_CR0_TS:
        raise X86Exception(abi.NM_VECTOR)


# --- control and status words ------------------------------------------------------------------


@handler("fnstcw")
def fnstcw(e: Emulator, i: Insn) -> None:
    """Store the control word."""
    _available(e)
    e.write(i.ops[0], e.vcpu.rw[FCW_W])


@handler("fnstsw")
def fnstsw(e: Emulator, i: Insn) -> None:
    """Store the status word, in memory or AX."""
    _available(e)
    e.write(i.ops[0], e.vcpu.rw[FSW_W])


@handler("fldcw")
def fldcw(e: Emulator, i: Insn) -> None:
    """Load the control word."""
    _available(e)
    fpu.check_pending(e.vcpu)
    fpu.set_control_word(e.vcpu, e.read(i.ops[0]))


@handler("fninit")
def fninit(e: Emulator, i: Insn) -> None:
    """Initialize."""
    _available(e)
    fpu.initialize(e.vcpu)


@handler("fnclex")
def fnclex(e: Emulator, i: Insn) -> None:
    """Clear exception flags, the summary, and the stack fault."""
    _available(e)
    e.vcpu.rw[FSW_W] &= 0x7F00


# --- MXCSR -------------------------------------------------------------------------------------


@handler("stmxcsr")
def stmxcsr(e: Emulator, i: Insn) -> None:
    """Store MXCSR."""
    check_sse(e)
    e.write(i.ops[0], e.vcpu.rd[MXCSR_D])


@handler("ldmxcsr")
def ldmxcsr(e: Emulator, i: Insn) -> None:
    """Load MXCSR; #GP for bits that don't exist."""
    check_sse(e)
    value = e.read(i.ops[0])
    if value & ~fpu.MXCSR_MASK:
        raise gp()
    e.vcpu.rd[MXCSR_D] = value


# --- the legacy area ---------------------------------------------------------------------------


def _area(e: Emulator, i: Insn, *, write: bool) -> int:
    """Return the linear address of the save area; #GP unless it is aligned."""
    _available(e)
    address = e.memory_address(i, _AREA_SIZE, write=write)
    if address & 15:
        raise gp()
    return address


def _xmm_count(e: Emulator) -> int:
    return 16 if e.vcpu.is_64bit_code() else 8


@handler("fxsave", "fxsave64")
def fxsave(e: Emulator, i: Insn) -> None:
    """Save x87 and SSE state; the bytes that hold none are left alone."""
    address = _area(e, i, write=True)
    vcpu = e.vcpu
    state = fpu.get_fpu(vcpu)
    ip, dp = state.last_ip, state.last_dp
    if i.mnemonic == "fxsave":
        ip = ip & 0xFFFF_FFFF | vcpu.rw[FCS_W] << 32
        dp = dp & 0xFFFF_FFFF | vcpu.rw[FDS_W] << 32
    head = _HEAD.pack(
        state.fcw, state.fsw, state.ftwx, 0, state.last_opcode & 0x7FF, ip, dp, state.mxcsr, fpu.MXCSR_MASK
    )
    registers = b"".join(bytes(register[:10]) + bytes(6) for register in state.fpr)
    vectors = b"".join(bytes(state.xmm[n]) for n in range(_xmm_count(e)))
    e.write_linear(address, head + registers + vectors)


@handler("fxrstor", "fxrstor64")
def fxrstor(e: Emulator, i: Insn) -> None:
    """Load x87 and SSE state; #GP for bits of MXCSR that don't exist."""
    area = e.read_linear(_area(e, i, write=False), _XMM + 256)
    fcw, fsw, ftwx, _, fop, ip, dp, mxcsr, _ = _HEAD.unpack_from(area)
    if mxcsr & ~fpu.MXCSR_MASK:
        raise gp()
    vcpu = e.vcpu
    fcs = fds = 0
    if i.mnemonic == "fxrstor":
        ip, fcs, dp, fds = ip & 0xFFFF_FFFF, ip >> 32 & 0xFFFF, dp & 0xFFFF_FFFF, dp >> 32 & 0xFFFF
    state = fpu.get_fpu(vcpu)
    state.fcw, state.fsw, state.ftwx, state.last_opcode, state.last_ip, state.last_dp = fcw, fsw, ftwx, fop, ip, dp
    for n in range(8):
        state.fpr[n][:10] = list(area[32 + 16 * n : 42 + 16 * n])
    for n in range(_xmm_count(e)):
        state.xmm[n][:] = list(area[_XMM + 16 * n : _XMM + 16 * n + 16])
    fpu.set_fpu(vcpu, state)
    vcpu.rw[FOP_W] = fop & 0x7FF
    vcpu.rw[FCS_W], vcpu.rw[FDS_W] = fcs, fds
    fpu.set_control_word(vcpu, fcw)
    vcpu.rd[MXCSR_D] = mxcsr
