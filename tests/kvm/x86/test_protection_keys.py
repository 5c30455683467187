# SPDX-License-Identifier: Apache-2.0
"""Protection keys: CR4.PKE and OSPKE by CPUID, PKRU's rights in guest and emulator, PKRU in KVM_GET_XSAVE."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.tiny import PAGE_TABLES, Tiny

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr

_PKU = 1 << 3
_OSPKE = 1 << 4
_KEY = 2
_KEYED = 0x20_0000
_PAGE_FAULT_HANDLER = 0x2000
_GP_HANDLER = 0x2100
_PKRU_AT = 0x980
_ACCESS_DISABLE = 1 << 2 * _KEY
_WRITE_DISABLE = 2 << 2 * _KEY


def _machine(*, pku: bool) -> Tiny:
    """4 MiB in 64-bit mode; the upper half is a user page with protection key 2."""
    tiny = Tiny(0x40_0000)
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == 7 and entry.index == 0:
            entry.ecx = entry.ecx | _PKU if pku else entry.ecx & ~_PKU
    tiny.vcpu.set_cpuid2(entries)
    tiny.long_mode()
    tiny.memory.write(PAGE_TABLES + 0x2008, struct.pack("<Q", _KEY << 59 | _KEYED | 0x87))
    tiny.gate64(abi.PF_VECTOR, _PAGE_FAULT_HANDLER)
    tiny.memory.write(_PAGE_FAULT_HANDLER, b"\x5d\xf4")  # pop rbp: the error code; hlt
    tiny.gate64(abi.GP_VECTOR, _GP_HANDLER)
    tiny.memory.write(_GP_HANDLER, b"\x6a\x0d\x5d\xf4")  # push 13; pop rbp; hlt
    return tiny


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = _machine(pku=True)
    yield machine
    machine.close()


def _enable(tiny: Tiny) -> None:
    sregs = tiny.vcpu.get_sregs()
    sregs.cr4 |= abi.X86_CR4_PKE
    tiny.vcpu.set_sregs(sregs)


def _after_wrpkru(tiny: Tiny, rights: int, access: str, **registers: int) -> int:
    """WRPKRU and an access through RBX; returns its #PF's error code, -1 without one."""
    tiny.load(
        bytes.fromhex(f"31c9 31d2 0f01ef {access} f4"),  # xor ecx, ecx; xor edx, edx; wrpkru
        **{"rbx": _KEYED + 0x100, "rax": rights, "rbp": (1 << 64) - 1, **registers},
    )
    error = tiny.run_to_halt().rbp
    return -1 if error == (1 << 64) - 1 else error


_READ = "488b33"  # mov rsi, [rbx]
_WRITE = "488933"  # mov [rbx], rsi


def test_pke_needs_the_guests_cpuid() -> None:
    for pku in (False, True):
        tiny = _machine(pku=pku)
        # mov rax, cr4; bts eax, 22; mov cr4, rax; mov eax, 7; xor ecx, ecx; cpuid
        tiny.load(bytes.fromhex("0f20e0 0fbae816 0f22e0 b807000000 31c9 0fa2 f4"), rbp=0)
        regs = tiny.run_to_halt()
        assert regs.rbp == (0 if pku else abi.GP_VECTOR)
        assert bool(tiny.vcpu.get_sregs().cr4 & abi.X86_CR4_PKE) == pku
        if pku:
            assert regs.rcx & (_PKU | _OSPKE) == _PKU | _OSPKE
        sregs = tiny.vcpu.get_sregs()
        sregs.cr4 |= abi.X86_CR4_PKE
        if pku:
            tiny.vcpu.set_sregs(sregs)
        else:
            with pytest.raises(OSError, match="no legal combination"):
                tiny.vcpu.set_sregs(sregs)
        tiny.close()


def test_ospke_is_clear_until_pke_is_set(tiny: Tiny) -> None:
    assert not tiny.vcpu.cpuid.answer(7, 0)[2] & _OSPKE
    _enable(tiny)
    assert tiny.vcpu.cpuid.answer(7, 0)[2] & _OSPKE


@pytest.mark.parametrize(
    ("rights", "access", "wp", "error"),
    [
        (_ACCESS_DISABLE, _READ, True, 0x21),
        (_ACCESS_DISABLE, _WRITE, True, 0x23),
        (_ACCESS_DISABLE, _WRITE, False, 0x23),
        (_WRITE_DISABLE, _READ, True, -1),
        (_WRITE_DISABLE, _WRITE, True, 0x23),
        (_WRITE_DISABLE, _WRITE, False, -1),
        (~(3 << 2 * _KEY) & 0xFFFF_FFFC, _WRITE, True, -1),  # the rights of other keys
    ],
)
def test_rights_of_a_user_page(tiny: Tiny, rights: int, access: str, wp: bool, error: int) -> None:
    """SDM vol. 3, 4.6.2: AD forbids all data accesses, WD the user's writes, and all with CR0.WP."""
    _enable(tiny)
    sregs = tiny.vcpu.get_sregs()
    sregs.cr0 = sregs.cr0 & ~(1 << 16) | wp << 16
    tiny.vcpu.set_sregs(sregs)
    assert _after_wrpkru(tiny, rights, access) == error
    # The emulator's walk comes to the same
    vcpu = tiny.vcpu
    assert vcpu.pkru == rights
    tiny.load(bytes.fromhex(access), rbx=_KEYED + 0x100)
    assert vcpu.emulator.emulate() == 1
    assert vcpu.exception.pending == (error >= 0)
    if error >= 0:
        assert (vcpu.exception.vector, vcpu.exception.error_code) == (abi.PF_VECTOR, error)


