# SPDX-License-Identifier: Apache-2.0
"""Notices on the console that a guest's kernel has panicked, and ends its machine."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from softkvm.vmm.events import Event
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import ConsoleWatcher

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

PANIC_GRACE_S = 5.0
"""How long a guest that printed a panic, and has no crash kernel, may take to reset."""


class PanicWatch:
    """Ends a machine whose kernel printed a panic and then neither resets nor goes on (a heuristic).

    With *crash_kernel* memory is reserved for a kernel that runs after a panic, silent at first: it has all the time.
    """

    def __init__(self, watcher: ConsoleWatcher, *, crash_kernel: bool) -> None:
        self._watcher = watcher
        self._crash_kernel = crash_kernel
        self._seen = threading.Event()
        self._machine: Machine | None = None

    def attach(self, machine: Machine) -> None:
        """Watch over *machine*."""
        self._machine = machine
        machine.events.add(self._told)

    def _told(self, event: Event, more: dict[str, str]) -> None:
        """A machine that would begin anew ends, if its kernel panicked."""
        if event is Event.RESET and self._machine is not None and self._watcher.reached("panic"):
            self._machine.end(self._outcome())

    def output(self, data: bytes) -> None:
        """Take output, after the watcher did."""
        if self._machine is None:
            return
        if self._watcher.reached("panic_end"):
            self._machine.end(self._outcome())
        elif self._watcher.reached("panic") and not self._crash_kernel and not self._seen.is_set():
            self._seen.set()
            timer = threading.Timer(PANIC_GRACE_S, lambda m: m.end(self._outcome()), (self._machine,))
            timer.daemon = True
            timer.start()

    def _outcome(self) -> Outcome:
        milestone = self._watcher.reached("panic")
        return Outcome(End.PANIC, f"on the console: {milestone.line}" if milestone else "on the console")

    def judge(self, outcome: Outcome) -> Outcome:
        """A reset after a panic message (``panic=-1``) is a panic, and so is a crash kernel's power-off."""
        ends = (End.RESET, End.POWER_OFF) if self._crash_kernel else (End.RESET,)
        if outcome.end in ends and self._watcher.reached("panic"):
            return self._outcome()
        return outcome
