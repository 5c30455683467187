# SPDX-License-Identifier: Apache-2.0
"""Call chains of a kernel without frame pointers, by its ORC tables.

Sources: Linux, Documentation/arch/x86/orc-unwinder.rst, ``arch/x86/include/asm/orc_types.h`` (the bits of an entry,
which have changed in 6.3 and 6.4: the kernel's own BTF says which they are) and ``asm/ptrace.h`` (``struct pt_regs``).
"""

from __future__ import annotations

import bisect
import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.debug.virtual import MemoryFault
from softkvm.vmm.linux.errors import KernelError

if TYPE_CHECKING:
    from softkvm.vmm.linux.kernel import Kernel
    from softkvm.vmm.linux.value import Value

FRAMES_MOST: Final = 128
_ENTRY: Final = struct.Struct("<hhH")
_ENTRIES: Final = Size(
    "unwind entries of a guest's kernel", 1 << 23, KernelError, giver="guest", element=6, effect="KernelError",
    where=__name__,
)  # fmt: skip
_ORDER: Final = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs flags rsp"
_PT_REGS: Final = {name: 8 * n for n, name in enumerate(_ORDER.split())}
_IRET_FRAME: Final = _PT_REGS["rip"]
#: ``struct inactive_task_frame``: where a task that does not run has its frame pointer and return address.
_INACTIVE_RBP, _INACTIVE_RETURN, _INACTIVE_SIZE = 40, 48, 56
_KERNEL: Final = 1 << 63


class _Register(enum.IntEnum):
    UNDEFINED = 0
    PREV_SP = 1
    DX = 2
    DI = 3
    BP = 4
    SP = 5
    R10 = 6
    R13 = 7
    BP_INDIRECT = 8
    SP_INDIRECT = 9


_NAMED: Final = {_Register.DX: "rdx", _Register.DI: "rdi", _Register.R10: "r10", _Register.R13: "r13"}


class _Frame(enum.Enum):
    CALL = "call"
    REGS = "regs"
    PARTIAL = "regs, partial"
    END = "end"


_TYPES_OLD: Final = (_Frame.CALL, _Frame.REGS, _Frame.PARTIAL, _Frame.END)
_TYPES_NEW: Final = (_Frame.END, _Frame.END, _Frame.CALL, _Frame.REGS, _Frame.PARTIAL)


@dataclass(frozen=True, slots=True)
class Frame:
    """One of the functions that were called: the address in it, and as a symbol where that is known."""

    address: int
    text: str
    interrupted: bool = False
    """Whether this is where an interrupt or exception came, not a call."""


