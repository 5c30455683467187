# SPDX-License-Identifier: Apache-2.0
"""The CPU time of a vCPU, and timers on it, as POSIX has them for threads (``timer_create``, ``timer_settime``).

Expiry is task work: what a timer calls runs on the vCPU's own thread, before that enters the guest again. As in the
kernel (``posix-cpu-timers.c``) there are two halves. One timer of the host's, on the clock of the vCPU's thread, says
that something may be due; its signal goes to one thread of the process, which has it blocked and waits for it, so no
handler runs, and no thread of the client's sees any of it. That thread only queues the other half as task work, which
looks at the vCPU's clock, and calls what is due.

The host counts for us, so nobody looks at clocks meanwhile: neither the monitor while the vCPU's thread sleeps (a vCPU
that halts uses no CPU time), nor the vCPU itself. The price is the host's resolution: it looks at such timers at its
tick. A timer is late by up to a tick of CPU time (1 to 10 ms), and the time until the vCPU is out of the guest; never
early.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import heapq
import itertools
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from softkvm import _softcpu
from softkvm.abi.checks import kvm_error, number
from softkvm.threads import start_quiet, tell_after_fork

#: What the host's timers send to the monitor's thread, which blocks it; to no other.
SIGNAL: Final = signal.SIGRTMIN + 5

#: Longer times are EINVAL: a hundred years, which every clock of the host's takes.
MAX_NS: Final = 100 * 365 * 86400 * 10**9

#: How far ahead of the vCPU the host's timer is set at least: the guest gets somewhere between two looks.
STEP_NS: Final = 100_000

#: An overrun is never more (``DELAYTIMER_MAX``).
OVERRUN_MAX: Final = (1 << 31) - 1

_ROOM: Final = 64


class Clock(enum.Enum):
    """Which time of a vCPU."""

    TOTAL = "total"
    """That of its thread, as the host counts it."""
    GUEST = "guest"
    """The part of it in guest mode."""


class Setting(NamedTuple):
    """What a timer is set to (``struct itimerspec``), in ns: what is left, 0 if it is not armed; the period."""

    value_ns: int
    interval_ns: int


class Source(Protocol):
    """Where the time comes from: the processor, or the thread that runs one of the device's."""

    def account(self) -> None:
        """Begin; on the vCPU's thread, in KVM_RUN."""

    def cpu_times(self) -> tuple[int, int | None]:
        """Return total and guest time in ns; None where nobody knows the latter."""

    def cpu_thread(self) -> tuple[int, int]:
        """Return the thread that is in KVM_RUN, 0 for none, and by how much the account is ahead of its clock."""


class CpuTimer:
    """A timer on a vCPU's CPU time, not armed at first; see :meth:`CpuClock.create_timer`."""

    __slots__ = ("_clock", "_notify", "expires_ns", "generation", "interval_ns", "kind", "overrun")

    def __init__(self, clock: CpuClock, kind: Clock, notify: Callable[[CpuTimer], None]) -> None:
        self._clock = clock
        self._notify = notify
        self.kind = kind
        #: When it expires next, by its clock; 0: it is not armed.
        self.expires_ns = 0
        self.interval_ns = 0
        #: How many expiries the last call stands for, beside one (``timer_getoverrun``).
        self.overrun = 0
        #: Changes with each setting: what was queued before is void.
        self.generation = 0

    def settime(self, value_ns: int, interval_ns: int = 0, *, absolute: bool = False) -> Setting:
        """Arm the timer: to expire in ``value_ns``, then every ``interval_ns``, if that isn't 0; return what it was.

        ``absolute``: when the clock reads ``value_ns``; if it does already, at once. ``value_ns`` 0 disarms.
        EINVAL for times below 0 or above :data:`MAX_NS`, EBADF once the vCPU is closed.
        """
        number("value_ns", value_ns, 0, MAX_NS)
        number("interval_ns", interval_ns, 0, MAX_NS)
        return self._clock.set(self, value_ns, interval_ns, absolute)

    def gettime(self) -> Setting:
        """Return what the timer is set to. One that is due, and has not been called for yet, has 1 ns left."""
        return self._clock.get(self)

    def delete(self) -> None:
        """Disarm the timer; it is not called any more, but for a call that runs already."""
        with contextlib.suppress(OSError):  # the vCPU has been closed, and its timers with it
            self.settime(0)

    def call(self, generation: int, overrun: int) -> None:
        """Call what is to be called, unless the timer has been set anew since it expired; on the vCPU's thread."""
        if generation == self.generation:
            self.overrun = overrun
            self._notify(self)


