# SPDX-License-Identifier: Apache-2.0
"""What the guest's CPUID changes besides CPUID itself: intercepts, and registers of Intel's or AMD's width."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import DATA, Tiny

from softkvm import abi
from softkvm.kvm.x86.svm import vmcb as V

SYSENTER_ESP = 0x175
SYSENTER_EIP = 0x176
TSC_AUX = 0xC000_0103
_RDTSCP = (0x8000_0001, "edx", 27)
_RDPID = (7, "ecx", 22)
_INVPCID = (7, "ebx", 10)
_UD_HANDLER = 0x2000
_GP_HANDLER = 0x2100


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    yield machine
    machine.close()


def _without(tiny: Tiny, *features: tuple[int, str, int], vendor: bytes | None = None) -> None:
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        for function, register, bit in features:
            if entry.function == function and entry.index == 0:
                setattr(entry, register, getattr(entry, register) & ~(1 << bit))
        if vendor is not None and entry.function == 0:
            entry.ebx, entry.edx, entry.ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    tiny.vcpu.set_cpuid2(entries)


def _vector(tiny: Tiny, code: str, **registers: int) -> int:
    """Run an instruction in 64-bit mode; returns the vector of its fault, 0 without one."""
    tiny.long_mode()
    for vector, handler in ((abi.UD_VECTOR, _UD_HANDLER), (abi.GP_VECTOR, _GP_HANDLER)):
        tiny.gate64(vector, handler)
        tiny.memory.write(handler, bytes((0x6A, vector, 0x5D, 0xF4)))  # push vector; pop rbp; hlt
    tiny.load(bytes.fromhex(code) + b"\xf4", rbp=0, **registers)
    return tiny.run_to_halt().rbp


@pytest.mark.parametrize(
    ("feature", "code"),
    [
        (_INVPCID, "660f38820b"),  # invpcid rcx, [rbx]
        (_RDTSCP, "0f01f9"),
    ],
)
def test_instructions_that_cpuid_denies_are_undefined(tiny: Tiny, feature: tuple[int, str, int], code: str) -> None:
    _without(tiny, feature)
    assert _vector(tiny, code, rbx=DATA, rcx=2) == abi.UD_VECTOR


@pytest.mark.parametrize("code", ["660f38820b", "0f01f9"])
def test_instructions_that_cpuid_grants_run_without_an_exit(tiny: Tiny, code: str) -> None:
    assert _vector(tiny, code, rbx=DATA, rcx=2) == 0
    assert not {V.EXIT_RDTSCP, V.EXIT_INVPCID} & tiny.vcpu.exit_counts.keys()


def test_the_intercepts_follow_every_change_of_cpuid_and_survive_init(tiny: Tiny) -> None:
    _without(tiny, _INVPCID)
    _without(tiny)
    assert _vector(tiny, "660f38820b", rbx=DATA, rcx=2) == 0
    other = Tiny()
    try:
        _without(other, _INVPCID)
        other.vcpu.vcpu_reset(True)
        assert _vector(other, "660f38820b", rbx=DATA, rcx=2) == abi.UD_VECTOR
    finally:
        other.close()


@pytest.mark.parametrize("msr", [SYSENTER_ESP, SYSENTER_EIP])
@pytest.mark.parametrize(
    ("vendor", "written", "read"),
    [
        (b"GenuineIntel", 0x1234_5678_9ABC, 0x1234_5678_9ABC),
        (b"GenuineIntel", 0x8000_0000_0000_0001, 1),  # not canonical: made so, no fault
        (b"GenuineIntel", 0x0000_FFFF_0000_0001, 0xFFFF_FFFF_0000_0001),
        (b"CentaurHauls", 0x1234_5678_9ABC, 0x1234_5678_9ABC),
        (b"AuthenticAMD", 0x1234_5678_9ABC, 0x5678_9ABC),
        (b"HygonGenuine", 0x1234_5678_9ABC, 0x5678_9ABC),
    ],
)
def test_sysenter_msrs_have_the_width_of_the_vendors(
    tiny: Tiny, msr: int, vendor: bytes, written: int, read: int
) -> None:
    _without(tiny, vendor=vendor)
    code = "0f30 31c0 31d2 0f32"  # wrmsr; xor eax, eax; xor edx, edx; rdmsr
    assert _vector(tiny, code, rcx=msr, rax=written & 0xFFFF_FFFF, rdx=written >> 32) == 0
    regs = tiny.vcpu.get_regs()
    assert regs.rdx << 32 | regs.rax == read
    assert list(tiny.vcpu.get_msrs([msr])) == [read]
    tiny.vcpu.set_msrs({msr: 0})
    tiny.vcpu.set_msrs({msr: written})
    assert list(tiny.vcpu.get_msrs([msr])) == [read]


def test_tsc_aux_goes_with_rdtscp_and_rdpid(tiny: Tiny) -> None:
    _without(tiny, _RDTSCP, _RDPID)
    assert _vector(tiny, "0f30", rcx=TSC_AUX, rax=7, rdx=0) == abi.GP_VECTOR
    assert tiny.vcpu.set_msrs({TSC_AUX: 5}) == 1


@pytest.mark.parametrize(("vendor", "vector"), [(b"AuthenticAMD", 0), (b"GenuineIntel", abi.GP_VECTOR)])
def test_the_upper_half_of_tsc_aux_is_reserved_or_ignored(tiny: Tiny, vendor: bytes, vector: int) -> None:
    _without(tiny, vendor=vendor)
    assert _vector(tiny, "0f30", rcx=TSC_AUX, rax=7, rdx=1) == vector
    assert list(tiny.vcpu.get_msrs([TSC_AUX])) == [0 if vector else 7]


def test_leaves_beyond_the_range_answer_as_intels_or_not_at_all(tiny: Tiny) -> None:
    """KVM API 4.20: redirected to the highest basic leaf unless the vendor is AMD or Hygon."""
    for vendor, redirected in ((b"GenuineIntel", True), (b"CentaurHauls", True), (b"AuthenticAMD", False)):
        _without(tiny, vendor=vendor)
        last = tiny.vcpu.cpuid.answer(0, 0)[0]
        expected = tiny.vcpu.cpuid.answer(last, 0) if redirected else (0, 0, 0, 0)
        assert tiny.vcpu.cpuid.answer(last + 0x100, 0) == expected, vendor
