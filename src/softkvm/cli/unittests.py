# SPDX-License-Identifier: Apache-2.0
"""``softkvm unittests``: runs kvm-unit-tests from a build of them."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import softkvm
from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import count, factor, file_name, seconds
from softkvm.cli.output import STDOUT, OutputFile, say
from softkvm.progress import StatusLine
from softkvm.unittests import config, reports
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.result import Result, Status
from softkvm.unittests.runner import DEVICES, TIMEOUT_SCALE, Settings, set_params
from softkvm.unittests.suite import SuiteRun, select

EXIT_FAILED = 1

EPILOG = """\
DIR is your own build of kvm-unit-tests: a checkout after `./configure && make`. FILE - is standard output, in place of
the lines.

exit status:
  0  nothing failed
  1  a test failed, the KVM cannot be opened, or a file cannot be written at the end
  2  usage: bad arguments, no build in DIR, no such test, a file that cannot be written at all
  128 + n  ended by signal n

examples:
  softkvm unittests ~/kvm-unit-tests                        all tests
  softkvm unittests ~/kvm-unit-tests eventinj realmode -v   two of them, with what they print
  softkvm unittests ~/kvm-unit-tests --group vmexit -j 2 --html report.html
"""

_REPORTS: dict[str, Callable[[Sequence[Result], str], str]] = {
    "junit": reports.junit,
    "json": reports.json_text,
    "html": reports.html_page,
    "markdown": reports.markdown,
}
"""What the options that name a file write there."""

_COLOURS = {Status.PASS: "32", Status.FAIL: "31", Status.SKIP: "33"}


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", type=file_name, help="build of kvm-unit-tests")
    add("names", metavar="NAME", nargs="*", help="tests to run (default: all)")
    add("--group", metavar="GROUP", action="append", default=[], help="tests of this group (may be repeated)")
    add("--list", action="store_true", help="list the tests instead of running them")
    add("-a", "--all", action="store_true", help="run tests that are marked for manual runs, too")
    add(
        "-j",
        "--jobs",
        metavar="N",
        default="1",
        help="vCPUs at the same time: a test takes as many places as it has (default: 1)",
    )
    add("--timeout", metavar="SECONDS", help="for every test, instead of its own limit; 0 for none")
    add(
        "--timeout-scale",
        metavar="FACTOR",
        help="multiply the tests' own limits, which are made for processors (default: "
        + ", ".join(f"{scale:g} with --accel {accel}" for accel, scale in TIMEOUT_SCALE.items())
        + ")",
    )
    add(
        "--accel",
        choices=tuple(DEVICES),
        default="soft",
        help="soft: KVM in Python on the software CPU (default); kvm: /dev/kvm",
    )
    add(
        "--param",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="module parameter of the software KVM, such as force_emulation_prefix=1",
    )
    add(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="variable of the tests' environment, such as NR_CPUS=1",
    )
    add("--junit", metavar="FILE", type=file_name, help="write JUnit XML")
    add("--json", metavar="FILE", type=file_name, help="write everything as JSON")
    add("--html", metavar="FILE", type=file_name, help="write one self-contained page")
    add("--markdown", metavar="FILE", type=file_name, help="write the table of docs/kvm-unit-tests.md")
    add("-v", "--verbose", action="store_true", help="print the log of every test, and what it ignored")


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CommandError(f"{option} {text}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


def _settings(args: Namespace) -> Settings:
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout, zero=True)
    scale = None if args.timeout_scale is None else factor("--timeout-scale", args.timeout_scale)
    return Settings(
        args.accel,
        timeout_s,
        scale,
        run_nodefault=args.all or bool(args.names) or bool(args.group),
        params=_pairs("--param", args.param),
        environment=_pairs("--env", args.env),
    )


def _check_kvm(settings: Settings) -> None:
    """Fail before the first test if none can run."""
    try:
        with softkvm.open(DEVICES[settings.accel]) as kvm:
            set_params(kvm, settings.params)
    except ImportError as error:
        raise CommandError(f"the software CPU is not built: {error}", EXIT_ERROR) from None
    except OSError as error:
        text = f"--accel {settings.accel}: {DEVICES[settings.accel]}: {error.strerror or error}"
        raise CommandError(text, EXIT_ERROR) from None
    except SuiteError as error:
        raise CommandError(f"--param {error}") from None


def _list(entries: Sequence[Entry]) -> None:
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        facts = [entry.file, f"smp={entry.smp}" if entry.smp != "1" else "", entry.arch]
        facts += [f"groups: {' '.join(entry.groups)}"] if entry.groups else []
        say(f"{entry.name.ljust(width)}  {'  '.join(fact for fact in facts if fact)}".rstrip())


class _Printer:
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


def _run(args: Namespace) -> int:
    settings = _settings(args)
    jobs = count("-j", args.jobs, 1, 256)
    directory = Path(args.directory)
    try:
        entries = config.read(directory)
    except SuiteError as error:
        raise CommandError(str(error)) from None
    try:
        entries = select(entries, args.names, args.group)
    except SuiteError as error:
        raise CommandError(f"{error}; --list names all") from None
    if args.list:
        _list(entries)
        return EXIT_OK
    named = {kind: name for kind in _REPORTS if (name := getattr(args, kind)) is not None}
    for kind, name in named.items():
        same = [f"--{other}" for other in named if other != kind and named[other] == name]
        if same:
            raise CommandError(f"--{kind} {name}: {same[0]} goes there, too")
    files = {kind: OutputFile(f"--{kind}", name) for kind, name in named.items()}
    _check_kvm(settings)
    printer = _Printer(len(entries), verbose=args.verbose, quiet=STDOUT in named.values())
    run = SuiteRun(directory, entries, settings, jobs, finished=printer.finished, tick=printer.tick)
    try:
        results = run.run()
    finally:
        printer.clear()
    printer.summary()
    errors = []
    for kind, file in files.items():
        try:
            file.write(_REPORTS[kind](results, settings.accel))
        except CommandError as error:
            errors.append(error)  # the others may be on another disk
    if errors:
        raise errors[0]
    return EXIT_FAILED if any(result.status is Status.FAIL for result in results) else EXIT_OK


command = Command(
    _add_arguments, _run, "Run kvm-unit-tests, the test programs of the KVM developers.", EPILOG, intermixed=True
)