class CpuClock:
    """A vCPU's CPU time, and its timers. It begins with the first KVM_RUN, or the next entry to the guest, from now."""

    def __init__(self, source: Source, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self._source = source
        self._call_soon = call_soon
        self._lock = threading.Lock()
        self._order = itertools.count()
        # Timers by expiry; an entry is void if the timer's generation is another by now.
        self._armed: dict[Clock, list[tuple[int, int, int, CpuTimer]]] = {kind: [] for kind in Clock}
        self._room = _ROOM  # with so many, void ones are looked for
        self._host_timer: _softcpu.ThreadTimer | None = None
        self._queued = False
        self._closed = False
        tell_after_fork(self)
        call_soon(self._begin)

    def total_ns(self) -> int:
        """Return the CPU time of the vCPU's thread, KVM_RUN's and what the thread does between. It never falls.

        While the vCPU is not in KVM_RUN it is what it was when that ended.
        """
        return self._source.cpu_times()[0]

    def guest_ns(self) -> int:
        """Return the part that the guest had; ENOTSUP where nobody knows."""
        return self._now(Clock.GUEST, self._source.cpu_times())

    def host_ns(self) -> int:
        """Return the part that KVM and its user had; ENOTSUP where nobody knows."""
        times = self._source.cpu_times()
        return times[0] - self._now(Clock.GUEST, times)

    @staticmethod
    def _now(kind: Clock, times: tuple[int, int | None]) -> int:
        if kind is Clock.TOTAL:
            return times[0]
        if times[1] is None:
            raise kvm_error(errno.ENOTSUP, "the device doesn't tell what of a thread's CPU time was the guest's")
        return times[1]

    # --- timers --------------------------------------------------------------------------------------

    def create_timer(self, notify: Callable[[CpuTimer], None], clock: Clock = Clock.TOTAL) -> CpuTimer:
        """Return a timer that calls ``notify`` with itself when it expires (``timer_create``).

        It is called on the vCPU's thread, in KVM_RUN, before the guest is entered again. What it raises KVM_RUN
        raises. ENOTSUP for guest time where nobody knows that.
        """
        self._now(clock, self._source.cpu_times())
        return CpuTimer(self, clock, notify)

    def set(self, timer: CpuTimer, value_ns: int, interval_ns: int, absolute: bool) -> Setting:
        """Do :meth:`CpuTimer.settime`."""
        with self._lock:
            if self._closed:
                raise kvm_error(errno.EBADF, "the vCPU has been closed")
            now = self._now(timer.kind, self._source.cpu_times())
            before = self._setting(timer, now)
            timer.generation += 1
            timer.interval_ns = interval_ns
            timer.expires_ns = 0
            if value_ns:
                timer.expires_ns = value_ns if absolute else now + value_ns
                self._push(timer)
        self.check()
        return before

    def get(self, timer: CpuTimer) -> Setting:
        """Do :meth:`CpuTimer.gettime`."""
        with self._lock:
            return self._setting(timer, self._now(timer.kind, self._source.cpu_times()))

    @staticmethod
    def _setting(timer: CpuTimer, now: int) -> Setting:
        return Setting(max(timer.expires_ns - now, 1) if timer.expires_ns else 0, timer.interval_ns)

    def _push(self, timer: CpuTimer) -> None:
        armed = self._armed[timer.kind]
        if len(armed) >= self._room:
            armed[:] = [entry for entry in armed if entry[2] == entry[3].generation]
            heapq.heapify(armed)
            self._room = max(2 * len(armed), _ROOM)
        heapq.heappush(armed, (timer.expires_ns, next(self._order), timer.generation, timer))

    def _first(self, kind: Clock) -> int | None:
        """Return when the first timer of a kind expires."""
        armed = self._armed[kind]
        while armed and armed[0][2] != armed[0][3].generation:
            heapq.heappop(armed)
        return armed[0][0] if armed else None

    def _earliest(self, times: tuple[int, int | None]) -> int | None:
        """Return the total time at which a timer may be due: the guest's grows no faster than the total."""
        first = [
            times[0] + expires - self._now(kind, times) for kind in Clock if (expires := self._first(kind)) is not None
        ]
        return min(first, default=None)

    # --- expiry --------------------------------------------------------------------------------------

    def check(self, *, expired: bool = False) -> None:
        """Queue the expiry as task work if something is due, else have the host say when it may be; from any thread.

        *expired*: this was it. What has become due since waits for a step, as the kernel's waits for a tick: with
        periods that are shorter than an expiry takes there would be no end of them.
        """
        with self._lock:
            if self._queued or self._closed:
                return
            times = self._source.cpu_times()
            earliest = self._earliest(times)
            if earliest is None:  # should the host's timer be armed it comes for nothing, once
                return
            if (expired or earliest > times[0]) and self._arm(max(earliest, times[0] + STEP_NS)):
                return
            self._queued = True
        self._call_soon(self._expire)

    def _arm(self, total_ns: int) -> bool:
        """Have the host say when the vCPU's clock has come that far; False if no thread is in KVM_RUN.

        Then its clock goes on, and the vCPU's stands still: the next KVM_RUN has to look.
        """
        thread, ahead = self._source.cpu_thread()
        if not thread:
            return False
        try:
            if self._host_timer is None:
                self._host_timer = _softcpu.ThreadTimer(thread, SIGNAL, _monitor.watch(self))
            self._host_timer.arm(total_ns - ahead)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise kvm_error(errno.ENOMEM, "the host gives no more timers (RLIMIT_SIGPENDING)") from None
            self._host_timer = None  # the thread has ended meanwhile
            return False
        return True

    def _expire(self) -> None:
        """Queue what is due behind this, on the vCPU's thread (``handle_posix_cpu_timers``)."""
        with self._lock:
            self._queued = False
            times = self._source.cpu_times()
            fired = [call for kind in Clock for call in self._take_due(kind, times)]
        for timer, generation, overrun in fired:
            self._call_soon(lambda t=timer, g=generation, o=overrun: t.call(g, o))  # type: ignore[misc]
        self.check(expired=True)

    def _take_due(self, kind: Clock, times: tuple[int, int | None]) -> list[tuple[CpuTimer, int, int]]:
        due = []
        while (expires := self._first(kind)) is not None and expires <= (now := self._now(kind, times)):
            timer = heapq.heappop(self._armed[kind])[3]
            overrun = 0
            timer.expires_ns = 0
            if timer.interval_ns:
                overrun = (now - expires) // timer.interval_ns
                timer.expires_ns = expires + (overrun + 1) * timer.interval_ns
                self._push(timer)
            due.append((timer, timer.generation, min(overrun, OVERRUN_MAX)))
        return due

    # --- the vCPU's life -----------------------------------------------------------------------------

    def _begin(self) -> None:
        self._source.account()
        self.check()

    def moved(self) -> None:
        """The vCPU's thread is another one; on that."""
        with self._lock:
            self._host_timer = None
        self.check()

    def close(self) -> None:
        """The vCPU is no more: no timer expires."""
        self._end()
        _monitor.forget(self)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            self._host_timer = None
            for armed in self._armed.values():
                for _, _, _, timer in armed:
                    timer.expires_ns = 0
                    timer.generation += 1
                armed.clear()

    def after_fork(self) -> None:
        """In a child the vCPU is its parent's, and there is no monitor. The lock may have been held."""
        self._lock = threading.Lock()
        self._end()


class _Monitor:
    """The thread that the host's timers wake: one for the process, while there are clocks with such a timer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clocks: weakref.WeakSet[CpuClock] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def watch(self, clock: CpuClock) -> int:
        """Have a clock looked at when the signal comes; return the thread that has to get it."""
        with self._lock:
            self._clocks.add(clock)
            if self._thread is None:
                self._thread = start_quiet(self._main, "kvm-cpu-timers")
            assert self._thread.native_id is not None
            return self._thread.native_id

    def forget(self, clock: CpuClock) -> None:
        """A clock is no more; the thread ends with the last one."""
        with self._lock:
            self._clocks.discard(clock)
            if self._thread is None or self._clocks:
                return
            thread, self._thread = self._thread, None
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, SIGNAL)
        if thread is not threading.current_thread():
            thread.join()

    def _main(self) -> None:
        while self._look():
            signal.sigwaitinfo({SIGNAL})

    def _look(self) -> bool:
        """Look at all clocks; False if the thread is needed no more."""
        with self._lock:
            if self._thread is not threading.current_thread():
                return False
            clocks = list(self._clocks)
        for clock in clocks:
            clock.check()
        return True


_monitor = _Monitor()


def _after_fork() -> None:
    global _monitor
    _monitor = _Monitor()


os.register_at_fork(after_in_child=_after_fork)
