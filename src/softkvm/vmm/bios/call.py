# SPDX-License-Identifier: Apache-2.0
"""A software interrupt in real mode: the registers and flags of its caller, to read and to change."""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.vmm.memory import GuestMemory

CARRY: Final = 1 << 0
ZERO: Final = 1 << 6
STATUS_OK: Final = 0


class Retry(Exception):
    """The service has to wait: the guest takes its interrupts and asks again."""


def _low(name: str) -> property:
    """Return the property for the low 16 bits of a register."""

    def get(self: Call) -> int:
        return int(getattr(self.regs, name)) & 0xFFFF

    def put(self: Call, value: int) -> None:
        setattr(self.regs, name, getattr(self.regs, name) & ~0xFFFF | value & 0xFFFF)

    return property(get, put)


def _byte(name: str, shift: int) -> property:
    """Return the property for one of the two low bytes of a register."""

    def get(self: Call) -> int:
        return int(getattr(self.regs, name)) >> shift & 0xFF

    def put(self: Call, value: int) -> None:
        setattr(self.regs, name, getattr(self.regs, name) & ~(0xFF << shift) | (value & 0xFF) << shift)

    return property(get, put)


def _wide(name: str) -> property:
    """Return the property for the low 32 bits of a register."""

    def get(self: Call) -> int:
        return int(getattr(self.regs, name)) & 0xFFFFFFFF

    def put(self: Call, value: int) -> None:
        setattr(self.regs, name, value & 0xFFFFFFFF)

    return property(get, put)


class Call:
    """A software interrupt: the caller's registers, its flags as INT pushed them, its segments."""

    ax, bx, cx, dx, si, di, bp = map(_low, ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"))
    al, bl, cl, dl = (_byte(name, 0) for name in ("rax", "rbx", "rcx", "rdx"))
    ah, bh, ch, dh = (_byte(name, 8) for name in ("rax", "rbx", "rcx", "rdx"))
    eax, ebx, ecx, edx = map(_wide, ("rax", "rbx", "rcx", "rdx"))

    def __init__(self, regs: abi.kvm_regs, sregs: abi.kvm_sregs, memory: GuestMemory) -> None:
        self.regs = regs
        self.memory = memory
        self.es = sregs.es.base
        self._frame = sregs.ss.base + (regs.rsp & 0xFFFF)
        self.vector, _, _, self.flags = self._words(self._frame, 4)

    def _words(self, gpa: int, count: int) -> list[int]:
        data = self.memory.read(gpa, 2 * count)
        return [int.from_bytes(data[at : at + 2], "little") for at in range(0, 2 * count, 2)]

    def finish(self) -> None:
        """Give the caller its flags."""
        self.memory.write(self._frame + 6, self.flags.to_bytes(2, "little"))

    def set(self, flag: int, value: object) -> None:
        """Set or clear a flag of the caller's."""
        self.flags = self.flags & ~flag | (flag if value else 0)

    def fail(self, status: int) -> None:
        """Carry, and *status* in AH."""
        self.ah = status
        self.set(CARRY, True)

    def succeed(self) -> None:
        """No carry, and 0 in AH."""
        self.ah = STATUS_OK
        self.set(CARRY, False)
