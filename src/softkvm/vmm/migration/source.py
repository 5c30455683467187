# SPDX-License-Identifier: Apache-2.0
"""The side that has the machine: memory goes over while the guest runs, what it changes meanwhile again, the rest last.

Each round sends the pages that were written during the one before (:mod:`softkvm.vmm.snapshot.dirty`). When what is
left would take less than the downtime that is allowed, the machine stands, and the last pages and its state follow. A
guest that writes faster than that is slowed down, step by step (:mod:`.throttle`).

Whatever goes wrong before the target has said COMMITTED: the machine goes on here as if nothing had been, with the
quota that it had and its large pages back, for its writes are no longer watched.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import softkvm
from softkvm.vmm.errors import MachineError, MigrationError
from softkvm.vmm.migration.stream import OFFSET, RANGE, VERSION, Channel, Kind, encode_json
from softkvm.vmm.migration.throttle import Throttle
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.snapshot import encoding, state
from softkvm.vmm.snapshot.dirty import DirtyPages, Ranges, total
from softkvm.vmm.snapshot.manifest import CONFIG
from softkvm.vmm.snapshot.memory_file import not_zero, pieces, used_ranges
from softkvm.vmm.snapshot.tracking import tracked, untrack

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

DOWNTIME_S: Final = 0.3
"""How long the guest may stand, as far as it can be foreseen."""
MOST_ROUNDS: Final = 50
_PATIENCE: Final = 2
"""Rounds that don't make what is left smaller by a half, before the guest is slowed down."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is."""

    round: int
    sent: int
    """Bytes, in all."""
    left: int
    """Bytes of memory that have changed and are not there yet."""
    percent: int
    """Of a processor that each vCPU has left."""


@dataclass(frozen=True, slots=True)
class Report:
    """How it went."""

    rounds: int
    sent: int
    seconds: float
    downtime_s: float
    percent: int

    def __str__(self) -> str:
        slowed = f", vCPUs slowed to {self.percent} %" if self.percent < 100 else ""
        return (
            f"{self.sent / (1 << 20):.1f} MiB in {self.rounds} round{'s' * (self.rounds != 1)}, {self.seconds:.2f} s, "
            f"downtime {1000 * self.downtime_s:.0f} ms{slowed}"
        )


