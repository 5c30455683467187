# SPDX-License-Identifier: Apache-2.0
"""A standstill gets every vCPU thread, and lets it go."""

from __future__ import annotations

import threading
from typing import cast

from softkvm.vmm.standstill import Standstill
from softkvm.vmm.vcpu_thread import VcpuThread


class Thread:
    """Comes to stand when its vCPU is kicked for the second time: the first kick is lost."""

    def __init__(self, standstill: Standstill) -> None:
        self.standstill = standstill
        self.kicks = 0
        self.went_on = threading.Event()
        self.vcpu = self

    def kick(self) -> None:
        self.kicks += 1
        if self.kicks == 2:
            threading.Thread(target=self._stand, daemon=True).start()

    def _stand(self) -> None:
        self.standstill.stand(cast(VcpuThread, self))
        self.went_on.set()


def test_standstill_fetches_everyone_and_lets_them_go() -> None:
    standstill = Standstill(threading.Event())
    threads = [Thread(standstill), Thread(standstill)]
    with standstill.hold():
        assert standstill.held
        assert standstill.wait(cast(list[VcpuThread], threads), 30)
        assert not any(thread.went_on.is_set() for thread in threads)
    assert all(thread.went_on.wait(30) for thread in threads)
    assert not standstill.held


def test_standstill_gives_up_on_a_thread_that_is_busy_elsewhere() -> None:
    standstill = Standstill(threading.Event())
    busy = Thread(standstill)
    busy.kicks = 2  # deaf from now on
    with standstill.hold():
        assert not standstill.wait(cast(list[VcpuThread], [busy]), 0.05)


def test_end_of_the_machine_ends_a_standstill() -> None:
    ended = threading.Event()
    standstill = Standstill(ended)
    thread = Thread(standstill)
    with standstill.hold():
        assert standstill.wait(cast(list[VcpuThread], [thread]), 30)
        ended.set()
        assert thread.went_on.wait(30)


def test_who_changes_the_machine_is_alone() -> None:
    standstill = Standstill(threading.Event())
    alone, go = threading.Event(), threading.Event()

    def change() -> None:
        with standstill.hold(), standstill.alone() as still:
            assert still
            alone.set()
            assert go.wait(30)

    thread = threading.Thread(target=change)
    with standstill.hold():
        thread.start()
        assert not alone.wait(0.05)  # somebody looks
    assert alone.wait(30)
    with standstill.hold():
        assert not standstill.wait([], 0.05)
        go.set()
        assert standstill.wait([], 30)
    thread.join(30)


def test_nobody_is_alone_behind_the_end() -> None:
    ended = threading.Event()
    ended.set()
    standstill = Standstill(ended)
    with standstill.hold(), standstill.alone() as still:
        assert not still
