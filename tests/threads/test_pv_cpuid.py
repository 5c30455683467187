# SPDX-License-Identifier: Apache-2.0
"""KVM_CAP_ENFORCE_PV_FEATURE_CPUID: a guest has those paravirtual MSRs and hypercalls that its CPUID has, no others."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.tiny import DATA, Tiny

from softkvm import abi

#: Which feature each is of (Documentation/virt/kvm/x86/cpuid.rst).
MSRS = {
    abi.MSR_KVM_WALL_CLOCK: abi.KVM_FEATURE_CLOCKSOURCE,
    abi.MSR_KVM_SYSTEM_TIME: abi.KVM_FEATURE_CLOCKSOURCE,
    abi.MSR_KVM_WALL_CLOCK_NEW: abi.KVM_FEATURE_CLOCKSOURCE2,
    abi.MSR_KVM_SYSTEM_TIME_NEW: abi.KVM_FEATURE_CLOCKSOURCE2,
    abi.MSR_KVM_ASYNC_PF_EN: abi.KVM_FEATURE_ASYNC_PF,
    abi.MSR_KVM_STEAL_TIME: abi.KVM_FEATURE_STEAL_TIME,
    abi.MSR_KVM_PV_EOI_EN: abi.KVM_FEATURE_PV_EOI,
    abi.MSR_KVM_POLL_CONTROL: abi.KVM_FEATURE_POLL_CONTROL,
    abi.MSR_KVM_ASYNC_PF_INT: abi.KVM_FEATURE_ASYNC_PF_INT,
    abi.MSR_KVM_ASYNC_PF_ACK: abi.KVM_FEATURE_ASYNC_PF_INT,
}
HYPERCALLS = {
    abi.KVM_HC_KICK_CPU: abi.KVM_FEATURE_PV_UNHALT,
    abi.KVM_HC_SEND_IPI: abi.KVM_FEATURE_PV_SEND_IPI,
    abi.KVM_HC_SCHED_YIELD: abi.KVM_FEATURE_PV_SCHED_YIELD,
}
FEATURES = sorted({*MSRS.values(), *HYPERCALLS.values()})

HANDLER = 0x2000
RDMSR, WRMSR, VMMCALL = b"\x0f\x32", b"\x0f\x30", b"\x0f\x01\xd9"
OUT = b"\xe6\x10"


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True).long_mode()
    machine.gate64(abi.GP_VECTOR, HANDLER)
    machine.memory.write(HANDLER, b"\x48\xc7\xc5\x0d\x00\x00\x00" + OUT)  # mov rbp, 13
    yield machine
    machine.close()


def set_features(tiny: Tiny, features: int) -> None:
    entries = tiny.kvm.get_supported_cpuid()
    for entry in entries:
        if entry.function == abi.KVM_CPUID_FEATURES:
            entry.eax = features
    tiny.vcpu.set_cpuid2(entries)


def enforce(tiny: Tiny) -> None:
    tiny.vcpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)


def run(tiny: Tiny, code: bytes, **registers: int) -> abi.kvm_regs:
    """Run an instruction, or the handler of its #GP; returns the registers behind it."""
    tiny.load(code + OUT, **{"rbp": 0, "rax": 0, "rdx": 0, **registers})
    assert tiny.run() == abi.KVM_EXIT_IO
    return tiny.vcpu.get_regs()


def is_refused(tiny: Tiny, code: bytes, **registers: int) -> bool:
    """Tell whether an instruction raises #GP."""
    return run(tiny, code, **registers).rbp == abi.GP_VECTOR


@pytest.mark.parametrize("enforced_first", [True, False], ids=["enforced first", "CPUID first"])
@pytest.mark.parametrize("feature", FEATURES)
def test_msrs_and_hypercalls_are_those_of_the_features(tiny: Tiny, feature: int, enforced_first: bool) -> None:
    if enforced_first:
        enforce(tiny)
    set_features(tiny, 1 << feature)
    if not enforced_first:
        enforce(tiny)
    for msr, its in MSRS.items():
        assert is_refused(tiny, RDMSR, rcx=msr) == (its != feature), hex(msr)
        assert is_refused(tiny, WRMSR, rcx=msr) == (its != feature), hex(msr)
    for number, its in HYPERCALLS.items():
        denied = run(tiny, VMMCALL, rax=number, rbx=0, rcx=0, rsi=0).rax == (1 << 64) - abi.KVM_ENOSYS
        assert denied == (its != feature), number


@pytest.mark.parametrize("last", [0, 1 << abi.KVM_FEATURE_STEAL_TIME])
def test_the_last_cpuid_is_the_one_that_counts(tiny: Tiny, last: int) -> None:
    enforce(tiny)
    for features in (last, last ^ 1 << abi.KVM_FEATURE_STEAL_TIME, last):
        set_features(tiny, features)
    assert is_refused(tiny, RDMSR, rcx=abi.MSR_KVM_STEAL_TIME) == (not last)


def test_it_can_be_switched_off_again(tiny: Tiny) -> None:
    set_features(tiny, 0)
    enforce(tiny)
    assert is_refused(tiny, RDMSR, rcx=abi.MSR_KVM_STEAL_TIME)
    tiny.vcpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
    assert not is_refused(tiny, RDMSR, rcx=abi.MSR_KVM_STEAL_TIME)


def test_userspace_has_every_msr_whatever_the_guest_has(tiny: Tiny) -> None:
    set_features(tiny, 0)
    enforce(tiny)
    assert len(tiny.vcpu.get_msrs(list(MSRS))) == len(MSRS)
    assert tiny.vcpu.set_msrs(dict.fromkeys(MSRS, 0)) == len(MSRS)


def test_the_clock_is_where_the_guest_has_moved_it_to(tiny: Tiny) -> None:
    set_features(tiny, 1 << abi.KVM_FEATURE_CLOCKSOURCE | 1 << abi.KVM_FEATURE_CLOCKSOURCE2)
    enforce(tiny)
    old, new = DATA, DATA + 0x1000
    places = [(abi.MSR_KVM_SYSTEM_TIME, old), (abi.MSR_KVM_SYSTEM_TIME_NEW, new), (abi.MSR_KVM_SYSTEM_TIME, old)]
    versions = {old: 0, new: 0}
    for msr, place in places:
        other = new if place == old else old
        before = tiny.memory.read(other, 32)
        assert not is_refused(tiny, WRMSR, rcx=msr, rax=place | 1)
        version, _, tsc, time_ns = struct.unpack("<IIQQ", tiny.memory.read(place, 24))
        assert version > versions[place] and version % 2 == 0
        assert tsc and time_ns >= 0
        versions[place] = version
        assert tiny.memory.read(other, 32) == before, "only the one that is in force is kept up to date"
