# SPDX-License-Identifier: Apache-2.0
"""Timers run in order, never early, and stop when told."""

import threading
import time

from tests.support.interrupts import FakeClock

from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer, HrtimerQueue, HrtimerThread


def test_timers_run_in_the_order_of_their_deadlines_and_not_before() -> None:
    clock = FakeClock(0)
    queue = HrtimerQueue(clock)
    order: list[str] = []

    def note(name: str) -> Hrtimer:
        def run(now: int) -> int:
            order.append(name)
            return 0

        return Hrtimer(queue, run)

    late, early = note("late"), note("early")
    late.start(200)
    early.start(100)
    clock.now_ns = 99
    queue.run()
    assert order == []
    assert queue.next_deadline_ns() == 100
    clock.now_ns = 200
    queue.run()
    assert order == ["early", "late"]
    assert queue.next_deadline_ns() == 0


def test_returned_deadline_arms_again_unless_cancelled_meanwhile() -> None:
    clock = FakeClock(0)
    queue = HrtimerQueue(clock)
    runs: list[int] = []

    def tick(now: int) -> int:
        runs.append(now)
        if len(runs) == 3:
            timer.cancel()
        return now + 10

    timer = Hrtimer(queue, tick)
    timer.start(10)
    for clock.now_ns in range(0, 100, 10):
        queue.run()
    assert runs == [10, 20, 30]
    assert timer.deadline_ns == 0


def test_thread_runs_a_timer_that_is_started_while_it_sleeps_for_a_later_one() -> None:
    queue = HrtimerQueue(time.monotonic_ns)
    thread = HrtimerThread(queue)
    done = threading.Event()
    ran: list[int] = []

    def soon(now: int) -> int:
        ran.append(now)
        done.set()
        return 0

    Hrtimer(queue, lambda now: 0).start(time.monotonic_ns() + 60_000_000_000)
    deadline = time.monotonic_ns() + 5_000_000
    Hrtimer(queue, soon).start(deadline)
    assert done.wait(30)
    assert ran[0] >= deadline
    thread.stop()
    Hrtimer(queue, soon).start(1)
    time.sleep(0.01)
    assert len(ran) == 1
