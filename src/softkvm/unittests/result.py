# SPDX-License-Identifier: Apache-2.0
"""What came out of an entry."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SUMMARY = re.compile(r"^SUMMARY: (.*?)\s*$")
SUBTEST = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS|KFAIL): (.*?)\s*$")
SUMMARY_LINES = 5  # the summary is looked for among the last lines, as the suite does
FAILED_SUBTESTS = frozenset({"FAIL", "XPASS"})

# Exit statuses of a test program, as the debug-exit port delivers them (value << 1 | 1)
STATUS_PASS = 1
STATUS_SKIP = 77
STATUS_ABORT = 127


class Status(enum.StrEnum):
    """The three ends that the suite knows."""

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
            return self.reason or skipped.strip() or _last_words(self.log) or self.summary
        return "; ".join([*self.failed_checks()[:1], *([self.reason] if self.reason else [])]) or _last_words(self.log)

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


def _last_words(log: str) -> str:
    """Return the last line of *log* that says something beyond the count."""
    lines = (line.strip() for line in reversed(log.splitlines()))
    return next((line for line in lines if line and not SUMMARY.match(line)), "")


def read_log(log: str) -> tuple[list[Subtest], str]:
    """Return the checks that *log* reports, and its summary."""
    lines = log.splitlines()
    subtests = [Subtest(match[1], match[2]) for line in lines if (match := SUBTEST.match(line))]
    summary = ""
    for line in lines[-SUMMARY_LINES:]:
        match = SUMMARY.match(line)
        if match:
            summary = match[1]
    return subtests, summary


def judge(exit_status: int) -> tuple[Status, str]:
    """Return what a test's exit status means, and a reason where the log need not give one."""
    if exit_status == STATUS_PASS:
        return Status.PASS, ""
    if exit_status == STATUS_SKIP:
        return Status.SKIP, ""
    if exit_status == STATUS_ABORT:
        return Status.FAIL, "aborted"
    return Status.FAIL, ""
