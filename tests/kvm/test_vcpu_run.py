# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN: exits for userspace and their completion, kicks, interrupts without in-kernel chips, debugging."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
import threading
from collections.abc import Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.forks import in_child
from tests.support.threads import running, until
from tests.support.tiny import CODE, DATA, IDT, MIB, STACK, Memory, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.state import BLOCKING, IN_GUEST_MODE
from softkvm.kvm.x86.svm.exits import EXIT_HANDLERS
from softkvm.kvm.x86.svm.vmcb import EXIT_NPF, EXIT_VINTR
from softkvm.kvm.x86.vcpu import Vcpu

MMIO = 0x1000_0000


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    yield machine
    machine.close()


def _io(tiny: Tiny) -> tuple[int, int, int, int, bytes]:
    io = tiny.vcpu.kvm_run.io
    data = bytes(tiny.vcpu.shared[io.data_offset : io.data_offset + io.size * io.count])
    return io.direction, io.size, io.port, io.count, data


def _mmio(tiny: Tiny) -> tuple[int, int, int, bytes]:
    mmio = tiny.vcpu.kvm_run.mmio
    return mmio.phys_addr, mmio.len, mmio.is_write, bytes(mmio.data[: mmio.len])


# --- port I/O ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size"),
    [(b"\xee", 1), (b"\x66\xef", 2), (b"\xef", 4)],  # out dx, al / ax / eax
)
def test_out_shows_port_size_and_data(tiny: Tiny, code: bytes, size: int) -> None:
    tiny.protected_mode().load(code + b"\xf4", rax=0x1122_3344, rdx=0x3F8)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert _io(tiny) == (abi.KVM_EXIT_IO_OUT, size, 0x3F8, 1, (0x1122_3344).to_bytes(4, "little")[:size])
    assert tiny.run_to_halt().rip == CODE + len(code) + 1


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [(b"\xec", 1, 0xFFFF_FFFF_FFFF_FFA1), (b"\x66\xed", 2, 0xFFFF_FFFF_FFFF_A2A1), (b"\xed", 4, 0xA4A3_A2A1)],
)
def test_in_takes_userspaces_data(tiny: Tiny, code: bytes, size: int, rax: int) -> None:
    tiny.long_mode().load(code + b"\xf4", rax=(1 << 64) - 1, rdx=0x60)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert _io(tiny)[:4] == (abi.KVM_EXIT_IO_IN, size, 0x60, 1)
    offset = tiny.vcpu.kvm_run.io.data_offset
    tiny.vcpu.shared[offset : offset + 4] = b"\xa1\xa2\xa3\xa4"
    assert tiny.run_to_halt().rax == rax


def test_userspace_may_move_rip_during_an_io_exit(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\xee\xf4", rdx=0x64)
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.load(b"\x90\x90\xf4")
    tiny.registers(rip=CODE + 1)
    assert tiny.run_to_halt().rip == CODE + 3


@pytest.mark.parametrize("code", [b"\xec", b"\xe4\x64", b"\x66\xed", b"\xed"])  # in al, dx; al, 0x64; eax, dx; ax, dx
def test_what_in_reads_is_not_loaded_once_userspace_has_moved_rip(tiny: Tiny, code: bytes) -> None:
    tiny.real_mode().load(code + b"\x90\xf4", rdx=0x64)
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.registers(rip=CODE + len(code), rax=0x1122_3344_5566_7788)
    tiny.vcpu.shared[tiny.vcpu.kvm_run.io.data_offset] = 0x99
    assert tiny.run_to_halt().rax == 0x1122_3344_5566_7788


def test_rep_outs_shows_all_elements_of_a_page_at_once(tiny: Tiny) -> None:
    tiny.memory.write(DATA, b"hello, world")
    tiny.protected_mode().load(b"\xf3\x6e\xf4", rsi=DATA, rcx=12, rdx=0xE9)
    seen = b""
    while (reason := tiny.run()) == abi.KVM_EXIT_IO:
        direction, size, port, _, data = _io(tiny)
        assert (direction, size, port) == (abi.KVM_EXIT_IO_OUT, 1, 0xE9)
        seen += data
    assert reason == abi.KVM_EXIT_HLT
    assert seen == b"hello, world"
    regs = tiny.vcpu.get_regs()
    assert (regs.rcx, regs.rsi) == (0, DATA + 12)


def test_rep_ins_fills_memory_across_a_page(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\xf3\x66\x6d\xf4", rdi=DATA + 0xFFC, rcx=5, rdx=0x1F0)
    values = iter(range(1, 100))
    while tiny.run() == abi.KVM_EXIT_IO:
        direction, size, port, count, _ = _io(tiny)
        assert (direction, size, port) == (abi.KVM_EXIT_IO_IN, 2, 0x1F0)
        offset = tiny.vcpu.kvm_run.io.data_offset
        tiny.vcpu.shared[offset : offset + 2 * count] = b"".join(
            next(values).to_bytes(2, "little") for _ in range(count)
        )
    assert tiny.memory.read(DATA + 0xFFC, 10) == b"".join(n.to_bytes(2, "little") for n in range(1, 6))
    assert tiny.vcpu.get_regs().rdi == DATA + 0xFFC + 10


def test_backwards_rep_outs_goes_down(tiny: Tiny) -> None:
    tiny.memory.write(DATA, b"abc")
    tiny.protected_mode().load(b"\xf3\x6e\xf4", rsi=DATA + 2, rcx=3, rdx=0xE9, rflags=0x402)
    seen = b""
    while tiny.run() == abi.KVM_EXIT_IO:
        seen += _io(tiny)[4]
    assert seen == b"cba"
    assert tiny.vcpu.get_regs().rsi == DATA - 1


# --- MMIO --------------------------------------------------------------------------------------


def test_mmio_store_and_load(tiny: Tiny) -> None:
    # mov [MMIO], ax; mov ecx, [MMIO+4]; hlt
    tiny.protected_mode().load(b"\x66\xa3\x00\x00\x00\x10\x8b\x0d\x04\x00\x00\x10\xf4", rax=0xBEEF)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny) == (MMIO, 2, 1, b"\xef\xbe")
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny)[:3] == (MMIO + 4, 4, 0)
    tiny.vcpu.kvm_run.mmio.data[:4] = [0x78, 0x56, 0x34, 0x12]
    assert tiny.run_to_halt().rcx == 0x1234_5678


