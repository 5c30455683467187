# SPDX-License-Identifier: Apache-2.0
"""Emulated stack instructions, and frames: several items that are pushed all or not at all (APM vol. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from softkvm import abi
from softkvm.kvm.x86 import segments
from softkvm.kvm.x86.emulate.access import in_limit
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import REG, SEG, Insn, Operand
from softkvm.kvm.x86.exceptions import X86Exception
from softkvm.kvm.x86.mmu.paging import is_canonical
from softkvm.kvm.x86.svm import vmcb as V

_U16: Final = 0xFFFF
_U32: Final = 0xFFFF_FFFF
_U64: Final = (1 << 64) - 1
_RSP: Final = 4
_RBP: Final = 5


class Stack(NamedTuple):
    """A stack that a frame is pushed on: the one in force, or that of an inner privilege level."""

    segment: V.Segment
    rsp: int
    #: Mask of the stack pointer's width.
    mask: int
    #: Privilege level of the accesses.
    cpl: int
    #: Error code of #SS.
    error: int = 0

    def merged(self, rsp: int) -> int:
        """Return RSP with a new value in the stack pointer's width: 16 bits keep the others, 32 clear them."""
        return self.rsp & ~_U16 & _U64 | rsp & _U16 if self.mask == _U16 else rsp & self.mask


def stack_mask(segment: V.Segment) -> int:
    """Return the mask of the stack pointer for a stack segment of legacy and compatibility mode."""
    return _U32 if segment.attrib & V.SEG_DB else _U16


def current_stack(e: Emulator) -> Stack:
    """Return the stack in force."""
    return Stack(e.vcpu.vmcb.segment(V.SS_OFFSET), e.gpr[_RSP], e.stack_mask(), e.vcpu.b[V.CPL])


def _item_address(e: Emulator, stack: Stack, offset: int, size: int) -> int:
    """Return the linear address of ``size`` bytes of a stack; #SS beyond the segment, or if it is not canonical."""
    if stack.mask == _U64:
        la57 = bool(e.vcpu.cr4 & abi.X86_CR4_LA57)
        if is_canonical(offset, la57=la57) and is_canonical(offset + size - 1 & _U64, la57=la57):
            return offset
    elif in_limit(stack.segment, offset, size):
        return offset + stack.segment.base & _U32
    raise X86Exception(abi.SS_VECTOR, stack.error)


def push_frame(e: Emulator, stack: Stack, items: Sequence[int], width: int) -> int:
    """Push ``items`` of ``width`` bytes, the first one first; returns the new RSP, no register is changed.

    Every item is translated before the first one is written.
    """
    access = e.access(True, cpl=stack.cpl)
    addresses = []
    offset = stack.rsp
    for _ in items:
        offset = offset - width & stack.mask
        addresses.append(_item_address(e, stack, offset, width))
        e.pages(addresses[-1], width, access)
    for address, item in zip(addresses, items, strict=True):
        e.write_linear(address, (item & (1 << width * 8) - 1).to_bytes(width, "little"), cpl=stack.cpl)
    return stack.merged(offset)


# --- PUSH and POP ------------------------------------------------------------------------------


@handler("push")
def push(e: Emulator, i: Insn) -> None:
    """Push a register, an immediate or memory."""
    e.push(e.read(i.ops[0]), i.stack_size)


@handler("pop")
def pop(e: Emulator, i: Insn) -> None:
    """Pop into a register or memory; RSP has its new value when the destination's address is computed."""
    op = i.ops[0]
    if op.kind == SEG:
        stack = current_stack(e)
        segments.load_segment(e, op.index, e.peek(i.stack_size) & 0xFFFF)
        e.gpr[_RSP] = stack.merged(stack.rsp + i.stack_size)  # in the width of the stack that it came from
        if op.index == V.SS_OFFSET:
            e.mov_ss_shadow()
        return
    value = e.peek(i.stack_size)
    rsp = e.gpr[_RSP]
    e.drop(i.stack_size)
    try:
        e.write(op, value)
    except BaseException:
        e.gpr[_RSP] = rsp
        raise


@handler("pusha", "pushad")
def pusha(e: Emulator, i: Insn) -> None:
    """Push AX, CX, DX, BX, SP from before, BP, SI and DI."""
    e.gpr[_RSP] = push_frame(e, current_stack(e), [e.gpr[n] for n in range(8)], i.stack_size)


@handler("popa", "popad")
def popa(e: Emulator, i: Insn) -> None:
    """Pop what PUSHA pushed; the stack pointer's image is thrown away."""
    size = i.stack_size
    values = [e.peek(size, depth=size * (7 - n)) for n in range(8)]
    for n, value in enumerate(values):
        if n != _RSP:
            e.write(Operand(REG, size, n), value)
    e.drop(8 * size)


@handler("enter")
def enter(e: Emulator, i: Insn) -> None:
    """Make a stack frame, with the frame pointers of the levels around it; the stack must be writable at its end."""
    room, level = i.ops[0].value & 0xFFFF, i.ops[1].value & 31
    size = i.stack_size
    stack = current_stack(e)
    rbp = e.gpr[_RBP]
    frame = stack.rsp - size
    items = [rbp]
    for n in range(1, level):
        address = e.linearize(V.SS_OFFSET, rbp - size * n & stack.mask, size, write=False)
        items.append(int.from_bytes(e.read_linear(address, size), "little"))
    if level:
        items.append(stack.merged(frame))
    end = stack.rsp - size * len(items) - room & stack.mask
    e.pages(_item_address(e, stack, end, size), size, e.access(True))
    push_frame(e, stack, items, size)
    e.write(Operand(REG, size, _RBP), frame & (1 << size * 8) - 1)
    e.gpr[_RSP] = stack.merged(end)


@handler("leave")
def leave(e: Emulator, i: Insn) -> None:
    """Undo ENTER: RSP from RBP, then pop RBP."""
    size, rbp = i.stack_size, e.gpr[_RBP]
    address = e.linearize(V.SS_OFFSET, rbp & e.stack_mask(), size, write=False)
    value = int.from_bytes(e.read_linear(address, size), "little")
    e.set_rsp(rbp + size)
    e.write(Operand(REG, size, _RBP), value)


# --- near calls --------------------------------------------------------------------------------


@handler("ret")
def ret(e: Emulator, i: Insn) -> None:
    """Near return."""
    target = e.peek(i.stack_size)
    e.jump(target, i.stack_size)
    e.drop(i.stack_size + (i.ops[0].value if i.ops else 0))
