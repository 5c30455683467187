# SPDX-License-Identifier: Apache-2.0
"""Emulated loops and the fast system calls of guests that take themselves for an Intel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.segments import enter_ring_3
from tests.support.tiny import CODE, CODE_SELECTOR, Tiny

from softkvm import abi

_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176
_ZF = 1 << 6
_UD_HANDLER = 0x2000
_ENTRY = 0x2100


def _machine(vendor: bytes = b"GenuineIntel") -> Tiny:
    tiny = Tiny()
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 0:
            entry.ebx, entry.edx, entry.ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    tiny.vcpu.set_cpuid2(entries)
    tiny.long_mode()
    tiny.gate64(abi.UD_VECTOR, _UD_HANDLER)
    tiny.memory.write(_UD_HANDLER, b"\x6a\x06\x5d\xf4")  # push 6; pop rbp; hlt
    tiny.memory.write(_ENTRY, b"\x6a\x55\x5d\xf4")  # push 0x55; pop rbp; hlt
    return tiny


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = _machine()
    yield machine
    machine.close()


@pytest.mark.parametrize("code", ["e20e", "67e20e", "e10e", "e00e", "e30e", "67e30e"])  # loops, jrcxz, jecxz
@pytest.mark.parametrize("rcx", [0, 1, 2, 1 << 32, (1 << 32) + 1])
@pytest.mark.parametrize("flags", [2, 2 | _ZF])
def test_loops_do_what_the_silicons_do(tiny: Tiny, code: str, rcx: int, flags: int) -> None:
    encoded = bytes.fromhex(code)
    tiny.load(encoded + b"\xf4" * 32, rcx=rcx, rflags=flags)
    native = tiny.run_to_halt()
    tiny.load(encoded + b"\xf4" * 32, rcx=rcx, rflags=flags)
    assert tiny.vcpu.emulator.emulate() == 1
    emulated = tiny.vcpu.get_regs()
    assert (emulated.rip + 1, emulated.rcx) == (native.rip, native.rcx)


def test_an_emulated_jump_is_single_stepped(tiny: Tiny) -> None:
    tiny.load(bytes.fromhex("eb10"), rflags=2 | 1 << 8)
    assert tiny.vcpu.emulator.emulate() == 1
    assert tiny.vcpu.get_regs().rip == CODE + 0x12
    assert (tiny.vcpu.exception.pending, tiny.vcpu.exception.vector) == (True, abi.DB_VECTOR)


def _compatibility(tiny: Tiny) -> None:
    """32-bit user code under a 64-bit kernel."""
    sregs = tiny.vcpu.get_sregs()
    enter_ring_3(sregs, ("cs", "ss", "ds", "es"))
    sregs.cs.l, sregs.cs.db = 0, 1
    tiny.vcpu.set_sregs(sregs)


def _set_up(tiny: Tiny) -> None:
    tiny.vcpu.set_msrs({_SYSENTER_CS: CODE_SELECTOR, _SYSENTER_ESP: 0x7000, _SYSENTER_EIP: _ENTRY})


def test_sysenter_from_a_32_bit_program_enters_the_64_bit_kernel(tiny: Tiny) -> None:
    _set_up(tiny)
    _compatibility(tiny)
    tiny.load(bytes.fromhex("0f34"), rbp=0, rflags=2 | 1 << 9)
    regs = tiny.run_to_halt()
    assert (regs.rbp, regs.rsp, regs.rflags & 1 << 9) == (0x55, 0x7000, 0)
    sregs = tiny.vcpu.get_sregs()
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.dpl) == (CODE_SELECTOR, 1, 0, 0)
    assert (sregs.ss.selector, sregs.ss.dpl, sregs.ss.limit) == (CODE_SELECTOR + 8, 0, 0xFFFF_FFFF)


def test_sysenter_takes_all_64_bits_of_the_msrs(tiny: Tiny) -> None:
    _set_up(tiny)
    tiny.vcpu.set_msrs({_SYSENTER_ESP: 0xFFFF_8000_0000_7000, _SYSENTER_EIP: 0xFFFF_8000_0000_2100})
    _compatibility(tiny)
    tiny.load(bytes.fromhex("0f34"))
    assert tiny.vcpu.emulator.emulate() == 1
    regs = tiny.vcpu.get_regs()
    assert (regs.rip, regs.rsp) == (0xFFFF_8000_0000_2100, 0xFFFF_8000_0000_7000)


@pytest.mark.parametrize("wide", [False, True])
def test_sysexit_returns_to_user_mode(tiny: Tiny, wide: bool) -> None:
    _set_up(tiny)
    high = 0x7F << 32 if wide else 0
    tiny.load(bytes.fromhex("480f35" if wide else "0f35"), rdx=high | 0x1234, rcx=high | 0x5678)
    assert tiny.vcpu.emulator.emulate() == 1
    regs, sregs = tiny.vcpu.get_regs(), tiny.vcpu.get_sregs()
    assert (regs.rip, regs.rsp) == (high | 0x1234, high | 0x5678)
    selector = CODE_SELECTOR + (32 if wide else 16) | 3
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.dpl) == (selector, int(wide), 3)
    assert (sregs.ss.selector, sregs.ss.dpl) == (selector + 8, 3)


def test_sysenter_without_a_selector_is_a_general_protection_fault(tiny: Tiny) -> None:
    _compatibility(tiny)
    tiny.load(bytes.fromhex("0f34"))
    assert tiny.vcpu.emulator.emulate() == 1
    assert (tiny.vcpu.exception.vector, tiny.vcpu.exception.error_code) == (abi.GP_VECTOR, 0)


@pytest.mark.parametrize("vendor", [b"AuthenticAMD", b"GenuineIntel"])
def test_sysenter_is_undefined_in_64_bit_code(vendor: bytes) -> None:
    tiny = _machine(vendor)
    _set_up(tiny)
    tiny.load(bytes.fromhex("0f34"), rbp=0)
    assert tiny.run_to_halt().rbp == abi.UD_VECTOR
    tiny.close()


def test_sysenter_is_undefined_in_long_mode_for_amds() -> None:
    tiny = _machine(b"AuthenticAMD")
    _set_up(tiny)
    _compatibility(tiny)
    tiny.load(bytes.fromhex("0f34"))
    assert tiny.vcpu.emulator.emulate() == 1
    assert tiny.vcpu.exception.vector == abi.UD_VECTOR
    tiny.close()


@pytest.mark.parametrize("patched", [True, False])
def test_the_other_vendors_hypercall_is_patched_or_undefined(tiny: Tiny, patched: bool) -> None:
    if not patched:
        tiny.vm.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, abi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
    tiny.load(bytes.fromhex("0f01c1 f4"), rax=99)  # vmcall; hlt
    regs = tiny.run_to_halt()
    if patched:
        assert (regs.rax, tiny.memory.read(CODE, 3)) == ((1 << 64) - 1000, b"\x0f\x01\xd9")  # -KVM_ENOSYS, VMMCALL
    else:
        assert (regs.rbp, regs.rax, tiny.memory.read(CODE, 3)) == (abi.UD_VECTOR, 99, b"\x0f\x01\xc1")