def test_a_read_modify_write_of_mmio_is_a_read_and_a_write(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\x83\x0d\x00\x00\x00\x10\x01\xf4")  # or dword [MMIO], 1
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny)[:3] == (MMIO, 4, 0)
    tiny.vcpu.kvm_run.mmio.data[:4] = [0xF0, 0, 0, 0]
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny) == (MMIO, 4, 1, b"\xf1\0\0\0")
    tiny.run_to_halt()


def test_a_16_byte_access_is_two_exits_of_8(tiny: Tiny) -> None:
    tiny.long_mode().load(bytes.fromhex("0f1007 f30f7f4710 f4"), rdi=MMIO)  # movups xmm0,[rdi]; movdqu [rdi+16],xmm0
    for part in (0, 8):
        assert tiny.run() == abi.KVM_EXIT_MMIO
        assert _mmio(tiny)[:3] == (MMIO + part, 8, 0)
        tiny.vcpu.kvm_run.mmio.data[:] = list(range(part, part + 8))
    for part in (0, 8):
        assert tiny.run() == abi.KVM_EXIT_MMIO
        assert _mmio(tiny) == (MMIO + 16 + part, 8, 1, bytes(range(part, part + 8)))
    tiny.run_to_halt()


def test_an_access_from_ram_into_mmio_writes_both(tiny: Tiny) -> None:
    edge = 2 * MIB  # the end of memory
    tiny.long_mode().load(bytes.fromhex("488907f4"), rdi=edge - 3, rax=0x8877_6655_4433_2211)  # mov [rdi], rax
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny) == (edge, 5, 1, bytes.fromhex("4455667788"))
    tiny.run_to_halt()
    assert tiny.memory.read(edge - 3, 3) == bytes.fromhex("112233")


def test_an_access_from_ram_into_mmio_reads_both(tiny: Tiny) -> None:
    edge = 2 * MIB
    tiny.memory.write(edge - 3, b"\x11\x22\x33")
    tiny.long_mode().load(bytes.fromhex("488b07f4"), rdi=edge - 3)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny)[:3] == (edge, 5, 0)
    tiny.vcpu.kvm_run.mmio.data[:5] = [0x44, 0x55, 0x66, 0x77, 0x88]
    assert tiny.run_to_halt().rax == 0x8877_6655_4433_2211


def test_rep_movs_into_mmio_is_one_exit_per_element(tiny: Tiny) -> None:
    tiny.memory.write(DATA, bytes(range(16)))
    tiny.protected_mode().load(b"\xf3\xa5\xf4", rsi=DATA, rdi=MMIO, rcx=4)
    for n in range(4):
        assert tiny.run() == abi.KVM_EXIT_MMIO
        assert _mmio(tiny) == (MMIO + 4 * n, 4, 1, bytes(range(4 * n, 4 * n + 4)))
    assert tiny.run_to_halt().rcx == 0


