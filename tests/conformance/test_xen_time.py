# SPDX-License-Identifier: Apache-2.0
"""Xen's time: the clock in its structures and in CPUID, and how long a vCPU was in which state (KVM API)."""

import errno
import struct
from collections.abc import Callable
from functools import partial

import pytest
from tests.support.conformance import MEMORY_SIZE, Guest, refused
from tests.support.xen import ALL, RUNSTATE, TIME_INFO, VCPU_INFO, XenGuest

from softkvm import abi

Make = Callable[..., Guest]
_ADDR = abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR
_CURRENT = abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT
_DATA = abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA
_ADJUST = abi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST
_TIME = abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO
_FLAG = abi.KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG
STATES = ("running", "runnable", "blocked", "offline")
STABLE = 1
NOWHERE = abi.KVM_XEN_INVALID_GPA


@pytest.fixture
def xen(make: Make) -> XenGuest:
    """One vCPU with all that there is."""
    guest = XenGuest(make, needs=ALL)
    guest.share()
    return guest


def _runstate(xen: XenGuest, *, at: int = RUNSTATE, long_mode: bool = True) -> tuple[int, int, list[int]]:
    """What the guest sees: state, since when, the four times."""
    state, entry, *times = struct.unpack_from("<I4x5Q" if long_mode else "<I5Q", xen.guest.memory, at)
    return state, entry, times


def _data(xen: XenGuest) -> tuple[int, int, list[int]]:
    """What userspace sees."""
    given = xen.get_vcpu(_DATA).runstate
    return given.state, given.state_entry_time, [getattr(given, f"time_{name}") for name in STATES]


def _set(xen: XenGuest, type: int, state: int, *times: int, entry: int | None = None) -> None:
    fields = {f"runstate__time_{name}": value for name, value in zip(STATES, times, strict=False)}
    total = sum(times) & (1 << 64) - 1 if entry is None else entry
    xen.set_vcpu(type, runstate__state=state, runstate__state_entry_time=total, **fields)


def _now(xen: XenGuest) -> int:
    return int(xen.guest.vm.get_clock().clock)


# --- runstate ----------------------------------------------------------------------------------------------


def test_a_vcpu_runs_from_its_first_run_on_and_was_offline(xen: XenGuest) -> None:
    xen.set_vcpu(_ADDR, gpa=RUNSTATE)
    assert xen.get_vcpu(_ADDR).gpa == RUNSTATE
    before = _now(xen)
    xen.execute("90")
    state, entry, times = _runstate(xen)
    assert state == abi.RUNSTATE_running
    assert before <= entry <= _now(xen)
    assert sum(times) == entry, "the whole life of the guest"
    assert times[abi.RUNSTATE_offline] >= before
    assert (state, entry, times) == _data(xen)


def test_userspace_says_what_else_a_vcpu_is(xen: XenGuest) -> None:
    xen.set_vcpu(_ADDR, gpa=RUNSTATE)
    xen.execute("90")
    for state in (abi.RUNSTATE_runnable, abi.RUNSTATE_blocked, abi.RUNSTATE_offline):
        _, _, before = _runstate(xen)
        xen.set_vcpu(_CURRENT, runstate__state=state)
        assert xen.get_vcpu(_CURRENT).runstate.state == state
        assert _runstate(xen)[0] == state
        xen.execute("90")
        now, entry, times = _runstate(xen)
        assert now == abi.RUNSTATE_running
        assert times[state] > before[state]
        assert sum(times) == entry
    refused(errno.EINVAL, partial(xen.set_vcpu, _CURRENT, runstate__state=4))


def test_all_of_it_can_be_set_and_read(xen: XenGuest) -> None:
    xen.execute("90")
    times = (5, 6, 7, 8)
    _set(xen, _DATA, abi.RUNSTATE_blocked, *times)
    assert _data(xen) == (abi.RUNSTATE_blocked, 26, [*times])
    refused(errno.EINVAL, partial(_set, xen, _DATA, 4, *times))
    refused(errno.EINVAL, partial(_set, xen, _DATA, 0, *times, entry=27))
    refused(errno.EINVAL, partial(_set, xen, _DATA, 0, 1 << 60))
    assert _data(xen) == (abi.RUNSTATE_blocked, 26, [*times])


def test_times_can_be_moved_between_states(xen: XenGuest) -> None:
    xen.set_vcpu(_ADDR, gpa=RUNSTATE)
    _set(xen, _DATA, abi.RUNSTATE_running, 100, 100, 100, 100)
    stays = (1 << 64) - 1
    _set(xen, _ADJUST, stays, 5, (1 << 64) - 7, 2, 0)
    assert _data(xen) == _runstate(xen) == (0, 400, [105, 93, 102, 100])
    refused(errno.EINVAL, partial(_set, xen, _ADJUST, stays, 5, entry=4))
    refused(errno.EINVAL, partial(_set, xen, _ADJUST, 4))
    refused(errno.EINVAL, partial(_set, xen, _ADJUST, stays, 1 << 60))
    refused(errno.EINVAL, partial(xen.get_vcpu, _ADJUST))
    _set(xen, _ADJUST, abi.RUNSTATE_offline, 0, 0, 0, 10)
    state, entry, times = _data(xen)
    assert (state, times[3], sum(times)) == (abi.RUNSTATE_offline, 110, entry)


