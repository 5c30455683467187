# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN and its exits: port I/O, MMIO, HLT, shutdown, EINTR (KVM API 4.10 and section 5)."""

import errno
import threading
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, TABLES, Guest, pio_data, refused, set_pio_data
from tests.support.threads import beside

from softkvm import abi

MMIO = 0x20_0000

# --- port I/O --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [("ee", 1, 0x44), ("ef", 2, 0x3344), ("66ef", 4, 0x11223344)],
    ids=["byte", "word", "dword"],
)
def test_out(guest: Guest, code: str, size: int, value: int) -> None:
    guest.real("66b844332211 ba3412" + code + "f4")  # mov eax, 0x11223344; mov dx, 0x1234; out; hlt
    run = guest.expect(abi.KVM_EXIT_IO)
    assert (run.io.direction, run.io.size, run.io.port, run.io.count) == (abi.KVM_EXIT_IO_OUT, size, 0x1234, 1)
    assert pio_data(guest.cpu) == value.to_bytes(size, "little")
    guest.expect(abi.KVM_EXIT_HLT)


@pytest.mark.parametrize(
    ("code", "size", "result"),
    [("ec", 1, 0x112233AA), ("ed", 2, 0x1122BBAA), ("66ed", 4, 0xDDCCBBAA)],
    ids=["byte", "word", "dword"],
)
def test_in(guest: Guest, code: str, size: int, result: int) -> None:
    guest.real("66b844332211 ba3412" + code + "f4")  # mov eax, 0x11223344; mov dx, 0x1234; in; hlt
    run = guest.expect(abi.KVM_EXIT_IO)
    assert (run.io.direction, run.io.size, run.io.port, run.io.count) == (abi.KVM_EXIT_IO_IN, size, 0x1234, 1)
    set_pio_data(guest.cpu, b"\xaa\xbb\xcc\xdd"[:size])
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == result


def test_in_to_eax_clears_the_upper_half_in_long_mode(guest: Guest) -> None:
    guest.long("48b8 8877665544332211 66ba3412 ed f4")  # mov rax, imm64; mov dx, 0x1234; in eax, dx; hlt
    guest.expect(abi.KVM_EXIT_IO)
    set_pio_data(guest.cpu, b"\x01\x02\x03\x04")
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == 0x04030201


def all_output(guest: Guest) -> list[bytes]:
    """Collect what string outputs give, in exits of any count."""
    chunks = []
    while guest.run() == abi.KVM_EXIT_IO:
        size = guest.kvm_run.io.size
        data = pio_data(guest.cpu)
        chunks += [data[n : n + size] for n in range(0, len(data), size)]
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    return chunks


@pytest.mark.parametrize(("code", "size"), [("6e", 1), ("6f", 2), ("666f", 4)], ids=["byte", "word", "dword"])
@pytest.mark.parametrize("backward", [False, True], ids=["up", "down"])
def test_rep_outs(guest: Guest, code: str, size: int, backward: bool) -> None:
    data = bytes(range(1, 1 + 6 * size))
    guest.write(0x6000, data)
    start = 0x6000 + (5 * size if backward else 0)
    direction = "fd" if backward else "fc"
    # std or cld; mov si, start; mov cx, 6; mov dx, 0x500; rep outs; hlt
    guest.real(direction + "be" + start.to_bytes(2, "little").hex() + "b90600 ba0005 f3" + code + "f4")
    chunks = [data[n : n + size] for n in range(0, len(data), size)]
    assert all_output(guest) == (chunks[::-1] if backward else chunks)
    regs = guest.cpu.get_regs()
    assert (regs.rcx, regs.rsi) == (0, 0x6000 - size if backward else 0x6000 + 6 * size)


@pytest.mark.parametrize(("code", "size"), [("6c", 1), ("6d", 2), ("666d", 4)], ids=["byte", "word", "dword"])
def test_rep_ins(guest: Guest, code: str, size: int) -> None:
    # cld; mov di, 0x6000; mov cx, 5; mov dx, 0x500; rep ins; hlt
    guest.real("fc bf0060 b90500 ba0005 f3" + code + "f4")
    given = b""
    while guest.run() == abi.KVM_EXIT_IO:
        run = guest.kvm_run
        assert (run.io.direction, run.io.size) == (abi.KVM_EXIT_IO_IN, size)
        data = bytes(len(given) + n & 0xFF for n in range(size * run.io.count))
        set_pio_data(guest.cpu, data)
        given += data
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert len(given) >= 5 * size
    assert guest.memory[0x6000 : 0x6000 + 5 * size] == given[: 5 * size]
    regs = guest.cpu.get_regs()
    assert (regs.rcx, regs.rdi) == (0, 0x6000 + 5 * size)


