# SPDX-License-Identifier: Apache-2.0
"""What KVM writes into guest memory: kvmclock, wall clock, steal time (KVM's Documentation/virt/kvm/x86/msr.rst)."""

import time
from collections.abc import Callable

import pytest
from tests.support.conformance import Guest

from softkvm import abi

AREA = 0x6000
#: What the clocks of the two sides, of the host and of the guest may be apart.
TOLERANCE_NS = 20_000_000


def supported(guest: Guest, cap: int, feature: int) -> None:
    """Skips without the capability or the CPUID bit of a paravirtual feature."""
    features = [e.eax for e in guest.cpu.get_cpuid2() if e.function == abi.KVM_CPUID_FEATURES]
    if not guest.vm.check_extension(cap) or not features or not features[0] >> feature & 1:
        pytest.skip("this KVM does not have the feature")


def read_tsc(guest: Guest) -> int:
    """Let the guest read its time stamp counter."""
    guest.real("0f31 f4")  # rdtsc; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    regs = guest.cpu.get_regs()
    return (regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF


def pvclock(guest: Guest) -> abi.pvclock_vcpu_time_info:
    """Return the guest's time structure."""
    return abi.pvclock_vcpu_time_info.from_buffer_copy(guest.memory, AREA)


def guest_time_ns(guest: Guest, tsc: int) -> int:
    """Return the guest's time when its counter was *tsc*, as msr.rst says that guests do it."""
    info = pvclock(guest)
    delta = tsc - info.tsc_timestamp
    delta = delta << info.tsc_shift if info.tsc_shift >= 0 else delta >> -info.tsc_shift
    return int(info.system_time + (delta * info.tsc_to_system_mul >> 32))


@pytest.mark.parametrize(
    ("msr", "feature"),
    [
        (abi.MSR_KVM_SYSTEM_TIME, abi.KVM_FEATURE_CLOCKSOURCE),
        (abi.MSR_KVM_SYSTEM_TIME_NEW, abi.KVM_FEATURE_CLOCKSOURCE2),
    ],
    ids=["old", "new"],
)
def test_the_guests_clock_is_that_of_the_vm(guest: Guest, msr: int, feature: int) -> None:
    supported(guest, abi.KVM_CAP_CLOCKSOURCE, feature)
    assert guest.cpu.set_msrs({msr: AREA | abi.KVM_MSR_ENABLED}) == 1
    assert guest.cpu.get_msrs([msr]) == [AREA | abi.KVM_MSR_ENABLED]
    read_tsc(guest)
    version = pvclock(guest).version
    assert version > 0 and version % 2 == 0, "odd while it changes"
    for _ in range(2):
        before = guest.vm.get_clock().clock
        tsc = read_tsc(guest)
        after = guest.vm.get_clock().clock
        assert before - TOLERANCE_NS <= guest_time_ns(guest, tsc) <= after + TOLERANCE_NS


def test_the_guests_clock_follows_the_one_that_is_set(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_CLOCKSOURCE, abi.KVM_FEATURE_CLOCKSOURCE2)
    guest.cpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: AREA | abi.KVM_MSR_ENABLED})
    read_tsc(guest)
    version = pvclock(guest).version
    hour_ns = 3600 * 1_000_000_000
    guest.vm.set_clock(abi.kvm_clock_data(clock=hour_ns))
    tsc = read_tsc(guest)
    assert pvclock(guest).version > version
    assert hour_ns <= guest_time_ns(guest, tsc) + TOLERANCE_NS < hour_ns + 60 * 1_000_000_000


def test_a_clock_that_lies_in_two_pages_is_none(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_CLOCKSOURCE, abi.KVM_FEATURE_CLOCKSOURCE2)
    last = AREA + 0x1000 - 32
    for where, written in ((last + 4, False), (last, True)):
        guest.write(last, bytes(64))
        assert guest.cpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: where | abi.KVM_MSR_ENABLED}) == 1
        read_tsc(guest)
        assert any(guest.memory[last : last + 64]) == written


@pytest.mark.parametrize("msr", [abi.MSR_KVM_WALL_CLOCK, abi.MSR_KVM_WALL_CLOCK_NEW], ids=["old", "new"])
def test_wall_clock_and_guests_clock_give_the_hosts_time(guest: Guest, msr: int) -> None:
    supported(guest, abi.KVM_CAP_CLOCKSOURCE, abi.KVM_FEATURE_CLOCKSOURCE)
    guest.real(b"\x66\xb9" + msr.to_bytes(4, "little") + bytes.fromhex("66b800600000 66ba00000000 0f30 f4"))
    guest.expect(abi.KVM_EXIT_HLT)  # mov ecx, msr; mov eax, 0x6000; mov edx, 0; wrmsr; hlt
    wall = abi.pvclock_wall_clock.from_buffer_copy(guest.memory, AREA)
    assert wall.version > 0 and wall.version % 2 == 0
    now = wall.sec * 1_000_000_000 + wall.nsec + guest.vm.get_clock().clock
    assert abs(now - time.time_ns()) < 2_000_000_000


