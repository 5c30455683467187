# SPDX-License-Identifier: Apache-2.0
"""Threads of tests: they end with the test, however that ends (``tests/conftest.py`` makes sure of it)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softkvm import api

PATIENCE_S = 30.0


def until(reached: Callable[[], object]) -> None:
    """Wait for a condition; AssertionError if it doesn't come."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)


@contextmanager
def beside(*threads: threading.Thread) -> Iterator[None]:
    """Start threads, timers among them; at the end wait for them. They have to end by themselves."""
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            if isinstance(thread, threading.Timer):
                thread.cancel()
        end = time.monotonic() + PATIENCE_S
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))


class Running:
    """A KVM_RUN on a thread of its own."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        #: What it raised.
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._main)

    def _main(self) -> None:
        try:
            self.run()
        except OSError as error:
            self.error = error

    def wait(self) -> OSError | None:
        """Wait until it is over, without a kick; return what it raised."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "KVM_RUN does not end"
        return self.error


@contextmanager
def running(vcpu: api.Vcpu, run: Callable[[], object] | None = None) -> Iterator[Running]:
    """Run a vCPU on a thread of its own, which a kick ends at last; *run* is instead of ``vcpu.run``."""
    state = Running(run or vcpu.run)
    state.thread.start()
    try:
        yield state
    finally:
        end = time.monotonic() + PATIENCE_S
        while state.thread.is_alive() and time.monotonic() < end:
            vcpu.kick()
            state.thread.join(0.1)