def test_a_rep_outs_of_no_elements_does_nothing(guest: Guest) -> None:
    guest.real("fc b90000 ba0005 f36e f4")  # cld; mov cx, 0; mov dx, 0x500; rep outsb; hlt
    guest.expect(abi.KVM_EXIT_HLT)


def test_userspace_may_move_rip_instead_of_completing(guest: Guest) -> None:
    guest.real("e410 90 90 f4")  # in al, 0x10; nop; nop; hlt
    guest.expect(abi.KVM_EXIT_IO)
    guest.cpu.set_regs(abi.kvm_regs(rip=CODE + 4, rflags=abi.X86_EFLAGS_FIXED, rax=0x55))
    set_pio_data(guest.cpu, b"\x99")
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rip == CODE + 5


# --- MMIO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [
        ("880425 00002000", 1, 0x88),  # mov [0x200000], al
        ("66890425 00002000", 2, 0x7788),
        ("890425 00002000", 4, 0x55667788),
        ("48890425 00002000", 8, 0x1122334455667788),
        ("c70425 00002000 44332211", 4, 0x11223344),  # mov dword [0x200000], imm32
        ("480fc30425 00002000", 8, 0x1122334455667788),  # movnti
    ],
)
def test_mmio_stores(guest: Guest, code: str, size: int, value: int) -> None:
    guest.long("48b8 8877665544332211" + code + "f4")  # mov rax, imm64; store; hlt
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (MMIO, size, 1)
    assert bytes(run.mmio.data[:size]) == value.to_bytes(size, "little")
    guest.expect(abi.KVM_EXIT_HLT)


@pytest.mark.parametrize(
    ("code", "size", "result"),
    [
        ("8a0425 00002000", 1, 0x1111_1111_1111_11F1),  # mov al, [0x200000]
        ("668b0425 00002000", 2, 0x1111_1111_1111_F2F1),
        ("8b0425 00002000", 4, 0xF4F3_F2F1),
        ("488b0425 00002000", 8, 0xF8F7_F6F5_F4F3_F2F1),
        ("0fb60425 00002000", 1, 0xF1),  # movzx eax, byte
        ("480fbf0425 00002000", 2, 0xFFFF_FFFF_FFFF_F2F1),  # movsx rax, word
        ("48630425 00002000", 4, 0xFFFF_FFFF_F4F3_F2F1),  # movsxd rax, dword
    ],
)
def test_mmio_loads(guest: Guest, code: str, size: int, result: int) -> None:
    guest.long("48b8 1111111111111111" + code + "f4")
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (MMIO, size, 0)
    run.mmio.data[:size] = [0xF1 + n for n in range(size)]
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == result


def test_a_read_modify_write_reads_then_writes(guest: Guest) -> None:
    guest.long("830425 00002000 05 f4")  # add dword [0x200000], 5; hlt
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.len, run.mmio.is_write) == (4, 0)
    run.mmio.data[:4] = [0xFE, 0xFF, 0xFF, 0xFF]
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (MMIO, 4, 1)
    assert bytes(run.mmio.data[:4]) == b"\x03\0\0\0"
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rflags & 1, "the carry"


def test_a_load_across_a_page_is_two_exits(guest: Guest) -> None:
    guest.long("8b0425 fe0f2000 f4")  # mov eax, [0x200ffe]; hlt
    seen = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        seen.append((run.mmio.phys_addr, run.mmio.len, run.mmio.is_write))
        run.mmio.data[:2] = [0xA0 + len(seen), 0xB0 + len(seen)]
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert seen == [(0x20_0FFE, 2, 0), (0x20_1000, 2, 0)]
    assert guest.cpu.get_regs().rax == 0xB2A2_B1A1


def test_a_store_across_a_page_is_two_exits(guest: Guest) -> None:
    guest.long("c70425 fd0f2000 44332211 f4")  # mov dword [0x200ffd], 0x11223344; hlt
    seen = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        assert run.mmio.is_write
        seen.append((run.mmio.phys_addr, bytes(run.mmio.data[: run.mmio.len])))
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert seen == [(0x20_0FFD, b"\x44\x33\x22"), (0x20_1000, b"\x11")]


def test_a_store_half_in_memory_is_split(guest: Guest) -> None:
    guest.region(1, 0x20_0000, 4096, offset=0x4000)
    guest.long("c70425 fe0f2000 44332211 f4")  # mov dword [0x200ffe], 0x11223344; hlt
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.phys_addr, bytes(run.mmio.data[: run.mmio.len])) == (0x20_1000, b"\x22\x11")
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.word(0x4FFE, 2) == 0x3344


