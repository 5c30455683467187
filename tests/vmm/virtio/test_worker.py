# SPDX-License-Identifier: Apache-2.0
"""Workers call what is due, one at a time, rest when they are told to, and outlive what their devices raise."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from softkvm.vmm.virtio.worker import ONCE, READ, Worker, Workers


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("test") as worker:
        yield worker


def settle(worker: Worker) -> None:
    done = threading.Event()
    worker.call(done.set)
    assert done.wait(30)


def test_calls_are_made_in_order_on_the_workers_thread(worker: Worker) -> None:
    found: list[tuple[int, str]] = []
    for number in range(100):
        worker.call(lambda number=number: found.append((number, threading.current_thread().name)))
    settle(worker)
    assert found == [(number, "test") for number in range(100)]


def test_a_file_is_called_for_until_it_is_taken_away(worker: Worker) -> None:
    read, write = os.pipe()
    seen: list[bytes] = []
    worker.add(read, READ, lambda events: seen.append(os.read(read, 10)))
    os.write(write, b"one")
    settle(worker)
    settle(worker)
    worker.remove(read)
    os.write(write, b"two")
    settle(worker)
    assert seen == [b"one"]
    os.close(read)
    os.close(write)


def test_an_eventfd_calls_once_for_a_signal_although_nobody_reads_it(worker: Worker) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    seen: list[int] = []
    worker.add(fd, READ | ONCE, seen.append)
    for count in range(1, 4):
        os.eventfd_write(fd, 1)
        settle(worker)
        settle(worker)
        assert len(seen) == count
    worker.remove(fd)
    os.close(fd)


def test_timers_are_called_in_the_order_of_their_times_unless_cancelled(worker: Worker) -> None:
    found: list[int] = []
    timers = [worker.call_later(delay / 100, found.append, delay) for delay in (9, 3, 6)]
    timers[2].cancel()
    deadline = time.monotonic() + 30
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    settle(worker)
    assert found == [3, 9]


def test_nothing_is_called_during_a_pause_and_nothing_is_lost(worker: Worker) -> None:
    found: list[int] = []
    settle(worker)
    worker.pause()
    worker.pause()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    worker.add(fd, READ | ONCE, lambda events: found.append(2))
    worker.call(found.append, 1)
    os.eventfd_write(fd, 1)
    worker.call_later(0, found.append, 3)
    worker.resume()
    time.sleep(0.05)
    assert found == []
    worker.resume()
    settle(worker)
    settle(worker)
    assert sorted(found) == [1, 2, 3]
    worker.remove(fd)
    os.close(fd)


def test_what_a_callback_raises_is_said_and_the_others_go_on(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(50):
        worker.call(lambda: 1 // 0)
    settle(worker)
    said = capfd.readouterr().err
    assert said.count("ZeroDivisionError") == 10  # not for ever
    assert said.startswith("softkvm: test: ")


def test_a_worker_that_is_new_while_others_rest_rests_too() -> None:
    found: list[int] = []
    with Workers() as workers:
        assert workers.shared() is workers.shared()
        workers.pause()
        own = workers.own("own")
        own.call(found.append, 1)
        time.sleep(0.02)
        assert found == []
        workers.resume()
        settle(own)
        assert found == [1]


def test_a_closed_worker_calls_nothing(worker: Worker) -> None:
    found: list[int] = []
    settle(worker)
    worker.close()
    worker.call(found.append, 1)
    worker.call_later(0, found.append, 2)
    time.sleep(0.02)
    assert found == []
    worker.close()
