# SPDX-License-Identifier: Apache-2.0
"""What came out of an entry of a suite."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FAILED_SUBTESTS = frozenset({"FAIL", "XPASS"})


class Status(enum.StrEnum):
    """The three ends that suites know."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Subtest:
    """A line of the log that reports a check."""

    status: str
    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a vCPU stood when its machine was stopped, and the last exits that it took, oldest first."""

    vcpu: int
    rip: int
    symbol: str
    state: str
    last_exits: tuple[str, ...] = ()

    def exits_text(self) -> str:
        """Return the last exits in one line, repeated ones once: ``HLT, IO out 0x3f8/1 (7 times)``."""
        groups = [(text, len(list(same))) for text, same in itertools.groupby(self.last_exits)]
        return ", ".join(text if count == 1 else f"{text} ({count} times)" for text, count in groups) or "none"

    def __str__(self) -> str:
        where = f"{self.rip:#x} {self.symbol}".rstrip()
        return f"vCPU {self.vcpu} at {where}" + (f" ({self.state})" if self.state else "")


@dataclass(slots=True)
class Result:
    """An entry's status with everything that explains it."""

    name: str
    status: Status
    reason: str = ""
    """Why it was skipped or failed where the test itself does not say."""
    summary: str = ""
    """The test's own count: ``12 tests, 1 skipped``."""
    file: str = ""
    arguments: str = ""
    vcpus: int = 1
    memory_bytes: int = 0
    accel: str = ""
    ignored: list[str] = field(default_factory=list)
    """Parts of the entry's configuration that had no effect."""
    notes: list[str] = field(default_factory=list)
    """What was set up for it beyond its options."""
    exit_status: int | None = None
    time_s: float = 0.0
    timeout_s: float | None = None
    """The limit that it ran under; 0 is none, None: it did not run."""
    suite_timeout_s: float | None = None
    """The suite's own limit for it; 0 is none."""
    instructions: int | None = None
    exits: dict[str, int] = field(default_factory=dict)
    """Returns of KVM_RUN by exit reason, all vCPUs."""
    kvm_exits: dict[str, int] = field(default_factory=dict)
    """The KVM's own counters, all vCPUs, where it has some."""
    subtests: list[Subtest] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    log: str = ""

    @property
    def line(self) -> str:
        """The line that the suite prints: ``PASS name (12 tests)``."""
        detail = self.reason or self.summary
        parts = [f"{self.status} {self.name}"]
        if detail:
            parts.append(f"({detail})")
        return " ".join(parts)

    @property
    def limit_text(self) -> str:
        """The limit that it ran under, and the suite's where that is another; empty if it did not run."""
        if self.timeout_s is None:
            return ""
        own, suite = (f"{limit_s:g} s" if limit_s else "none" for limit_s in (self.timeout_s, self.suite_timeout_s))
        return own if own == suite else f"{own}; the suite's is {suite}"

    @property
    def over_suite_limit(self) -> str:
        """What there is to say if it did not fail, but took longer than the suite allows it; otherwise empty."""
        if not self.suite_timeout_s or self.time_s <= self.suite_timeout_s or self.status is Status.FAIL:
            return ""
        return f"took {self.time_s:.0f} s, the suite's limit is {self.suite_timeout_s:g} s"

    def counts(self) -> dict[str, int]:
        """Return the subtests by status."""
        totals: dict[str, int] = {}
        for subtest in self.subtests:
            totals[subtest.status] = totals.get(subtest.status, 0) + 1
        return totals

    def failed_checks(self) -> list[str]:
        """Return the names of the checks that failed."""
        return [subtest.name for subtest in self.subtests if subtest.status in FAILED_SUBTESTS]

    def why(self) -> str:
        """Return in one line why the entry does not pass; empty if it does."""
        if self.status is Status.PASS:
            return ""
        if self.status is Status.SKIP:
            skipped = next((subtest.name for subtest in self.subtests if subtest.status == "SKIP"), "")
            return self.reason or skipped.strip() or self._last_words() or self.summary
        return "; ".join([*self.failed_checks()[:1], *([self.reason] if self.reason else [])]) or self._last_words()

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Return the result that :meth:`as_dict` described."""
        fields = dict(data)
        fields["status"] = Status(fields["status"])
        fields["subtests"] = [Subtest(**item) for item in fields["subtests"]]
        fields["places"] = [Place(**{**item, "last_exits": tuple(item["last_exits"])}) for item in fields["places"]]
        return cls(**fields)

    def _last_words(self) -> str:
        """Return the last line of the log that says something beyond the count."""
        lines = (line.strip() for line in reversed(self.log.splitlines()))
        return next((line for line in lines if line and line != f"SUMMARY: {self.summary}"), "")
