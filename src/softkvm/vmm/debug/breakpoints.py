# SPDX-License-Identifier: Apache-2.0
"""Breakpoints and watchpoints: INT3 in guest memory, and the processor's four debug registers.

Sources: KVM API, 4.87 (KVM_SET_GUEST_DEBUG); AMD64 Architecture Programmer's Manual, volume 2, 13.1.1 (debug
registers).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple

from softkvm import abi, api
from softkvm.vmm.debug.virtual import MemoryFault, translate
from softkvm.vmm.memory import GuestMemory

INT3: Final = 0xCC
DEBUG_REGISTERS: Final = 4
_LENGTHS: Final = {1: 0, 2: 1, 4: 3, 8: 2}
_DR7_FIXED: Final = 1 << 10
_DR7_EXACT: Final = 1 << 9


class Kind(enum.IntEnum):
    """What to stop at; the numbers are those of gdb's ``Z`` packets."""

    SOFTWARE = 0
    """An instruction, found by INT3 in its place."""
    EXECUTE = 1
    """An instruction, found by a debug register."""
    WRITE = 2
    READ = 3
    """A read. The processor cannot tell it from a write: both stop."""
    ACCESS = 4


#: The type field of DR7.
_TYPES: Final = {Kind.EXECUTE: 0, Kind.WRITE: 1, Kind.READ: 3, Kind.ACCESS: 3}


class BreakpointError(Exception):
    """A breakpoint cannot be set: too many, or not what a debug register can watch."""


class Point(NamedTuple):
    """A breakpoint: what, where (a linear address), and of how many bytes."""

    kind: Kind
    address: int
    size: int


class _Slot(NamedTuple):
    """What one debug register watches, and for which breakpoint."""

    point: Point
    address: int
    size: int


class _Patch:
    """A byte of guest memory that is INT3 while the machine runs, for these addresses."""

    __slots__ = ("addresses", "original")

    def __init__(self) -> None:
        self.original = 0
        self.addresses: set[int] = set()


def _registers(point: Point) -> list[_Slot]:
    """Return the aligned pieces that debug registers can watch; an instruction is one byte."""
    if point.kind is Kind.EXECUTE:
        return [_Slot(point, point.address, 1)]
    pieces: list[_Slot] = []
    address, left = point.address, point.size
    while left > 0 and len(pieces) <= DEBUG_REGISTERS:
        size = next(size for size in (8, 4, 2, 1) if size <= left and address % size == 0)
        pieces.append(_Slot(point, address, size))
        address += size
        left -= size
    return pieces


