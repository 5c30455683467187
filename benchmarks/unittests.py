# SPDX-License-Identifier: Apache-2.0
"""The entries of kvm-unit-tests that pass on softkvm: their time here and on QEMU's TCG.

Both sides run the same images with the same arguments and options, as many vCPUs at a time (-j). Each side has its
limits: QEMU the suite's, softkvm those times 3, as `softkvm unittests` does. Two totals: over all entries that pass on
softkvm, where a timeout of QEMU counts as its limit; and over those that pass on both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from softkvm import qemu
from softkvm.bench.sides import QemuSide, Side, SideError, SoftkvmSide
from softkvm.unittests import Entry, Result, Status, SuiteError, read
from softkvm.unittests.suite import select


@dataclass(slots=True)
class Outcome:
    """An entry on one side, over all runs."""

    status: str
    """``pass``, ``fail``, ``skip`` or ``timeout``: the worst of the runs."""
    runs_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """The median; of a timeout, the limit."""
    reason: str = ""
    suite_timeout_s: float | None = None

    @property
    def passes(self) -> bool:
        """In every run?"""
        return self.status == "pass"

    def mark(self) -> str:
        """What the table says besides the time."""
        if self.status == "timeout":
            return f"timeout, {self.seconds:g} s"
        if not self.passes:
            return self.status
        if self.suite_timeout_s is not None and self.seconds > self.suite_timeout_s:
            return f"over the suite's {self.suite_timeout_s:g} s"
        return ""


def status_of(result: Result) -> str:
    """Return the result's status, timeouts told apart."""
    if result.status is Status.FAIL and result.reason.startswith("timeout"):
        return "timeout"
    return result.status.lower()


_WORST = ("pass", "skip", "fail", "timeout")


def outcome_of(results: Sequence[Result]) -> Outcome:
    """Return what the runs of one entry come to."""
    worst = max(results, key=lambda result: _WORST.index(status_of(result)))
    runs_s = [result.time_s for result in results]
    seconds = common.median(runs_s)
    if status_of(worst) == "timeout" and worst.timeout_s:
        seconds = worst.timeout_s
    return Outcome(status_of(worst), runs_s, seconds, worst.why(), worst.suite_timeout_s)


@dataclass(slots=True)
class SideRuns:
    """A side's entries, and how long all took at -j."""

    elapsed_s: list[float] = field(default_factory=list)
    entries: dict[str, Outcome] = field(default_factory=dict)


def run_side(side: Side, directory: Path, entries: list[Entry], jobs: int, runs: int) -> SideRuns:
    """Run all *entries* *runs* times."""
    results: dict[str, list[Result]] = {entry.name: [] for entry in entries}
    measured = SideRuns()
    for number in range(runs):
        started = time.monotonic()
        for result in side.run_entries(directory, entries, jobs, tick=_progress(f"{side.title}, run {number + 1}")):
            results[result.name].append(result)
        measured.elapsed_s.append(time.monotonic() - started)
    _clear()
    measured.entries = {name: outcome_of(found) for name, found in results.items()}
    return measured


def _progress(what: str) -> Callable[[list[tuple[str, float]]], None]:
    def tick(running: list[tuple[str, float]]) -> None:
        if os.isatty(2):
            text = f"{what}: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in running)
            sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()

    return tick


def _clear() -> None:
    if os.isatty(2):
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def totals(sides: dict[str, SideRuns]) -> dict[str, dict[str, Any]]:
    """Return sums of the entries' times: over those that pass on softkvm, and over those that pass on both sides."""
    ours = sides[common.SOFTKVM].entries
    passing = [name for name in ours if ours[name].passes]
    found = {"pass on softkvm": passing}
    if common.QEMU in sides:
        theirs = sides[common.QEMU].entries
        found["pass on both"] = [name for name in passing if theirs[name].passes]
    return {
        title: {
            "entries": len(names),
            "seconds": {key: sum(side.entries[name].seconds for name in names) for key, side in sides.items()},
            "not_passing": {
                key: {
                    status: count
                    for status in _WORST[1:]
                    if (count := sum(side.entries[name].status == status for name in names))
                }
                for key, side in sides.items()
            },
        }
        for title, names in found.items()
    }


