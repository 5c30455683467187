# SPDX-License-Identifier: Apache-2.0
"""String instructions of the emulator: MOVS, STOS, LODS, CMPS, SCAS on memory that may be MMIO (APM vol. 3).

One iteration is emulated at a time; with a repeat prefix RIP stays until the count is used up, so that every MMIO
access is its own exit and interrupts get in between, as on the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from softkvm.kvm.x86 import emulate_flags as F
from softkvm.kvm.x86.emulate_context import RAX, RCX, RDI, RSI, SEGMENTS, Context, RegisterName

#: Iterations without any exit that one call does before it looks for events.
BATCH: Final = 1024


def _step(c: Context, register: int, size: int) -> None:
    mask = c.plan.address_mask
    value = c.regs[register]
    moved = (value - size if c.flags & F.DF else value + size) & mask
    c.regs[register] = moved if mask >= 0xFFFF_FFFF else value & ~mask | moved


def _source(c: Context, size: int) -> int:
    return c.segment_linear(_segment(c), c.regs[RSI] & c.plan.address_mask, size)


def _segment(c: Context) -> int:
    return SEGMENTS[c.plan.insn.memory_segment or "ds"]


def _destination(c: Context, size: int, *, write: bool = False) -> int:
    return c.segment_linear(0, c.regs[RDI] & c.plan.address_mask, size, write=write)


def _movs(c: Context, size: int) -> None:
    data = c.load(_source(c, size), size)
    c.store(_destination(c, size, write=True), data)
    _step(c, RSI, size)
    _step(c, RDI, size)


def _stos(c: Context, size: int) -> None:
    c.store(_destination(c, size, write=True), c.get(RegisterName(RAX, size)).to_bytes(size, "little"))
    _step(c, RDI, size)


def _lods(c: Context, size: int) -> None:
    c.put(RegisterName(RAX, size), int.from_bytes(c.load(_source(c, size), size), "little"))
    _step(c, RSI, size)


def _cmps(c: Context, size: int) -> None:
    a = int.from_bytes(c.load(_source(c, size), size), "little")
    b = int.from_bytes(c.load(_destination(c, size), size), "little")
    c.flags = c.flags & ~F.ARITH | F.sub(a, b, size * 8)[1]
    _step(c, RSI, size)
    _step(c, RDI, size)


def _scas(c: Context, size: int) -> None:
    b = int.from_bytes(c.load(_destination(c, size), size), "little")
    c.flags = c.flags & ~F.ARITH | F.sub(c.get(RegisterName(RAX, size)), b, size * 8)[1]
    _step(c, RDI, size)


def _string(one: Callable[[Context, int], None], size: int, *, compares: bool) -> Callable[[Context], None]:
    def handler(c: Context) -> None:
        plan = c.plan
        if not (plan.rep or plan.repne):
            one(c, size)
            return
        mask = plan.address_mask
        if not c.regs[RCX] & mask:
            return
        one(c, size)
        count = (c.regs[RCX] - 1) & mask
        c.regs[RCX] = count if mask >= 0xFFFF_FFFF else c.regs[RCX] & ~mask | count
        c.restart = bool(count)
        if compares and bool(c.flags & F.ZF) != plan.rep:
            c.restart = False

    return handler


_SIZES: Final = {"b": 1, "w": 2, "d": 4, "q": 8}
STRING: Final[dict[str, Callable[[Context], None]]] = {
    name + suffix: _string(one, size, compares=compares)
    for name, one, compares in (
        ("movs", _movs, False),
        ("stos", _stos, False),
        ("lods", _lods, False),
        ("cmps", _cmps, True),
        ("scas", _scas, True),
    )
    for suffix, size in _SIZES.items()
}
