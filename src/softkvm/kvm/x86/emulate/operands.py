# SPDX-License-Identifier: Apache-2.0
"""Decoded instructions as the emulator uses them: operands, effective addresses, and a cache of both.

Lengths and operands come from the decoder of the silicon (:func:`softkvm._softcpu.decode`); nothing about an
encoding is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import _softcpu
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from collections.abc import Callable

    from softkvm.kvm.x86.emulate.emulator import Emulator

# Operand kinds
REG: Final = 0
MEM: Final = 1
IMM: Final = 2
SEG: Final = 3
CR: Final = 4
DR: Final = 5
XMM: Final = 6
MMX: Final = 7
BRANCH: Final = 8
STR_SRC: Final = 9
STR_DST: Final = 10
OTHER: Final = 11
FAR: Final = 12

_GPR64: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_GPR32: Final = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{n}d" for n in range(8, 16)))
_GPR16: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{n}w" for n in range(8, 16)))
_GPR8: Final = ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{n}b" for n in range(8, 16)))
_GPR8L: Final = tuple(f"r{n}l" for n in range(8, 16))
_GPR8_HIGH: Final = ("ah", "ch", "dh", "bh")

#: Byte offset in the VMCB of a segment register, by name.
SEGMENT_OFFSETS: Final = {
    "es": V.ES_OFFSET,
    "cs": V.CS_OFFSET,
    "ss": V.SS_OFFSET,
    "ds": V.DS_OFFSET,
    "fs": V.FS_OFFSET,
    "gs": V.GS_OFFSET,
}


def _register_table() -> dict[str, tuple[int, int, int, int]]:
    """Return (kind, index, size, shift) of every register by its name."""
    table: dict[str, tuple[int, int, int, int]] = {}
    for names, size in ((_GPR64, 8), (_GPR32, 4), (_GPR16, 2), (_GPR8, 1)):
        for index, name in enumerate(names):
            table[name] = (REG, index, size, 0)
    for index, name in enumerate(_GPR8L):
        table[name] = (REG, index + 8, 1, 0)
    for index, name in enumerate(_GPR8_HIGH):
        table[name] = (REG, index, 1, 8)
    for name, offset in SEGMENT_OFFSETS.items():
        table[name] = (SEG, offset, 2, 0)
    for n in range(16):
        table[f"cr{n}"] = (CR, n, 8, 0)
        table[f"dr{n}"] = (DR, n, 8, 0)
        table[f"xmm{n}"] = (XMM, n, 16, 0)
    for n in range(8):
        table[f"mm{n}"] = (MMX, n, 8, 0)
    return table


REGISTERS: Final = _register_table()


_LEGACY_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")


def _prefixes(code: bytes) -> bytes:
    """Return the legacy prefixes of an instruction."""
    count = 0
    while count < len(code) and code[count] in _LEGACY_PREFIXES:
        count += 1
    return code[:count]


def _stack_size(bitness: int, prefixes: bytes) -> int:
    """Return how many bytes PUSH, POP, ENTER and LEAVE move: 8 in 64-bit code, which has no 4 (APM vol. 3, 1.2.3)."""
    wide = bitness != 16
    if 0x66 in prefixes:
        wide = not wide
    return 2 if not wide else 8 if bitness == 64 else 4


#: Instructions that read their first operand and write it.
_MODIFIES: Final = frozenset(
    {
        *("adc", "add", "and", "btc", "btr", "bts", "cmpxchg", "dec", "inc", "neg", "not", "or", "rcl", "rcr", "rol"),
        *("ror", "sal", "sar", "sbb", "shl", "shld", "shr", "shrd", "sub", "xadd", "xchg", "xor"),
    }
)


def _segment(decoded: _softcpu.Instruction, bitness: int) -> int:
    """Return the segment of the memory operand; 64-bit code has no override but FS and GS (APM vol. 3, 1.2.4)."""
    name = decoded.memory_segment or "ds"
    if bitness == 64 and name not in ("fs", "gs"):
        name = "ss" if decoded.memory_base in ("rsp", "esp", "rbp", "ebp") else "ds"
    return SEGMENT_OFFSETS.get(name, V.DS_OFFSET)


class Operand:
    """One operand: where it is and how wide."""

    __slots__ = ("index", "kind", "shift", "size", "value")

    def __init__(self, kind: int, size: int, index: int = 0, shift: int = 0, value: int = 0) -> None:
        self.kind = kind
        self.size = size
        #: Register number, or byte offset of a segment register in the VMCB.
        self.index = index
        #: 8 for AH, CH, DH and BH.
        self.shift = shift
        self.value = value

    @property
    def is_branch(self) -> bool:
        """The target of a near branch, relative to the instruction."""
        return self.kind == BRANCH


class Insn:
    """A decoded instruction at no particular address."""

    __slots__ = (
        "address_mask",
        "address_size",
        "base",
        "bitness",
        "code",
        "disp",
        "far",
        "far_selector",
        "index",
        "length",
        "lock",
        "mmio",
        "mnemonic",
        "modifies_memory",
        "operand_size",
        "ops",
        "rep",
        "repne",
        "rex_w",
        "run",
        "scale",
        "segment",
        "stack_size",
        "text",
    )

    def __init__(self, code: bytes, bitness: int) -> None:
        decoded = _softcpu.decode(code, bitness, 0)
        self.bitness = bitness
        self.length = decoded.length
        self.code = bytes(code[: decoded.length])
        self.mnemonic = decoded.mnemonic
        self.text = str(decoded)
        #: A jump or call with a selector of its own, and what it is where the instruction has it.
        self.far = "far" in self.text or decoded.far_branch_selector is not None
        self.far_selector = decoded.far_branch_selector or 0
        prefixes = _prefixes(self.code)
        # The decoder doesn't show REX.W for every instruction.
        self.rex_w = bitness == 64 and self.code[len(prefixes)] & 0xF8 == 0x48
        self.stack_size = 8 if self.rex_w else _stack_size(bitness, prefixes)
        #: What far returns move: 64-bit code has no larger default than 4.
        self.operand_size = 8 if self.rex_w else min(4, self.stack_size)
        self.lock = decoded.has_lock
        self.rep = decoded.has_rep
        self.repne = decoded.has_repne
        self.address_size = decoded.address_size
        self.address_mask = (1 << self.address_size * 8) - 1
        self.segment = _segment(decoded, bitness)
        self.scale = decoded.memory_scale
        self.disp = decoded.memory_displacement
        base, index = decoded.memory_base, decoded.memory_index
        # With ip = 0 the displacement of a RIP-relative operand counts from the instruction's start.
        self.base = -2 if base in ("rip", "eip") else -1 if base is None else REGISTERS[base][1]
        self.index = -1 if index is None else REGISTERS[index][1]
        self.ops = tuple(self._operand(decoded, n) for n in range(decoded.op_count))
        #: Whether the first operand is memory that is read and written: a fault of the read is one of a write, too.
        self.modifies_memory = bool(self.ops) and self.ops[0].kind == MEM and self.mnemonic in _MODIFIES
        self.run: Callable[[Emulator, Insn], None] | None = None
        #: Plan of a plain load or store: (is_write, size, operand), see Emulator.mmio.
        self.mmio: tuple[int, int, Operand] | None = None
        self._plan_mmio()

    @staticmethod
    def _operand(decoded: _softcpu.Instruction, n: int) -> Operand:
        kind = decoded.op_kind(n)
        size = decoded.op_size(n)
        if kind == "register":
            name = decoded.op_register(n) or ""
            register = REGISTERS.get(name)
            return (
                Operand(OTHER, size)
                if register is None
                else Operand(register[0], register[2], register[1], register[3])
            )
        if kind == "memory":
            return Operand(MEM, decoded.memory_size)
        if kind == "immediate":
            return Operand(IMM, size, value=decoded.immediate(n))
        if kind == "near_branch":
            return Operand(BRANCH, size, value=decoded.near_branch_target)
        if kind == "far_branch":
            return Operand(FAR, size, value=decoded.far_branch_offset)
        if kind == "memory_si":
            return Operand(STR_SRC, size)
        if kind == "memory_di":
            return Operand(STR_DST, size)
        return Operand(OTHER, size)

    def _plan_mmio(self) -> None:
        """Recognise plain loads and stores, the bulk of all MMIO."""
        if self.mnemonic not in ("mov", "movzx") or len(self.ops) != 2 or self.lock:
            return
        dst, src = self.ops
        if dst.kind == REG and src.kind == MEM and src.size <= 8:
            self.mmio = (0, src.size, dst)
        elif dst.kind == MEM and src.kind in (REG, IMM) and dst.size <= 8:
            self.mmio = (1, dst.size, src)


#: Decoded instructions by their bytes and bitness; guests choose the keys, so the size is bounded.
_CACHE_ENTRIES: Final = 4096


class DecodeCache:
    """Instructions decoded so far, by the bytes fetched and the code's bitness."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], Insn] = {}

    def get(self, code: bytes, bitness: int) -> Insn:
        """Return the instruction at the start of ``code``; ``ValueError`` if it can't be decoded."""
        key = (code, bitness)
        insn = self._known.get(key)
        if insn is None:
            insn = Insn(code, bitness)
            if len(self._known) >= _CACHE_ENTRIES:
                self._known.clear()
            self._known[key] = insn
        return insn