def _passing(args: argparse.Namespace, side: Side, entries: list[Entry]) -> list[Entry]:
    """Return the entries that pass on softkvm: as an earlier report says, or by running them."""
    if args.passing is not None:
        try:
            report = json.loads(args.passing.read_text())
            names = {item["name"] for item in report["results"] if item["status"] == Status.PASS}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise common.BenchmarkError(
                f"{args.passing}: expected a report of softkvm unittests --json: {error}"
            ) from None
    else:
        print("selecting the entries that pass on softkvm", file=sys.stderr)
        results = side.run_entries(args.directory, entries, args.jobs, tick=_progress("selecting"))
        _clear()
        names = {result.name for result in results if result.status is Status.PASS}
    return [entry for entry in entries if entry.name in names]


def _rows(sides: dict[str, SideRuns], entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    rows = []
    for entry in entries:
        ours = sides[common.SOFTKVM].entries[entry.name]
        theirs = sides[common.QEMU].entries[entry.name] if common.QEMU in sides else None
        both = theirs is not None and ours.passes and theirs.passes
        ratio = common.ratio(ours.seconds, theirs.seconds) if theirs is not None and both else "-"
        marks = [("softkvm", ours.mark()), ("QEMU", theirs.mark() if theirs else "")]
        said = "; ".join(f"{title}: {mark}" for title, mark in marks if mark)
        seconds = (common.number(outcome.seconds if outcome else None, 2) for outcome in (ours, theirs))
        rows.append((entry.name, entry.smp, *seconds, ratio, said))
    return rows


def _total_rows(sides: dict[str, SideRuns], jobs: int) -> list[tuple[str, ...]]:
    rows = []
    for title, total in totals(sides).items():
        seconds = [total["seconds"].get(side) for side in (common.SOFTKVM, common.QEMU)]
        marks = ", ".join(f"{count} {status}" for status, count in total["not_passing"].get(common.QEMU, {}).items())
        said = f"QEMU: {marks}" if marks else ""
        row = (*(common.number(value, 1) for value in seconds), common.ratio(*seconds))
        rows.append((f"sum, {total['entries']} that {title}", "", *row, said))
    elapsed = [
        common.median(sides[side].elapsed_s) if side in sides else None for side in (common.SOFTKVM, common.QEMU)
    ]
    rows.append(
        (f"elapsed, -j {jobs}", "", *(common.number(value, 1) for value in elapsed), common.ratio(*elapsed), "")
    )
    return rows


def _arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__ or "", runs=1)
    parser.add_argument("directory", metavar="DIR", type=Path, help="build of kvm-unit-tests")
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries (default: all that are not for manual runs)")
    parser.add_argument("-j", "--jobs", metavar="N", type=int, default=2, help="vCPUs at a time (default: 2)")
    parser.add_argument("--passing", metavar="FILE", type=Path, help="softkvm unittests --json: which entries pass")
    args = parser.parse_args()
    if args.jobs < 1 or args.runs < 1:
        parser.error("-j and --runs: expected a number above 0")
    return args


def measure() -> None:
    """Run, print, save."""
    args = _arguments()
    try:
        entries = select(read(args.directory), args.names, [])
        if not args.names:
            entries = [entry for entry in entries if "nodefault" not in entry.groups]
        ours = SoftkvmSide()
        chosen: list[Side] = [ours]
        if common.QEMU in common.chosen_sides(args):
            chosen.append(QemuSide(qemu.find() or qemu.PROGRAM))
        entries = _passing(args, ours, entries)
        if not entries:
            raise common.BenchmarkError("none of the entries passes on softkvm")
        sides = {side.name: run_side(side, args.directory, entries, args.jobs, args.runs) for side in chosen}
    except (SuiteError, SideError) as error:
        raise common.BenchmarkError(str(error)) from None
    header = ("entry", "vCPUs", "softkvm s", "QEMU s", "ratio", "")
    rows = _rows(sides, entries)
    common.table("kvm-unit-tests that pass on softkvm, seconds", header, [*rows, *_total_rows(sides, args.jobs)])
    result = {
        "runs": args.runs,
        "jobs": args.jobs,
        "sides": {name: asdict(side) for name, side in sides.items()},
        "totals": totals(sides),
    }
    common.save("unittests", result)


if __name__ == "__main__":
    common.main(measure)
