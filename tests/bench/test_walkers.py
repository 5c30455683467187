# SPDX-License-Identifier: Apache-2.0
"""The machine that measurements of memory have in common ends whenever it is told to, in the middle of a pass, too."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest
from tests.support.machines import KVMS
from tests.support.timeouts import OWN_ALARM

from softkvm.bench.walkers import BenchError, Walk, Walkers, map_memory


class _Signalled(Exception):
    pass


def _raise(number: int, frame: FrameType | None) -> None:
    raise _Signalled


@OWN_ALARM
@pytest.mark.parametrize("kind", sorted(KVMS))
def test_what_a_signal_has_ended_can_be_closed(kind: str) -> None:
    with KVMS[kind]() as kvm:
        walk = Walk(2, 16 << 20, False, 100)
        machine = Walkers(kvm, walk, *map_memory(32 << 20, "anonymous"))
        before = signal.signal(signal.SIGALRM, _raise)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(_Signalled):
                while True:
                    machine.go_over_memory()
        finally:
            signal.signal(signal.SIGALRM, before)
        closing = threading.Thread(target=machine.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()


def test_where_the_host_has_no_more_threads_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_three(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_three)
    with KVMS["soft"]() as kvm:
        with pytest.raises(BenchError, match="5 vCPUs: can't start new thread"):
            Walkers(kvm, Walk(5, 2 << 20, True, 50), *map_memory(2 << 20, "anonymous"))
        assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("passes", [0, 1])
def test_what_waits_for_its_next_pass_can_be_closed(passes: int) -> None:
    with KVMS["soft"]() as kvm:
        machine = Walkers(kvm, Walk(2, 2 << 20, True, 50), *map_memory(2 << 20, "shmem"))
        for _ in range(passes):
            machine.go_over_memory()
        machine.close()
