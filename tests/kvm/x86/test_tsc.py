# SPDX-License-Identifier: Apache-2.0
"""The guest's time-stamp counter at another frequency than the processor's, and what depends on it.

Expected values: AMD APM vol. 2, 15.30.5 (ratio), KVM API 4.55 and 4.56 (KVM_SET_TSC_KHZ), msr.rst (kvmclock), TLFS
12.7.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import DATA, Tiny

from softkvm import _softcpu, abi
from softkvm.kvm.x86 import tsc
from softkvm.kvm.x86.paravirt import kvmclock

HOST_KHZ = _softcpu.tsc_khz()
RDTSC = b"\x0f\x31\xe6\x10"  # rdtsc; out 0x10, al
U64 = (1 << 64) - 1


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True, vcpus=2).long_mode()
    yield machine
    machine.close()


def rdtsc(tiny: Tiny) -> int:
    """The counter as the guest's RDTSC reads it."""
    tiny.load(RDTSC)
    assert tiny.run() == abi.KVM_EXIT_IO
    regs = tiny.vcpu.get_regs()
    return regs.rdx << 32 | regs.rax


def offset(tiny: Tiny) -> int:
    return tiny.vcpu.get_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)


@pytest.mark.parametrize("khz", [1, 12_345, HOST_KHZ // 3, 2 * HOST_KHZ + 1, tsc.max_khz() - 1])
def test_the_guests_counter_ticks_with_the_frequency_that_was_set(tiny: Tiny, khz: int) -> None:
    tiny.vcpu.set_tsc_khz(khz)
    assert tiny.vcpu.get_tsc_khz() == khz
    tiny.vcpu.set_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, 77)
    ratio = (khz << 32) // HOST_KHZ
    before = _softcpu.rdtsc()
    values = [rdtsc(tiny), *tiny.vcpu.get_msrs([0x10])]
    after = _softcpu.rdtsc()
    for value in values:
        assert (before * ratio >> 32) + 77 <= value <= (after * ratio >> 32) + 77


def test_a_frequency_within_the_tolerance_is_the_processors(tiny: Tiny) -> None:
    tiny.vcpu.set_tsc_khz(HOST_KHZ + HOST_KHZ // 5000)  # 200 ppm
    assert tiny.vcpu.tsc_ratio == 1 << 32
    tiny.vcpu.set_tsc_khz(HOST_KHZ + HOST_KHZ // 3000)
    assert tiny.vcpu.tsc_ratio > 1 << 32
    tiny.vcpu.set_tsc_khz(0)
    assert (tiny.vcpu.tsc_ratio, tiny.vcpu.get_tsc_khz()) == (1 << 32, HOST_KHZ)


@pytest.mark.parametrize("khz", [tsc.max_khz(), 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_frequency_that_no_ratio_makes_is_einval(tiny: Tiny, khz: int) -> None:
    for target in (tiny.vcpu, tiny.vm):
        with pytest.raises(OSError) as info:
            target.set_tsc_khz(khz)
        assert info.value.errno == errno.EINVAL
    assert tiny.vcpu.get_tsc_khz() == tiny.vm.get_tsc_khz() == HOST_KHZ


def test_new_vcpus_have_the_vms_frequency(tiny: Tiny) -> None:
    tiny.vm.set_tsc_khz(2 * HOST_KHZ)
    assert tiny.vm.get_tsc_khz() == 2 * HOST_KHZ
    assert tiny.vcpu.get_tsc_khz() == HOST_KHZ
    new = tiny.vm.create_vcpu(7)
    assert new.get_tsc_khz() == 2 * HOST_KHZ
    assert new.tsc_ratio == 2 << 32
    assert new.cpu.tsc_ratio == 2 << 32


def test_writes_of_one_value_are_one_counter_if_the_frequency_is_the_same(tiny: Tiny) -> None:
    first, second = tiny.vcpus
    for khz, same in ((3 * HOST_KHZ, True), (HOST_KHZ, False)):
        first.set_tsc_khz(3 * HOST_KHZ)
        second.set_tsc_khz(khz)
        first.set_msrs({0x10: 1 << 40})
        second.set_msrs({0x10: 1 << 40})
        assert (first.tsc_offset == second.tsc_offset) is same
        assert tiny.vm.tsc.agree is same


def test_a_deadline_of_the_guests_counter_is_its_place_on_the_clock(tiny: Tiny) -> None:
    for khz in (HOST_KHZ // 7, 5 * HOST_KHZ):
        tiny.vcpu.set_tsc_khz(khz)
        now = tsc.read_guest_tsc(tiny.vcpu)
        for milliseconds in (-1000, 5, 3_600_000):
            before = _softcpu.clock_ns()
            due = tiny.vcpu.tsc_deadline_to_ns(now + khz * milliseconds)
            # The counter has gone on since `now`.
            late = _softcpu.clock_ns() - before + 50_000_000
            assert before + milliseconds * 1_000_000 - late <= due <= before + milliseconds * 1_000_000 + late
            # Not sooner: at that time the counter has come so far.
            host = _softcpu.clocks()
            then = host[0] + -((host[1] - due) * HOST_KHZ // 1_000_000)
            assert tsc.guest_tsc_at(tiny.vcpu, then) >= now + khz * milliseconds - khz // 1_000_000 - 1


def test_a_deadline_beyond_all_time_never_comes(tiny: Tiny) -> None:
    tiny.vcpu.set_tsc_khz(1)
    assert tiny.vcpu.tsc_deadline_to_ns(U64) == (1 << 63) - 1


def pvclock(tiny: Tiny) -> tuple[int, int, int, int, int]:
    """TSC, nanoseconds, multiplier, shift and flags of kvmclock's structure."""
    fields = struct.unpack("<IIQQIbB", tiny.memory.read(DATA, 30))
    return fields[2], fields[3], fields[4], fields[5], fields[6]


def scaled(ticks: int, multiplier: int, shift: int) -> int:
    return (ticks << shift if shift >= 0 else ticks >> -shift) * multiplier >> 32


@pytest.mark.parametrize("khz", [HOST_KHZ // 11, HOST_KHZ, 7 * HOST_KHZ + 3])
def test_kvmclock_counts_nanoseconds_at_any_frequency(tiny: Tiny, khz: int) -> None:
    for vcpu in tiny.vcpus:
        vcpu.set_tsc_khz(khz)
        vcpu.set_msrs({0x10: 1000})
    tiny.vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: DATA | 1})
    rdtsc(tiny)
    stamp, ns, multiplier, shift, flags = pvclock(tiny)
    assert flags & abi.PVCLOCK_TSC_STABLE_BIT
    before = kvmclock.get_kvmclock_ns(tiny.vm)
    value = rdtsc(tiny)
    after = kvmclock.get_kvmclock_ns(tiny.vm)
    now = ns + scaled(value - stamp, multiplier, shift)
    tick = 1_000_000 // khz + 2  # of the guest's counter, in ns
    assert before - tick <= now <= after + tick


def test_the_clock_is_not_stable_while_the_counters_differ(tiny: Tiny) -> None:
    tiny.vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: DATA | 1})
    pairing = (abi.KVM_HC_CLOCK_PAIRING, DATA + 0x100)
    for khz, agree in ((2 * HOST_KHZ, False), (HOST_KHZ, True)):
        tiny.vcpus[1].set_tsc_khz(khz)
        tiny.load(b"\x0f\x01\xd9\xe6\x10", rax=pairing[0], rbx=pairing[1], rcx=abi.KVM_CLOCK_PAIRING_WALLCLOCK)
        assert tiny.run() == abi.KVM_EXIT_IO
        assert bool(pvclock(tiny)[4] & abi.PVCLOCK_TSC_STABLE_BIT) is agree
        assert bool(tiny.vm.get_clock().flags & abi.KVM_CLOCK_TSC_STABLE) is agree
        result = tiny.vcpu.get_regs().rax
        assert result == (0 if agree else -abi.KVM_EOPNOTSUPP & U64)


@given(khz=st.integers(1, tsc.max_khz() - 1), seconds=st.integers(0, 600))
def test_the_scale_of_any_frequency_is_that_frequency(khz: int, seconds: int) -> None:
    shift, multiplier = kvmclock.get_time_scale(khz * 1000 << 32)
    assert multiplier >> 31 == 1
    ns = scaled(khz * 1000 * seconds, multiplier, shift)
    exact = seconds * 1_000_000_000
    # The multiplier has 32 bits; a right shift loses ticks, each less than a nanosecond.
    lost = (exact >> 30) + 1 + (0 if shift >= 0 else 1)
    assert exact - lost <= ns <= exact


def test_hyper_vs_page_and_counter_agree_at_another_frequency(tiny: Tiny) -> None:
    khz = 3 * HOST_KHZ + 7
    for vcpu in tiny.vcpus:
        vcpu.set_cpuid2([*vcpu.get_cpuid2(), *tiny.kvm.get_supported_hv_cpuid()])
        vcpu.set_tsc_khz(khz)
        vcpu.set_msrs({0x10: 1})
    tiny.vcpu.set_msrs({abi.HV_X64_MSR_GUEST_OS_ID: 1, abi.HV_X64_MSR_REFERENCE_TSC: DATA | 1})
    rdtsc(tiny)
    sequence, scale, bias = struct.unpack("<I4xQq", tiny.memory.read(DATA, 24))
    assert sequence
    [before] = tiny.vcpu.get_msrs([abi.HV_X64_MSR_TIME_REF_COUNT])
    clock_before = kvmclock.get_kvmclock_ns(tiny.vm) // 100
    value = (rdtsc(tiny) * scale >> 64) + bias
    clock_after = kvmclock.get_kvmclock_ns(tiny.vm) // 100
    [after] = tiny.vcpu.get_msrs([abi.HV_X64_MSR_TIME_REF_COUNT])
    assert before <= value <= after
    assert clock_before - 1 <= value <= clock_after + 1
