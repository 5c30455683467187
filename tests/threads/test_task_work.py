# SPDX-License-Identifier: Apache-2.0
"""Task work runs on a vCPU's own thread before the guest is entered; CPU timers expire in it."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from tests.support.forks import in_child
from tests.support.machines import KVMS
from tests.support.threads import running, until
from tests.support.tiny import Memory, Tiny

from softkvm import _softcpu, abi, api
from softkvm.cputime import MAX_NS, Clock, CpuClock, CpuTimer

MS = 1_000_000
SPIN = b"\xeb\xfe"


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny().long_mode()
    machine.load(SPIN)
    yield machine
    machine.close()


@pytest.fixture
def halted() -> Iterator[Tiny]:
    """A guest that halts, with nothing to wake it."""
    machine = Tiny(irqchip=True).long_mode()
    machine.load(b"\xf4\xeb\xfd")
    yield machine
    machine.close()


def time_of(timer: CpuTimer, clock: CpuClock) -> int:
    return clock.total_ns() if timer.kind is Clock.TOTAL else clock.guest_ns()


def more_than(things: list[int], count: int) -> bool:
    return len(things) > count


def use(clock: CpuClock, ns: int) -> None:
    """Wait until the vCPU has used some CPU time."""
    end = clock.total_ns() + ns
    until(lambda: clock.total_ns() >= end)


# --- task work -----------------------------------------------------------------------------------------


def test_a_guest_that_never_exits_is_interrupted_and_goes_on(tiny: Tiny) -> None:
    threads: list[int] = []
    with running(tiny.vcpu) as state:
        for n in range(200):
            tiny.vcpu.call_soon(lambda: threads.append(threading.get_ident()))
            until(partial(more_than, threads, n))
        assert state.thread.is_alive()
        assert set(threads) == {state.thread.ident}
    assert tiny.vcpu.stats()["signal_exits"] <= 1  # the end's


def test_a_vcpu_that_halts_does_its_work_and_stays_halted(halted: Tiny) -> None:
    done: list[int] = []
    with running(halted.vcpu) as state:
        until(lambda: halted.vcpu.stats()["blocking"])
        for n in range(20):
            halted.vcpu.call_soon(lambda: done.append(1))
            until(partial(more_than, done, n))
        assert state.thread.is_alive()
    assert halted.vcpu.get_mp_state().mp_state == abi.KVM_MP_STATE_HALTED


def test_work_that_raises_ends_kvm_run_and_loses_no_other(tiny: Tiny) -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError(errno.ENODEV, "for a test")

    for work in (lambda: done.append(1), fail, lambda: done.append(2), tiny.vcpu.kick):
        tiny.vcpu.call_soon(work)
    with pytest.raises(OSError) as info:
        tiny.vcpu.run()
    assert (info.value.errno, done) == (errno.ENODEV, [1])
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert done == [1, 2]


def test_work_comes_before_the_guest(tiny: Tiny) -> None:
    seen: list[int] = []
    tiny.load(b"\x48\xff\xc0\xf4")  # inc rax; hlt
    tiny.vcpu.call_soon(lambda: seen.append(tiny.vcpu.get_regs().rax))
    assert tiny.run_to_halt().rax == 1
    assert seen == [0]


# --- the clock -----------------------------------------------------------------------------------------


def test_shares_are_scaled_to_the_whole_and_never_fall() -> None:
    # Half of the time the thread had no processor.
    assert _softcpu.cputime_adjust(500, 600, 400, (0, 0)) == (300, 200)
    assert _softcpu.cputime_adjust(500, 0, 0, (0, 0)) == (0, 500)
    # As Linux does: what one share may not lose the other has to do without.
    assert _softcpu.cputime_adjust(120, 30, 90, (60, 40)) == (60, 60)
    assert _softcpu.cputime_adjust(120, 90, 30, (40, 60)) == (60, 60)
    assert _softcpu.cputime_adjust(90, 90, 30, (40, 60)) == (40, 60)
    huge = (1 << 63) - 1
    assert _softcpu.cputime_adjust(huge, huge, huge, (0, 0)) == (huge // 2, huge - huge // 2)


def test_the_clock_is_that_of_the_thread_and_a_loop_is_the_guests(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    assert clock is tiny.vcpu.cpu_clock
    assert (clock.total_ns(), clock.guest_ns(), clock.host_ns()) == (0, 0, 0)
    with running(tiny.vcpu) as state:
        until(lambda: clock.total_ns() > 100 * MS)
        assert state.thread.native_id is not None
        total, of_thread = clock.total_ns(), time.clock_gettime_ns(~state.thread.native_id << 3 | 6)
        assert total <= of_thread
        before = (0, 0, 0)
        for _ in range(1000):
            now = (clock.total_ns(), clock.guest_ns(), clock.host_ns())
            assert all(later >= earlier for earlier, later in zip(before, now, strict=True))
            before = now
    assert clock.guest_ns() + clock.host_ns() == clock.total_ns()
    assert clock.guest_ns() > clock.total_ns() // 2


def test_exits_are_the_hosts_time(tiny: Tiny) -> None:
    tiny.load(b"\x0f\xa2\xeb\xfc")  # cpuid, for ever
    clock = tiny.vcpu.cpu_clock
    with running(tiny.vcpu):
        use(clock, 100 * MS)
    assert clock.host_ns() > clock.guest_ns() > 0


def test_a_vcpu_that_halts_uses_no_time_and_its_timers_stand_still(halted: Tiny) -> None:
    clock = halted.vcpu.cpu_clock
    fired: list[int] = []
    timer = clock.create_timer(lambda timer: fired.append(timer.overrun))
    with running(halted.vcpu):
        until(lambda: halted.vcpu.stats()["blocking"])
        timer.settime(200 * MS)
        time.sleep(0.5)
        assert clock.total_ns() < 200 * MS
        assert timer.gettime().value_ns > 0
    assert not fired


def test_the_clock_goes_with_the_vcpu_from_thread_to_thread(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    fired: list[int] = []
    timer = clock.create_timer(lambda timer: fired.append(time_of(timer, clock)))
    timer.settime(70 * MS, absolute=True)
    for _ in range(3):
        with running(tiny.vcpu):
            use(clock, 30 * MS)
    until(lambda: clock.total_ns() >= 90 * MS)
    with running(tiny.vcpu):
        until(lambda: fired)
    assert fired[0] >= 70 * MS
    before = clock.total_ns()
    end = time.thread_time_ns() + 20 * MS
    while time.thread_time_ns() < end:  # this thread is none of the vCPU's
        pass
    assert clock.total_ns() == before


# --- timers --------------------------------------------------------------------------------------------


def test_of_a_thousand_timers_none_is_lost_and_none_early(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    numbers = random.Random(1)
    fired: dict[CpuTimer, list[int]] = {}
    threads: set[int] = set()

    def expired(timer: CpuTimer) -> None:
        fired.setdefault(timer, []).append(time_of(timer, clock))
        threads.add(threading.get_ident())

    due = {
        clock.create_timer(expired, numbers.choice(list(Clock))): numbers.randrange(1, 300 * MS) for _ in range(1000)
    }
    timers = list(due)
    for timer in timers[:500]:
        timer.settime(due[timer], absolute=True)
    with running(tiny.vcpu) as state:
        for timer in timers[500:]:  # beside the guest
            timer.settime(due[timer], absolute=True)
        until(lambda: len(fired) == len(due))
        assert threads == {state.thread.ident}
        use(clock, 20 * MS)
    assert tiny.vcpu.stats()["signal_exits"] <= 1
    for timer, expiry in due.items():
        (when,) = fired[timer]
        assert when >= expiry
        assert timer.gettime() == (0, 0)


@pytest.mark.parametrize("kind", Clock)
def test_an_interval_timers_expiries_are_all_told_of(tiny: Tiny, kind: Clock) -> None:
    clock = tiny.vcpu.cpu_clock
    period = 2 * MS
    told = [0]

    def expired(timer: CpuTimer) -> None:
        told[0] += 1 + timer.overrun
        now = time_of(timer, clock)
        assert told[0] <= now // period
        # The next one is the period's next end.
        assert told[0] * period < now + timer.gettime().value_ns <= (now // period + 1) * period + MS

    timer = clock.create_timer(expired, kind)
    timer.settime(period, period)
    with running(tiny.vcpu) as state:
        until(lambda: told[0] >= 30 or not state.thread.is_alive())
        assert state.thread.is_alive(), state.error
        assert timer.settime(0).interval_ns == period
        done = told[0]
        use(clock, 10 * period)
    assert told[0] <= done + 1  # a call may have been on its way


def test_settime_tells_what_was_and_a_time_that_has_passed_expires_at_once(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    fired: list[CpuTimer] = []
    timer = clock.create_timer(fired.append)
    assert timer.gettime() == (0, 0)
    assert timer.settime(3600 * 1000 * MS, 5) == (0, 0)
    assert timer.settime(0) == (3600 * 1000 * MS, 5)
    with running(tiny.vcpu):
        use(clock, 10 * MS)
        assert not fired
        timer.settime(1, absolute=True)
        until(lambda: fired)
        timer.settime(3600 * 1000 * MS)
        assert 3500 * 1000 * MS < timer.gettime().value_ns <= 3600 * 1000 * MS
        timer.delete()
        assert timer.gettime().value_ns == 0
    assert fired == [timer]


def test_what_a_timer_was_set_to_before_is_void(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    fired: list[str] = []
    second = clock.create_timer(lambda _: fired.append("second"))

    def first(timer: CpuTimer) -> None:
        fired.append("first")
        second.settime(3600 * 1000 * MS)  # it is due already, and queued behind this

    for timer in (clock.create_timer(first), second):
        timer.settime(1, absolute=True)
    with running(tiny.vcpu):
        until(lambda: fired)
        use(clock, 10 * MS)
    assert fired == ["first"]


def test_a_timer_that_is_set_again_and_again_takes_no_more_room(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    timer = clock.create_timer(lambda _: None)
    for n in range(10000):
        timer.settime(3600 * 1000 * MS + n)
    assert len(clock._armed[Clock.TOTAL]) <= 64


@pytest.mark.parametrize("value", [-1, MAX_NS + 1, 1 << 64])
def test_times_that_no_clock_has_are_einval(tiny: Tiny, value: int) -> None:
    timer = tiny.vcpu.cpu_clock.create_timer(lambda _: None)
    for arguments in ((value, 0), (1, value)):
        with pytest.raises(OSError) as info:
            timer.settime(*arguments)
        assert info.value.errno == errno.EINVAL
    with pytest.raises(TypeError):
        timer.settime("1")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", Clock)
def test_a_period_shorter_than_its_expiry_takes_leaves_the_guest_time_and_kicks_their_effect(
    tiny: Tiny, kind: Clock
) -> None:
    clock = tiny.vcpu.cpu_clock
    told = [0]

    def expired(timer: CpuTimer) -> None:
        told[0] += 1 + timer.overrun
        assert told[0] <= time_of(timer, clock)

    timer = clock.create_timer(expired, kind)
    timer.settime(1, 1)
    with running(tiny.vcpu) as state:
        until(lambda: told[0] > 1_000_000)
        before = tiny.vcpu.cpu.instructions
        until(lambda: tiny.vcpu.cpu.instructions > before + 10_000 or not state.thread.is_alive())
        tiny.vcpu.kick()
        error = state.wait()
        assert error is not None and error.errno == errno.EINTR


def test_a_kick_ends_work_that_queues_itself_for_ever(tiny: Tiny) -> None:
    done = [0]

    def work() -> None:
        done[0] += 1
        tiny.vcpu.call_soon(work)

    tiny.vcpu.call_soon(work)
    with running(tiny.vcpu) as state:
        until(lambda: done[0] > 100)
        tiny.vcpu.kick()
        error = state.wait()
        assert error is not None and error.errno == errno.EINTR
    assert len(tiny.vcpu.task_work) == 1, "the rest is for the next KVM_RUN"


def test_work_that_work_queues_is_done_before_a_kick_ends_kvm_run(tiny: Tiny) -> None:
    done: list[str] = []

    def first() -> None:
        tiny.vcpu.kick()
        done.append("first")
        tiny.vcpu.call_soon(lambda: done.append("second"))

    tiny.vcpu.call_soon(first)
    with running(tiny.vcpu) as state:
        error = state.wait()
    assert error is not None and error.errno == errno.EINTR and done == ["first", "second"]


def test_what_a_timer_raises_kvm_run_raises(tiny: Tiny) -> None:
    def fail(_: CpuTimer) -> None:
        raise OSError(errno.ENODEV, "for a test")

    tiny.vcpu.cpu_clock.create_timer(fail).settime(5 * MS)
    with running(tiny.vcpu) as state:
        error = state.wait()
    assert error is not None and error.errno == errno.ENODEV


def test_a_closed_vcpus_timers_do_not_expire(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    timer = clock.create_timer(lambda _: None)
    timer.settime(5 * MS)
    tiny.vcpu.close()
    assert timer.gettime().value_ns == 0
    with pytest.raises(OSError) as info:
        timer.settime(1)
    assert info.value.errno == errno.EBADF
    timer.delete()


def test_a_child_has_none_of_its_parents_timers_and_may_have_its_own(tiny: Tiny) -> None:
    clock = tiny.vcpu.cpu_clock
    fired: list[int] = []
    timer = clock.create_timer(lambda _: fired.append(os.getpid()))
    with running(tiny.vcpu):
        timer.settime(1000 * MS, absolute=True)

        def child() -> None:
            assert timer.gettime().value_ns == 0
            other = Tiny().long_mode()
            other.load(SPIN)
            done: list[int] = []
            other.vcpu.cpu_clock.create_timer(lambda _: done.append(1)).settime(5 * MS)
            with running(other.vcpu):
                until(lambda: done)
            other.close()

        in_child(child)
        until(lambda: fired)
    assert fired == [os.getpid()]


# --- the same on either KVM ----------------------------------------------------------------------------


def _spinning(kvm: api.Kvm) -> tuple[api.Vm, api.Vcpu]:
    vm = kvm.create_vm()
    if vm.check_extension(abi.KVM_CAP_SET_TSS_ADDR):
        vm.set_tss_addr(0xFFFBD000)
    memory = Memory(2 << 20)
    memory.write(0x1000, SPIN)
    region = abi.kvm_userspace_memory_region(memory_size=memory.size, userspace_addr=memory.address)
    vm.set_user_memory_region(region, memory.view)
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=0x1000, rflags=2, rsp=0x8000))
    return vm, vcpu


@pytest.mark.parametrize("kind", sorted(KVMS))
def test_timers_expire_on_the_vcpus_thread_whichever_kvm_it_is(kind: str) -> None:
    with KVMS[kind]() as kvm:
        vm, vcpu = _spinning(kvm)
        clock = vcpu.cpu_clock
        fired: list[tuple[int, int]] = []
        timer = clock.create_timer(lambda _: fired.append((threading.get_ident(), clock.total_ns())))
        timer.settime(20 * MS, 10 * MS)
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                with pytest.raises(InterruptedError):
                    vcpu.run()

        with running(vcpu, run) as state:
            until(lambda: len(fired) >= 3)
            stop.set()
        assert {thread for thread, _ in fired} == {state.thread.ident}
        assert all(when >= (20 + 10 * n) * MS for n, (_, when) in enumerate(fired))
        vcpu.close()
        vm.close()


def test_the_device_does_not_tell_the_guests_part() -> None:
    with KVMS["device"]() as kvm:
        vm, vcpu = _spinning(kvm)
        asked: list[Callable[[], object]] = [
            vcpu.cpu_clock.guest_ns,
            vcpu.cpu_clock.host_ns,
            lambda: vcpu.cpu_clock.create_timer(lambda _: None, Clock.GUEST),
        ]
        for ask in asked:
            with pytest.raises(OSError) as info:
                ask()
            assert info.value.errno == errno.ENOTSUP
        vcpu.close()
        vm.close()


def test_who_asks_for_no_time_is_not_accounted(tiny: Tiny) -> None:
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    assert tiny.vcpu.accounted is None
    assert tiny.vcpu.cpu.cpu_times() == (0, 0)
    with pytest.raises(RuntimeError):
        tiny.vcpu.cpu.account()
