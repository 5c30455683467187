# SPDX-License-Identifier: Apache-2.0
"""A machine that stands still and goes on: for its user, and for who looks at it or saves it as a whole.

A machine that is paused changes nothing by itself. Its vCPU threads are out of KVM_RUN, and KVM has finished what their
last exits began (KVM API, 5: ``immediate_exit``): registers and memory are those between two instructions. What works
beside the vCPUs, devices' timers and workers, has come to the end of what it was at, and does nothing.

Time goes on: a guest finds its clocks where they would be, all by the same amount, and timers that came due meanwhile
expire at once. It is told that it was stopped (KVM_KVMCLOCK_CTRL), so that its watchdogs don't take that for a lock-up.
KVM's own timers, of the local APICs and the i8254, run on and leave their interrupts pending.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from softkvm.threads import start_quiet
from softkvm.vmm.errors import StateError
from softkvm.vmm.events import Event

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

PAUSE_S = 10.0
"""How long a machine may take to come to stand, unless its user says otherwise."""


class Pausable(Protocol):
    """A part of a machine that does something by itself, beside the vCPUs."""

    def pause(self) -> None:
        """Be quiescent when this returns: nothing under way, nothing that begins until :meth:`resume`."""

    def resume(self) -> None:
        """Go on."""


class Pausing:
    """The pauses of *machine*: one of its user's, and any number of others', which may overlap."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lock = threading.RLock()
        self._holds = 0
        self._asked = False
        self.parts: list[Pausable] = []
        """What stands with the vCPUs, behind them and in this order."""

    @property
    def paused(self) -> bool:
        """Whether the machine stands because its user said so, and has not ended."""
        return self._asked and not self._machine.ended.is_set()

    @property
    def standing(self) -> bool:
        """Whether the machine stands, whoever wanted that."""
        return self._holds > 0

    def pause(self, timeout_s: float = PAUSE_S) -> None:
        """Let the machine stand from now on; see :meth:`softkvm.vmm.machine.Machine.pause`."""
        with self._lock:
            if not self._asked:
                self._hold(timeout_s)
                self._asked = True
                self._machine.events.tell(Event.PAUSED)

    def resume(self) -> None:
        """End the user's pause; it is none of those that :meth:`still` makes."""
        with self._lock:
            if self._asked:
                self._asked = False
                if self._release():
                    self._machine.events.tell(Event.RESUMED)

    @contextlib.contextmanager
    def still(self, timeout_s: float = PAUSE_S) -> Iterator[None]:
        """Have the machine stand for the ``with`` statement, as :meth:`pause` does and whether it is paused or not."""
        with self._lock:
            self._hold(timeout_s)
        try:
            yield
        finally:
            with self._lock:
                self._release()

    def pause_soon(self, then: Callable[[], object] | None = None) -> None:
        """Ask for a pause from anywhere, a vCPU's thread too, which does not go back into the guest.

        *then* is called on a thread of its own when the machine is paused; never, if it ends before that.
        """
        machine = self._machine
        machine.standstill.acquire()
        machine.leave_guest()

        def wait() -> None:
            try:
                self.pause()
            except StateError:
                return
            finally:
                machine.standstill.release()
            if then is not None:
                then()

        start_quiet(wait, "pause")

    def end(self) -> None:
        """The machine has ended and its vCPUs' threads with it: its parts go on, to finish what they have."""
        with self._lock:
            self._asked = False
            if self._holds:
                self._holds = 0
                self._machine.standstill.release()
                for part in reversed(self.parts):
                    part.resume()

    def _hold(self, timeout_s: float) -> None:
        if self._holds == 0:
            self._stop(timeout_s)
        self._holds += 1

    def _stop(self, timeout_s: float) -> None:
        machine = self._machine
        machine.expect_going()
        if machine.on_vcpu_thread():
            raise StateError("a vCPU's thread cannot wait until it stands itself: expected another, or pause_soon()")
        machine.standstill.acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(machine.standstill.release)
            if not machine.standstill.wait(machine.running_vcpus(), timeout_s):
                machine.expect_going()
                raise StateError(f"a vCPU is busy outside of the guest for longer than {timeout_s:g} s")
            for part in self.parts:
                undo.callback(part.resume)
                part.pause()
            undo.pop_all()

    def _release(self) -> bool:
        if self._holds == 0:  # the machine has ended meanwhile
            return False
        self._holds -= 1
        if self._holds == 0:
            machine = self._machine
            for part in reversed(self.parts):
                part.resume()
            if machine.started_ns:
                machine.board.was_stopped()
            machine.standstill.release()
        return True
