# SPDX-License-Identifier: Apache-2.0
"""What an emulated instruction reaches: addresses, memory, operands, flags, stack, branches.

Memory without a memory slot is MMIO. A read that only userspace can answer leaves the handler by :class:`IoNeeded`;
when the handler runs again it finds every read of its first attempt in :attr:`Access.reads`, by its address. A write
is kept in :attr:`Access.writes` until the handler is done: it happens once, and not at all when the instruction faults.

Every access is translated through the guest's tables by its own linear address. The guest-physical address that a
nested page fault reports says nothing of which access it was (an operand, the stack, a descriptor, the TSS), so it is
used for no instruction that might make more than one (see :meth:`Emulator.mmio`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import abi
from softkvm.kvm.memory.guest_memory import cmpxchg_guest, gpa_to_hva, read_guest, write_guest
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86 import io
from softkvm.kvm.x86.emulate.operands import IMM, MEM, MMX, REG, SEG, XMM, Insn, Operand
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, gp
from softkvm.kvm.x86.mmu.paging import PFERR_IMPLICIT, PFERR_USER, PFERR_WRITE, is_canonical, walk
from softkvm.kvm.x86.register_block import st_b, ymm_b
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
_SEGMENTS_WITH_BASE_64: Final = (V.FS_OFFSET, V.GS_OFFSET)


class IoNeeded(Exception):
    """Userspace has to read: ``fragments`` are (gpa, size) of at most 8 bytes, ``parts`` has None in their places."""

    def __init__(self, parts: list[bytes | None], fragments: list[tuple[int, int]]) -> None:
        super().__init__(fragments)
        self.parts = parts
        self.fragments = fragments


class Retry(Exception):
    """Another processor changed the operand of a locked instruction: start it over."""


class Read(NamedTuple):
    """What an instruction has read: where, and what was there."""

    address: int
    size: int
    data: bytes


def in_limit(segment: V.Segment, offset: int, size: int) -> bool:
    """Tell whether ``size`` bytes at ``offset`` lie within a segment of legacy mode (APM vol. 2, 4.7.2)."""
    last = offset + size - 1
    if segment.attrib & 0xC == 4:  # expand-down data
        return offset > segment.limit and last <= (0xFFFF_FFFF if segment.attrib & V.SEG_DB else 0xFFFF)
    return last <= segment.limit


class Access:
    """The guest's state as the handlers of instructions see it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.vm = vcpu.vm
        self.gpr = vcpu.gpr
        self.q = vcpu.q
        self.insn: Insn | None = None
        #: What this instruction has read so far, memory and MMIO, and how many of them the handler has had.
        self.reads: list[Read] = []
        self.position = 0
        #: The read that :class:`IoNeeded` was raised for: its linear address and size.
        self.reading = (0, 0)
        #: MMIO data to be written when the handler is done: (gpa, at most 8 bytes).
        self.writes: list[tuple[int, bytes]] = []
        #: Set by a handler that has put RIP where it belongs.
        self.rip_written = False
        #: Set by a handler that has completed a branch.
        self.branched = False
        #: Set by a handler that has loaded RFLAGS.RF, or all of a task.
        self.rf_loaded = False

    def begin(self, insn: Insn | None) -> None:
        """Begin with ``insn`` (None: what the processor leaves to KVM): nothing of the last one is remembered."""
        self.insn = insn
        self.reads.clear()
        self.restart()

    def restart(self) -> None:
        """Start the instruction over: what it has read it finds again, nothing else has happened."""
        self.position = 0
        self.writes.clear()
        self.rip_written = False
        self.branched = False
        self.rf_loaded = False

    # --- addresses ---------------------------------------------------------------------------------

    def effective_address(self, insn: Insn) -> int:
        """Return the offset of the memory operand in its segment."""
        ea = insn.disp
        if insn.base >= 0:
            ea += self.gpr[insn.base]
        elif insn.base == -2:
            ea += self.q[V.RIP]
        if insn.index >= 0:
            ea += self.gpr[insn.index] * insn.scale
        return ea & insn.address_mask

    def linear_hint(self, insn: Insn) -> int:
        """Return the linear address of the memory operand without the checks of its segment."""
        return self.effective_address(insn) + self.q[(insn.segment >> 3) + 1] & _U64

    def linearize(self, segment: int, offset: int, size: int, *, write: bool) -> int:
        """Return the linear address, after the checks of its segment (#GP or #SS)."""
        vcpu = self.vcpu
        fault = X86Exception(abi.SS_VECTOR if segment == V.SS_OFFSET else abi.GP_VECTOR, 0)
        if vcpu.is_64bit_code():
            address = offset
            if segment in _SEGMENTS_WITH_BASE_64:
                address = address + self.q[(segment >> 3) + 1] & _U64
            la57 = bool(vcpu.cr4 & abi.X86_CR4_LA57)
            if not (is_canonical(address, la57=la57) and is_canonical(address + size - 1 & _U64, la57=la57)):
                raise fault
            return address
        seg = vcpu.vmcb.segment(segment)
        attrib = seg.attrib
        if vcpu.cr0 & abi.X86_CR0_PE and not self.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
            if not attrib & V.SEG_P:
                raise fault
            code = attrib & 8
            if write and (code or not attrib & 2):
                raise fault
            if not write and code and not attrib & 2:
                raise fault
        offset &= 0xFFFF_FFFF
        if not in_limit(seg, offset, size):
            raise fault
        return offset + seg.base & 0xFFFF_FFFF

    # --- memory ------------------------------------------------------------------------------------

    def access(self, write: bool, implicit: bool = False, cpl: int | None = None) -> int:
        """Return the PFERR_* bits of a data access at a privilege level, the guest's if none is given."""
        access = PFERR_WRITE if write else 0
        if implicit:
            return access | PFERR_IMPLICIT
        return access | PFERR_USER if (self.vcpu.b[V.CPL] if cpl is None else cpl) == 3 else access

    def pages(self, address: int, size: int, access: int) -> list[tuple[int, int]]:
        """Translate an access: (gpa, size) per page, before any of it happens; the first fault is raised."""
        mask = _U64
        if not self.vcpu.efer & abi.EFER_LMA or not (access & PFERR_IMPLICIT or self.vcpu.is_64bit_code()):
            mask = 0xFFFF_FFFF
        address &= mask
        in_page = PAGE_SIZE - (address & (PAGE_SIZE - 1))
        if size <= in_page:
            return [(walk(self.vcpu, address, access).gpa, size)]
        return [
            (walk(self.vcpu, address, access).gpa, in_page),
            (walk(self.vcpu, address + in_page & mask, access).gpa, size - in_page),
        ]

    def require_memory(self, address: int, size: int) -> None:
        """See to it that the system can write ``size`` bytes there; :class:`Unhandleable` if it isn't memory."""
        for gpa, _ in self.pages(address, size, self.access(True, True)):
            if gpa_to_hva(self.vm, gpa, write=True) is None:
                raise Unhandleable

    def read_linear(self, address: int, size: int, *, implicit: bool = False, modify: bool = False) -> bytes:
        """Return ``size`` bytes (at most a page) at a linear address; ``modify``: they will be written as well."""
        if self.position < len(self.reads):
            known = self.reads[self.position]
            if known.address == address and known.size == size:
                self.position += 1
                return known.data
            del self.reads[self.position :]  # userspace has changed registers meanwhile: what it read is not this
        parts: list[bytes | None] = []
        fragments: list[tuple[int, int]] = []
        for gpa, length in self.pages(address, size, self.access(modify, implicit)):
            data = read_guest(self.vm, gpa, length)
            if data is None:
                self._read_mmio(gpa, length, parts, fragments)
            else:
                parts.append(data)
        if fragments:
            self.reading = (address, size)
            raise IoNeeded(parts, fragments)
        return self.keep_read(address, size, b"".join(part for part in parts if part is not None))

    def keep_read(self, address: int, size: int, data: bytes) -> bytes:
        """Note what was read; returns it."""
        self.reads.append(Read(address, size, data))
        self.position += 1
        return data

    def _read_mmio(self, gpa: int, size: int, parts: list[bytes | None], fragments: list[tuple[int, int]]) -> None:
        """Read up to 8 bytes at a time: from devices in the kernel at once, the others are ``fragments``."""
        for at in range(gpa, gpa + size, 8):
            length = min(8, gpa + size - at)
            value = io.kernel_mmio_read(self.vcpu, at, length)
            if value is None:
                fragments.append((at, length))
                parts.append(None)
            else:
                parts.append(value.to_bytes(length, "little"))

    def write_linear(self, address: int, data: bytes, *, implicit: bool = False, cpl: int | None = None) -> None:
        """Write ``data`` (at most a page) at a linear address; MMIO is written when the handler is done."""
        pages = self.pages(address, len(data), self.access(True, implicit, cpl))
        at = 0
        for gpa, length in pages:
            piece = data[at : at + length]
            at += length
            if not write_guest(self.vm, gpa, piece):
                self.writes += [(gpa + n, piece[n : n + 8]) for n in range(0, length, 8)]

    def cmpxchg_linear(self, address: int, old: bytes, new: bytes) -> None:
        """Replace ``old`` by ``new`` atomically where the memory allows it; :class:`Retry` if it changed."""
        pages = self.pages(address, len(old), self.access(True))
        if len(pages) == 1 and (address & 7) + len(old) <= 8:
            found = cmpxchg_guest(self.vm, pages[0][0], old, new)
            if found is not None:
                if found != old:
                    raise Retry
                return
        self.write_linear(address, new)

    def memory_address(self, insn: Insn, size: int, *, write: bool) -> int:
        """Return the linear address of the memory operand."""
        return self.linearize(insn.segment, self.effective_address(insn), size, write=write)

    # --- operands ----------------------------------------------------------------------------------

    def read(self, op: Operand) -> int:
        """Return an operand's value as an unsigned number of its size."""
        kind = op.kind
        if kind == REG:
            return self.gpr[op.index] >> op.shift & (1 << op.size * 8) - 1
        if kind == MEM:
            insn = self.insn
            assert insn is not None
            modify = insn.modifies_memory and op is insn.ops[0]
            address = self.memory_address(insn, op.size, write=modify)
            return int.from_bytes(self.read_linear(address, op.size, modify=modify), "little")
        if kind == IMM:
            return op.value
        if kind == SEG:
            return self.vcpu.w[op.index >> 1]
        if kind == XMM:
            offset = ymm_b(op.index)
            return int.from_bytes(self.vcpu.rb[offset : offset + 16], "little")
        if kind == MMX:
            return self.vcpu.rq[st_b(op.index) >> 3]
        raise Unhandleable

    def write(self, op: Operand, value: int, old: int | None = None) -> None:
        """Store into an operand; with LOCK and ``old`` given, only if it still holds ``old``."""
        kind = op.kind
        size = op.size
        if kind == REG:
            if size >= 4:
                self.gpr[op.index] = value & (1 << size * 8) - 1
            else:
                mask = ((1 << size * 8) - 1) << op.shift
                self.gpr[op.index] = self.gpr[op.index] & ~mask | (value << op.shift & mask)
        elif kind == MEM:
            assert self.insn is not None
            address = self.memory_address(self.insn, size, write=True)
            data = (value & (1 << size * 8) - 1).to_bytes(size, "little")
            if old is not None and self.insn.lock:
                self.cmpxchg_linear(address, old.to_bytes(size, "little"), data)
            else:
                self.write_linear(address, data)
        elif kind == XMM:
            offset = ymm_b(op.index)
            self.vcpu.rb[offset : offset + 16] = (value & (1 << 128) - 1).to_bytes(16, "little")
        elif kind == MMX:
            at = st_b(op.index)
            self.vcpu.rq[at >> 3] = value & _U64
            self.vcpu.rw[at + 8 >> 1] = 0xFFFF
        else:
            raise Unhandleable

    # --- flags, stack, branches --------------------------------------------------------------------

    def set_flags(self, mask: int, value: int) -> None:
        """Replace the flags in ``mask``."""
        self.q[V.RFLAGS] = self.q[V.RFLAGS] & ~mask | value

    def stack_mask(self) -> int:
        """Return the mask of the stack pointer's width."""
        if self.vcpu.is_64bit_code():
            return _U64
        return 0xFFFF_FFFF if self.vcpu.w[V.SS_ATTRIB] & V.SEG_DB else 0xFFFF

    def push(self, value: int, size: int) -> None:
        """Push ``size`` bytes."""
        mask = self.stack_mask()
        rsp = self.gpr[4] - size & mask
        address = self.linearize(V.SS_OFFSET, rsp, size, write=True)
        self.write_linear(address, (value & (1 << size * 8) - 1).to_bytes(size, "little"))
        self.set_rsp(rsp)

    def peek(self, size: int, depth: int = 0) -> int:
        """Return ``size`` bytes of the stack, ``depth`` bytes above its top."""
        mask = self.stack_mask()
        address = self.linearize(V.SS_OFFSET, self.gpr[4] + depth & mask, size, write=False)
        return int.from_bytes(self.read_linear(address, size), "little")

    def drop(self, size: int) -> None:
        """Remove ``size`` bytes from the stack."""
        self.set_rsp(self.gpr[4] + size)

    def set_rsp(self, rsp: int) -> None:
        """Load the stack pointer in its width: 16 bits keep the others, 32 clear them."""
        mask = self.stack_mask()
        self.gpr[4] = self.gpr[4] & ~0xFFFF & _U64 | rsp & mask if mask == 0xFFFF else rsp & mask

    def jump(self, target: int, size: int) -> None:
        """Set RIP to ``target``, truncated to ``size`` bytes and checked."""
        vcpu = self.vcpu
        if vcpu.is_64bit_code():
            target &= 0xFFFF if size == 2 else _U64
            if not is_canonical(target, la57=bool(vcpu.cr4 & abi.X86_CR4_LA57)):
                raise gp()
        else:
            target &= (1 << size * 8) - 1 if size < 8 else 0xFFFF_FFFF
            if target > vcpu.vmcb.segment(V.CS_OFFSET).limit:
                raise gp()
        self.q[V.RIP] = target
        vcpu.b[V.INT_STATE_B] = 0
        self.rip_written = self.branched = True