class Unwinder:
    """Call chains in *kernel*; KernelError if it has no ORC tables."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        symbols = kernel.symbols
        try:
            start, end = symbols["__start_orc_unwind_ip"], symbols["__stop_orc_unwind_ip"]
            entries = symbols["__start_orc_unwind"]
        except KeyError:
            raise KernelError(f"Linux {kernel.release} has no ORC tables (CONFIG_UNWINDER_ORC)") from None
        count = _ENTRIES.check((end - start) // 4)
        self._start = start
        self._places = memoryview(kernel.read(start, 4 * count)).cast("i")
        self._entries = kernel.read(entries, _ENTRY.size * count)
        btf = kernel.btf
        members = {member.name: member for member in btf.named("struct orc_entry").members}
        type_bits = members["type"].bit_size
        self._type_shift = members["type"].bit_offset % 16
        self._type_mask = (1 << type_bits) - 1
        self._types = _TYPES_OLD if type_bits == 2 else _TYPES_NEW
        self._end_bit = 1 << members["end"].bit_offset % 16 if "end" in members else 0

    def _entry(self, address: int) -> tuple[int, int, int] | None:
        start, places = self._start, self._places
        n = bisect.bisect_right(range(len(places)), address, key=lambda n: start + 4 * n + places[n]) - 1
        if n < 0 or not self._kernel.symbol("_stext") <= address < self._kernel.symbol("_end"):
            return None
        entry: tuple[int, int, int] = _ENTRY.unpack_from(self._entries, _ENTRY.size * n)
        return entry

    def _word(self, address: int) -> int:
        return int.from_bytes(self._kernel.read(address & (1 << 64) - 1, 8), "little")

    def chain(self, registers: dict[str, int]) -> Iterator[Frame]:
        """Yield the call chain of a processor with these registers; it ends where it is not known any more."""
        rip, rsp, rbp = registers["rip"], registers["rsp"], registers["rbp"]
        known, exact = dict(registers), True  # whether rip is an instruction to come, not a return address
        for _ in range(FRAMES_MOST):
            if not rip & _KERNEL:
                yield Frame(rip, f"{rip:#x} (user)", exact)
                return
            text = self._kernel.symbolize(rip if exact else rip - 1)
            yield Frame(rip, text if exact else self._after(text), exact)
            entry = self._entry(rip if exact else rip - 1)
            try:
                if entry is None:  # as the kernel does: there may be a frame pointer
                    rsp, rip, rbp = rbp + 16, self._word(rbp + 8), self._word(rbp)
                    exact, known = False, {}
                    continue
                found = self._previous(entry, rsp, rbp, known)
            except (MemoryFault, KeyError, ValueError):
                return
            if found is None:
                return
            rip, rsp, rbp, known, exact = found

    def _after(self, text: str) -> str:
        """Return a symbol's text for a return address, which was looked up one byte before."""
        name, plus, rest = text.partition("+")
        offset, space, module = rest.partition(" ")
        return f"{name}+{int(offset, 16) + 1:#x}{space}{module}" if plus else text

    def _previous(
        self, entry: tuple[int, int, int], rsp: int, rbp: int, known: dict[str, int]
    ) -> tuple[int, int, int, dict[str, int], bool] | None:
        """Return the caller's registers: rip, rsp, rbp, what else is known, and whether it was interrupted."""
        sp_offset, bp_offset, bits = entry
        if bits & self._end_bit:
            return None
        kind = self._types[bits >> self._type_shift & self._type_mask]
        sp_register, bp_register = _Register(bits & 0xF), _Register(bits >> 4 & 0xF)
        if kind is _Frame.END or sp_register is _Register.UNDEFINED:
            return None
        match sp_register:
            case _Register.SP:
                cfa = rsp + sp_offset
            case _Register.BP:
                cfa = rbp + sp_offset
            case _Register.SP_INDIRECT:
                cfa = self._word(rsp) + sp_offset
            case _Register.BP_INDIRECT:
                cfa = self._word(rbp + sp_offset)
            case _:
                cfa = known[_NAMED[sp_register]]
        if kind is _Frame.CALL:
            rip, sp, saved, exact = self._word(cfa - 8), cfa, {}, False
        else:
            base = cfa if kind is _Frame.REGS else cfa - _IRET_FRAME
            names = _PT_REGS if kind is _Frame.REGS else ("rip", "rsp")
            saved = {name: self._word(base + _PT_REGS[name]) for name in names}
            rip, sp, exact = saved["rip"], saved["rsp"], True
        match bp_register:
            case _Register.UNDEFINED:
                rbp = saved.get("rbp", rbp)
            case _Register.PREV_SP:
                rbp = self._word(cfa + bp_offset)
            case _Register.BP:
                rbp = self._word(rbp + bp_offset)
            case _:
                return None
        return rip, sp, rbp, saved, exact

    def of_task(self, task: Value) -> Iterator[Frame]:
        """Yield the call chain of a task that does not run now."""
        sp = int(task.thread.sp)
        registers = {
            "rip": self._word(sp + _INACTIVE_RETURN),
            "rsp": sp + _INACTIVE_SIZE,
            "rbp": self._word(sp + _INACTIVE_RBP),
        }
        return self.chain(registers)