class Breakpoints:
    """All breakpoints of a machine. They change only while it stands; its vCPU threads look at them.

    It is a part of the machine that is paused: while the machine stands, memory is without INT3s of ours, whoever looks
    at it or copies it. *standing* says whether it does now. ``changed`` counts what concerns the debug registers.
    """

    def __init__(self, memory: GuestMemory, *, standing: bool = False) -> None:
        self._memory = memory
        self._placed = not standing
        self._patches: dict[int, _Patch] = {}
        self._software: dict[int, int] = {}  # a breakpoint's linear address: where its INT3 is
        self.slots: list[_Slot] = []
        self.changed = 0

    def __bool__(self) -> bool:
        return bool(self._patches or self.slots)

    def __contains__(self, point: Point | None) -> bool:
        if point is None:
            return False
        if point.kind is Kind.SOFTWARE:
            return point.address in self._software
        return any(slot.point == point for slot in self.slots)

    def add(self, point: Point, vcpu: api.Vcpu) -> None:
        """Set a breakpoint; nothing happens if it is there. *vcpu*'s tables say where a software one lies.

        MemoryFault if there is no memory, BreakpointError if no debug register is free.
        """
        if point in self:
            return
        if point.kind is Kind.SOFTWARE:
            gpa = translate(vcpu, self._memory, point.address)
            try:
                self._memory.slice(gpa, 1)
            except IndexError:
                raise MemoryFault(point.address, f"virtual {point.address:#x} leads to no RAM") from None
            if gpa not in self._patches:
                self._patches[gpa] = _Patch()
                if self._placed:
                    self._place(gpa)
            self._patches[gpa].addresses.add(point.address)
            self._software[point.address] = gpa
            return
        if point.size < 1 or point.address + point.size > 1 << 64:
            raise BreakpointError(f"a watchpoint of {point.size} bytes at {point.address:#x}: expected 1 or more")
        wanted = _registers(point)
        if len(self.slots) + len(wanted) > DEBUG_REGISTERS:
            raise BreakpointError(
                f"{point.size} bytes at {point.address:#x} take {len(wanted)} debug registers: "
                f"{DEBUG_REGISTERS - len(self.slots)} of {DEBUG_REGISTERS} are free"
            )
        self.slots += wanted
        self.changed += 1

    def remove(self, point: Point) -> None:
        """Take a breakpoint away; nothing happens if it isn't there."""
        if point.kind is not Kind.SOFTWARE:
            left = [slot for slot in self.slots if slot.point != point]
            self.changed += left != self.slots
            self.slots = left
            return
        gpa = self._software.pop(point.address, None)
        if gpa is None:
            return
        patch = self._patches[gpa]
        patch.addresses.discard(point.address)
        if not patch.addresses:
            if self._placed:
                self._lift(gpa)
            del self._patches[gpa]

    def _place(self, gpa: int) -> None:
        self._patches[gpa].original = self._memory.read(gpa, 1)[0]
        self._put(gpa, INT3)

    def _lift(self, gpa: int) -> None:
        if self._memory.read(gpa, 1)[0] == INT3:  # the guest may have written something else there
            self._put(gpa, self._patches[gpa].original)

    def _put(self, gpa: int, byte: int) -> None:
        self._memory.write(gpa, bytes([byte]))

    def pause(self) -> None:
        """The machine stands: memory is as the guest has it."""
        if self._placed:
            self._placed = False
            for gpa in self._patches:
                self._lift(gpa)

    def resume(self) -> None:
        """The machine goes on."""
        if not self._placed:
            self._placed = True
            for gpa in self._patches:
                self._place(gpa)

    def clear_software(self) -> None:
        """Take all software breakpoints away."""
        if self._placed:
            for gpa in self._patches:
                self._lift(gpa)
        self._patches.clear()
        self._software.clear()

    def clear(self) -> None:
        """Take all breakpoints away."""
        self.clear_software()
        self.changed += bool(self.slots)
        self.slots = []

    @property
    def has_software(self) -> bool:
        """Whether there is an INT3 of ours."""
        return bool(self._patches)

    def is_ours(self, vcpu: api.Vcpu, address: int) -> bool:
        """Whether the INT3 that *vcpu* came upon is one of ours. On its own thread, or while it stands."""
        try:
            return translate(vcpu, self._memory, address) in self._patches
        except MemoryFault:
            return False

    # -- memory as it would be without

    def hide(self, gpa: int, data: bytes) -> bytes:
        """Return what was read at a guest-physical address, with what is under our INT3s in their place."""
        if not self._placed:
            return data
        hidden = None
        for at in self._within(gpa, len(data)):
            if data[at - gpa] == INT3:
                hidden = hidden if hidden is not None else bytearray(data)
                hidden[at - gpa] = self._patches[at].original
        return data if hidden is None else bytes(hidden)

    def keep(self, gpa: int, data: bytes) -> bytes:
        """Return what has to be written in place of *data*, so that our INT3s stay; they are over that from now on."""
        if not self._placed:
            return data
        kept = None
        for at in self._within(gpa, len(data)):
            self._patches[at].original = data[at - gpa]
            kept = kept if kept is not None else bytearray(data)
            kept[at - gpa] = INT3
        return data if kept is None else bytes(kept)

    def _within(self, gpa: int, size: int) -> Iterator[int]:
        return (at for at in self._patches if gpa <= at < gpa + size)

    # -- debug registers

    def debug(self, *, step: bool, block_interrupts: bool) -> abi.kvm_guest_debug:
        """Return what KVM_SET_GUEST_DEBUG has to be told of a vCPU."""
        debug = abi.kvm_guest_debug()
        control = 0
        if self._patches:
            control |= abi.KVM_GUESTDBG_USE_SW_BP
        if self.slots:
            control |= abi.KVM_GUESTDBG_USE_HW_BP
            dr7 = _DR7_FIXED | _DR7_EXACT
            for n, slot in enumerate(self.slots):
                debug.arch.debugreg[n] = slot.address
                dr7 |= 2 << 2 * n | (_TYPES[slot.point.kind] | _LENGTHS[slot.size] << 2) << 16 + 4 * n
            debug.arch.debugreg[7] = dr7
        if step:
            control |= abi.KVM_GUESTDBG_SINGLESTEP | (abi.KVM_GUESTDBG_BLOCKIRQ if block_interrupts else 0)
        debug.control = control | abi.KVM_GUESTDBG_ENABLE if control else 0
        return debug

    def hits(self, dr6: int) -> list[Point]:
        """Return the breakpoints whose debug registers *dr6* names, each once."""
        return list(dict.fromkeys(slot.point for n, slot in enumerate(self.slots) if dr6 >> n & 1))