def test_rep_movs_from_mmio(guest: Guest) -> None:
    # mov esi, 0x200000; mov edi, 0x6000; mov ecx, 3; rep movsd; hlt
    guest.long("be00002000 bf00600000 b903000000 f3a5 f4")
    seen = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        assert (run.mmio.len, run.mmio.is_write) == (4, 0)
        seen.append(run.mmio.phys_addr)
        run.mmio.data[:4] = [len(seen)] * 4
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert seen == [MMIO, MMIO + 4, MMIO + 8]
    assert guest.memory[0x6000:0x600C] == b"\1" * 4 + b"\2" * 4 + b"\3" * 4


def test_rep_stos_to_mmio(guest: Guest) -> None:
    # mov edi, 0x200000; mov al, 0x5a; mov ecx, 4; rep stosb; hlt
    guest.long("bf00002000 b05a b904000000 f3aa f4")
    seen = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        seen.append((run.mmio.phys_addr, run.mmio.len, run.mmio.data[0]))
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert seen == [(MMIO + n, 1, 0x5A) for n in range(4)]


def test_push_of_an_mmio_operand(guest: Guest) -> None:
    guest.long("ff3425 00002000 f4")  # push qword [0x200000]; hlt
    run = guest.expect(abi.KVM_EXIT_MMIO)
    assert (run.mmio.len, run.mmio.is_write) == (8, 0)
    run.mmio.data[:] = [1, 2, 3, 4, 5, 6, 7, 8]
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.word(guest.cpu.get_regs().rsp, 8) == 0x0807060504030201


def test_cmpxchg_on_mmio(guest: Guest) -> None:
    # mov eax, 7; mov ecx, 9; cmpxchg [0x200000], ecx; hlt
    guest.long("b807000000 b909000000 0fb10c25 00002000 f4")
    writes = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        if run.mmio.is_write:
            writes.append(bytes(run.mmio.data[: run.mmio.len]))
        else:
            run.mmio.data[:4] = [7, 0, 0, 0]
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert writes == [b"\x09\0\0\0"]
    assert guest.cpu.get_regs().rflags >> 6 & 1, "ZF"


# --- HLT, shutdown, EINTR --------------------------------------------------------------------------


def test_hlt_without_chips_is_an_exit_behind_the_instruction(guest: Guest) -> None:
    guest.real("90 f4")
    run = guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rip == CODE + 2
    assert run.if_flag == 0


def test_if_flag_cr8_and_apic_base_are_reported(guest: Guest) -> None:
    guest.long("fb 90 f4")  # sti; nop; hlt
    sregs = guest.cpu.get_sregs()
    sregs.cr8 = 5
    guest.cpu.set_sregs(sregs)
    guest.kvm_run.cr8 = 5
    run = guest.expect(abi.KVM_EXIT_HLT)
    assert (run.if_flag, run.cr8, run.apic_base) == (1, 5, guest.cpu.get_sregs().apic_base)


def test_cr8_is_taken_from_the_run_page(guest: Guest) -> None:
    guest.long("440f20c0 f4")  # mov rax, cr8; hlt
    guest.kvm_run.cr8 = 6
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == 6