def test_steal_time_is_written_when_the_vcpu_runs(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_STEAL_TIME, abi.KVM_FEATURE_STEAL_TIME)
    guest.write(AREA, bytes(64))
    assert guest.cpu.set_msrs({abi.MSR_KVM_STEAL_TIME: AREA | abi.KVM_MSR_ENABLED}) == 1
    read_tsc(guest)
    first = abi.kvm_steal_time.from_buffer_copy(guest.memory, AREA)
    assert first.version > 0 and first.version % 2 == 0, "odd while it changes"
    started = time.monotonic_ns()
    read_tsc(guest)
    second = abi.kvm_steal_time.from_buffer_copy(guest.memory, AREA)
    assert 0 <= second.steal - first.steal <= time.monotonic_ns() - started + TOLERANCE_NS
    assert second.version >= first.version and (second.flags, second.version % 2) == (0, 0)


def test_the_reserved_bits_of_the_steal_time_register_are_refused(guest: Guest) -> None:
    supported(guest, abi.KVM_CAP_STEAL_TIME, abi.KVM_FEATURE_STEAL_TIME)
    for bit in range(1, abi.KVM_STEAL_ALIGNMENT_BITS + 1):
        assert guest.cpu.set_msrs({abi.MSR_KVM_STEAL_TIME: AREA | abi.KVM_MSR_ENABLED | 1 << bit}) == 0, bit
    assert guest.cpu.get_msrs([abi.MSR_KVM_STEAL_TIME]) == [0]


@pytest.mark.parametrize("msr", [abi.MSR_KVM_WALL_CLOCK, abi.MSR_KVM_WALL_CLOCK_NEW], ids=["old", "new"])
def test_a_wall_clock_at_0_is_none(guest: Guest, msr: int) -> None:
    supported(guest, abi.KVM_CAP_CLOCKSOURCE, abi.KVM_FEATURE_CLOCKSOURCE)
    guest.write(0, b"\xaa" * 16)
    assert guest.cpu.set_msrs({msr: 0}) == 1  # what a reset or a restore writes for a guest that has no clock
    assert guest.memory[:16] == b"\xaa" * 16


def test_paravirtual_eoi_needs_memory(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True)
    supported(guest, abi.KVM_CAP_IRQCHIP, abi.KVM_FEATURE_PV_EOI)
    msr = abi.MSR_KVM_PV_EOI_EN
    assert guest.cpu.set_msrs({msr: AREA | abi.KVM_MSR_ENABLED}) == 1
    nowhere = 1 << 32
    assert guest.cpu.set_msrs({msr: nowhere | abi.KVM_MSR_ENABLED}) == 0
    assert guest.cpu.set_msrs({msr: AREA + 2}) == 0, "not aligned"
    assert guest.cpu.get_msrs([msr]) == [AREA | abi.KVM_MSR_ENABLED]
    assert guest.cpu.set_msrs({msr: nowhere}) == 1, "not enabled"


def async_pf_guest(make: Callable[..., Guest]) -> Guest:
    """A guest with a software-enabled local APIC that may have asynchronous page faults."""
    guest = make(irqchip=True)
    supported(guest, abi.KVM_CAP_ASYNC_PF, abi.KVM_FEATURE_ASYNC_PF)
    supported(guest, abi.KVM_CAP_ASYNC_PF_INT, abi.KVM_FEATURE_ASYNC_PF_INT)
    lapic = guest.cpu.get_lapic()
    lapic.regs[0xF0:0xF2] = [0xFF, 0x01]
    guest.cpu.set_lapic(lapic)
    return guest


def test_a_guest_that_enables_asynchronous_page_faults_is_told_to_wake_all(make: Callable[..., Guest]) -> None:
    """It may have been waiting on another host: an interrupt, and the token that is none."""
    guest = async_pf_guest(make)
    guest.write(AREA, bytes(64))
    guest.ivt(0x51, 0x1800)
    guest.write(0x1800, bytes.fromhex("e651 cf"))  # out 0x51, al; iret
    on = abi.KVM_ASYNC_PF_ENABLED | abi.KVM_ASYNC_PF_SEND_ALWAYS | abi.KVM_ASYNC_PF_DELIVERY_AS_INT
    msrs = {abi.MSR_KVM_ASYNC_PF_INT: 0x51, abi.MSR_KVM_ASYNC_PF_EN: AREA | on}
    assert guest.cpu.set_msrs(msrs) == 2
    assert guest.cpu.get_msrs(list(msrs)) == list(msrs.values())
    guest.real("fb 90 90 f4")  # sti; nop; nop; hlt
    guest.expect(abi.KVM_EXIT_IO)
    assert guest.kvm_run.io.port == 0x51
    area = abi.kvm_vcpu_pv_apf_data.from_buffer_copy(guest.memory, AREA)
    assert (area.flags, area.token) == (0, 0xFFFF_FFFF)


def test_asynchronous_page_faults_reserved_bits_are_refused(make: Callable[..., Guest]) -> None:
    guest = async_pf_guest(make)
    for bit in (4, 5):
        assert guest.cpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: AREA | abi.KVM_ASYNC_PF_ENABLED | 1 << bit}) == 0, bit
    assert guest.cpu.set_msrs({abi.MSR_KVM_ASYNC_PF_INT: 0x100}) == 0
    on = abi.KVM_ASYNC_PF_ENABLED | abi.KVM_ASYNC_PF_DELIVERY_AS_INT
    assert guest.cpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: 1 << 30 | on}) == 0, "there is no memory"
