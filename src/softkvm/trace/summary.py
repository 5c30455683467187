# SPDX-License-Identifier: Apache-2.0
"""Exits by reason, with how long their handling took, as ``perf kvm stat report`` has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from softkvm.trace.dat import Record
from softkvm.trace.vcpus import Span, reason, spans


@dataclass(slots=True)
class Row:
    """The exits of one reason; times in nanoseconds, from the exit to the next entry."""

    reason: str
    count: int = 0
    total_ns: int = 0
    min_ns: int = 1 << 63
    max_ns: int = 0
    _squares: int = 0

    def add(self, ns: int) -> None:
        """Count one that took *ns*."""
        self.count += 1
        self.total_ns += ns
        self.min_ns = min(self.min_ns, ns)
        self.max_ns = max(self.max_ns, ns)
        self._squares += ns * ns

    @property
    def mean_ns(self) -> float:
        """The mean."""
        return self.total_ns / self.count

    @property
    def error_percent(self) -> float:
        """The standard error of the mean, in percent of it."""
        if self.count < 2 or not self.total_ns:
            return 0.0
        variance = max(self._squares - self.total_ns * self.mean_ns, 0) / (self.count - 1)
        return 100 * math.sqrt(variance / self.count) / self.mean_ns

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {
            "reason": self.reason,
            "count": self.count,
            "total_ns": self.total_ns,
            "min_ns": self.min_ns,
            "max_ns": self.max_ns,
            "mean_ns": round(self.mean_ns, 1),
            "error_percent": round(self.error_percent, 2),
        }


@dataclass(slots=True)
class Summary:
    """What a trace says of the exits of all vCPUs, or of one."""

    rows: list[Row]
    guest_ns: int
    vcpus: int

    @property
    def count(self) -> int:
        """All exits."""
        return sum(row.count for row in self.rows)

    @property
    def total_ns(self) -> int:
        """The time that all of them took."""
        return sum(row.total_ns for row in self.rows)


def summarize(records: Iterable[Record], vcpu: int | None = None) -> Summary:
    """Return the exits of a trace by reason, the most frequent first."""
    rows: dict[str, Row] = {}
    names: dict[tuple[int, int], str] = {}
    guest_ns = 0
    vcpus = set()
    for span in spans(records):
        if vcpu is not None and span.vcpu != vcpu:
            continue
        vcpus.add(span.vcpu)
        if span.exit is None:
            guest_ns += span.end_ns - span.start_ns
        else:
            _count(rows, reason(span.exit, names), span)
    ordered = sorted(rows.values(), key=lambda row: (-row.count, row.reason))
    return Summary(ordered, guest_ns, len(vcpus))


def _count(rows: dict[str, Row], name: str, span: Span) -> None:
    row = rows.get(name)
    if row is None:
        row = rows[name] = Row(name)
    row.add(span.end_ns - span.start_ns)