@pytest.mark.parametrize("long_mode", [True, False])
@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("offset", [0, 1, 4096 - 1, 4096 - 4, 4096 - 9, 4096 - 16, 4096 - 0x2C, 4096 - 0x30])
def test_the_structure_may_lie_anywhere(xen: XenGuest, long_mode: bool, flag: int, offset: int) -> None:
    size = 0x30 if long_mode else 0x2C
    xen.set_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=long_mode)
    xen.set_hvm(_FLAG, runstate_update_flag=flag)
    assert xen.get_hvm(_FLAG).runstate_update_flag == flag
    at = RUNSTATE + offset
    xen.guest.write(RUNSTATE, b"\xaa" * 0x2000)
    xen.set_vcpu(_ADDR, gpa=at)
    xen.execute("90")
    state, entry, times = _runstate(xen, at=at, long_mode=long_mode)
    assert (state, entry, times) == _data(xen), "without XEN_RUNSTATE_UPDATE, in the end"
    around = bytes(xen.guest.memory[RUNSTATE : RUNSTATE + 0x2000])
    assert around[:offset] == b"\xaa" * offset
    assert set(around[offset + size :]) == {0xAA}


def test_a_structure_without_memory_is_none(xen: XenGuest) -> None:
    xen.set_vcpu(_ADDR, gpa=RUNSTATE)
    for gpa in (MEMORY_SIZE, MEMORY_SIZE - 16, 1 << 45):
        refused(errno.EFAULT, partial(xen.set_vcpu, _ADDR, gpa=gpa))
        refused(errno.ENOENT, partial(xen.get_vcpu, _ADDR))
    xen.set_vcpu(_ADDR, gpa=RUNSTATE)
    xen.set_vcpu(_ADDR, gpa=NOWHERE)
    refused(errno.ENOENT, partial(xen.get_vcpu, _ADDR))
    xen.guest.write(RUNSTATE, b"\xaa" * 0x30)
    xen.execute("90")
    assert bytes(xen.guest.memory[RUNSTATE : RUNSTATE + 0x30]) == b"\xaa" * 0x30


# --- the clock ---------------------------------------------------------------------------------------------


def _clock(xen: XenGuest, at: int) -> tuple[int, int, int]:
    """Version, time and flags of a time structure."""
    version, _, _, system_time, _, _, flags = struct.unpack_from("<IIQQIbB", xen.guest.memory, at)
    return version, system_time, flags


def test_the_clock_is_where_the_guest_has_it(xen: XenGuest) -> None:
    xen.set_vcpu(_TIME, gpa=TIME_INFO)
    assert xen.get_vcpu(_TIME).gpa == TIME_INFO
    xen.execute("90")
    for at in (VCPU_INFO + 32, TIME_INFO):
        version, system_time, flags = _clock(xen, at)
        assert version and not version & 1
        assert 0 < system_time <= _now(xen)
        assert flags == STABLE
    xen.guest.vm.set_clock(abi.kvm_clock_data(clock=1 << 40))
    xen.execute("90")
    assert all(_clock(xen, at)[1] >= 1 << 40 for at in (VCPU_INFO + 32, TIME_INFO))
    refused(errno.EINVAL, partial(xen.set_vcpu, _TIME, gpa=TIME_INFO + 4096 - 31))
    refused(errno.EFAULT, partial(xen.set_vcpu, _TIME, gpa=MEMORY_SIZE))
    xen.set_vcpu(_TIME, gpa=NOWHERE)
    assert xen.get_vcpu(_TIME).gpa == NOWHERE


def test_the_clock_may_be_said_to_be_unstable(xen: XenGuest) -> None:
    xen.execute("90")
    xen.config(flags=abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | abi.KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE)
    xen.execute("90")
    assert _clock(xen, VCPU_INFO + 32)[2] == 0


def test_xens_leaf_of_time_has_the_clocks_scale(make: Make) -> None:
    xen = XenGuest(make, needs=ALL)
    cpu = xen.guest.cpu
    signature = [int.from_bytes(abi.XEN_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8)]
    leaves = [abi.kvm_cpuid_entry2(0x4000_0000, 0, 0, 0x4000_0003, *signature)]
    indexed = abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    leaves += [abi.kvm_cpuid_entry2(0x4000_0003, index, indexed) for index in range(3)]
    own = [entry for entry in cpu.get_cpuid2() if not 0x4000_0000 <= entry.function < 0x4000_0100]
    cpu.set_cpuid2(own + leaves)
    xen.share()
    xen.execute("90")
    _, _, _, _, multiplier, shift, _ = struct.unpack_from("<IIQQIbB", xen.guest.memory, VCPU_INFO + 32)
    time = {entry.index: entry for entry in cpu.get_cpuid2() if entry.function == 0x4000_0003}
    assert (time[1].ecx, time[1].edx) == (multiplier, shift & 0xFFFF_FFFF)
    assert time[2].eax == cpu.get_tsc_khz()
    regs = xen.execute("0fa2", rax=0x4000_0003, rcx=1)
    assert regs.rcx == multiplier
