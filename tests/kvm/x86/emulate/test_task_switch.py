# SPDX-License-Identifier: Apache-2.0
"""Hardware task switches (APM vol. 2, 12.2 and 12.3; SDM vol. 3, chapter 9)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.segments import enter_ring_3
from tests.support.tiny import CODE, DATA_SELECTOR, GDT, IDT, STACK, Tiny

from softkvm import abi

OLD_TSS, NEW_TSS = 0x5000, 0x6000
OLD_SELECTOR, NEW_SELECTOR = 0x18, 0x20
TARGET = CODE + 0x100
_AVAILABLE, _BUSY = 0x89, 0x8B  # present, system, 32-bit TSS


def _descriptor(base: int, kind: int) -> int:
    return 0x67 | (base & 0xFF_FFFF) << 16 | kind << 40 | base >> 24 << 56


def _kind(tiny: Tiny, selector: int) -> int:
    return tiny.memory.read(GDT + selector + 5, 1)[0]


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    """Protected mode with two tasks; the second begins at TARGET, which halts."""
    machine = Tiny()
    machine.protected_mode()
    machine.memory.write(
        GDT + OLD_SELECTOR, struct.pack("<2Q", _descriptor(OLD_TSS, _BUSY), _descriptor(NEW_TSS, _AVAILABLE))
    )
    sregs = machine.vcpu.get_sregs()
    sregs.gdt.limit = 0x27
    sregs.tr = abi.kvm_segment(selector=OLD_SELECTOR, base=OLD_TSS, limit=0x67, type=11, present=1)
    machine.vcpu.set_sregs(sregs)
    selectors = (DATA_SELECTOR, 8, DATA_SELECTOR, DATA_SELECTOR, 0, 0, 0)  # ES, CS, SS, DS, FS, GS, LDTR
    tss = struct.pack("<7I 18I", *[0] * 7, 0, TARGET, 2, 0xA, 0xC, 0xD, 0xB, STACK, 0x5, 0x6, 0x7, *selectors)
    machine.memory.write(NEW_TSS, tss)
    machine.memory.write(TARGET, b"\xf4")
    yield machine
    machine.close()


def test_a_jump_to_a_tss_saves_one_task_and_loads_the_other(tiny: Tiny) -> None:
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR), rax=0x1111_2222, rflags=0x3)
    regs = tiny.run_to_halt()
    assert (regs.rip, regs.rsp, regs.rflags) == (TARGET + 1, STACK, 2)
    assert (regs.rax, regs.rcx, regs.rdx, regs.rbx) == (0xA, 0xC, 0xD, 0xB)
    saved = struct.unpack("<3I", tiny.memory.read(OLD_TSS + 32, 12))
    assert saved == (CODE + 7, 3, 0x1111_2222)  # EIP behind the jump, EFLAGS, EAX
    sregs = tiny.vcpu.get_sregs()
    assert sregs.tr.selector == NEW_SELECTOR and sregs.tr.base == NEW_TSS
    assert sregs.cr0 & abi.X86_CR0_TS
    assert (_kind(tiny, OLD_SELECTOR), _kind(tiny, NEW_SELECTOR)) == (_AVAILABLE, _BUSY)


def test_a_call_of_a_tss_nests_the_task_and_leaves_the_old_one_busy(tiny: Tiny) -> None:
    tiny.load(b"\x9a" + struct.pack("<IH", 0, NEW_SELECTOR))
    regs = tiny.run_to_halt()
    assert regs.rip == TARGET + 1
    assert regs.rflags & abi.X86_EFLAGS_NT
    assert struct.unpack("<H", tiny.memory.read(NEW_TSS, 2)) == (OLD_SELECTOR,)  # the link
    assert (_kind(tiny, OLD_SELECTOR), _kind(tiny, NEW_SELECTOR)) == (_BUSY, _BUSY)


def test_a_task_switch_disarms_the_local_breakpoints(tiny: Tiny) -> None:
    local, everywhere = 0x155, 0x2AA  # L0 to L3 and LE, G0 to G3 and GE
    debug = tiny.vcpu.get_debugregs()
    debug.db[0] = 0x10_0000
    debug.dr7 = 0x400 | local | everywhere
    tiny.vcpu.set_debugregs(debug)
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    assert tiny.run_to_halt().rip == TARGET + 1
    assert tiny.vcpu.get_debugregs().dr7 == 0x400 | everywhere


def test_null_selectors_of_a_task_have_no_base(tiny: Tiny) -> None:
    sregs = tiny.vcpu.get_sregs()
    sregs.fs.base = 0x1234_0000
    tiny.vcpu.set_sregs(sregs)
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    tiny.run_to_halt()
    fs = tiny.vcpu.get_sregs().fs
    assert (fs.selector, fs.base, fs.unusable) == (0, 0, 1)  # CPUID 80000021h EAX[6], NullSelectorClearsBase


def test_a_busy_task_is_a_general_protection_fault(tiny: Tiny) -> None:
    tiny.memory.write(GDT + NEW_SELECTOR + 5, bytes([_BUSY]))
    tiny.memory.write(TARGET + 0x10, b"\xf4")
    gate = (TARGET + 0x10) & 0xFFFF | 8 << 16 | 0x8E << 40
    tiny.memory.write(0x4000 + 8 * abi.GP_VECTOR, struct.pack("<Q", gate))
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    regs = tiny.run_to_halt()
    assert regs.rip == TARGET + 0x11
    assert struct.unpack("<2I", tiny.memory.read(regs.rsp, 8)) == (NEW_SELECTOR, CODE)


_GATE_SELECTOR = 0x28
_HOLE = 0xD000_0000


def _gates(tiny: Tiny, **handlers: int) -> None:
    """Set 32-bit interrupt gates to HLTs."""
    for name, address in handlers.items():
        vector = getattr(abi, f"{name.upper()}_VECTOR")
        gate = address & 0xFFFF | 8 << 16 | 0x8E << 40 | address >> 16 << 48
        tiny.memory.write(IDT + 8 * vector, struct.pack("<Q", gate))
        tiny.memory.write(address, b"\xf4")


def _task_gate(dpl: int, selector: int = NEW_SELECTOR) -> bytes:
    return struct.pack("<Q", selector << 16 | (0x85 | dpl << 5) << 40)


def _user_mode(tiny: Tiny) -> None:
    sregs = tiny.vcpu.get_sregs()
    enter_ring_3(sregs, ("cs", "ss", "ds", "es"))
    tiny.vcpu.set_sregs(sregs)


@pytest.mark.parametrize("opcode", [b"\xea", b"\x9a"], ids=["jmp", "call"])
def test_user_code_may_use_a_task_gate_whatever_the_tss_descriptors_dpl(tiny: Tiny, opcode: bytes) -> None:
    # SDM vol. 3, 8.2.5: "when a task gate is used, the DPL of the destination TSS descriptor is not used"
    tiny.memory.write(GDT + _GATE_SELECTOR, _task_gate(dpl=3))
    sregs = tiny.vcpu.get_sregs()
    sregs.gdt.limit = 0x2F
    tiny.vcpu.set_sregs(sregs)
    _user_mode(tiny)
    tiny.load(opcode + struct.pack("<IH", 0, _GATE_SELECTOR | 3))
    assert tiny.run_to_halt().rip == TARGET + 1
    assert struct.unpack("<I", tiny.memory.read(OLD_TSS + 32, 4)) == (CODE + 7,)


@pytest.mark.parametrize("nrips", [True, False])
def test_a_fault_of_the_switch_is_one_of_its_instruction(nrips: bool, tiny: Tiny) -> None:
    tiny.vcpu.nrips = tiny.vcpu.cpu.next_rip = nrips
    _gates(tiny, ts=TARGET + 0x10)
    tiny.memory.write(NEW_TSS, bytes(0x68))  # a null CS
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    tiny.memory.write(GDT + NEW_SELECTOR, struct.pack("<H", 0x66))  # and a limit that is too small
    regs = tiny.run_to_halt()
    assert regs.rip == TARGET + 0x11
    assert struct.unpack("<2I", tiny.memory.read(regs.rsp, 8)) == (NEW_SELECTOR, CODE)
    assert _kind(tiny, NEW_SELECTOR) == _AVAILABLE


@pytest.mark.parametrize("base", [_HOLE, 0x7FFF_F000])
def test_a_tss_without_memory_is_an_internal_error_and_nothing_happens(tiny: Tiny, base: int) -> None:
    tiny.memory.write(GDT + NEW_SELECTOR, struct.pack("<Q", _descriptor(base, _AVAILABLE)))
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR), rax=0x1234)
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR
    assert tiny.vcpu.kvm_run.internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    regs = tiny.vcpu.get_regs()
    assert (regs.rip, regs.rax, tiny.vcpu.get_sregs().tr.selector) == (CODE, 0x1234, OLD_SELECTOR)
    assert (_kind(tiny, OLD_SELECTOR), _kind(tiny, NEW_SELECTOR)) == (_BUSY, _AVAILABLE)
    assert tiny.memory.read(OLD_TSS, 0x68) == bytes(0x68)


def test_an_old_tss_without_memory_is_one_too(tiny: Tiny) -> None:
    sregs = tiny.vcpu.get_sregs()
    sregs.tr.base = _HOLE
    tiny.vcpu.set_sregs(sregs)
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR
    assert (_kind(tiny, OLD_SELECTOR), _kind(tiny, NEW_SELECTOR)) == (_BUSY, _AVAILABLE)


def test_a_new_stack_without_memory_is_an_internal_error(tiny: Tiny) -> None:
    tiny.memory.write(IDT + 8 * abi.GP_VECTOR, _task_gate(dpl=0))
    tiny.memory.write(NEW_TSS + 56, struct.pack("<I", _HOLE + 0x800))  # ESP, where the error code goes
    tiny.load(bytes.fromhex("66b8f8ff 8ed8"))  # mov ax, 0xfff8; mov ds, ax
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR


def test_nothing_that_was_emulated_before_leaks_into_a_task_switch(tiny: Tiny) -> None:
    # An access to a device whose page offset is that of the new TSS, then the switch.
    tiny.load(
        bytes.fromhex("810d")
        + struct.pack("<II", _HOLE | NEW_TSS & 0xFFF, 1)
        + b"\xea"
        + struct.pack("<IH", 0, NEW_SELECTOR)
    )
    assert tiny.run() == abi.KVM_EXIT_MMIO  # or dword [device], 1: the read
    tiny.vcpu.kvm_run.mmio.data[:4] = [0xF0] * 4
    assert tiny.run() == abi.KVM_EXIT_MMIO  # the write
    regs = tiny.run_to_halt()
    assert (regs.rip, regs.rax) == (TARGET + 1, 0xA)


def test_an_exception_through_a_task_gate_pushes_its_error_code_and_resumes_at_the_instruction(tiny: Tiny) -> None:
    tiny.memory.write(IDT + 8 * abi.GP_VECTOR, _task_gate(dpl=0))
    tiny.load(bytes.fromhex("66b8f8ff 8ed8"))  # mov ax, 0xfff8; mov ds, ax: beyond the GDT
    regs = tiny.run_to_halt()
    assert regs.rsp == STACK - 4
    assert struct.unpack("<I", tiny.memory.read(STACK - 4, 4)) == (0xFFF8,)
    eip, eflags = struct.unpack("<2I", tiny.memory.read(OLD_TSS + 32, 8))
    assert eip == CODE + 4
    assert eflags & abi.X86_EFLAGS_RF  # a fault (APM vol. 2, 15.14.1: EXITINFO2 bit 48)


def test_a_fault_on_the_way_to_the_task_makes_a_double_fault(tiny: Tiny) -> None:
    # #GP through a task gate whose TSS isn't present: #NP on #GP (APM vol. 2, 8.2.9)
    tiny.memory.write(IDT + 8 * abi.GP_VECTOR, _task_gate(dpl=0))
    tiny.memory.write(GDT + NEW_SELECTOR, struct.pack("<Q", _descriptor(NEW_TSS, _AVAILABLE) & ~(0x80 << 40)))
    _gates(tiny, df=TARGET + 0x20, np=TARGET + 0x30)
    tiny.load(bytes.fromhex("66b8f8ff 8ed8"))
    assert tiny.run_to_halt().rip == TARGET + 0x21


def test_a_software_interrupt_through_a_task_gate_resumes_behind_it(tiny: Tiny) -> None:
    tiny.memory.write(IDT + 8 * 0x30, _task_gate(dpl=0))
    tiny.load(bytes.fromhex("cd30 f4"))
    assert tiny.run_to_halt().rip == TARGET + 1
    assert struct.unpack("<I", tiny.memory.read(OLD_TSS + 32, 4)) == (CODE + 2,)


def test_the_trap_bit_of_a_tss_is_a_debug_exception_of_the_new_task(tiny: Tiny) -> None:
    _gates(tiny, db=TARGET + 0x40)
    tiny.memory.write(NEW_TSS + 0x64, b"\1")
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    regs = tiny.run_to_halt()
    assert regs.rip == TARGET + 0x41
    assert struct.unpack("<I", tiny.memory.read(regs.rsp, 4)) == (TARGET,)
    assert tiny.vcpu.get_debugregs().dr6 & 1 << 15


def test_the_reserved_bits_beside_the_trap_bit_say_nothing(tiny: Tiny) -> None:
    _gates(tiny, db=TARGET + 0x40)
    tiny.memory.write(NEW_TSS + 0x64, b"\xfe\xff")
    tiny.load(b"\xea" + struct.pack("<IH", 0, NEW_SELECTOR))
    assert tiny.run_to_halt().rip == TARGET + 1
