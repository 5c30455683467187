# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator: what the guest does to MMIO, and the few instructions that KVM carries out itself.

A handler reads its operands first, computes, and writes last. When an operand is MMIO that userspace has to
read, the handler is left by :class:`IoNeeded`; after KVM_RUN is called again the instruction starts over with
the data that have arrived (:attr:`Emulator.reads`). Nothing of the guest's state has changed until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import EFER_LMA
from softkvm.kvm.guest_memory import cmpxchg_guest, read_guest, write_guest
from softkvm.kvm.mmu.paging import PFERR_FETCH, PFERR_IMPLICIT, PFERR_USER, PFERR_WRITE, is_canonical, walk
from softkvm.kvm.mmu.spte import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.x86 import io, svm
from softkvm.kvm.x86 import vmcb as V
from softkvm.kvm.x86.debug import check_code_breakpoint
from softkvm.kvm.x86.emulate_operands import CR, DR, IMM, MEM, MMX, REG, SEG, XMM, DecodeCache, Insn, Operand
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, gp, inject_emulated_exception, queue_exception
from softkvm.kvm.x86.io import advance, exit_mmio, kernel_mmio_read, kernel_mmio_write
from softkvm.kvm.x86.vmcb import CS_ATTRIB, SEG_L

if TYPE_CHECKING:
    from collections.abc import Callable

    from softkvm.kvm.vcpu_state import VcpuState as Vcpu

    Handler = Callable[["Emulator", Insn], None]

_U64: Final = (1 << 64) - 1
_MAX_INSN: Final = 15
_ASSIST_ENTRIES: Final = 1024
_SEGMENTS_WITH_BASE_64: Final = (V.FS_OFFSET, V.GS_OFFSET)

#: Handler of every mnemonic, filled in by the ``emulate_*`` modules when ``emulate_table`` imports them.
HANDLERS: dict[str, Handler] = {}


class IoNeeded(Exception):
    """An operand has to be read by userspace: (gpa, size) pieces of at most 8 bytes, or a port."""

    def __init__(self, fragments: list[tuple[int, int]]) -> None:
        super().__init__(fragments)
        self.fragments = fragments


class PioNeeded(Exception):
    """Data have to be read from a port by userspace."""

    def __init__(self, port: int, size: int, count: int) -> None:
        super().__init__(port, size, count)
        self.port = port
        self.size = size
        self.count = count


class Retry(Exception):
    """Another processor changed the operand of a locked instruction: start it over."""


def handler(*mnemonics: str) -> Callable[[Handler], Handler]:
    """Register a function as the handler of ``mnemonics``."""

    def register(function: Handler) -> Handler:
        for mnemonic in mnemonics:
            HANDLERS[mnemonic] = function
        return function

    return register