def test_a_triple_fault_is_a_shutdown(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("exceptions in long mode")
    guest.long("0f0b")  # ud2 without an IDT
    guest.expect(abi.KVM_EXIT_SHUTDOWN)


def test_immediate_exit_stays_in_force(guest: Guest) -> None:
    guest.real("b80100 f4")  # mov ax, 1; hlt
    guest.kvm_run.immediate_exit = 1
    for _ in range(2):
        refused(errno.EINTR, guest.cpu.run)
        assert guest.cpu.get_regs().rip == CODE
    guest.kvm_run.immediate_exit = 0
    guest.expect(abi.KVM_EXIT_HLT)


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
def test_immediate_exit_completes_the_instruction_before(guest: Guest, store: bool) -> None:
    # in al, 0x10; hlt or out 0x10, al; hlt
    guest.real(("e610" if store else "e410") + "f4")
    guest.expect(abi.KVM_EXIT_IO)
    if not store:
        set_pio_data(guest.cpu, b"\x77")
    guest.kvm_run.immediate_exit = 1
    refused(errno.EINTR, guest.cpu.run)
    regs = guest.cpu.get_regs()
    assert regs.rip == CODE + 2
    assert store or regs.rax == 0x77


def test_immediate_exit_completes_an_mmio_load(guest: Guest) -> None:
    guest.long("8b0425 00002000 f4")
    run = guest.expect(abi.KVM_EXIT_MMIO)
    run.mmio.data[:4] = [1, 2, 3, 4]
    run.immediate_exit = 1
    refused(errno.EINTR, guest.cpu.run)
    regs = guest.cpu.get_regs()
    assert (regs.rip, regs.rax) == (CODE + 7, 0x04030201)


def test_an_out_to_port_7e_has_moved_rip_before_the_exit(guest: Guest) -> None:
    guest.real("e67e f4")  # out 0x7e, al; hlt
    assert guest.expect(abi.KVM_EXIT_IO).io.port == 0x7E
    assert guest.cpu.get_regs().rip == CODE + 2
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rip == CODE + 3


def test_immediate_exit_reports_no_reason(guest: Guest) -> None:
    guest.real("f4")
    guest.kvm_run.exit_reason = abi.KVM_EXIT_UNKNOWN
    guest.kvm_run.immediate_exit = 1
    refused(errno.EINTR, guest.cpu.run)
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_UNKNOWN


def test_a_kick_ends_an_endless_loop(guest: Guest) -> None:
    guest.real("ebfe")  # jmp $
    with beside(threading.Timer(0.05, guest.cpu.kick)):
        refused(errno.EINTR, guest.cpu.run)
    assert guest.cpu.get_regs().rip == CODE
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_INTR


def test_a_kick_ends_hlt_with_chips(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True)
    guest.real("f4 f4", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    with beside(threading.Timer(0.05, guest.cpu.kick)):
        refused(errno.EINTR, guest.cpu.run)
    assert guest.cpu.get_mp_state().mp_state == abi.KVM_MP_STATE_HALTED


# --- from real through protected to long mode ------------------------------------------------------


def test_a_guest_goes_from_real_through_protected_to_long_mode(guest: Guest) -> None:
    gdt = b"".join(
        n.to_bytes(8, "little")
        for n in (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00AF_9B00_0000_FFFF)  # code32, data, code64
    )
    guest.write(0x900, gdt)
    guest.write(0x920, (len(gdt) - 1).to_bytes(2, "little") + (0x900).to_bytes(4, "little"))
    guest.identity_map()
    protected, long = CODE + 0x100, CODE + 0x200
    # lgdt [0x920]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:protected
    guest.write(CODE, bytes.fromhex("0f01162009 0f20c0 0c01 0f22c0 66ea") + protected.to_bytes(4, "little") + b"\x08\0")
    guest.write(
        protected,
        # mov ax, 16; mov ds, ax; mov ss, ax; mov al, 'P'; out 0xe9, al
        bytes.fromhex("66b81000 8ed8 8ed0 b050 e6e9")
        # mov eax, cr4; or eax, 0x20; mov cr4, eax; mov eax, TABLES; mov cr3, eax
        + bytes.fromhex("0f20e0 83c820 0f22e0 b8")
        + TABLES.to_bytes(4, "little")
        + bytes.fromhex("0f22d8")
        # mov ecx, 0xc0000080; rdmsr; or eax, 0x100; wrmsr; mov eax, cr0; or eax, 0x80000000; mov cr0, eax
        + bytes.fromhex("b9800000c0 0f32 0d00010000 0f30 0f20c0 0d00000080 0f22c0 ea")
        + long.to_bytes(4, "little")
        + b"\x18\0",  # jmp 24:long
    )
    # mov rax, 0x123456789abcdef0; mov r15, rax; mov al, 'L'; out 0xe9, al; hlt
    guest.write(long, bytes.fromhex("48b8f0debc9a78563412 4989c7 b04c e6e9 f4"))
    sregs = guest.cpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    guest.cpu.set_sregs(sregs)
    guest.cpu.set_regs(abi.kvm_regs(rip=CODE, rflags=abi.X86_EFLAGS_FIXED, rsp=0x8000))
    guest.expect(abi.KVM_EXIT_IO)
    assert pio_data(guest.cpu) == b"P"
    assert guest.cpu.get_sregs().cs.selector == 8
    guest.expect(abi.KVM_EXIT_IO)
    assert pio_data(guest.cpu) == b"L"
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().r15 == 0x1234_5678_9ABC_DEF0
    sregs = guest.cpu.get_sregs()
    assert (sregs.cs.selector, sregs.cs.l, sregs.efer & 0x500) == (24, 1, 0x500)


def test_paging_without_long_mode(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("paging outside long mode")
    guest.write(TABLES, (0x83).to_bytes(4, "little"))  # 4 MiB at 0
    guest.write(TABLES + 4, (0x83).to_bytes(4, "little"))  # and again at 4 MiB
    guest.write(0x6000, b"\x5a")
    guest.protected("a000604000 f4")  # mov al, [0x406000]; hlt
    sregs = guest.cpu.get_sregs()
    sregs.cr3, sregs.cr4, sregs.cr0 = TABLES, sregs.cr4 | 0x10, sregs.cr0 | 1 << 31
    guest.cpu.set_sregs(sregs)
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == 0x5A


def test_a_hypercall_that_does_not_exist_is_enosys(guest: Guest, needs: Callable[[str], None]) -> None:
    needs("hypercalls")
    guest.long("b863000000 0f01c1 f4")  # mov eax, 99; vmcall; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert guest.cpu.get_regs().rax == (1 << 64) - 1000  # -KVM_ENOSYS
