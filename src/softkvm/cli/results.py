# SPDX-License-Identifier: Apache-2.0
"""What commands that run a suite of tests share: lines as results come, and files of all of them at the end."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from softkvm.cli import CommandError
from softkvm.cli.arguments import file_name
from softkvm.cli.output import STDOUT, OutputFile, say
from softkvm.progress import StatusLine
from softkvm.reports import formats
from softkvm.reports.result import Result, Status
from softkvm.reports.suite import Suite

_FORMATS: dict[str, tuple[str, Callable[[Sequence[Result], Suite], str]]] = {
    "tap": ("write a TAP stream", formats.tap),
    "junit": ("write JUnit XML", formats.junit),
    "json": ("write everything as JSON", formats.json_text),
    "html": ("write one self-contained page", formats.html_page),
    "markdown": ("write a table", formats.markdown),
}
"""What the options that name a file write there."""

_COLOURS = {Status.PASS: "32", Status.FAIL: "31", Status.SKIP: "33"}


def add_report_options(parser: ArgumentParser) -> None:
    """Add ``--junit FILE`` and the others."""
    for kind, (help, _) in _FORMATS.items():
        parser.add_argument(f"--{kind}", metavar="FILE", type=file_name, help=help)


class Reports:
    """The files that the options name: opened before anything runs, written at the end."""

    def __init__(self, args: Namespace) -> None:
        """Raise CommandError for a file that cannot be written, or is named twice."""
        named = {kind: name for kind in _FORMATS if (name := getattr(args, kind)) is not None}
        for kind, name in named.items():
            same = [f"--{other}" for other in named if other != kind and named[other] == name]
            if same:
                raise CommandError(f"--{kind} {name}: {same[0]} goes there, too")
        self._files = {kind: OutputFile(f"--{kind}", name) for kind, name in named.items()}
        self.take_stdout = STDOUT in named.values()

    def write(self, results: Sequence[Result], suite: Suite) -> None:
        """Write all; CommandError for the first that cannot be."""
        errors = []
        for kind, file in self._files.items():
            try:
                file.write(_FORMATS[kind][1](results, suite))
            except CommandError as error:
                errors.append(error)  # the others may be on another disk
        if errors:
            raise errors[0]


class Printer:
    """Lines of results on standard output; a line of progress on standard error if that is a terminal.

    *quiet*: a report takes standard output, there are no lines.
    """

    def __init__(self, total: int, *, verbose: bool, quiet: bool) -> None:
        self._total = total
        self._verbose = verbose
        self._quiet = quiet
        self._colours = os.isatty(1) and "NO_COLOR" not in os.environ
        self._progress = StatusLine()
        self._counts: Counter[Status] = Counter()
        self._over = 0

    def finished(self, result: Result) -> None:
        """Print a result."""
        self._counts[result.status] += 1
        self._over += bool(result.over_suite_limit)
        self._progress.clear()
        if not self._quiet:
            say("\n".join(self._lines(result)))

    def _lines(self, result: Result) -> Iterator[str]:
        line = result.line
        if self._colours:
            line = line.replace(result.status, f"\x1b[{_COLOURS[result.status]}m{result.status}\x1b[0m", 1)
        yield line
        if self._verbose:
            yield from (f"  ignored: {text}" for text in result.ignored)
            yield from (f"  set: {text}" for text in result.notes)
            yield from (f"  | {text}" for text in result.log.splitlines())
        if result.over_suite_limit:
            yield f"  {result.over_suite_limit}"
        if self._verbose or result.status is Status.FAIL:
            yield from (f"  {place}; last exits: {place.exits_text()}" for place in result.places)

    def tick(self, running: list[tuple[str, float]]) -> None:
        """Show what runs."""
        if not self._progress.shown:
            return
        done = sum(self._counts.values())
        counts = " ".join(f"{self._counts[status]} {status.lower()}" for status in Status)
        names = ", ".join(f"{name} {time_s:.0f} s" for name, time_s in running)
        self._progress.show(f"[{done}/{self._total}] {counts}  {names}")

    def clear(self) -> None:
        """Take the progress away."""
        self._progress.clear()

    def summary(self) -> None:
        """Print the totals."""
        if self._quiet:
            return
        over = f"; {self._over} took longer than the suite's own limit" if self._over else ""
        say(", ".join(f"{self._counts[status]} {status}" for status in Status) + over)
