# SPDX-License-Identifier: Apache-2.0
"""All vCPU threads out of KVM_RUN, for as long as someone needs that: to sleep, or to look at the whole machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.vmm.vcpu_thread import VcpuThread

_LOOK_S = 0.1  # the end wakes nobody
_KICK_AGAIN_S = 0.01  # a kick that came between two runs may be lost


class Standstill:
    """``held`` says that a thread that came out of KVM_RUN has to call :meth:`stand` before it goes back."""

    def __init__(self, ended: threading.Event) -> None:
        self.held = 0
        self._ended = ended
        self._changed = threading.Condition()
        self._standing: set[VcpuThread] = set()
        self._changers = 0
        self._changing = False
        self._held_alone: dict[VcpuThread, int] = {}  # what ``held`` counts for one thread each

    def acquire(self) -> None:
        """Ask for it. Threads that are in the guest go on until :meth:`wait` fetches them."""
        with self._changed:
            self.held += 1

    def release(self) -> None:
        """Have had enough of it."""
        with self._changed:
            self.held -= 1
            self._changed.notify_all()

    def acquire_thread(self, thread: VcpuThread) -> None:
        """Ask for *thread* alone to stand: the others go on."""
        with self._changed:
            self.held += 1
            self._held_alone[thread] = self._held_alone.get(thread, 0) + 1

    def release_thread(self, thread: VcpuThread) -> None:
        """Have had enough of :meth:`acquire_thread`."""
        with self._changed:
            self.held -= 1
            self._held_alone[thread] -= 1
            if not self._held_alone[thread]:
                del self._held_alone[thread]
            self._changed.notify_all()

    @property
    def _held_together(self) -> int:
        """How many hold all threads."""
        return self.held - sum(self._held_alone.values())

    def _holds(self, thread: VcpuThread) -> bool:
        """Whether somebody holds *thread*, by itself or with all."""
        return thread in self._held_alone or self._held_together > 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Ask for it in a ``with`` statement."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait until all who hold it want to change the machine, one by one, and no :meth:`wait` ends: True.

        For holders who change what others look at. False if the machine has ended.
        """
        with self._changed:
            self._changers += 1
            while (self._held_together > self._changers or self._changing) and not self._ended.is_set():
                self._changed.wait(_LOOK_S)
            self._changing = True
            alone = not self._ended.is_set()
        try:
            yield alone
        finally:
            with self._changed:
                self._changing = False
                self._changers -= 1
                self._changed.notify_all()

    def wait(self, threads: Collection[VcpuThread], timeout_s: float) -> bool:
        """Wait until all of *threads* stand, return whether they do. To be called while it is held."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._ended.is_set():
                missing = set(threads) - self._standing
                remaining_s = deadline - time.monotonic()
                if not (missing or self._changing) or remaining_s <= 0:
                    return not (missing or self._changing)
                for thread in missing:
                    thread.vcpu.kick()
                self._changed.wait(min(remaining_s, _KICK_AGAIN_S))
        return False

    def stand(self, thread: VcpuThread, until_ns: int = 0) -> None:
        """Let *thread*, which calls this, stand until nobody holds it, or all, and the clock reads *until_ns*.

        The machine's end comes before that.
        """
        with self._changed:
            self._standing.add(thread)
            self._changed.notify_all()
            while not self._ended.is_set():
                left_s = (until_ns - time.monotonic_ns()) / 1e9
                held = self._holds(thread)
                if not held and left_s <= 0:
                    break
                self._changed.wait(_LOOK_S if held else min(left_s, _LOOK_S))
            self._standing.discard(thread)
