# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator: what the guest does to MMIO, and the few instructions that KVM carries out itself.

A handler reads its operands first, computes, and writes last. When an operand is MMIO that userspace has to
read, the handler is left by :class:`IoNeeded`; after KVM_RUN is called again the instruction starts over and finds
what it has read (:attr:`Emulator.reads`). Nothing of the guest's state has changed until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import EFER_LMA, run_page
from softkvm.kvm.memory.guest_memory import read_guest
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86 import io
from softkvm.kvm.x86.debug import check_code_breakpoint
from softkvm.kvm.x86.emulate.access import Access, IoNeeded, Read, Retry
from softkvm.kvm.x86.emulate.operands import IMM, DecodeCache, Insn, Operand
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, inject_emulated_exception, queue_exception
from softkvm.kvm.x86.io import advance, exit_mmio, kernel_mmio_read, kernel_mmio_write
from softkvm.kvm.x86.mmu.paging import PFERR_FETCH, PFERR_USER, walk
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.vmcb import CS_ATTRIB, SEG_L

if TYPE_CHECKING:
    from collections.abc import Callable

    from softkvm.kvm.x86.state import VcpuState as Vcpu

    Handler = Callable[["Emulator", Insn], None]

_MAX_INSN: Final = 15
_ASSIST_ENTRIES: Final = 1024

#: Handler of every mnemonic, filled in by the ``emulate_*`` modules when ``emulate_table`` imports them.
HANDLERS: dict[str, Handler] = {}


class PioNeeded(Exception):
    """Data have to be read from a port by userspace."""

    def __init__(self, port: int, size: int, count: int) -> None:
        super().__init__(port, size, count)
        self.port = port
        self.size = size
        self.count = count


def handler(*mnemonics: str) -> Callable[[Handler], Handler]:
    """Register a function as the handler of ``mnemonics``."""

    def register(function: Handler) -> Handler:
        for mnemonic in mnemonics:
            HANDLERS[mnemonic] = function
        return function

    return register


