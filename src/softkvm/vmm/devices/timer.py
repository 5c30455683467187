# SPDX-License-Identifier: Apache-2.0
"""A one-shot timer for devices, on a thread that exists only once it was needed."""

import threading
from collections.abc import Callable

from softkvm.threads import start_quiet


class Timer:
    """Calls ``expire()`` on its own thread when the armed time has come; arming again replaces the time.

    ``clock_ns`` is the clock that ``arm()`` deadlines are on. The callback may arm the timer again. It is called
    without any lock of the timer's held, and it may come once more for a deadline that was replaced or cancelled at
    that very moment: a device looks at its own state when it is called.
    """

    def __init__(self, name: str, clock_ns: Callable[[], int], expire: Callable[[], None]) -> None:
        self._name = name
        self._clock_ns = clock_ns
        self._expire = expire
        self._deadline_ns: int | None = None
        self._closed = False
        self._paused = False
        self._expiring = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def arm(self, deadline_ns: int | None) -> None:
        """Fire at ``deadline_ns`` of the clock; None disarms."""
        with self._changed:
            if deadline_ns == self._deadline_ns or self._closed:
                return
            self._deadline_ns = deadline_ns
            if self._thread is not None:
                self._changed.notify_all()
            elif deadline_ns is not None:
                self._thread = start_quiet(self._loop, self._name)

    def pause(self) -> None:
        """Expire no more until :meth:`resume`; waits for a callback that runs."""
        with self._changed:
            self._paused = True
            while self._expiring and self._thread is not threading.current_thread():
                self._changed.wait()

    def resume(self) -> None:
        """Expire again, at once if that was due meanwhile."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """Disarm for ever and end the thread."""
        with self._changed:
            self._closed = True
            self._deadline_ns = None
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while True:
                    if self._closed:
                        return
                    if self._deadline_ns is None or self._paused:
                        self._changed.wait()
                        continue
                    remaining_ns = self._deadline_ns - self._clock_ns()
                    if remaining_ns <= 0:
                        break
                    # At most a minute at once: a wall clock may be set while we sleep.
                    self._changed.wait(min(remaining_ns / 1e9, 60.0))
                self._deadline_ns = None
                self._expiring = True
            try:
                self._expire()
            finally:
                with self._changed:
                    self._expiring = False
                    self._changed.notify_all()
