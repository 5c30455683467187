# SPDX-License-Identifier: Apache-2.0
"""Hardware task switches (APM vol. 2, 12.2 and 12.3; SDM vol. 3, chapter 9)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.tiny import CODE, DATA_SELECTOR, GDT, STACK, Tiny

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