class Emulator(Access):
    """The emulator of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__(vcpu)
        self.cache = DecodeCache()
        #: What userspace has to read and what has come of it, as :class:`IoNeeded` has them.
        self._fragments: list[tuple[int, int]] = []
        self._parts: list[bytes | None] = []
        self.pio_data = b""
        self.pio_out: tuple[int, int, bytes] | None = None
        #: The guest's forced-emulation prefix came before the instruction.
        self.forced = False
        self.shadow_after = 0
        #: The instruction holds the single step's trap off (APM vol. 2, 13.1.4).
        self.step_inhibited = False
        #: The instruction is a step for the debugger, once userspace has had its stores.
        self._stepped = False
        #: Set by a handler that leaves for userspace by itself.
        self.exit_to_userspace = False
        self._pio_request = (0, 0, 0)
        #: RIP of the instruction that waits for userspace's data.
        self._waiting_rip = 0
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

    def report_failure(self) -> None:
        """Describe a failed emulation to userspace, with the instruction bytes if they can be read."""
        vcpu = self.vcpu
        try:
            code = self.fetch()
        except X86Exception:
            code = b""
        vcpu.internal_error(abi.KVM_INTERNAL_ERROR_EMULATION, (0, 0, 0))
        if code:
            # ndata counts flags and the 16 bytes of length and instruction
            vcpu.run_q[run_page.EMULATION_FAILURE_FLAGS_Q] = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
            vcpu.run_b[run_page.EMULATION_FAILURE_INSN_SIZE_B] = len(code)
            start = run_page.EMULATION_FAILURE_INSN_BYTES_B
            vcpu.run_b[start : start + len(code)] = code

    def instruction_length(self) -> int:
        """Return the length of the instruction at RIP, 0 if it can't be had."""
        try:
            return self.cache.get(self.fetch(), svm.code_bitness(self.vcpu)).length
        except (ValueError, X86Exception):
            return 0

    def emulate(self, code: bytes = b"", *, forced: bool = False) -> int:
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
        self.begin(insn)
        self.pio_data = b""
        vcpu.stat_insn_emulation += 1
        return self._run(insn)

    def _run(self, insn: Insn) -> int:
        vcpu = self.vcpu
        stepping = vcpu.q[V.RFLAGS] & abi.X86_EFLAGS_TF  # as it was: an instruction that sets TF isn't trapped itself
        function = insn.run
        if function is None:
            function = HANDLERS.get(insn.mnemonic)
            if function is None:
                return self.unknown()
            insn.run = function
        while True:
            self.restart()
            self.pio_out = None
            self.shadow_after = 0
            self.step_inhibited = False
            self.exit_to_userspace = False
            try:
                function(self, insn)
                break
            except Retry:
                self.reads.clear()
                continue
            except IoNeeded as needed:
                self._fragments = needed.fragments
                self._parts = needed.parts
                self._exit_read()
                return 0
            except PioNeeded as needed_port:
                self._pio_request = (needed_port.port, needed_port.size, needed_port.count)
                io.exit_io(vcpu, abi.KVM_EXIT_IO_IN, needed_port.size, needed_port.port, needed_port.count)
                self._wait(self._complete_pio_in)
                return 0
            except X86Exception as exception:
                inject_emulated_exception(vcpu, exception)
                return 1
            except Unhandleable:
                return self.failed()
        self._retire(insn)
        result = 1
        if stepping and not self.exit_to_userspace and not self.step_inhibited:
            result = svm.do_singlestep(vcpu)  # a step of a repeated instruction is one for the debugger, too
        if self.writes and self._exit_write():
            self._stepped = not result
            return 0
        if self.pio_out is not None:
            port, size, data = self.pio_out
            vcpu.run_b[run_page.PIO_DATA_OFFSET : run_page.PIO_DATA_OFFSET + len(data)] = data
            io.exit_io(vcpu, abi.KVM_EXIT_IO_OUT, size, port, len(data) // size)
            if not result:
                vcpu.complete_userspace_io = svm.do_singlestep
            return 0
        return 0 if self.exit_to_userspace else result

    def _retire(self, insn: Insn) -> None:
        """Advance RIP, end RF and the interrupt shadow, unless the handler has done so or the instruction goes on."""
        vcpu = self.vcpu
        if not self.rip_written:
            rip = vcpu.q[V.RIP] + insn.length
            vcpu.q[V.RIP] = rip if vcpu.is_64bit_code() else rip & 0xFFFF_FFFF
        if self.branched or not self.rip_written:
            vcpu.b[V.INT_STATE_B] = V.INTERRUPT_SHADOW if self.shadow_after else 0
            if not self.rf_loaded:
                vcpu.q[V.RFLAGS] &= ~abi.X86_EFLAGS_RF

    def mov_ss_shadow(self) -> None:
        """SS was loaded: neither interrupts nor a single step's trap come before the next instruction's end."""
        self.shadow_after = 1
        self.step_inhibited = True

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
            vcpu.emulator.report_failure()
            return 0
        return 1

    # --- userspace completions ---------------------------------------------------------------------

    def _wait(self, completion: Callable[[Vcpu], int]) -> None:
        """Leave for userspace to have the instruction completed with its data."""
        self._waiting_rip = self.vcpu.q[V.RIP]
        self.vcpu.complete_userspace_io = completion

    def _resume(self) -> None:
        """The instruction that was decoded is what is completed: a RIP that userspace has set meanwhile is lost.

        As with the kernel's, whose emulator writes back the RIP of its own that it had before the exit. Other registers
        are taken as they are (``emulate_regs_need_sync_from_vcpu``).
        """
        self.vcpu.q[V.RIP] = self._waiting_rip

    def _exit_read(self) -> None:
        self.vcpu.stat_mmio_exits += 1
        gpa, size = self._fragments[0]
        exit_mmio(self.vcpu, gpa, size, 0, 0)
        self._wait(self._complete_read)

    def _complete_read(self, vcpu: Vcpu) -> int:
        self._resume()
        _, size = self._fragments.pop(0)
        parts = self._parts
        parts[parts.index(None)] = bytes(self.vcpu.run_b[run_page.MMIO_DATA_B : run_page.MMIO_DATA_B + size])
        if self._fragments:
            self._exit_read()
            return 0
        self.reads.append(Read(*self.reading, b"".join(part for part in parts if part is not None)))
        assert self.insn is not None
        return self._run(self.insn)

    def _exit_write(self) -> bool:
        """Do the writes to devices in the kernel; False when none is left, True at the first for userspace."""
        while self.writes:
            gpa, data = self.writes.pop(0)
            value = int.from_bytes(data, "little")
            if not kernel_mmio_write(self.vcpu, gpa, len(data), value):
                self.vcpu.stat_mmio_exits += 1
                exit_mmio(self.vcpu, gpa, len(data), value, 1)
                self.vcpu.complete_userspace_io = self._complete_write
                return True
        return False

    def _complete_write(self, vcpu: Vcpu) -> int:
        if self._exit_write():
            return 0
        return svm.do_singlestep(vcpu) if self._stepped else 1

    def _complete_pio_in(self, vcpu: Vcpu) -> int:
        self._resume()
        _, size, count = self._pio_request
        self.pio_data = bytes(self.vcpu.run_b[run_page.PIO_DATA_OFFSET : run_page.PIO_DATA_OFFSET + size * count])
        assert self.insn is not None
        return self._run(self.insn)

    # --- the fast path for loads and stores --------------------------------------------------------

    def mmio(self, gpa: int) -> int:
        """Emulate the access of an MMIO exit at ``gpa``: plain loads and stores here, the rest by emulate().

        A plain load or store has no other access than that of its operand, so ``gpa`` (-1: it was the guest's page
        tables that faulted) is the operand's address. The instruction's bytes are those that the processor fetched
        (decode assists, APM vol. 2, 15.33).
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
                return self.emulate(code)
            if code64:
                if len(self._assisted) > _ASSIST_ENTRIES:
                    self._assisted.clear()
                self._assisted[assist] = insn
        plan = insn.mmio
        offset = gpa & 0xFFF
        if plan is None or gpa < 0:
            return self.emulate(insn.code)
        is_write, size, operand = plan
        if offset + size > PAGE_SIZE or (not offset and self.linear_hint(insn) & 0xFFF):
            return self.emulate(insn.code)  # the access crosses into or out of the page
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
            if not result:
                vcpu.complete_userspace_io = svm.do_singlestep
            return 0
        apic = vcpu.apic
        if vcpu.mmio_bus.table.ranges or (apic is not None and gpa - offset == apic.base_address):
            value_read = kernel_mmio_read(vcpu, gpa, size)
            if value_read is not None:
                self._load(operand, value_read)
                return advance(vcpu, insn.length)
        vcpu.stat_mmio_exits += 1
        exit_mmio(vcpu, gpa, size, 0, 0)
        self.insn = insn
        self._waiting_rip = vcpu.q[V.RIP]
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
        """:meth:`_resume`, the load, and on to the next instruction."""
        insn = self.insn
        assert insn is not None and insn.mmio is not None
        _, size, operand = insn.mmio
        self._load(operand, vcpu.run_q[run_page.MMIO_DATA_Q] & (1 << size * 8) - 1)
        return advance(vcpu, insn.length, self._waiting_rip)
