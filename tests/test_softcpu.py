# SPDX-License-Identifier: Apache-2.0
"""The processor's clockwork as KVM uses it: kicks, the timer, waiting asleep and awake."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
from tests.support.threads import beside

from softkvm import _softcpu
from softkvm._softcpu import Cpu, Machine, clock_ns

MS = 1_000_000


@pytest.fixture
def cpu() -> Cpu:
    return Cpu(Machine(), 0)


@pytest.mark.parametrize("wait", ["wait", "poll"])
def test_a_wait_ends_with_its_time(cpu: Cpu, wait: str) -> None:
    start = clock_ns()
    assert not getattr(cpu, wait)(2 * MS)
    assert clock_ns() - start >= 2 * MS


@pytest.mark.parametrize("wait", ["wait", "poll"])
def test_a_kick_that_came_before_ends_a_wait_and_stays(cpu: Cpu, wait: str) -> None:
    cpu.kick()
    assert getattr(cpu, wait)(60_000 * MS)
    assert cpu.clear_kick()


@pytest.mark.parametrize("wait", ["wait", "poll"])
def test_a_kick_from_another_thread_ends_a_wait(cpu: Cpu, wait: str) -> None:
    with beside(threading.Timer(0.01, cpu.kick)):
        assert getattr(cpu, wait)(60_000 * MS)


@pytest.mark.parametrize("wait", ["wait", "poll"])
def test_the_timer_ends_a_wait_not_before_its_time(cpu: Cpu, wait: str) -> None:
    deadline = clock_ns() + 5 * MS
    cpu.set_timer(deadline)
    assert getattr(cpu, wait)(60_000 * MS)
    assert clock_ns() >= deadline


def test_a_timer_that_has_passed_ends_a_wait_at_once(cpu: Cpu) -> None:
    cpu.set_timer(1)
    assert cpu.wait()


def test_a_wait_that_ends_before_the_timer_leaves_it_armed(cpu: Cpu) -> None:
    deadline = clock_ns() + 30 * MS
    cpu.set_timer(deadline)
    assert not cpu.wait(MS)
    cpu.kick()
    assert cpu.wait()
    cpu.clear_kick()
    assert cpu.wait(60_000 * MS)
    assert clock_ns() >= deadline


def test_a_disarmed_timer_kicks_nobody(cpu: Cpu) -> None:
    while True:  # until the host lets us disarm it in time
        deadline = clock_ns() + 50 * MS
        cpu.set_timer(deadline)
        cpu.set_timer(0)
        if clock_ns() < deadline:
            break
        cpu.clear_kick()
    assert not cpu.wait(80 * MS)


def test_kicks_for_others_go_out_when_the_sender_leaves_the_interpreter() -> None:
    machine = Machine()
    sender, other, third = (Cpu(machine, n) for n in range(3))
    run = _softcpu.Run(sender, lambda _owner, _told: None, None).run
    for leave in (lambda: sender.wait(0), lambda: sender.poll(0), run):
        sender.kick_at_entry(other)
        sender.kick_at_entry(third)
        assert not other.clear_kick()
        leave()
        assert other.clear_kick()
        assert third.clear_kick()
        leave()
        assert not other.clear_kick()


def test_a_page_is_given_back_once_and_not_while_it_is_looked_at() -> None:
    page = Machine().alloc_page(2)
    view = memoryview(page)
    assert (page.size, len(view), bytes(view)) == (8192, 8192, bytes(8192))
    with pytest.raises(BufferError):
        page.free()
    view[8191] = 1
    view.release()
    page.free()
    page.free()
    assert page.address == 0
    with pytest.raises(BufferError, match="freed"):
        memoryview(page)


_FREEING = """
import sys, threading
from softkvm._softcpu import Machine
machine = Machine()
box, done = [machine.alloc_page()], threading.Event()
def take():
    while not done.is_set():
        try:
            view = memoryview(box[0])
        except BufferError:
            continue
        view[0], view[4095] = 1, 2
        view.release()
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=take) for _ in range(3)]
for thread in threads:
    thread.start()
freed = 0
while freed < 5000:
    try:
        box[0].free()
    except BufferError:
        continue
    freed += 1
    box[0] = machine.alloc_page(512)  # a chunk each: given back to the host at once
done.set()
for thread in threads:
    thread.join()
"""


def test_a_view_taken_while_a_page_is_given_back_keeps_it() -> None:
    ended = subprocess.run([sys.executable, "-c", _FREEING], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_run_is_told_of_words_that_are_watched() -> None:
    cpu = Cpu(Machine(), 0)
    told: list[int] = []
    run = _softcpu.Run(cpu, list.append, told).run
    words = memoryview(bytearray(24)).cast("Q")
    run()
    cpu.watch(words[1:])
    run()
    words[0] = 1
    run()
    words[2] = 1 << 63
    run()
    cpu.interrupt()
    run()
    both = _softcpu.RUN_WATCHED | _softcpu.RUN_INTERRUPTED
    assert told == [0, 0, 0, _softcpu.RUN_WATCHED, both]
    with pytest.raises(ValueError, match="already"):
        cpu.watch(words)
    for bad in (words[::2], memoryview(bytearray(8))):
        with pytest.raises((ValueError, BufferError)):
            Cpu(Machine(), 0).watch(bad)


def test_a_run_keeps_what_it_calls_and_goes_with_it() -> None:
    class Owner:
        run: _softcpu.Run

        def called(self, told: int) -> None:
            raise InterruptedError(told)

    owner = Owner()
    owner.run = _softcpu.Run(Cpu(Machine(), 0), Owner.called, owner)
    owner.run.mask = 1 << 9
    assert owner.run.mask == 1 << 9
    owner.run.mask = None
    assert owner.run.mask is None
    with pytest.raises(InterruptedError):
        owner.run.run()
    gone = weakref.ref(owner)
    del owner  # a circle, which the collector has to see through the native object
    gc.collect()
    assert gone() is None
