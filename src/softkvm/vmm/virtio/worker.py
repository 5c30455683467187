# SPDX-License-Identifier: Apache-2.0
"""Threads that devices work on: one waits for files and timers of several devices, and calls their functions in turn.

Whatever a worker calls runs under its lock. Another thread that holds the lock therefore sees no device of the worker's
in the middle of something: so vCPU threads change a device's status.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from softkvm.closing import Closing
from softkvm.threads import start_quiet
from softkvm.vmm.errors import complain, show_traceback, unexpected

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
ONCE: Final = select.EPOLLET
"""With READ, of an eventfd: each signal calls once, and nobody has to read the counter."""
_COMPLAINTS: Final = 10

HANG_UP: Final = select.EPOLLHUP | select.EPOLLERR


class Timer:
    """A call that is due at ``due`` of :func:`time.monotonic`."""

    __slots__ = ("arguments", "due", "function")

    def __init__(self, due: float, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.due = due
        self.function: Callable[..., object] | None = function
        self.arguments = arguments

    def cancel(self) -> None:
        """Don't call it any more."""
        self.function = None


class Worker(Closing):
    """A thread with a selector. What it calls may add, remove and call; other threads may, too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        """Held during every call."""
        self._resumed = threading.Condition(self.lock)
        self._pauses = 0
        self._files: dict[int, Callable[[int], object]] = {}
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._closed = False
        self._complaints = 0
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, READ)
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        """Begin to wait, now that there is something to wait for."""
        if self._thread is None and not self._closed:
            self._thread = start_quiet(self._main, self.name)

    # -- files

    def add(self, file: Any, events: int, callback: Callable[[int], object]) -> None:
        """Call *callback* with the events of *file* (a descriptor, or what has ``fileno()``): READ, WRITE, HANG_UP."""
        fd = file if isinstance(file, int) else file.fileno()
        with self.lock:
            self._files[fd] = callback
            self._epoll.register(fd, events)
            self._start()

    def modify(self, file: Any, events: int) -> None:
        """Wait for other *events* of *file*."""
        self._epoll.modify(file, events)

    def remove(self, file: Any) -> None:
        """Wait for *file* no more; from another thread, its callback isn't running when this returns."""
        fd = file if isinstance(file, int) else file.fileno()
        with self.lock:
            if self._files.pop(fd, None) is not None:
                with contextlib.suppress(OSError, ValueError):  # closed before
                    self._epoll.unregister(fd)

    # -- calls

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call *function* on the worker's thread, soon and in order; from any thread, without waiting for it."""
        self._calls.append((function, arguments))
        self._wake_up()

    def call_later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> Timer:
        """Call *function* on the worker's thread after *seconds*; the result's ``cancel()`` takes that back."""
        timer = Timer(time.monotonic() + seconds, function, arguments)
        with self.lock:
            heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        self._wake_up()
        return timer

    def _wake_up(self) -> None:
        if self._thread is None:
            with self.lock:
                self._start()
        if self._thread is not threading.current_thread():
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    # -- rest

    def pause(self) -> None:
        """Call nothing any more, from this moment on until as many :meth:`resume`; what is running ends before."""
        with self.lock:
            self._pauses += 1

    def resume(self) -> None:
        """Go on: what came meanwhile is called now."""
        with self.lock:
            self._pauses -= 1
            self._resumed.notify_all()

    def close(self) -> None:
        """End the thread; nothing is called any more when this returns."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self._resumed.notify_all()
            thread = self._thread
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._epoll.close()
        os.close(self._wake)
        self._files.clear()
        self._calls.clear()
        self._timers.clear()

    # -- the thread

    def _main(self) -> None:
        poll, files, calls, timers = self._epoll.poll, self._files, self._calls, self._timers
        lock, wake = self.lock, self._wake
        while True:
            timeout = None
            if calls:
                timeout = 0.0
            elif timers:
                timeout = max(0.0, timers[0][0] - time.monotonic())
            ready = poll(timeout)
            with lock:
                while self._pauses and not self._closed:
                    self._resumed.wait()
                if self._closed:
                    return
                for fd, events in ready:
                    if fd == wake:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(wake)
                        continue
                    callback = files.get(fd)
                    if callback is not None:
                        self._call(callback, (events,))
                if calls:
                    for _ in range(len(calls)):
                        self._call(*calls.popleft())
                if timers:
                    self._expire()

    def _expire(self) -> None:
        now = time.monotonic()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            if timer.function is not None:
                self._call(timer.function, timer.arguments)

    def _call(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self._closed:
            return
        try:
            function(*arguments)
        except Exception as error:  # a bug of one device's must not end the others'
            show_traceback(error)
            self._complaints += 1
            if self._complaints <= _COMPLAINTS:  # a file that stays ready would fill the terminal
                complain(f"{self.name}: {unexpected(error)}")


class Workers(Closing):
    """All workers of a machine: one that small devices share, and those of devices that have their own."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._shared: Worker | None = None
        self._pauses = 0

    def shared(self) -> Worker:
        """Return the one for all devices that have little to do."""
        if self._shared is None:
            self._shared = self.own("devices")
        return self._shared

    def own(self, name: str) -> Worker:
        """Return a new one."""
        worker = Worker(name)
        for _ in range(self._pauses):
            worker.pause()
        self._workers.append(worker)
        return worker

    def pause(self) -> None:
        """When this returns, no device is in the middle of anything, until :meth:`resume`."""
        self._pauses += 1
        for worker in self._workers:
            worker.pause()

    def resume(self) -> None:
        """Go on."""
        self._pauses -= 1
        for worker in self._workers:
            worker.resume()

    def close(self) -> None:
        """End all threads."""
        for worker in self._workers:
            worker.close()