class Migration:
    """*machine* moves over *channel*; *extra* is for the target's user interface, as a snapshot's manifest has it.

    *progress* is called after each round, *done* when the machine is the target's, before it ends here.
    """

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        *,
        extra: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | None = None,
        done: Callable[[Report], object] | None = None,
        downtime_s: float = DOWNTIME_S,
        where: str = "another process",
    ) -> None:
        self._machine = machine
        self._channel = channel
        self._extra = dict(extra or {})
        self._progress = progress
        self._done = done
        self._downtime_s = downtime_s
        self._where = where
        self._pages = DirtyPages(machine.vm, machine.memory)
        self._throttle = Throttle(machine.vcpus)
        self._rounds = 0
        self._started = time.monotonic()
        self._stopped = 0.0
        self._lock = threading.Lock()
        self._cancelled = False
        self._committing = False

    def cancel(self) -> None:
        """Let it be, from any thread; the machine goes on. MigrationError if it is too late for that."""
        with self._lock:
            if self._committing:
                raise MigrationError("the machine is about to start on the other side")
            self._cancelled = True
        self._channel.shut_down()

    def run(self) -> Report:
        """Do it; the machine has ended then (MIGRATED). MigrationError, and it runs on, if it cannot be."""
        try:
            return self._run()
        except MigrationError as error:
            if self._cancelled:
                raise MigrationError("cancelled") from None
            self._channel.send_refusal(str(error))
            raise
        except (MachineError, OSError) as error:
            self._channel.send_refusal(str(error))
            raise MigrationError(str(error)) from None

    def _run(self) -> Report:
        machine = self._machine
        if tracked(machine) is not None:
            untrack(machine)  # a snapshot's watch: the other side has none
        hello = {
            "version": VERSION,
            "softkvm": softkvm.__version__,
            "machine": {name: getattr(machine.config, name) for name in CONFIG},
            "files": bool(machine.board.files()),
            "paused": machine.paused,
            "extra": self._extra,
        }
        self._channel.send(Kind.HELLO, encode_json(hello))
        self._channel.receive(Kind.ACCEPTED)
        with contextlib.ExitStack() as undo:
            undo.callback(self._throttle.end)
            self._pages.start()
            undo.callback(self._stop_watching)
            self._send_while_it_runs()
            with machine.pausing.still(), contextlib.ExitStack() as here:
                self._stopped = time.monotonic()
                saved = state.save(machine)  # first: devices show the guest what they have done
                here.callback(machine.board.take_files_back)
                here.callback(self._channel.shut_down)  # a target that waits closes them
                machine.board.let_go_of_files()
                self._send(self._pages.take())
                self._channel.send(Kind.STATE, encoding.encode(saved))
                self._channel.receive(Kind.READY)
                self._hand_over()
                report = self._report()
                if self._done is not None:
                    self._done(report)
                here.pop_all()
                machine.end(Outcome(End.MIGRATED, f"to {self._where}"))
        return report

    def _report(self) -> Report:
        now = time.monotonic()
        sent, percent = self._channel.sent, self._throttle.percent
        return Report(self._rounds, sent, now - self._started, now - self._stopped, percent)

    def _stop_watching(self) -> None:
        with contextlib.suppress(OSError):  # the machine is closed
            self._pages.stop()

    def _hand_over(self) -> None:
        with self._lock:
            if self._cancelled:
                raise MigrationError("cancelled")
            self._committing = True
        try:
            self._channel.send(Kind.COMMIT)
            # From here on only the other side's word, or its end, says whose the machine is.
            self._channel.wait_for_ever()
            self._channel.receive(Kind.COMMITTED)
        finally:
            self._committing = False

    # -- memory

    def _send_while_it_runs(self) -> None:
        """Send all memory, and then what has changed, until the rest would take no longer than the downtime."""
        left = used_ranges(self._machine.memory)
        first = True
        slow_rounds = 0
        while True:
            self._rounds += 1
            size = total(left)
            began, sent = time.monotonic(), self._channel.sent
            self._send(left, first=first)
            first = False
            taken_s = max(time.monotonic() - began, 1e-4)
            rate = max(self._channel.sent - sent, 1) / taken_s
            left = self._pages.take()
            self._tell(left)
            if total(left) <= rate * self._downtime_s or self._rounds >= MOST_ROUNDS:
                break
            slow_rounds = slow_rounds + 1 if total(left) > size / 2 else 0
            if slow_rounds >= _PATIENCE:
                slow_rounds = 0
                self._throttle.tighten()
        # what was taken is not in the log any more: it goes with the last round
        self._send(left)

    def _tell(self, left: Ranges) -> None:
        if self._progress is not None:
            self._progress(Progress(self._rounds, self._channel.sent, total(left), self._throttle.percent))

    def _send(self, ranges: Ranges, *, first: bool = False) -> None:
        """Send *ranges* as they are now; pages of zeroes too, unless it is the *first* time: memory begins so."""
        view = self._machine.memory.view
        for offset, size in pieces(ranges):
            data = bytes(view[offset : offset + size])
            at = offset
            for start, length in not_zero(data, offset):
                if start > at and not first:
                    self._channel.send(Kind.ZEROES, RANGE.pack(at, start - at))
                part = memoryview(data)[start - offset : start - offset + length]
                self._channel.send(Kind.PAGES, OFFSET.pack(start), part)
                at = start + length
            if offset + size > at and not first:
                self._channel.send(Kind.ZEROES, RANGE.pack(at, offset + size - at))
