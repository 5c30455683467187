# SPDX-License-Identifier: Apache-2.0
"""The state of one emulated instruction: its operands, guest memory as it sees it, and what it will commit.

Registers and flags are worked on in a copy that is written to the vCPU only when the instruction has succeeded, so a
fault leaves the guest as it was. A read that only userspace can answer abandons the instruction
(:class:`NeedsUserspace`); it runs again from the start when the data has come, and finds it among
:attr:`Context.replies`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm.abi import GP_VECTOR, SS_VECTOR, UD_VECTOR
from softkvm.kvm.guest_memory import cmpxchg_guest, read_guest, write_guest
from softkvm.kvm.mmu.paging import PFERR_FETCH, PFERR_IMPLICIT, PFERR_USER, PFERR_WRITE, is_canonical, walk
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.exceptions import X86Exception

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

    from softkvm._softcpu import Instruction

PAGE: Final = 4096
#: Bytes of one KVM_EXIT_MMIO.
MMIO_FRAGMENT: Final = 8
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
SEGMENTS: Final = {"es": 0, "cs": 1, "ss": 2, "ds": 3, "fs": 4, "gs": 5}
_LOW: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_CR4_LA57: Final = 1 << 12


class RegisterName(NamedTuple):
    """A general register operand: number, size in bytes, and whether it is AH, CH, DH or BH."""

    number: int
    size: int
    high: bool = False


def _register_names() -> dict[str, RegisterName]:
    names: dict[str, RegisterName] = {}
    for n, low in enumerate(_LOW):
        names["r" + low] = RegisterName(n, 8)
        names["e" + low] = RegisterName(n, 4)
        names[low] = RegisterName(n, 2)
        names[low[0] + "l" if n < 4 else low + "l"] = RegisterName(n, 1)
        if n < 4:
            names[low[0] + "h"] = RegisterName(n, 1, True)
    for n in range(8, 16):
        for suffix, size in (("", 8), ("d", 4), ("w", 2), ("l", 1), ("b", 1)):
            names[f"r{n}{suffix}"] = RegisterName(n, size)
    return names


REGISTERS: Final = _register_names()


class Operand(NamedTuple):
    """One operand as the decoder gave it."""

    kind: str
    size: int
    register: str | None
    value: int


class Plan:
    """A decoded instruction, kept for as long as its bytes come again."""

    __slots__ = (
        "address_mask", "base", "bits", "bitness", "displacement", "handler", "index", "insn", "ip_relative", "length",
        "lock", "mnemonic", "operands", "rep", "repne", "scale", "segment",
    )  # fmt: skip

    def __init__(self, insn: Instruction, bitness: int, handler: Callable[[Context], None]) -> None:
        self.insn = insn
        self.bitness = bitness
        self.handler = handler
        self.length = insn.length
        self.mnemonic = insn.mnemonic
        self.rep = insn.has_rep
        self.repne = insn.has_repne
        self.lock = insn.has_lock
        self.address_mask = (1 << (insn.address_size * 8)) - 1
        self.operands = tuple(self._operand(insn, n) for n in range(insn.op_count))
        base = insn.memory_base
        self.ip_relative = base in ("rip", "eip")
        self.base = None if base is None or self.ip_relative else REGISTERS[base].number
        self.index = REGISTERS[insn.memory_index].number if insn.memory_index else None
        self.scale = insn.memory_scale
        self.displacement = insn.memory_displacement
        self.segment = SEGMENTS[insn.memory_segment] if insn.memory_segment else 3
        #: Bits of the first operand.
        self.bits = self.operands[0].size * 8 if self.operands else 0

    @staticmethod
    def _operand(insn: Instruction, n: int) -> Operand:
        kind = insn.op_kind(n)
        if kind == "immediate":
            value = insn.immediate(n)
        elif kind == "near_branch":
            value = insn.near_branch_target
        else:
            value = 0
        return Operand(kind, insn.op_size(n), insn.op_register(n) if kind == "register" else None, value)


class NeedsUserspace(Exception):
    """A read that no in-kernel device answers: ``size`` (at most 8) bytes at ``gpa``."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(gpa, size)
        self.gpa = gpa
        self.size = size


