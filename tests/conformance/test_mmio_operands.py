# SPDX-License-Identifier: Apache-2.0
"""Emulated instructions that make more than one access: each reaches its own address (APM vol. 3).

Stack, operand and descriptors have the same offset in their pages here: what a nested page fault reports fits all.
"""

import pytest
from tests.support.conformance import CODE, GDT, STACK, Guest

from softkvm import abi

MMIO = 0x2000_0000
_PATTERN = bytes(range(0x11, 0x19))


def mmio(guest: Guest, data: bytes) -> list[tuple[int, bytes | None]]:
    """Run to HLT; reads of the device give *data*. Returns the accesses: address, and what was written."""
    seen: list[tuple[int, bytes | None]] = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        run = guest.kvm_run
        length = run.mmio.len
        seen.append((run.mmio.phys_addr, bytes(run.mmio.data[:length]) if run.mmio.is_write else None))
        run.mmio.data[:length] = data[:length]
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    return seen


def test_pop_into_mmio_takes_the_value_from_the_stack(guest: Guest) -> None:
    guest.long("8f0425 00000020 f4")  # pop qword [MMIO]; hlt
    guest.write(STACK, b"\xaa" * 8)
    assert mmio(guest, _PATTERN) == [(MMIO, b"\xaa" * 8)]
    assert guest.cpu.get_regs().rsp == STACK + 8


def test_push_of_mmio_goes_to_the_stack(guest: Guest) -> None:
    guest.long("ff3425 f80f0020 f4")  # push qword [MMIO + 0xff8]; hlt
    assert mmio(guest, _PATTERN) == [(MMIO + 0xFF8, None)]
    assert guest.memory[STACK - 8 : STACK] == _PATTERN


def test_a_call_through_mmio_leaves_its_return_address_on_the_stack(guest: Guest) -> None:
    guest.long("ff1425 f80f0020")  # call [MMIO + 0xff8]
    guest.write(CODE + 0x100, b"\xf4")
    assert mmio(guest, (CODE + 0x100).to_bytes(8, "little")) == [(MMIO + 0xFF8, None)]
    assert guest.word(STACK - 8, 8) == CODE + 7


def test_a_stack_in_mmio_takes_the_value_from_memory(guest: Guest) -> None:
    guest.long("ff3425 f8600000 f4")  # push qword [0x60f8]; hlt
    guest.write(0x60F8, _PATTERN)
    regs = guest.cpu.get_regs()
    regs.rsp = MMIO + 0x100
    guest.cpu.set_regs(regs)
    assert mmio(guest, b"\xff" * 8) == [(MMIO + 0xF8, _PATTERN)]


@pytest.mark.parametrize("selector", [0x10, 0x13])
def test_a_segment_loaded_from_mmio_has_its_descriptor_from_the_table(guest: Guest, selector: int) -> None:
    guest.long("8e0425 10000020 f4")  # mov es, [MMIO + 0x10]; hlt: the descriptor is at offset 0x10 of its page, too
    guest.write(GDT + 0x10, (0x00CF_F300_1234_FFFF).to_bytes(8, "little"))
    sregs = guest.cpu.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = GDT, 0x17
    guest.cpu.set_sregs(sregs)
    assert mmio(guest, selector.to_bytes(2, "little")) == [(MMIO + 0x10, None)]
    es = guest.cpu.get_sregs().es
    assert (es.selector, es.base, es.dpl) == (selector, 0x1234, 3)


def test_a_string_is_compared_with_the_other_one_in_mmio(guest: Guest) -> None:
    guest.long("be00600000 bf00000020 a6 f4")  # mov esi, 0x6000; mov edi, MMIO; cmpsb; hlt
    guest.write(0x6000, b"\x11")
    assert mmio(guest, b"\x11") == [(MMIO, None)]
    assert guest.cpu.get_regs().rflags & abi.X86_EFLAGS_ZF


def test_both_strings_in_mmio_are_read_in_their_order(guest: Guest) -> None:
    guest.long("be00000020 bf00100020 a7 f4")  # mov esi, MMIO; mov edi, MMIO + 0x1000; cmpsd; hlt
    answers = iter((b"\1\0\0\0", b"\2\0\0\0"))
    seen = []
    while guest.run() == abi.KVM_EXIT_MMIO:
        seen.append(guest.kvm_run.mmio.phys_addr)
        guest.kvm_run.mmio.data[:4] = next(answers)
    assert seen == [MMIO, MMIO + 0x1000]
    assert guest.cpu.get_regs().rflags & abi.X86_EFLAGS_CF  # 1 - 2 borrows


def test_x87_words_are_stored_in_mmio(guest: Guest) -> None:
    guest.long("dbe3 d93c25 00000020 dd3c25 02000020 f4")  # fninit; fnstcw [MMIO]; fnstsw [MMIO + 2]; hlt
    assert mmio(guest, _PATTERN) == [(MMIO, b"\x7f\x03"), (MMIO + 2, b"\0\0")]


@pytest.mark.parametrize(("code", "name"), [("0fb4", "fs"), ("0fb5", "gs")])
def test_a_far_pointer_is_loaded_from_mmio(guest: Guest, code: str, name: str) -> None:
    guest.long(code + "0425 10000020 f4")  # lfs or lgs eax, [MMIO + 0x10]; hlt
    guest.write(GDT + 0x10, (0x00CF_F300_1234_FFFF).to_bytes(8, "little"))
    sregs = guest.cpu.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = GDT, 0x17
    guest.cpu.set_sregs(sregs)
    assert mmio(guest, bytes.fromhex("78563412 1000")) == [(MMIO + 0x10, None)]
    segment = getattr(guest.cpu.get_sregs(), name)
    assert (guest.cpu.get_regs().rax, segment.selector, segment.base) == (0x1234_5678, 0x10, 0x1234)