def test_push_onto_an_mmio_stack(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\x50\xf4", rax=0x55, rsp=MMIO + 8)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert _mmio(tiny) == (MMIO + 4, 4, 1, b"\x55\0\0\0")
    assert tiny.run_to_halt().rsp == MMIO + 4


def test_popa_takes_registers_from_mmio(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\x61\xf4", rsp=MMIO)  # popad; hlt
    addresses = []
    while tiny.run() == abi.KVM_EXIT_MMIO:
        addresses.append(_mmio(tiny)[0])
        tiny.vcpu.kvm_run.mmio.data[:4] = [len(addresses)] * 4
    regs = tiny.vcpu.get_regs()
    assert sorted(addresses) == [MMIO + 4 * n for n in range(8)]
    read = {address: 0x0101_0101 * (n + 1) for n, address in enumerate(addresses)}
    assert [regs.rdi, regs.rsi, regs.rbp] == [read[MMIO + 4 * n] for n in range(3)]
    assert (regs.rax, regs.rsp) == (read[MMIO + 28], MMIO + 32)


def test_pusha_into_mmio_is_every_register(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\x60\xf4", rsp=MMIO + 32, rax=1, rcx=2, rdx=3, rbx=4, rbp=5, rsi=6, rdi=7)
    seen = {}
    while tiny.run() == abi.KVM_EXIT_MMIO:
        address, _, is_write, data = _mmio(tiny)
        assert is_write
        seen[address] = int.from_bytes(data, "little")
    assert [seen[MMIO + 4 * n] for n in range(8)] == [7, 6, 5, MMIO + 32, 4, 3, 2, 1]
    assert tiny.vcpu.get_regs().rsp == MMIO


@pytest.mark.parametrize("hole", ["stack", "LDT"])
def test_a_far_call_with_a_part_in_mmio_is_done_once_all_has_been_read(tiny: Tiny, hole: str) -> None:
    tiny.protected_mode()
    sregs = tiny.vcpu.get_sregs()
    sregs.ldt = abi.kvm_segment(base=MMIO if hole == "LDT" else DATA, limit=0xF, type=2, present=1, selector=0x18)
    tiny.vcpu.set_sregs(sregs)
    code = (0x00CF_9A00_0000_FFFF).to_bytes(8, "little")  # not accessed yet
    tiny.memory.write(DATA + 8, code)
    tiny.memory.write(CODE + 0x100, b"\xf4")
    stack = MMIO + 0x100 if hole == "stack" else STACK
    tiny.load(b"\x9a" + (CODE + 0x100).to_bytes(4, "little") + b"\x0c\0", rsp=stack)  # call 0xc:CODE + 0x100
    seen = []
    while tiny.run() == abi.KVM_EXIT_MMIO:
        address, length, is_write, data = _mmio(tiny)
        seen.append((address - MMIO, data if is_write else None))
        if not is_write:
            tiny.vcpu.kvm_run.mmio.data[:length] = list(code[:length])
    frame = [(CODE + 7).to_bytes(4, "little"), (8).to_bytes(4, "little")]
    if hole == "stack":
        assert seen == [(0xFC, frame[1]), (0xF8, frame[0])]
    else:
        assert seen == [(8, None), (13, b"\x9b")]  # the descriptor, and its accessed bit
        assert tiny.memory.read(STACK - 8, 8) == b"".join(frame)
    regs = tiny.vcpu.get_regs()
    assert (regs.rip, regs.rsp, tiny.vcpu.get_sregs().cs.selector) == (CODE + 0x101, stack - 8, 0xC)


def test_code_in_mmio_space_cannot_be_emulated(tiny: Tiny) -> None:
    tiny.protected_mode().load(b"\xf4")
    tiny.registers(rip=MMIO)
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR
    assert tiny.vcpu.kvm_run.internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION


# --- ending KVM_RUN ----------------------------------------------------------------------------


def test_immediate_exit_completes_io_and_runs_nothing(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\xec\x40\xf4", rdx=0x60, rax=0)  # in al, dx; inc ax; hlt
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.vcpu.shared[tiny.vcpu.kvm_run.io.data_offset] = 0x41
    tiny.vcpu.kvm_run.immediate_exit = 1
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert tiny.vcpu.get_regs().rax == 0x41
    assert tiny.vcpu.get_regs().rip == CODE + 1
    tiny.vcpu.kvm_run.immediate_exit = 0
    assert tiny.run_to_halt().rax == 0x42


def test_a_kick_ends_a_guest_that_loops(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\xeb\xfe")
    with running(tiny.vcpu) as other:
        until(lambda: tiny.vcpu.mode == IN_GUEST_MODE)
        tiny.vcpu.kick()
        assert isinstance(other.wait(), InterruptedError)
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_INTR


def test_a_kick_before_run_ends_exactly_one_run(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\xf4")
    tiny.vcpu.kick()
    tiny.vcpu.kick()
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    tiny.run_to_halt()


@pytest.mark.parametrize("code", ["ebfe", "fb f4 ebfc", "fa f4 ebfc"])  # jmp $; sti, hlt; cli, hlt
def test_closing_the_vm_ends_run_with_an_error(code: str) -> None:
    tiny = Tiny(irqchip=True, vcpus=2).real_mode()
    tiny.load(bytes.fromhex(code))
    halts = "f4" in code
    # The second waits for its start-up IPI.
    with running(tiny.vcpu) as first, running(tiny.vcpus[1]) as second:
        until(lambda: [vcpu.mode for vcpu in tiny.vcpus] == [BLOCKING if halts else IN_GUEST_MODE, BLOCKING])
        tiny.close()
        for other in (first, second):
            error = other.wait()
            assert error is not None and error.errno == errno.EIO
    with pytest.raises(OSError):
        tiny.vcpu.run()


def test_what_an_exit_finds_after_the_close_is_not_told_to_userspace(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny().real_mode()
    tiny.load(b"\xeb\xfe")  # whose fetch is the first nested fault
    handler = EXIT_HANDLERS[EXIT_NPF]

    def overtaken(vcpu: Vcpu) -> bool:
        tiny.close()
        assert not handler(vcpu), "the fetch from no memory ends KVM_RUN"
        return False

    monkeypatch.setitem(EXIT_HANDLERS, EXIT_NPF, overtaken)
    with pytest.raises(OSError, match="the VM is dead") as caught:
        tiny.vcpu.run()
    assert caught.value.errno == errno.EIO


def test_memory_may_be_unmapped_when_the_vm_is_closed_under_a_running_vcpu() -> None:
    tiny = Tiny()
    gpa = 64 * MIB
    extra = mmap.mmap(-1, MIB)
    tiny.vm.set_user_memory_region(
        abi.kvm_userspace_memory_region(
            slot=1,
            guest_phys_addr=gpa,
            memory_size=MIB,
            userspace_addr=ctypes.addressof(ctypes.c_char.from_buffer(extra)),
        ),
        extra,
    )
    tiny.protected_mode().load(b"\xff\x03\xeb\xfc", rbx=gpa)  # 1: inc dword [ebx]; jmp 1b
    with running(tiny.vcpu) as other:
        until(lambda: extra[0])
        with pytest.raises(BufferError):
            extra.close()
        tiny.close()
        extra.close()
        error = other.wait()
        assert error is not None and error.errno == errno.EIO


def test_a_triple_fault_is_shutdown(tiny: Tiny) -> None:
    tiny.protected_mode()
    sregs = tiny.vcpu.get_sregs()
    sregs.idt.limit = 0
    tiny.vcpu.set_sregs(sregs)
    tiny.load(b"\x0f\x0b")
    assert tiny.run() == abi.KVM_EXIT_SHUTDOWN


def test_an_impossible_vmcb_is_fail_entry(tiny: Tiny) -> None:
    tiny.long_mode().load(b"\xf4")
    tiny.vcpu.d[0x58 // 4] = 0  # ASID 0 (APM vol. 2, 15.5.1)
    assert tiny.run() == abi.KVM_EXIT_FAIL_ENTRY
    assert tiny.vcpu.kvm_run.fail_entry.hardware_entry_failure_reason == (1 << 64) - 1


# --- interrupts with chips in userspace --------------------------------------------------------


def _vector_table(tiny: Tiny) -> None:
    tiny.real_mode()
    sregs = tiny.vcpu.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT, 0x3FF
    tiny.vcpu.set_sregs(sregs)
    tiny.memory.write(IDT + 4 * 0x21, (0x2000).to_bytes(4, "little"))
    tiny.memory.write(0x2000, b"\xb3\x77\xcf")  # mov bl, 0x77; iret


def test_an_interrupt_is_taken_when_the_guest_allows_it(tiny: Tiny) -> None:
    _vector_table(tiny)
    tiny.load(b"\xfb\x90\x90\xf4", rbx=0)  # sti; nop; nop; hlt
    tiny.vcpu.interrupt(0x21)
    with pytest.raises(OSError) as info:
        tiny.vcpu.interrupt(0x22)
    assert info.value.errno == errno.EEXIST
    assert tiny.run_to_halt().rbx == 0x77


def test_the_interrupt_window_opens_when_the_guest_sets_if(tiny: Tiny) -> None:
    _vector_table(tiny)
    tiny.load(b"\x90\xfb\x90\x90\xf4", rbx=0)
    run = tiny.vcpu.kvm_run
    run.request_interrupt_window = 1
    assert tiny.run() == abi.KVM_EXIT_IRQ_WINDOW_OPEN
    assert (run.ready_for_interrupt_injection, run.if_flag) == (1, 1)
    assert tiny.vcpu.get_regs().rip == CODE + 3  # behind the shadow of STI
    run.request_interrupt_window = 0
    tiny.vcpu.interrupt(0x21)
    assert tiny.run_to_halt().rbx == 0x77


def test_bad_vectors_are_refused(tiny: Tiny) -> None:
    with pytest.raises(OSError) as info:
        tiny.vcpu.interrupt(256)
    assert info.value.errno == errno.EINVAL


def test_an_nmi_is_blocked_while_one_is_handled() -> None:
    tiny = Tiny(irqchip=True)
    _vector_table(tiny)
    # The handler stores a count, so that nesting would show: inc [DATA]; out; iret
    tiny.memory.write(IDT + 4 * 2, (0x2000).to_bytes(4, "little"))
    tiny.memory.write(0x2000, b"\x43\xe6\x10\x43\xcf")  # inc bx; out 0x10, al; inc bx; iret
    tiny.load(b"\xe6\x20\x90\x90\x90\xe6\x30", rbx=0)
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.vcpu.nmi()
    assert tiny.run() == abi.KVM_EXIT_IO
    assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rbx) == (0x10, 1)
    assert tiny.vcpu.get_vcpu_events().nmi.masked
    tiny.vcpu.nmi()
    tiny.vcpu.nmi()  # only one is remembered while blocked
    assert tiny.run() == abi.KVM_EXIT_IO
    assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rbx) == (0x10, 3)
    assert tiny.run() == abi.KVM_EXIT_IO
    assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rbx) == (0x30, 4)
    assert not tiny.vcpu.get_vcpu_events().nmi.masked
    tiny.close()


# --- debugging ---------------------------------------------------------------------------------


def _debug(tiny: Tiny, control: int, dr: dict[int, int] | None = None) -> None:
    debug = abi.kvm_guest_debug(control=control | abi.KVM_GUESTDBG_ENABLE)
    for n, value in (dr or {}).items():
        debug.arch.debugreg[n] = value
    tiny.vcpu.set_guest_debug(debug)


def test_single_step_stops_behind_every_instruction(tiny: Tiny) -> None:
    code = b"\x40\x0f\xa2\x90\xe6\x10\x43\xf4"  # inc ax; cpuid; nop; out; inc bx; hlt
    tiny.real_mode().load(code)
    _debug(tiny, abi.KVM_GUESTDBG_SINGLESTEP)
    stops = []
    while (reason := tiny.run()) in (abi.KVM_EXIT_DEBUG, abi.KVM_EXIT_IO):
        if reason == abi.KVM_EXIT_DEBUG:
            assert tiny.vcpu.kvm_run.debug.arch.exception == abi.DB_VECTOR
            assert tiny.vcpu.kvm_run.debug.arch.dr6 & 1 << 14
            stops.append(tiny.vcpu.kvm_run.debug.arch.pc - CODE)
    assert stops[:5] == [1, 3, 4, 6, 7]
    assert not tiny.vcpu.get_regs().rflags & 0x100


def test_a_hardware_breakpoint_stops_before_its_instruction(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\x40\x40\x40\xf4", rax=0)
    _debug(tiny, abi.KVM_GUESTDBG_USE_HW_BP, {0: CODE + 2, 7: 0x402})
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    arch = tiny.vcpu.kvm_run.debug.arch
    assert (arch.exception, arch.pc, arch.dr6 & 0xF) == (abi.DB_VECTOR, CODE + 2, 1)
    assert tiny.vcpu.get_regs().rax == 2


def test_a_software_breakpoint_is_userspaces(tiny: Tiny) -> None:
    tiny.real_mode().load(b"\x40\xcc\x40\xf4", rax=0)
    _debug(tiny, abi.KVM_GUESTDBG_USE_SW_BP)
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    arch = tiny.vcpu.kvm_run.debug.arch
    assert (arch.exception, arch.pc) == (abi.BP_VECTOR, CODE + 1)


@pytest.mark.parametrize("code", [b"\x0f\x21\xc0", b"\x0f\x23\xc0"])  # mov eax, dr0; mov dr0, eax
def test_the_debuggers_general_detect_stops_before_an_access_of_debug_registers(tiny: Tiny, code: bytes) -> None:
    # kvm.rst: the debugger's DR7 is the processor's; selftests' debug_regs expects DR6.BD, volume 2, 13.1.1.4
    tiny.real_mode().load(b"\x40" + code + b"\x40\xf4", rax=0)
    _debug(tiny, abi.KVM_GUESTDBG_USE_HW_BP, {7: 0x400 | 1 << 13})
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    arch = tiny.vcpu.kvm_run.debug.arch
    assert (arch.exception, arch.pc, arch.dr6) == (abi.DB_VECTOR, CODE + 1, 0xFFFF_2FF0)
    tiny.vcpu.set_guest_debug(abi.kvm_guest_debug(control=0))
    assert not tiny.vcpu.get_debugregs().dr7 & 1 << 13
    assert tiny.run() == abi.KVM_EXIT_HLT


def test_the_guests_debug_registers_survive_the_debuggers(tiny: Tiny) -> None:
    regs = abi.kvm_debugregs(dr6=0xFFFF_0FF0, dr7=0x403)
    regs.db[0] = 0x1234
    tiny.vcpu.set_debugregs(regs)
    _debug(tiny, abi.KVM_GUESTDBG_USE_HW_BP, {0: 0x9999, 7: 0x402})
    tiny.vcpu.set_guest_debug(abi.kvm_guest_debug(control=0))
    after = tiny.vcpu.get_debugregs()
    assert (after.db[0], after.dr7) == (0x1234, 0x403)


# --- skipping instructions ---------------------------------------------------------------------


@pytest.mark.parametrize("nrips", [True, False])
@pytest.mark.parametrize(
    "instruction",
    ["0fa2", "660fa2", "f3662e0fa2", "2e2e2e2e0fa2"],  # CPUID with redundant prefixes
)
def test_an_intercepted_instruction_is_skipped_by_its_whole_length(nrips: bool, instruction: str) -> None:
    tiny = Tiny(params=Params(nrips=nrips))
    code = bytes.fromhex(instruction)
    tiny.protected_mode().load(code + b"\xf4", rax=0)
    regs = tiny.run_to_halt()
    assert regs.rip == CODE + len(code) + 1
    assert regs.rbx == int.from_bytes(b"Auth", "little")
    tiny.close()


@pytest.mark.parametrize("nrips", [True, False])
def test_skipping_ends_the_interrupt_shadow(nrips: bool) -> None:
    tiny = Tiny(params=Params(nrips=nrips))
    tiny.real_mode().load(b"\xfb\x0f\xa2\xe6\x10\xf4")  # sti; cpuid; out
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_vcpu_events().interrupt.shadow == 0
    tiny.close()


def test_a_wrmsr_that_faults_does_not_advance() -> None:
    tiny = Tiny().long_mode()
    tiny.gate64(13, 0x2000)
    tiny.memory.write(0x2000, b"\x5d\x5d\xf4")  # pop rbp (error code); pop rbp (rip); hlt
    tiny.load(b"\x90\x0f\x30\xf4", rcx=0x1234_5678)
    assert tiny.run_to_halt().rbp == CODE + 1
    tiny.close()


def test_a_guest_goes_from_real_through_protected_to_long_mode(tiny: Tiny) -> None:
    """The modes in one piece of code, by the guest's own MOV CR, WRMSR and far jumps."""
    tiny.long_mode()  # for its page tables and GDT
    tiny.close()
    guest = Tiny()
    guest.memory.write(0, tiny.memory.read(0, 0x50000))
    gdt = b"".join(
        x.to_bytes(8, "little") for x in (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00AF_9B00_0000_FFFF)
    )
    guest.memory.write(0x3000, gdt)
    guest.memory.write(0x3100, b"\x1f\x00\x00\x30\x00\x00")
    real = bytes.fromhex("0f011600 31 0f20c0 0c01 0f22c0 66ea 00110000 0800".replace(" ", ""))
    guest.memory.write(CODE, real)
    protected = bytes.fromhex(
        "66b81000 8ed8 8ed0"  # mov ax, 0x10; mov ds, ax; mov ss, ax
        "b820000000 0f22e0"  # mov eax, 0x20 (PAE); mov cr4, eax
        "b800000400 0f22d8"  # mov eax, 0x40000; mov cr3, eax
        "b9800000c0 0f32 0d00010000 0f30"  # EFER.LME
        "0f20c0 0d00000080 0f22c0"  # CR0.PG
        "ea 00120000 1800".replace(" ", "")
    )
    guest.memory.write(0x1100, protected)
    guest.memory.write(0x1200, bytes.fromhex("48b8efcdab8967452301 f4"))  # mov rax, imm64; hlt
    guest.real_mode().load(real)
    regs = guest.run_to_halt()
    assert regs.rax == 0x0123_4567_89AB_CDEF
    sregs = guest.vcpu.get_sregs()
    assert sregs.efer & 0x500 == 0x500 and sregs.cs.l == 1
    guest.close()


def test_a_halted_vcpu_sleeps_until_its_interrupt() -> None:
    tiny = Tiny(irqchip=True)
    _vector_table(tiny)
    tiny.load(b"\xfb\xf4\xe6\x10", rbx=0)  # sti; hlt; out
    lapic = tiny.vcpu.apic
    assert lapic is not None
    lapic.set_spiv(0x1FF)
    with running(tiny.vcpu) as other:
        until(lambda: tiny.vcpu.mode == BLOCKING)
        assert tiny.vcpu.mp_state == abi.KVM_MP_STATE_HALTED
        lapic.accept_irq(0, 0x21)
        assert other.wait() is None
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rbx == 0x77
    tiny.close()


def test_memory_given_to_a_vm_may_be_read_only_for_a_while(tiny: Tiny) -> None:
    extra = Memory(2 * MIB)
    tiny.slot(5, 8 * MIB, 2 * MIB, extra.address)
    tiny.protected_mode().load(b"\xa2\x00\x00\x80\x00\xf4", rax=7)
    tiny.run_to_halt()
    assert extra.read(0, 1) == b"\x07"
    assert STACK < 2 * MIB


def test_asking_for_the_state_of_a_running_vcpu_resets_nothing() -> None:
    tiny = Tiny(irqchip=True)
    tiny.protected_mode().load(b"\xfe\x03\xeb\xfc", rbx=DATA)  # 1: inc byte [ebx]; jmp 1b
    seen = []

    def ask() -> None:  # as an exit handler may, in the middle of KVM_RUN
        assert tiny.vcpu.apic is not None
        tiny.vcpu.apic.pending_events |= 1  # INIT, for KVM_RUN to take
        seen.append(tiny.vcpu.get_mp_state().mp_state)
        seen.append(tiny.vcpu.apic.pending_events)
        tiny.vcpu.apic.pending_events = 0
        tiny.vcpu.kick()

    tiny.vcpu.call_soon(ask)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert seen == [abi.KVM_MP_STATE_RUNNABLE, 1]
    tiny.close()


# --- INIT --------------------------------------------------------------------------------------


def test_init_ends_what_kvm_writes_to_the_guests_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(irqchip=True)
    enabled = {
        abi.MSR_KVM_SYSTEM_TIME_NEW: 0x5000 | abi.KVM_MSR_ENABLED,
        abi.MSR_KVM_STEAL_TIME: 0x5040 | abi.KVM_MSR_ENABLED,
        abi.MSR_KVM_PV_EOI_EN: 0x5080 | abi.KVM_MSR_ENABLED,
    }
    assert tiny.vcpu.set_msrs(enabled) == 3
    tiny.vcpu.vcpu_reset(True)
    assert tiny.vcpu.get_msrs(list(enabled)) == [0, 0, 0]
    tiny.close()


def test_init_leaves_the_debuggers_breakpoints_alone(tiny: Tiny) -> None:
    regs = abi.kvm_debugregs(dr6=0xFFFF_0FF0, dr7=0x401)
    regs.db[0] = 0x1234
    tiny.vcpu.set_debugregs(regs)
    _debug(tiny, abi.KVM_GUESTDBG_USE_HW_BP, {0: CODE + 1, 7: 0x402})
    tiny.vcpu.vcpu_reset(True)
    assert (tiny.vcpu.get_debugregs().db[0], tiny.vcpu.get_debugregs().dr7) == (0, 0x400)
    tiny.real_mode().load(b"\x90\x90\xf4")
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    assert tiny.vcpu.kvm_run.debug.arch.pc == CODE + 1


# --- steps and instructions that depend on quirks ------------------------------------------------


def test_a_repeated_store_to_mmio_stops_behind_every_step(tiny: Tiny) -> None:
    tiny.long_mode().load(b"\xf3\xaa\xf4", rcx=3, rdi=MMIO)  # rep stosb; hlt
    _debug(tiny, abi.KVM_GUESTDBG_SINGLESTEP)
    seen = []
    while (reason := tiny.run()) in (abi.KVM_EXIT_DEBUG, abi.KVM_EXIT_MMIO):
        if reason == abi.KVM_EXIT_DEBUG:
            seen.append((tiny.vcpu.kvm_run.debug.arch.pc - CODE, tiny.vcpu.get_regs().rcx))
    assert seen[:3] == [(0, 2), (0, 1), (2, 0)]


@pytest.mark.parametrize(
    ("code", "registers"),
    [
        (b"\x88\x07\x90\xf4", {"rdi": MMIO}),  # mov [rdi], al: by the decode assist
        (b"\x66\x0f\xd6\x07\x90\xf4", {"rdi": MMIO}),  # movq [rdi], xmm0: by the emulator
        (b"\x6e\x90\xf4", {"rsi": 0x6000, "rdx": 0x10}),  # outsb
    ],
)
def test_a_store_that_userspace_carries_out_is_a_step(tiny: Tiny, code: bytes, registers: dict[str, int]) -> None:
    tiny.long_mode().load(code, **registers)
    _debug(tiny, abi.KVM_GUESTDBG_SINGLESTEP)
    assert tiny.run() in (abi.KVM_EXIT_MMIO, abi.KVM_EXIT_IO)
    assert tiny.run() == abi.KVM_EXIT_DEBUG
    assert tiny.vcpu.kvm_run.debug.arch.pc == CODE + len(code) - 2


def test_an_out_to_port_7e_keeps_rip_once_the_quirk_is_off(tiny: Tiny) -> None:
    tiny.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_OUT_7E_INC_RIP)
    tiny.real_mode().load(b"\xe6\x7e\xf4")
    assert tiny.run() == abi.KVM_EXIT_IO
    assert tiny.vcpu.get_regs().rip == CODE
    assert tiny.run_to_halt().rip == CODE + 3


@pytest.mark.parametrize("instruction", [b"\x0f\x01\xc8", b"\x0f\x01\xc9"], ids=["monitor", "mwait"])
def test_mwait_is_undefined_without_its_cpuid_bit_once_the_quirk_is_off(tiny: Tiny, instruction: bytes) -> None:
    tiny.real_mode().load(instruction + b"\xf4")
    assert tiny.run_to_halt().rip == CODE + 4
    tiny.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    tiny.memory.write(4 * 6, (0x2000).to_bytes(4, "little"))
    tiny.memory.write(0x2000, b"\xf4")
    tiny.load(instruction + b"\xf4")
    assert tiny.run_to_halt().rip == 0x2001


def test_misc_enable_switches_mwait_in_cpuid_once_the_quirk_is_off(tiny: Tiny) -> None:
    misc_enable, mwait = 0x1A0, 1 << 18

    def has_mwait() -> bool:
        (leaf,) = (e for e in tiny.vcpu.get_cpuid2() if e.function == 1)
        return bool(leaf.ecx & 1 << 3)

    assert tiny.vcpu.set_msrs({misc_enable: 1 | mwait}) == 1
    assert not has_mwait()
    tiny.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    assert tiny.vcpu.set_msrs({misc_enable: 1 | mwait}) == 1
    assert has_mwait()
    assert tiny.vcpu.set_msrs({misc_enable: 1}) == 1
    assert not has_mwait()


# --- the thread's stack ------------------------------------------------------------------------


def _a_long_run_on_a_small_stack() -> None:
    """2000 times FSINCOS, of which each used to take some of the stack that came back with the last."""
    tiny = Tiny().protected_mode()
    loop = b"\xd9\xfb\xdd\xd8" * 30  # fsincos; fstp st(0)
    code = b"\xdb\xe3\xd9\xee\xbb" + struct.pack("<I", 100)  # fninit; fldz; mov ebx, 100
    tiny.load(code + loop + b"\x4b\x0f\x85" + struct.pack("<i", -len(loop) - 7) + b"\xf4")  # dec ebx; jnz; hlt
    registers: list[abi.kvm_regs] = []
    threading.stack_size(128 << 10)
    thread = threading.Thread(target=lambda: registers.append(tiny.run_to_halt()))
    thread.start()
    thread.join()
    assert [r.rbx for r in registers] == [0]
    tiny.close()


def test_a_long_run_of_slow_instructions_takes_a_small_stack_only() -> None:
    in_child(_a_long_run_on_a_small_stack)


def test_a_processor_that_waits_for_its_start_up_tells_so_when_something_else_ends_the_wait() -> None:
    """It is no part of KVM_RUN's loop: EAGAIN, for userspace to come again (``kvm_arch_vcpu_ioctl_run``)."""
    tiny = Tiny(irqchip=True, vcpus=2)
    waiting = tiny.vcpus[1]
    with running(waiting) as thread:
        until(lambda: waiting.mode == BLOCKING)
        waiting.call_soon(lambda: None)
        error = thread.wait()
    assert error is not None and error.errno == errno.EAGAIN
    tiny.close()


def test_a_window_that_is_asked_for_between_two_runs_is_told_of_with_a_split_irqchip() -> None:
    tiny = Tiny(split=24).real_mode()
    lapic = tiny.vcpu.get_lapic()
    lapic.regs[0x350:0x352] = [0, 7]  # LINT0: ExtINT
    tiny.vcpu.set_lapic(lapic)
    tiny.load(b"\xfa\xe6\x10\xfb\x90\xeb\xfe")  # cli; out; sti; nop; jmp to itself
    with watchdog(tiny.vcpu, 10):
        assert tiny.run() == abi.KVM_EXIT_IO
        tiny.vcpu.kvm_run.request_interrupt_window = 1
        assert tiny.run() == abi.KVM_EXIT_IRQ_WINDOW_OPEN
    assert tiny.vcpu.exit_counts[EXIT_VINTR] == 1, "the window, not an exit that came by"
    assert tiny.vcpu.kvm_run.ready_for_interrupt_injection == 1
    tiny.close()