def test_the_error_code_names_the_key_even_if_the_page_is_read_only(tiny: Tiny) -> None:
    tiny.memory.write(PAGE_TABLES + 0x2008, struct.pack("<Q", _KEY << 59 | _KEYED | 0x85))
    _enable(tiny)
    sregs = tiny.vcpu.get_sregs()
    sregs.cr0 |= 1 << 16
    tiny.vcpu.set_sregs(sregs)
    assert _after_wrpkru(tiny, _ACCESS_DISABLE, _WRITE) == 0x23
    tiny.load(bytes.fromhex(_WRITE), rbx=_KEYED + 0x100)
    assert tiny.vcpu.emulator.emulate() == 1
    assert (tiny.vcpu.exception.vector, tiny.vcpu.exception.error_code) == (abi.PF_VECTOR, 0x23)


def test_a_supervisor_page_has_no_key(tiny: Tiny) -> None:
    tiny.memory.write(PAGE_TABLES + 0x2008, struct.pack("<Q", _KEY << 59 | _KEYED | 0x83))
    _enable(tiny)
    assert _after_wrpkru(tiny, _ACCESS_DISABLE | _WRITE_DISABLE, _WRITE) == -1


def _xsave_with(tiny: Tiny, present: bool, value: int) -> abi.kvm_xsave:
    area = bytearray(bytes(tiny.vcpu.get_xsave()))
    (features,) = struct.unpack_from("<Q", area, 512)
    struct.pack_into("<Q", area, 512, features & ~cr.XFEATURE_PKRU | present << 9)
    struct.pack_into("<I", area, _PKRU_AT, value)
    return abi.kvm_xsave.from_buffer_copy(area)


def test_kvm_supports_the_component_where_amd_processors_have_it(tiny: Tiny) -> None:
    leaves = {(e.function, e.index): e for e in tiny.kvm.get_supported_cpuid()}
    assert leaves[7, 0].ecx & (_PKU | _OSPKE) == _PKU
    assert (leaves[0xD, 0].eax, leaves[0xD, 0].ecx) == (0x203, _PKRU_AT + 8)
    component = leaves[0xD, 9]
    assert (component.eax, component.ebx, component.ecx, component.edx) == (8, _PKRU_AT, 0, 0)
    xcrs = abi.kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = 0x203
    tiny.vcpu.set_xcrs(xcrs)
    assert tiny.vcpu.get_xcrs().xcrs[0].value == 0x203
    assert tiny.vcpu.cpuid.answer(0xD, 0)[1] == _PKRU_AT + 8
    assert tiny.vcpu.cpuid.answer(0xD, 1)[1] == 576 + 8


def test_pkru_is_in_the_xsave_area(tiny: Tiny) -> None:
    _enable(tiny)
    assert _after_wrpkru(tiny, _ACCESS_DISABLE, "") == -1
    area = bytes(tiny.vcpu.get_xsave())
    assert struct.unpack_from("<Q", area, 512)[0] & cr.XFEATURE_PKRU
    assert struct.unpack_from("<I", area, _PKRU_AT)[0] == _ACCESS_DISABLE
    tiny.vcpu.set_xsave(_xsave_with(tiny, True, _WRITE_DISABLE))
    assert tiny.vcpu.pkru == _WRITE_DISABLE
    # Absent from XSTATE_BV: KVM leaves PKRU alone, unlike every other component
    tiny.vcpu.set_xsave(_xsave_with(tiny, False, 0))
    assert tiny.vcpu.pkru == _WRITE_DISABLE
    # The new rights count at once, whatever translations the processor remembers
    tiny.load(bytes.fromhex(_READ) + b"\xf4", rbx=_KEYED, rbp=0)
    assert tiny.run_to_halt().rbp == 0
    tiny.vcpu.set_xsave(_xsave_with(tiny, True, _ACCESS_DISABLE))
    tiny.load(bytes.fromhex(_READ) + b"\xf4", rbx=_KEYED, rbp=0)
    assert tiny.run_to_halt().rbp == 0x21


def test_pkru_is_cleared_by_reset_and_not_by_init(tiny: Tiny) -> None:
    _enable(tiny)
    _after_wrpkru(tiny, _ACCESS_DISABLE, "")
    tiny.vcpu.vcpu_reset(True)
    assert tiny.vcpu.pkru == _ACCESS_DISABLE
    tiny.vcpu.vcpu_reset(False)
    assert tiny.vcpu.pkru == 0