class Emulator:
    """The emulator of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.vm = vcpu.vm
        self.cache = DecodeCache()
        self.insn: Insn | None = None
        self.gpr = vcpu.gpr
        self.q = vcpu.q
        #: Guest-physical address of the nested page fault, as far as it names the operand; -1 otherwise.
        self.gpa = -1
        #: MMIO data read so far by this instruction.
        self.reads: list[bytes] = []
        self._position = 0
        self._fragments: list[tuple[int, int]] = []
        self._arrived: list[bytes] = []
        self._writes: list[tuple[int, bytes]] = []
        self.pio_data = b""
        self.pio_out: tuple[int, int, bytes] | None = None
        #: The guest's forced-emulation prefix came before the instruction.
        self.forced = False
        #: Set by a handler that has put RIP where it belongs.
        self.rip_written = False
        #: Set by a handler that has completed a branch.
        self.branched = False
        self.shadow_after = 0
        #: Set by a handler that leaves for userspace by itself.
        self.exit_to_userspace = False
        self._pio_request = (0, 0, 0)
        #: The VMCB's count of fetched bytes and the bytes, and the instructions they decoded to in 64-bit code.
        self.assist = vcpu.b[V.INSN_LEN : V.INSN_BYTES + 15]
        self._assisted: dict[bytes, Insn] = {}

    # --- entry -------------------------------------------------------------------------------------

    def fetch(self) -> bytes:
        """Return the instruction bytes at RIP, read through the guest's page tables."""
        vcpu = self.vcpu
        address = svm.linear_rip(vcpu)
        access = PFERR_FETCH | (PFERR_USER if vcpu.b[V.CPL] == 3 else 0)
        first = min(_MAX_INSN, PAGE_SIZE - (address & (PAGE_SIZE - 1)))
        code = read_guest(self.vm, walk(vcpu, address, access).gpa, first)
        if code is None:
            return b""
        if first < _MAX_INSN:
            try:
                self.cache.get(code, svm.code_bitness(vcpu))
            except ValueError:
                rest = read_guest(self.vm, walk(vcpu, address + first, access).gpa, _MAX_INSN - first)
                code += rest or b""
        return code

    def instruction_length(self) -> int:
        """Return the length of the instruction at RIP, 0 if it can't be had."""
        try:
            return self.cache.get(self.fetch(), svm.code_bitness(self.vcpu)).length
        except (ValueError, X86Exception):
            return 0

    def emulate(self, gpa: int = -1, code: bytes = b"", *, forced: bool = False) -> int:
        """Emulate the instruction at RIP; returns 1 to go on, 0 to leave for userspace.

        ``code`` are the bytes that the processor fetched, if any (decode assists, APM vol. 2, 15.33).
        ``forced``: the guest asked for it by the forced-emulation prefix. Then the processor hasn't looked for
        breakpoints, and an instruction that the emulator doesn't know is #UD.
        """
        vcpu = self.vcpu
        self.forced = forced
        bitness = svm.code_bitness(vcpu)
        try:
            if code:
                try:
                    insn = self.cache.get(code, bitness)
                except ValueError:
                    insn = self.cache.get(self.fetch(), bitness)
            else:
                insn = self.cache.get(self.fetch(), bitness)
        except X86Exception as exception:
            inject_emulated_exception(vcpu, exception)
            return 1
        except ValueError:
            return self.unknown()
        if forced:
            result = check_code_breakpoint(vcpu)
            if result is not None:
                return result
        self.insn = insn
        self.gpa = -1 if insn.two_memory or insn.rep or insn.repne else gpa
        self.reads.clear()
        self.pio_data = b""
        vcpu.stat_insn_emulation += 1
        return self._run(insn)

    def _run(self, insn: Insn) -> int:
        vcpu = self.vcpu
        function = insn.run
        if function is None:
            function = HANDLERS.get(insn.mnemonic)
            if function is None:
                return self.unknown()
            insn.run = function
        while True:
            self._position = 0
            self._writes.clear()
            self.pio_out = None
            self.rip_written = False
            self.branched = False
            self.shadow_after = 0
            self.exit_to_userspace = False
            try:
                function(self, insn)
                break
            except Retry:
                continue
            except IoNeeded as needed:
                self._fragments = needed.fragments
                self._arrived = []
                self._exit_read()
                return 0
            except PioNeeded as needed_port:
                self._pio_request = (needed_port.port, needed_port.size, needed_port.count)
                io.exit_io(vcpu, abi.KVM_EXIT_IO_IN, needed_port.size, needed_port.port, needed_port.count)
                vcpu.complete_userspace_io = self._complete_pio_in
                return 0
            except X86Exception as exception:
                inject_emulated_exception(vcpu, exception)
                return 1
            except Unhandleable:
                return self.failed()
        result = 1
        if not self.rip_written:
            result = io.advance(vcpu, insn.length)
        elif self.branched:
            result = io.advance(vcpu, 0)  # RF and TF are the same as for other instructions
        if self.shadow_after:
            vcpu.b[V.INT_STATE_B] = V.INTERRUPT_SHADOW
        if self._writes:
            self._exit_write()
            return 0
        if self.pio_out is not None:
            port, size, data = self.pio_out
            vcpu.run_b[io.PIO_DATA_OFFSET : io.PIO_DATA_OFFSET + len(data)] = data
            io.exit_io(vcpu, abi.KVM_EXIT_IO_OUT, size, port, len(data) // size)
            return 0
        return 0 if self.exit_to_userspace else result

    def unknown(self) -> int:
        """The instruction can't be decoded, or has no handler."""
        if not self.forced:
            return self.failed()
        self.vcpu.stat_insn_emulation_fail += 1
        queue_exception(self.vcpu, abi.UD_VECTOR)
        return 1

    def failed(self) -> int:
        """Emulation failed: #UD for user code, KVM_EXIT_INTERNAL_ERROR for the kernel's."""
        vcpu = self.vcpu
        vcpu.stat_insn_emulation_fail += 1
        queue_exception(vcpu, abi.UD_VECTOR)
        if vcpu.b[V.CPL] == 0 or self.vm.exit_on_emulation_error:
            vcpu.exception.clear()
            vcpu.internal_error_emulation()
            return 0
        return 1

    # --- userspace completions ---------------------------------------------------------------------

    def _exit_read(self) -> None:
        gpa, size = self._fragments[len(self._arrived)]
        io.exit_mmio(self.vcpu, gpa, size, 0, 0)
        self.vcpu.complete_userspace_io = self._complete_read

    def _complete_read(self, vcpu: Vcpu) -> int:
        size = self._fragments[len(self._arrived)][1]
        self._arrived.append(bytes(self.vcpu.run_b[io.RUN_MMIO_DATA : io.RUN_MMIO_DATA + size]))
        if len(self._arrived) < len(self._fragments):
            self._exit_read()
            return 0
        self.reads.append(b"".join(self._arrived))
        assert self.insn is not None
        return self._run(self.insn)

    def _exit_write(self) -> None:
        gpa, data = self._writes.pop(0)
        io.exit_mmio(self.vcpu, gpa, len(data), int.from_bytes(data, "little"), 1)
        self.vcpu.complete_userspace_io = self._complete_write

    def _complete_write(self, vcpu: Vcpu) -> int:
        if self._writes:
            self._exit_write()
            return 0
        return 1

    def _complete_pio_in(self, vcpu: Vcpu) -> int:
        _, size, count = self._pio_request
        self.pio_data = bytes(self.vcpu.run_b[io.PIO_DATA_OFFSET : io.PIO_DATA_OFFSET + size * count])
        assert self.insn is not None
        return self._run(self.insn)

    # --- the fast path for loads and stores --------------------------------------------------------

    def mmio(self, gpa: int) -> int:
        """Emulate the access of an MMIO exit at ``gpa``: plain loads and stores here, the rest by emulate().

        The instruction's bytes are those that the processor fetched (decode assists, APM vol. 2, 15.33).
        """
        vcpu = self.vcpu
        assist = self.assist.tobytes()
        code64 = vcpu.efer & EFER_LMA and vcpu.w[CS_ATTRIB] & SEG_L
        insn = self._assisted.get(assist) if code64 else None
        if insn is None:
            code = assist[1 : 1 + assist[0]]
            try:
                insn = self.cache.get(code, svm.code_bitness(vcpu))
            except ValueError:
                return self.emulate(gpa, code)
            if code64:
                if len(self._assisted) > _ASSIST_ENTRIES:
                    self._assisted.clear()
                self._assisted[assist] = insn
        plan = insn.mmio
        offset = gpa & 0xFFF
        if plan is None or gpa < 0:
            return self.emulate(gpa, insn.code)
        is_write, size, operand = plan
        if offset + size > PAGE_SIZE or (not offset and self._linear_hint(insn) & 0xFFF):
            return self.emulate(gpa, insn.code)  # the access crosses into or out of the page
        vcpu.stat_insn_emulation += 1
        if is_write:
            value = operand.value if operand.kind == IMM else self.gpr[operand.index] >> operand.shift
            value &= (1 << size * 8) - 1
            handled = kernel_mmio_write(vcpu, gpa, size, value)
            result = advance(vcpu, insn.length)
            if handled:
                return result
            vcpu.stat_mmio_exits += 1
            exit_mmio(vcpu, gpa, size, value, 1)
            return 0
        value_read = kernel_mmio_read(vcpu, gpa, size)
        if value_read is not None:
            self._load(operand, value_read)
            return advance(vcpu, insn.length)
        vcpu.stat_mmio_exits += 1
        exit_mmio(vcpu, gpa, size, 0, 0)
        self.insn = insn
        vcpu.complete_userspace_io = self._complete_load
        return 0

    def _load(self, operand: Operand, value: int) -> None:
        index, size = operand.index, operand.size
        if size >= 4:
            self.gpr[index] = value
        else:
            mask = ((1 << size * 8) - 1) << operand.shift
            self.gpr[index] = self.gpr[index] & ~mask | (value << operand.shift & mask)

    def _complete_load(self, vcpu: Vcpu) -> int:
        insn = self.insn
        assert insn is not None and insn.mmio is not None
        _, size, operand = insn.mmio
        value = self.vcpu.run_q[io.RUN_MMIO_DATA_Q] & (1 << size * 8) - 1
        self._load(operand, value)
        return advance(self.vcpu, insn.length)

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

    def _linear_hint(self, insn: Insn) -> int:
        return self.effective_address(insn) + self.q[(insn.segment >> 3) + 1] & _U64

    def linearize(self, segment: int, offset: int, size: int, *, write: bool) -> int:
        """Return the linear address, after the checks of its segment (#GP or #SS)."""
        vcpu = self.vcpu
        fault = X86Exception(abi.SS_VECTOR if segment == V.SS_OFFSET else abi.GP_VECTOR, 0)
        if vcpu.is_64bit_code():
            address = offset
            if segment in _SEGMENTS_WITH_BASE_64:
                address = address + self.q[(segment >> 3) + 1] & _U64
            la57 = bool(vcpu.cr4 >> 12 & 1)
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
        last = offset + size - 1
        if attrib & 0xC == 4:  # expand-down data
            limit = 0xFFFF_FFFF if attrib & V.SEG_DB else 0xFFFF
            if offset <= seg.limit or last > limit:
                raise fault
        elif last > seg.limit:
            raise fault
        return offset + seg.base & 0xFFFF_FFFF

    # --- memory ------------------------------------------------------------------------------------

    def access(self, write: bool, implicit: bool = False) -> int:
        """Return the PFERR_* bits of a data access at the guest's privilege level."""
        access = PFERR_WRITE if write else 0
        if implicit:
            return access | PFERR_IMPLICIT
        return access | PFERR_USER if self.vcpu.b[V.CPL] == 3 else access

    def _pages(self, address: int, size: int, access: int) -> list[tuple[int, int]]:
        """Translate an access: (gpa, size) per page; the last fault wins nothing, the first is raised."""
        hint = self.gpa
        in_page = PAGE_SIZE - (address & (PAGE_SIZE - 1))
        if size <= in_page:
            if hint >= 0 and (hint ^ address) & (PAGE_SIZE - 1) == 0:
                return [(hint, size)]
            return [(walk(self.vcpu, address, access).gpa, size)]
        mask = _U64 if self.vcpu.is_64bit_code() else 0xFFFF_FFFF
        return [
            (walk(self.vcpu, address, access).gpa, in_page),
            (walk(self.vcpu, address + in_page & mask, access).gpa, size - in_page),
        ]

    def read_linear(self, address: int, size: int, *, implicit: bool = False) -> bytes:
        """Return ``size`` bytes (at most a page) at a linear address."""
        parts = []
        for gpa, length in self._pages(address, size, self.access(False, implicit)):
            data = read_guest(self.vm, gpa, length)
            parts.append(self._read_mmio(gpa, length) if data is None else data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_mmio(self, gpa: int, size: int) -> bytes:
        if self._position < len(self.reads):
            data = self.reads[self._position]
            self._position += 1
            return data
        fragments = []
        kernel = []
        for at in range(gpa, gpa + size, 8):
            length = min(8, gpa + size - at)
            value = io.kernel_mmio_read(self.vcpu, at, length)
            if value is None:
                fragments.append((at, length))
            else:
                kernel.append(value.to_bytes(length, "little"))
        if fragments:
            raise IoNeeded(fragments)
        data = b"".join(kernel)
        self.reads.append(data)
        self._position += 1
        return data

    def write_linear(self, address: int, data: bytes, *, implicit: bool = False) -> None:
        """Write ``data`` (at most a page) at a linear address; MMIO leaves for userspace afterwards."""
        pages = self._pages(address, len(data), self.access(True, implicit))
        at = 0
        for gpa, length in pages:
            piece = data[at : at + length]
            at += length
            if not write_guest(self.vm, gpa, piece):
                self._write_mmio(gpa, piece)

    def _write_mmio(self, gpa: int, data: bytes) -> None:
        for at in range(0, len(data), 8):
            piece = data[at : at + 8]
            if not io.kernel_mmio_write(self.vcpu, gpa + at, len(piece), int.from_bytes(piece, "little")):
                self._writes.append((gpa + at, piece))

    def cmpxchg_linear(self, address: int, old: bytes, new: bytes) -> None:
        """Replace ``old`` by ``new`` atomically where the memory allows it; :class:`Retry` if it changed."""
        pages = self._pages(address, len(old), self.access(True))
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

    def page_has_memory(self, gpa: int) -> bool:
        """Tell whether a memory slot backs ``gpa``."""
        return self.vm.memslots.gfn_to_memslot(gpa >> PAGE_SHIFT) is not None

    # --- operands ----------------------------------------------------------------------------------

    def read(self, op: Operand) -> int:
        """Return an operand's value as an unsigned number of its size."""
        kind = op.kind
        if kind == REG:
            return self.gpr[op.index] >> op.shift & (1 << op.size * 8) - 1
        if kind == MEM:
            assert self.insn is not None
            address = self.memory_address(self.insn, op.size, write=False)
            return int.from_bytes(self.read_linear(address, op.size), "little")
        if kind == IMM:
            return op.value
        if kind == SEG:
            return self.vcpu.w[op.index >> 1]
        if kind == XMM:
            offset = 0x200 + op.index * 32
            return int.from_bytes(self.vcpu.rb[offset : offset + 16], "little")
        if kind == MMX:
            return self.vcpu.rq[(0x180 + op.index * 16) >> 3]
        if kind in (CR, DR):
            raise Unhandleable
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
            offset = 0x200 + op.index * 32
            self.vcpu.rb[offset : offset + 16] = (value & (1 << 128) - 1).to_bytes(16, "little")
        elif kind == MMX:
            at = (0x180 + op.index * 16) >> 3
            self.vcpu.rq[at] = value & _U64
            self.vcpu.rw[(0x180 + op.index * 16 + 8) >> 1] = 0xFFFF
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
        self.gpr[4] = self.gpr[4] & ~mask & _U64 | rsp

    def peek(self, size: int, depth: int = 0) -> int:
        """Return ``size`` bytes of the stack, ``depth`` bytes above its top."""
        mask = self.stack_mask()
        address = self.linearize(V.SS_OFFSET, self.gpr[4] + depth & mask, size, write=False)
        return int.from_bytes(self.read_linear(address, size), "little")

    def drop(self, size: int) -> None:
        """Remove ``size`` bytes from the stack."""
        mask = self.stack_mask()
        self.gpr[4] = self.gpr[4] & ~mask & _U64 | (self.gpr[4] + size & mask)

    def jump(self, target: int, size: int) -> None:
        """Set RIP to ``target``, truncated to ``size`` bytes and checked."""
        vcpu = self.vcpu
        if vcpu.is_64bit_code():
            target &= _U64
            if not is_canonical(target, la57=bool(vcpu.cr4 >> 12 & 1)):
                raise gp()
        else:
            target &= (1 << size * 8) - 1 if size < 8 else 0xFFFF_FFFF
            if target > vcpu.vmcb.segment(V.CS_OFFSET).limit:
                raise gp()
        self.q[V.RIP] = target
        vcpu.b[V.INT_STATE_B] = 0
        self.rip_written = self.branched = True
