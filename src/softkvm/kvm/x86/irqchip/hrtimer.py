# SPDX-License-Identifier: Apache-2.0
"""Timers with nanosecond deadlines: a queue that runs expired callbacks, and the thread that waits for them.

:class:`HrtimerQueue` holds no clock of its own thread: a test moves a fake clock and calls :meth:`HrtimerQueue.run`.
A machine starts one :class:`HrtimerThread` on its queue, for the timers that belong to no vCPU (the PIT). The timers of
local APICs are the processors' own.
"""

import threading
import time
from collections.abc import Callable

from softkvm.kvm.x86.irqchip.seams import Clock
from softkvm.threads import start_quiet

HrtimerFunction = Callable[[int], int]
"""Called with the time now, in ns, and no lock held; returns the next deadline, or 0 to stop."""

_IDLE_NS = 3_600 * 10**9


def clock_ns() -> int:
    """Return the clock of the processors' timers, in nanoseconds."""
    return default_clock()()


def default_clock() -> Clock:
    """Return the software CPU's ``clock_ns``, or the system's monotonic clock where that is not built."""
    try:
        from softkvm import _softcpu
    except ImportError:
        return time.monotonic_ns
    return _softcpu.clock_ns


class Hrtimer:
    """One timer of a queue. It never runs early."""

    __slots__ = ("_function", "_generation", "_queue")

    def __init__(self, queue: "HrtimerQueue", function: HrtimerFunction) -> None:
        self._queue = queue
        self._function = function
        self._generation = 0  # counts start() and cancel()

    @property
    def deadline_ns(self) -> int:
        """The armed deadline, 0 for none."""
        return self._queue._armed.get(self, 0)

    def start(self, deadline_ns: int) -> None:
        """Run the function when the clock reaches *deadline_ns*, in place of any earlier deadline."""
        queue = self._queue
        deadline_ns = max(deadline_ns, 1)
        with queue._lock:
            self._generation += 1
            queue._armed[self] = deadline_ns
            first = min(queue._armed.values()) == deadline_ns
        if first and queue.wake is not None:
            queue.wake()

    def cancel(self) -> None:
        """Forget the deadline. A function that is running already runs to its end, but does not re-arm."""
        with self._queue._lock:
            self._generation += 1
            self._queue._armed.pop(self, None)


class HrtimerQueue:
    """The armed timers of a machine: a handful, so the earliest is looked for, not kept.

    *clock* gives nanoseconds; ``wake`` is called, without a lock, when the earliest deadline has moved forward.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or default_clock()
        self.wake: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._armed: dict[Hrtimer, int] = {}

    def next_deadline_ns(self) -> int:
        """Return the earliest deadline, or 0 with no timer armed."""
        with self._lock:
            return min(self._armed.values(), default=0)

    def run(self) -> None:
        """Run the functions of the timers whose deadline the clock has reached, in the order of their deadlines."""
        while True:
            now = self.clock()
            with self._lock:
                timer, deadline = min(self._armed.items(), key=lambda item: item[1], default=(None, 0))
                if timer is None or deadline > now:
                    return
                del self._armed[timer]
                generation = timer._generation
            again = timer._function(now)
            if again:
                with self._lock:
                    if timer._generation == generation:  # nobody started or cancelled it meanwhile
                        self._armed[timer] = again


class HrtimerThread:
    """Runs a queue's timers in real time until :meth:`stop`."""

    def __init__(self, queue: HrtimerQueue, name: str = "kvm-hrtimer") -> None:
        self._queue = queue
        self._event = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._name = name
        self._lock = threading.Lock()
        queue.wake = self._wake

    def _wake(self) -> None:
        """Start the thread with the first timer, later end its sleep."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._stopping:
                    self._thread = start_quiet(self._main, self._name)
        self._event.set()

    def _main(self) -> None:
        queue, event = self._queue, self._event
        while not self._stopping:
            event.clear()
            queue.run()
            deadline = queue.next_deadline_ns()
            wait_ns = deadline - queue.clock() if deadline else _IDLE_NS
            if wait_ns > 0:
                event.wait(min(wait_ns, _IDLE_NS) / 1e9)

    def stop(self) -> None:
        """End the thread and wait for it; no function runs after this returns."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        self._event.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
