# SPDX-License-Identifier: Apache-2.0
"""Breakpoints and watchpoints with functions to be called, for programs that debug a machine.

A thread of the controller's takes each stop, calls what was set for it while the whole machine stands, executes the
instruction at the breakpoint, and lets the machine go on; or leaves it standing, for who waits for that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from softkvm.closing import Closing
from softkvm.threads import start_quiet
from softkvm.vmm.debug.breakpoints import Kind, Point
from softkvm.vmm.debug.debugger import Cause, Debugger, Stop
from softkvm.vmm.debug.virtual import MemoryFault
from softkvm.vmm.errors import StateError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

_LOOK_S: Final = 0.2  # the machine's end wakes nobody

Callback = Callable[[Stop], object]


@dataclass(eq=False)
class Breakpoint:
    """A breakpoint or watchpoint that was set; it is taken away by :meth:`remove`, or at the end of a ``with``."""

    point: Point
    callback: Callback | None
    """Called with the machine standing; if what it returns is true, the machine stays so. None: it stays so."""
    controller: Controller = field(repr=False)
    hits: int = 0
    _value: bytes = field(default=b"", repr=False)

    def remove(self) -> None:
        """Take it away; nothing happens if it has gone."""
        self.controller.remove(self)

    def __enter__(self) -> Breakpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Controller(Closing):
    """Controls *machine* for a program; StateError if it has another debugger, gdb for example.

    All methods may be called from any thread, and from callbacks, which run on the controller's.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._closing = False
        self._calling = False
        self._at_breakpoints: set[int] = set()  # vCPUs whose stop there has been told of
        self.breakpoints: list[Breakpoint] = []
        self.stopped: Stop | None = None
        """Why the machine stands, if it does because of a stop."""
        self._failure: BaseException | None = None
        self._unseen = False  # whether nobody has been told of the stop
        self.debugger = Debugger(machine, self._wake.set)
        self._thread = start_quiet(self._run, "debugger")

    def close(self) -> None:
        """Take all breakpoints away, and let the machine go on."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:
            self.debugger.close()
            self._changed.notify_all()

    # -- the thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(_LOOK_S)
            self._wake.clear()
            with self._lock:
                if self._closing:
                    return
                self._take()
                if self.stopped is not None and self.stopped.cause is Cause.END:
                    return

    def _take(self) -> None:
        """Take the stops that there are."""
        if self.stopped is None and not self._closing:
            try:
                self._handle(self.debugger.poll())
            except StateError as error:
                self._stay(Stop(Cause.INTERRUPT, 0), error)

    def _handle(self, stop: Stop | None) -> None:
        """Call what was set for *stop*, and for those after it; go on if nothing wants the machine to stand."""
        while stop is not None:
            staying: Stop | None = None
            while stop is not None:  # all that have come together, before any vCPU goes on
                if stop.cause in (Cause.END, Cause.INTERRUPT, Cause.STEP):
                    self._stay(stop)
                    return
                if stop.cause in (Cause.SOFTWARE, Cause.HARDWARE):
                    self._at_breakpoints.add(stop.vcpu)
                try:
                    if self._call(stop) and staying is None:
                        staying = stop
                except BaseException as error:
                    self._stay(stop, error)
                    return
                stop = self.debugger.poll()
            if staying is not None:
                self._stay(staying)
                return
            if self._closing:
                return
            stop = self._leave()

    def _call(self, stop: Stop) -> bool:
        """Call the functions of what has been hit; return whether the machine is to stand."""
        stay = False
        for breakpoint in [each for each in self.breakpoints if each.point in (stop.point, *stop.more)]:
            if not self._is_hit(breakpoint, stop):
                continue
            breakpoint.hits += 1
            if breakpoint.callback is None:
                stay = True
                continue
            self._calling = True
            try:
                stay |= bool(breakpoint.callback(stop))
            finally:
                self._calling = False
        return stay

    def _leave(self) -> Stop | None:
        """Go on from where the machine stands; the stop that comes before that."""
        vcpus, self._at_breakpoints = self._at_breakpoints, set()
        try:
            stop = self.debugger.leave_breakpoints(vcpus)
        except (StateError, MemoryFault) as error:
            self._stay(Stop(Cause.INTERRUPT, 0), error)
            return None
        if stop is None:
            self.debugger.resume()
        return stop

    def _stay(self, stop: Stop, failure: BaseException | None = None) -> None:
        self.stopped, self._failure, self._unseen = stop, failure, True
        self._changed.notify_all()

    def _is_hit(self, breakpoint: Breakpoint, stop: Stop) -> bool:
        """Whether a watchpoint for reads was read: debug registers cannot tell that from a write of another value."""
        if breakpoint.point.kind is not Kind.READ:
            return True
        before, breakpoint._value = breakpoint._value, self._watched(breakpoint.point, stop.vcpu)
        return before == breakpoint._value

    def _watched(self, point: Point, vcpu: int) -> bytes:
        try:
            return self.debugger.read(vcpu, point.address, point.size)
        except MemoryFault:
            return b""

    # -- for the program

    @contextlib.contextmanager
    def standing(self) -> Iterator[Debugger]:
        """Have the machine stand for the ``with`` statement, if it doesn't anyway."""
        with self._lock:
            if self._closing:
                raise StateError("the machine has no debugger any more")
            was = self.debugger.halted
            self.debugger.halt()
            try:
                yield self.debugger
            finally:
                if not was and self.stopped is None and not self._calling:
                    self._handle(self.debugger.poll() or self._leave())

    def add(self, kind: Kind | None, address: int, size: int = 1, callback: Callback | None = None) -> Breakpoint:
        """Set a breakpoint at a linear address.

        With *kind* None it is a software one where there is memory, else one of the four debug registers.
        BreakpointError if no register is free, MemoryFault if there is no memory.
        """
        with self.standing() as debugger:
            if kind in (None, Kind.SOFTWARE):
                point = Point(Kind.SOFTWARE, address, 1)
                try:
                    self._add_software(debugger, point)
                except MemoryFault:
                    if kind is not None:
                        raise
                    point = Point(Kind.EXECUTE, address, 1)
                    debugger.breakpoints.add(point, self._machine.vcpus[0].vcpu)
            else:
                assert kind is not None
                point = Point(kind, address, 1 if kind is Kind.EXECUTE else size)
                debugger.breakpoints.add(point, self._machine.vcpus[0].vcpu)
            breakpoint = Breakpoint(point, callback, self)
            if point.kind is Kind.READ:
                breakpoint._value = self._watched(point, 0)
            self.breakpoints.append(breakpoint)
        return breakpoint

    def _add_software(self, debugger: Debugger, point: Point) -> None:
        """Set it by the tables of the first vCPU that has the address: user space has not all of the kernel's."""
        fault: MemoryFault | None = None
        for thread in self._machine.vcpus:
            try:
                debugger.breakpoints.add(point, thread.vcpu)
                return
            except MemoryFault as error:
                fault = error
        assert fault is not None
        raise fault

    def remove(self, breakpoint: Breakpoint) -> None:
        """Take a breakpoint away; nothing happens if it has gone, or the machine."""
        with self._lock:
            if breakpoint not in self.breakpoints:
                return
            self.breakpoints.remove(breakpoint)
            if any(other.point == breakpoint.point for other in self.breakpoints):
                return
            with contextlib.suppress(StateError), self.standing() as debugger:
                debugger.breakpoints.remove(breakpoint.point)

    def step(self, vcpu: int, count: int = 1) -> Stop:
        """Execute instructions on one vCPU, while the others stand; the machine stands afterwards. Returns the stop."""
        self._not_in_callback("step")
        with self._lock:
            self.debugger.halt()
            stop = Stop(Cause.STEP, vcpu)
            self._at_breakpoints.discard(vcpu)
            for _ in range(count):
                with self._without(vcpu):
                    found = self.debugger.step(vcpu)
                assert found is not None  # without a limit it waits
                stop = found
                if stop.cause is not Cause.STEP:
                    break
            self._stay(stop)
            self._unseen = False
            return stop

    @contextlib.contextmanager
    def _without(self, vcpu: int) -> Iterator[None]:
        """Have no breakpoint on the instruction that *vcpu* executes next."""
        points = self.debugger.points_here(vcpu)
        for point in points:
            self.debugger.breakpoints.remove(point)
        try:
            yield
        finally:
            for point in points:
                with contextlib.suppress(MemoryFault):
                    self.debugger.breakpoints.add(point, self._machine.vcpus[vcpu].vcpu)

    def pause(self) -> None:
        """Have the machine stand until :meth:`go_on`."""
        with self._lock:
            self.debugger.halt()
            if self.stopped is None and not self._calling:
                self._stay(Stop(Cause.INTERRUPT, 0))
                self._unseen = False

    def go_on(self, *, unless_unseen: bool = False) -> None:
        """Let a machine go on that stands; what a callback has raised is raised instead, once.

        With *unless_unseen* a stop that nobody has been told of is left for :meth:`wait`.
        """
        self._not_in_callback("go on")
        with self._lock:
            if self.stopped is None or self.stopped.cause is Cause.END:
                return
            self._raise_failure()
            if unless_unseen and self._unseen:
                return
            self.stopped = None
            self._handle(self.debugger.poll() or self._leave())

    def wait(self, timeout_s: float | None = None) -> Stop | None:
        """Wait until the machine stops; None if it doesn't within *timeout_s*. What a callback raised is raised."""
        self._not_in_callback("wait")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self.stopped is None:
                if self._closing:
                    raise StateError("the machine has no debugger any more")
                left_s = _LOOK_S if deadline is None else min(deadline - time.monotonic(), _LOOK_S)
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            self._raise_failure()
            self._unseen = False
            return self.stopped

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            self._unseen = False
            raise failure

    def expect_going(self) -> None:
        """Raise what a callback has raised, or StateError if a breakpoint has stopped the machine."""
        self._raise_failure()
        stopped = self.stopped
        if stopped is not None and stopped.cause is not Cause.END:
            raise StateError(f"the machine has stopped ({stopped.cause.value}, vCPU {stopped.vcpu}): nothing will come")

    def _not_in_callback(self, what: str) -> None:
        if self._calling and threading.current_thread() is self._thread:
            raise StateError(f"a callback cannot {what}: the machine goes on when it returns nothing, or False")
