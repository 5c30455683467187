# SPDX-License-Identifier: Apache-2.0
"""Emulated data movement: MOV and its kin, far pointers, and the moves of SSE and MMX."""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.kvm.x86 import fpu, segments
from softkvm.kvm.x86.emulate.alu import signed
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.far import read_far_pointer
from softkvm.kvm.x86.emulate.operands import CR, DR, MEM, MMX, REG, SEG, XMM, Insn, Operand
from softkvm.kvm.x86.emulate.x87 import check_sse
from softkvm.kvm.x86.exceptions import X86Exception, gp
from softkvm.kvm.x86.svm import vmcb as V


@handler("mov", "movzx", "movnti")
def mov(e: Emulator, i: Insn) -> None:
    """MOV between registers, memory and immediates; MOV to and from segment, control and debug registers."""
    dst, src = i.ops
    if dst.kind in (CR, DR) or src.kind in (CR, DR):
        from softkvm.kvm.x86.emulate.system import mov_system

        mov_system(e, i)
        return
    if dst.kind == SEG:
        segments.load_segment(e, dst.index, e.read(src) & 0xFFFF)
        if dst.index == V.SS_OFFSET:
            e.mov_ss_shadow()
        return
    e.write(dst, e.read(src))


#: Segment register of an instruction that loads a far pointer.
_FAR_POINTERS: Final = {
    "les": V.ES_OFFSET,
    "lds": V.DS_OFFSET,
    "lss": V.SS_OFFSET,
    "lfs": V.FS_OFFSET,
    "lgs": V.GS_OFFSET,
}


@handler(*_FAR_POINTERS)
def load_far_pointer(e: Emulator, i: Insn) -> None:
    """Load a segment register and a general register from a far pointer."""
    dst = i.ops[0]
    selector, offset, _ = read_far_pointer(e, i, dst.size)
    segments.load_segment(e, _FAR_POINTERS[i.mnemonic], selector)
    e.write(dst, offset)


@handler("movsx", "movsxd")
def movsx(e: Emulator, i: Insn) -> None:
    """Move with sign extension."""
    dst, src = i.ops
    e.write(dst, signed(e.read(src), src.size * 8) & (1 << dst.size * 8) - 1)


@handler("movbe")
def movbe(e: Emulator, i: Insn) -> None:
    """Move with the bytes reversed."""
    dst, src = i.ops
    e.write(dst, int.from_bytes(e.read(src).to_bytes(src.size, "little"), "big"))


@handler("bswap")
def bswap(e: Emulator, i: Insn) -> None:
    """Reverse the bytes of a register."""
    op = i.ops[0]
    e.write(op, int.from_bytes(e.read(op).to_bytes(op.size, "little"), "big") if op.size > 2 else 0)


@handler("lea")
def lea(e: Emulator, i: Insn) -> None:
    """Load the effective address."""
    e.write(i.ops[0], e.effective_address(i))


@handler("nop", "prefetch", "prefetchw", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "pause", "endbr64")
def nop(e: Emulator, i: Insn) -> None:
    """Nothing but the instruction pointer."""


@handler("clflush", "clflushopt", "clwb")
def clflush(e: Emulator, i: Insn) -> None:
    """Cache control: only the address is checked."""
    e.memory_address(i, 1, write=False)


@handler("cbw", "cwde", "cdqe")
def sign_extend_accumulator(e: Emulator, i: Insn) -> None:
    """Sign-extend AL, AX or EAX within the accumulator."""
    half = {"cbw": 1, "cwde": 2, "cdqe": 4}[i.mnemonic]
    value = signed(e.gpr[0] & (1 << half * 8) - 1, half * 8)
    e.write(Operand(REG, half * 2, 0), value & (1 << half * 16) - 1)


@handler("cwd", "cdq", "cqo")
def sign_extend_into_rdx(e: Emulator, i: Insn) -> None:
    """Fill DX, EDX or RDX with the accumulator's sign."""
    size = {"cwd": 2, "cdq": 4, "cqo": 8}[i.mnemonic]
    negative = e.gpr[0] >> (size * 8 - 1) & 1
    e.write(Operand(REG, size, 2), -negative & (1 << size * 8) - 1)


# --- SSE and MMX moves -------------------------------------------------------------------------


def _check_mmx(e: Emulator) -> None:
    """Raise #UD or #NM as the state of CR0 demands (APM vol. 2, 11.3), #MF pending from x87."""
    cr0 = e.vcpu.cr0
    if cr0 & abi.X86_CR0_EM:
        raise X86Exception(abi.UD_VECTOR)
    if cr0 & abi.X86_CR0_TS:
        raise X86Exception(abi.NM_VECTOR)
    fpu.check_pending(e.vcpu)


_ALIGNED: Final = frozenset({"movaps", "movapd", "movdqa", "movntdq", "movntps", "movntpd", "movntdqa"})


@handler("movups", "movupd", "movdqu", "lddqu", *_ALIGNED)
def move_vector(e: Emulator, i: Insn) -> None:
    """16-byte moves; the aligned ones raise #GP on other addresses."""
    check_sse(e)
    dst, src = i.ops
    if i.mnemonic in _ALIGNED:
        memory = dst if dst.kind == MEM else src
        if memory.kind == MEM and e.memory_address(i, 16, write=dst.kind == MEM) & 15:
            raise gp()
    e.write(dst, e.read(src))


@handler("movd", "movq", "movntq")
def move_quad(e: Emulator, i: Insn) -> None:
    """32- and 64-bit moves between vector registers, general registers and memory."""
    dst, src = i.ops
    mmx = MMX in (dst.kind, src.kind)
    (_check_mmx if mmx else check_sse)(e)
    size = 4 if i.mnemonic == "movd" else 8
    e.write(dst, e.read(src) & (1 << size * 8) - 1)
    if mmx:
        fpu.enter_mmx(e.vcpu)


@handler("movss", "movsd")
def move_scalar(e: Emulator, i: Insn) -> None:
    """Scalar moves: loads clear the rest of the register, register moves keep it. MOVSD the string move too."""
    if len(i.ops) < 2 or XMM not in (i.ops[0].kind, i.ops[1].kind):
        from softkvm.kvm.x86.emulate.string import movs

        movs(e, i)
        return
    check_sse(e)
    dst, src = i.ops
    mask = (1 << (32 if i.mnemonic == "movss" else 64)) - 1
    value = e.read(src) & mask
    if dst.kind == XMM and src.kind == XMM:
        value |= e.read(dst) & ~mask
    e.write(dst, value)


@handler("movlps", "movlpd", "movhps", "movhpd")
def move_half(e: Emulator, i: Insn) -> None:
    """Move one half of a vector register from or to memory."""
    check_sse(e)
    dst, src = i.ops
    shift = 64 if i.mnemonic.startswith("movh") else 0
    mask = ((1 << 64) - 1) << shift
    if dst.kind == XMM:
        e.write(dst, e.read(dst) & ~mask | e.read(src) << shift)
    else:
        e.write(dst, e.read(src) >> shift)
