# SPDX-License-Identifier: Apache-2.0
"""Emulated data movement: MOV and its kin, stack, branches, and the moves of SSE and MMX."""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.kvm.x86 import fpu, segments
from softkvm.kvm.x86.emulate.alu import signed
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import CR, DR, MEM, MMX, REG, SEG, XMM, Insn, Operand
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, gp
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
            e.shadow_after = 1
        return
    e.write(dst, e.read(src))


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


# --- stack and branches ------------------------------------------------------------------------


@handler("push")
def push(e: Emulator, i: Insn) -> None:
    """Push a register, an immediate or memory."""
    e.push(e.read(i.ops[0]), i.stack_size)


@handler("pop")
def pop(e: Emulator, i: Insn) -> None:
    """Pop into a register or memory; RSP has its new value when the destination's address is computed."""
    op = i.ops[0]
    if op.kind == SEG:
        segments.load_segment(e, op.index, e.peek(i.stack_size) & 0xFFFF)
        e.drop(i.stack_size)
        if op.index == V.SS_OFFSET:
            e.shadow_after = 1
        return
    value = e.peek(i.stack_size)
    rsp = e.gpr[4]
    e.drop(i.stack_size)
    try:
        e.write(op, value)
    except BaseException:
        e.gpr[4] = rsp
        raise


def _near_target(e: Emulator, op: Operand) -> int:
    return e.read(op) if op.kind in (REG, MEM) else op.value + e.q[V.RIP]


@handler("jmp")
def jmp(e: Emulator, i: Insn) -> None:
    """Jump: near, direct or through a register or memory; far through memory."""
    op = i.ops[0]
    if i.far:
        selector, offset, size = _far_pointer(e, i)
        _far_transfer(e, selector, offset, size)
        return
    e.jump(_near_target(e, op), op.size)


def _far_pointer(e: Emulator, i: Insn) -> tuple[int, int, int]:
    """Return (selector, offset, size of the offset) of a far operand in memory.

    REX.W makes the offset 64 bits wide: so Intel's processors have it, and KVM for every guest.
    """
    op = i.ops[0]
    if op.kind != MEM:
        raise Unhandleable
    size = 8 if i.rex_w else op.size - 2
    data = e.read_linear(e.memory_address(i, size + 2, write=False), size + 2)
    return int.from_bytes(data[size:], "little"), int.from_bytes(data[:size], "little"), size


def _far_transfer(e: Emulator, selector: int, offset: int, size: int) -> None:
    """Load CS and RIP; what CS was comes back if the target is outside of the new segment."""
    vcpu = e.vcpu
    old = vcpu.vmcb.segment(V.CS_OFFSET)
    segments.load_code_far(e, selector)
    try:
        e.jump(offset, size)
    except X86Exception:
        vcpu.vmcb.set_segment(V.CS_OFFSET, *old)
        raise


@handler("call")
def call(e: Emulator, i: Insn) -> None:
    """Call: near, direct or through a register or memory; far through memory."""
    op = i.ops[0]
    vcpu = e.vcpu
    old_rip, old_cs = e.q[V.RIP], vcpu.vmcb.segment(V.CS_OFFSET)
    shadow, rsp = vcpu.b[V.INT_STATE_B], e.gpr[4]
    try:
        if i.far:
            selector, offset, size = _far_pointer(e, i)
            _far_transfer(e, selector, offset, size)
            e.push(old_cs.selector, size)
        else:
            size = i.stack_size
            e.jump(_near_target(e, op), op.size)
        e.push(old_rip + i.length, size)
    except BaseException:
        e.q[V.RIP], e.gpr[4] = old_rip, rsp
        vcpu.vmcb.set_segment(V.CS_OFFSET, *old_cs)
        vcpu.b[V.INT_STATE_B] = shadow
        e.rip_written = False
        raise


@handler("ret")
def ret(e: Emulator, i: Insn) -> None:
    """Near return."""
    target = e.peek(i.stack_size)
    e.jump(target, i.stack_size)
    e.drop(i.stack_size + (i.ops[0].value if i.ops else 0))


@handler("enter")
def enter(e: Emulator, i: Insn) -> None:
    """Make a stack frame; without nesting levels, as in KVM."""
    frame, level = i.ops[0].value & 0xFFFF, i.ops[1].value & 31
    if level:
        raise Unhandleable
    size, mask = i.stack_size, e.stack_mask()
    e.push(e.gpr[5], size)
    e.write(Operand(REG, size, 5), e.gpr[4])
    e.gpr[4] = e.gpr[4] & ~mask & (1 << 64) - 1 | (e.gpr[4] - frame & mask)


@handler("leave")
def leave(e: Emulator, i: Insn) -> None:
    """Undo ENTER: RSP from RBP, then pop RBP."""
    size, mask = i.stack_size, e.stack_mask()
    address = e.linearize(V.SS_OFFSET, e.gpr[5] & mask, size, write=False)
    value = int.from_bytes(e.read_linear(address, size), "little")
    e.gpr[4] = e.gpr[4] & ~mask & (1 << 64) - 1 | (e.gpr[5] + size & mask)
    e.write(Operand(REG, size, 5), value)


# --- SSE and MMX moves -------------------------------------------------------------------------


def _check_simd(e: Emulator, *, mmx: bool) -> None:
    """Raise #UD or #NM as the state of CR0 and CR4 demands (APM vol. 2, 11.3), #MF pending from x87 for MMX."""
    cr0 = e.vcpu.cr0
    if cr0 & abi.X86_CR0_EM or (not mmx and not e.vcpu.cr4 & abi.X86_CR4_OSFXSR):
        raise X86Exception(abi.UD_VECTOR)
    if cr0 & abi.X86_CR0_TS:
        raise X86Exception(abi.NM_VECTOR)
    if mmx:
        fpu.check_pending(e.vcpu)


_ALIGNED: Final = frozenset({"movaps", "movapd", "movdqa", "movntdq", "movntps", "movntpd", "movntdqa"})


@handler("movups", "movupd", "movdqu", "lddqu", *_ALIGNED)
def move_vector(e: Emulator, i: Insn) -> None:
    """16-byte moves; the aligned ones raise #GP on other addresses."""
    _check_simd(e, mmx=False)
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
    _check_simd(e, mmx=mmx)
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
    _check_simd(e, mmx=False)
    dst, src = i.ops
    mask = (1 << (32 if i.mnemonic == "movss" else 64)) - 1
    value = e.read(src) & mask
    if dst.kind == XMM and src.kind == XMM:
        value |= e.read(dst) & ~mask
    e.write(dst, value)


@handler("movlps", "movlpd", "movhps", "movhpd")
def move_half(e: Emulator, i: Insn) -> None:
    """Move one half of a vector register from or to memory."""
    _check_simd(e, mmx=False)
    dst, src = i.ops
    shift = 64 if i.mnemonic.startswith("movh") else 0
    mask = ((1 << 64) - 1) << shift
    if dst.kind == XMM:
        e.write(dst, e.read(dst) & ~mask | e.read(src) << shift)
    else:
        e.write(dst, e.read(src) >> shift)
