# SPDX-License-Identifier: Apache-2.0
"""What a run cost: exits to the monitor by reason, boot milestones, instructions, wall and processor time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from softkvm import abi

REASONS = 64
"""Room in the per-reason tables; exit reasons are small numbers."""

STATS_VERSION = 1


class ExitStats:
    """Exits of one vCPU by exit reason, and the time in nanoseconds that the monitor needed for them."""

    __slots__ = ("counts", "guest_ns", "handler_ns", "interrupts")

    def __init__(self) -> None:
        self.counts = [0] * REASONS
        self.handler_ns = [0] * REASONS
        self.guest_ns = 0
        """Time inside KVM_RUN, halts included."""
        self.interrupts = 0
        """Returns of KVM_RUN with EINTR."""

    def as_dict(self) -> dict[str, Any]:
        """Return the table for the statistics file."""
        return {
            "run_ns": self.guest_ns,
            "interrupted": self.interrupts,
            "exits": {
                abi.EXIT_REASON_NAMES.get(reason, str(reason)): {
                    "count": count,
                    "handler_ns": self.handler_ns[reason],
                }
                for reason, count in enumerate(self.counts)
                if count
            },
        }


@dataclass(slots=True)
class Milestone:
    """The first console line that *pattern* matches; None: the first byte."""

    name: str
    pattern: re.Pattern[bytes] | None
    at_ns: int | None = None
    line: str = ""


def boot_milestones() -> list[Milestone]:
    """Return the milestones of a Linux boot."""
    return [
        Milestone("console", None),
        Milestone("kernel", re.compile(rb"Linux version \S+")),
        Milestone("init", re.compile(rb"Run \S+ as init process")),
        Milestone("panic", re.compile(rb"Kernel panic - not syncing")),
        Milestone("panic_end", re.compile(rb"---\[ end Kernel panic")),
    ]


@dataclass(slots=True)
class ConsoleWatcher:
    """Recognizes milestones in a machine's console output.

    This is a heuristic on text: a guest can print anything, and one that boots with ``quiet`` prints little.
    """

    milestones: list[Milestone] = field(default_factory=boot_milestones)
    started_ns: int = field(default_factory=time.monotonic_ns)
    _line: bytearray = field(default_factory=bytearray)

    def __call__(self, data: bytes) -> None:
        """Take the next bytes of output."""
        now_ns = time.monotonic_ns() - self.started_ns
        for part in data.splitlines(keepends=True):
            self._line += part
            for milestone in self.milestones:
                if milestone.at_ns is None and (milestone.pattern is None or milestone.pattern.search(self._line)):
                    milestone.at_ns = now_ns
                    milestone.line = self._line.decode("utf-8", "replace").strip()
            if part.endswith((b"\n", b"\r")) or len(self._line) > 4096:
                self._line.clear()

    def reached(self, name: str) -> Milestone | None:
        """Return the milestone *name* if it was reached."""
        return next((m for m in self.milestones if m.name == name and m.at_ns is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the milestones reached, for the statistics file."""
        return {m.name: {"at_ns": m.at_ns, "line": m.line} for m in self.milestones if m.at_ns is not None}