class Unhandleable(Exception):
    """The emulator does not know the instruction."""


class Context:
    """One instruction on its way through the emulator."""

    __slots__ = (
        "bitness", "efer", "flags", "gpa", "gpa_linear", "ip", "plan", "regs", "replies", "reply_at", "restart",
        "shadow", "user", "vcpu", "writes",
    )  # fmt: skip

    def __init__(self, vcpu: Vcpu, plan: Plan, gpa: int | None) -> None:
        self.vcpu = vcpu
        self.plan = plan
        #: Guest-physical address that the processor reported for the instruction's access, if it did.
        self.gpa = gpa
        self.replies: list[tuple[int, bytes]] = []
        self.begin()

    def begin(self) -> None:
        """(Re)start the instruction with the vCPU's registers; replies of userspace are kept."""
        vcpu = self.vcpu
        q = vcpu.q
        self.regs = list(vcpu.gpr)
        self.regs[RAX] = q[V.RAX]
        self.regs[RSP] = q[V.RSP]
        self.flags = vcpu.get_rflags()
        self.ip = (q[V.RIP] + self.plan.length) & (2**64 - 1 if self.plan.bitness == 64 else 2**32 - 1)
        self.bitness = self.plan.bitness
        self.efer = vcpu.efer
        self.user = PFERR_USER if vcpu.cpl() == 3 else 0
        self.gpa_linear: int | None = None
        #: MMIO writes for userspace: (gpa, data), at most 8 bytes each.
        self.writes: list[tuple[int, bytes]] = []
        self.reply_at = 0
        #: A string instruction that has more to do: RIP stays.
        self.restart = False
        #: The instruction starts an interrupt shadow.
        self.shadow = False

    def commit(self) -> None:
        """Write registers, flags and RIP to the vCPU."""
        vcpu = self.vcpu
        q = vcpu.q
        gpr = vcpu.gpr
        for n, value in enumerate(self.regs):
            gpr[n] = value
        q[V.RAX] = self.regs[RAX]
        q[V.RSP] = self.regs[RSP]
        vcpu.set_rflags(self.flags)
        if not self.restart:
            q[V.RIP] = self.ip
        vcpu.b[V.INT_STATE_B] = V.INTERRUPT_SHADOW if self.shadow else 0

    # --- registers -------------------------------------------------------------------------------------------

    def get(self, name: RegisterName) -> int:
        """Read a general register operand."""
        value = self.regs[name.number]
        if name.high:
            value >>= 8
        return value & ((1 << (name.size * 8)) - 1)

    def put(self, name: RegisterName, value: int) -> None:
        """Write a general register operand; 32-bit writes clear the upper half."""
        number, size, high = name
        if size == 8:
            self.regs[number] = value & 0xFFFF_FFFF_FFFF_FFFF
        elif size == 4:
            self.regs[number] = value & 0xFFFF_FFFF
        else:
            shift = 8 if high else 0
            mask = ((1 << (size * 8)) - 1) << shift
            self.regs[number] = self.regs[number] & ~mask | value << shift & mask

    # --- operands --------------------------------------------------------------------------------------------

    def read(self, n: int) -> int:
        """Read operand ``n``; immediates are truncated to the first operand's size."""
        operand = self.plan.operands[n]
        if operand.register is not None:
            return self.get(REGISTERS[operand.register])
        if operand.kind == "memory":
            return int.from_bytes(self.load(self.linear(operand.size), operand.size), "little")
        return operand.value & ((1 << self.plan.bits) - 1)

    def write(self, n: int, value: int) -> None:
        """Write operand ``n``."""
        operand = self.plan.operands[n]
        if operand.register is not None:
            self.put(REGISTERS[operand.register], value)
        else:
            data = (value & ((1 << (operand.size * 8)) - 1)).to_bytes(operand.size, "little")
            self.store(self.linear(operand.size), data)

    def effective(self) -> int:
        """Return the effective address of the memory operand."""
        plan = self.plan
        ea = plan.displacement
        if plan.ip_relative:
            # The decoder was told IP 0.
            ea += self.vcpu.q[V.RIP]
        if plan.base is not None:
            ea += self.regs[plan.base]
        if plan.index is not None:
            ea += self.regs[plan.index] * plan.scale
        return ea & plan.address_mask

    def linear(self, size: int, *, write: bool = False) -> int:
        """Return the linear address of the memory operand."""
        return self.segment_linear(self.plan.segment, self.effective(), size, write=write)

    def segment_linear(self, segment: int, offset: int, size: int, *, write: bool = False) -> int:
        """Return the linear address of ``size`` bytes at ``offset`` in ``segment``, checked as the mode demands."""
        vcpu = self.vcpu
        at = V.ES_OFFSET + 16 * segment
        base = vcpu.q[(at + 8) // 8]
        if self.bitness == 64:
            linear = (offset + (base if segment >= 4 else 0)) & 0xFFFF_FFFF_FFFF_FFFF
            if not is_canonical(linear, la57=bool(vcpu.cr4 & _CR4_LA57)):
                raise X86Exception(SS_VECTOR if segment == 2 else GP_VECTOR, 0)
            return linear
        limit = vcpu.d[(at + 4) // 4]
        attrib = vcpu.w[(at + 2) // 2]
        last = offset + size - 1
        if attrib & 0x1C == 0x14:
            top = 0xFFFF_FFFF if attrib & V.SEG_DB else 0xFFFF
            good = offset > limit and last <= top
        else:
            good = last <= limit
        if vcpu.is_protected():
            good = good and bool(attrib & V.SEG_P)
            if write:
                good = good and attrib & 0xA == 2
        if not good:
            raise X86Exception(SS_VECTOR if segment == 2 else GP_VECTOR, 0)
        return (base + offset) & 0xFFFF_FFFF

    # --- memory -----------------------------------------------------------------------------------------------

    def pieces(self, linear: int, size: int, access: int) -> list[tuple[int, int]]:
        """Translate ``size`` bytes at ``linear``: (gpa, size) within each page. Raises #PF."""
        result = []
        while size:
            part = min(size, PAGE - (linear & (PAGE - 1)))
            result.append((self._gpa(linear, access), part))
            linear = (linear + part) & (0xFFFF_FFFF_FFFF_FFFF if self.bitness == 64 else 0xFFFF_FFFF)
            size -= part
        return result

    def _gpa(self, linear: int, access: int) -> int:
        """Translate one address; the processor's own answer serves where it fits (same page offset, first access)."""
        gpa = self.gpa
        if gpa is not None and not access & (PFERR_FETCH | PFERR_IMPLICIT) and (gpa ^ linear) & (PAGE - 1) == 0:
            if self.gpa_linear is None:
                self.gpa_linear = linear
            if self.gpa_linear == linear and not self.plan.insn.is_string:
                return gpa
        return walk(self.vcpu, linear, access | self.user).gpa

    def load(self, linear: int, size: int, access: int = 0) -> bytes:
        """Read guest memory or MMIO."""
        return b"".join([self._load_physical(gpa, part) for gpa, part in self.pieces(linear, size, access)])

    def load_code(self, linear: int, size: int) -> bytes:
        """Fetch ``size`` bytes of one page; #PF as an instruction fetch would raise it."""
        gpa = walk(self.vcpu, linear, PFERR_FETCH | self.user).gpa
        data = read_guest(self.vcpu.vm, gpa, size)
        if data is None:
            raise X86Exception(UD_VECTOR)
        return data

    def _load_physical(self, gpa: int, size: int) -> bytes:
        vm = self.vcpu.vm
        at = self.reply_at
        if at < len(self.replies) and self.replies[at][0] == gpa:
            parts = []
            left = size
            while left:
                address, data = self.replies[self.reply_at] if self.reply_at < len(self.replies) else (-1, b"")
                if address != gpa:
                    break
                self.reply_at += 1
                parts.append(data)
                gpa += len(data)
                left -= len(data)
            if not left:
                return b"".join(parts)
            raise NeedsUserspace(gpa, min(left, MMIO_FRAGMENT))
        data_in_memory = read_guest(vm, gpa, size)
        if data_in_memory is not None:
            return data_in_memory
        value = self.vcpu.mmio_read(gpa, size) if size <= MMIO_FRAGMENT else None
        if value is None:
            raise NeedsUserspace(gpa, min(size, MMIO_FRAGMENT))
        data = value.to_bytes(size, "little")
        # A device may not be read twice if a later access sends the instruction to userspace.
        self.replies.insert(self.reply_at, (gpa, data))
        self.reply_at += 1
        return data

    def store(self, linear: int, data: bytes) -> None:
        """Write guest memory or MMIO; everything is translated before anything is written."""
        at = 0
        for gpa, part in self.pieces(linear, len(data), PFERR_WRITE):
            self._store_physical(gpa, data[at : at + part])
            at += part

    def _store_physical(self, gpa: int, data: bytes) -> None:
        vcpu = self.vcpu
        if write_guest(vcpu.vm, gpa, data):
            return
        for at in range(0, len(data), MMIO_FRAGMENT):
            piece = data[at : at + MMIO_FRAGMENT]
            if not vcpu.mmio_write(gpa + at, len(piece), int.from_bytes(piece, "little")):
                self.writes.append((gpa + at, piece))

    def compare_exchange(self, linear: int, expected: bytes, new: bytes) -> bytes:
        """Atomically replace ``expected`` by ``new``; what was found. MMIO and splits are done in two steps."""
        size = len(new)
        pieces = self.pieces(linear, size, PFERR_WRITE)
        gpa = pieces[0][0]
        if len(pieces) == 1 and size <= 8 and (gpa & 7) + size <= 8:
            found = cmpxchg_guest(self.vcpu.vm, gpa, expected, new)
            if found is not None:
                return found
        found = self.load(linear, size)
        if found == expected:
            self.store(linear, new)
        return found

    # --- the stack -----------------------------------------------------------------------------------------------

    def stack_mask(self) -> int:
        """Return the mask of the stack pointer in force."""
        if self.bitness == 64:
            return 0xFFFF_FFFF_FFFF_FFFF
        return 0xFFFF_FFFF if self.vcpu.w[V.SS_ATTRIB] & V.SEG_DB else 0xFFFF

    def push(self, value: int, size: int) -> None:
        """Push ``size`` bytes."""
        mask = self.stack_mask()
        sp = (self.regs[RSP] - size) & mask
        linear = self.segment_linear(2, sp, size, write=True)
        self.store(linear, (value & ((1 << (size * 8)) - 1)).to_bytes(size, "little"))
        self.regs[RSP] = self.regs[RSP] & ~mask | sp

    def pop(self, size: int) -> int:
        """Pop ``size`` bytes."""
        mask = self.stack_mask()
        sp = self.regs[RSP] & mask
        data = self.load(self.segment_linear(2, sp, size), size)
        self.regs[RSP] = self.regs[RSP] & ~mask | (sp + size) & mask
        return int.from_bytes(data, "little")

    def branch(self, target: int) -> None:
        """Go on at ``target``, checked as the mode demands."""
        if self.bitness == 64:
            target &= 0xFFFF_FFFF_FFFF_FFFF
            if not is_canonical(target, la57=bool(self.vcpu.cr4 & _CR4_LA57)):
                raise X86Exception(GP_VECTOR, 0)
        else:
            target &= 0xFFFF_FFFF
            if target > self.vcpu.d[(V.CS_OFFSET + 4) // 4]:
                raise X86Exception(GP_VECTOR, 0)
        self.ip = target

    def undefined(self) -> X86Exception:
        """Return #UD."""
        return X86Exception(UD_VECTOR)
