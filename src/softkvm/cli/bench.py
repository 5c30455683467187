# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench``: measurements. ``vmexit`` is what an exit costs; the others have modules of their own."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from softkvm import qemu
from softkvm.bench import vmexit
from softkvm.bench.sides import QEMU, SOFTKVM, QemuSide, Side, SideError, SoftkvmSide
from softkvm.bench.vmexit import Figure, Kind, Report
from softkvm.cli import (
    EXIT_ERROR,
    EXIT_OK,
    Command,
    CommandError,
    bench_demand_paging,
    bench_dirty_log,
    bench_overcommit,
    bench_page_reporting,
    bench_pmu,
    bench_task_work,
)
from softkvm.cli.arguments import add_param, count, file_name, param_values, seconds
from softkvm.cli.measurement import add_measurement
from softkvm.cli.output import STDOUT, OutputFile, say, table, warn
from softkvm.cli.parameters import open_with_params
from softkvm.progress import StatusLine
from softkvm.unittests.config import SuiteError
from softkvm.unittests.runner import DEVICES

EXIT_FAILED = 1

EPILOG = """\
measurements:
  vmexit         nanoseconds for each kind of exit, QEMU's TCG beside it
  dirty-log      what dirty logging costs: turning it on and off, passes over memory, fetching the log
  demand-paging  what memory costs that comes page by page
  task-work      how soon a vCPU's thread does what was called for, and how late CPU timers are
  pmu            what performance counters cost: exits while they count, overflows
  overcommit     how many guests a host has memory for, with memory that comes back
  page-reporting what free page reporting costs a guest that faults pages in

`softkvm bench MEASUREMENT --help` explains it.
"""

VMEXIT_EPILOG = """\
Without DIR our own guest measures: CPUID, IN, OUT, MMIO, the local APIC, HLT, IPIs. With DIR, your own build of
kvm-unit-tests (a checkout after `./configure && make`), its vmexit entries do.

QEMU runs the same images with -accel tcg. It has no exits: its figures are the work itself, in one process. A failure
there is shown and does not change the exit status.

exit status:
  0  softkvm gave every figure
  1  it did not, the KVM cannot be opened, or the file of --json cannot be written at the end
  2  usage: bad arguments, no build in DIR, a file that cannot be written at all
  128 + n  ended by signal n

examples:
  softkvm bench vmexit
  softkvm bench vmexit ~/kvm-unit-tests --runs 3 --json vmexit.json
  softkvm bench vmexit --no-qemu --param avic=0
  softkvm bench vmexit --accel kvm --no-qemu
"""


def _add_arguments(parser: ArgumentParser) -> None:
    measurements = parser.add_subparsers(
        dest="measurement",
        metavar="MEASUREMENT",
        required=True,
        help="vmexit, dirty-log, demand-paging, task-work, pmu, overcommit, page-reporting",
    )
    bench_dirty_log.add(measurements)
    bench_demand_paging.add(measurements)
    bench_task_work.add(measurements)
    bench_pmu.add(measurements)
    bench_overcommit.add(measurements)
    bench_page_reporting.add(measurements)
    command = add_measurement(
        measurements, "vmexit", _vmexit, description="Measure what an exit costs, kind by kind.", epilog=VMEXIT_EPILOG
    )
    add = command.add_argument
    add("directory", metavar="DIR", type=file_name, nargs="?", help="build of kvm-unit-tests (default: our own guest)")
    add("--runs", metavar="N", default="1", help="runs; the figure is their median (default: 1)")
    add(
        "--accel",
        choices=tuple(DEVICES),
        default="soft",
        help="soft: KVM in Python on the software CPU (default); kvm: /dev/kvm",
    )
    add_param(command)
    side = command.add_mutually_exclusive_group()
    side.add_argument(
        "--qemu", metavar="PATH", type=file_name, help=f"QEMU to compare with (default: {qemu.PROGRAM} on PATH)"
    )
    side.add_argument("--no-qemu", action="store_true", help="do not compare")
    add(
        "--timeout",
        metavar="SECONDS",
        help=f"for every kind or entry on either side (default: {vmexit.TIMEOUT_S:g}; with DIR the suite's limits, "
        "3 times those with --accel soft)",
    )
    add(
        "--json",
        metavar="FILE",
        type=file_name,
        help="write everything as JSON; - is standard output, instead of the table",
    )


def _sides(args: Namespace) -> list[Side]:
    """Return what can be compared; a note on stderr if QEMU is not there."""
    open_with_params(args.accel, args.param).close()
    sides: list[Side] = [SoftkvmSide(args.accel, param_values(args.param))]
    if args.no_qemu:
        return sides
    program = qemu.find(args.qemu)
    if program is not None:
        return [*sides, QemuSide(program)]
    if args.qemu is not None:
        raise CommandError(f"--qemu {args.qemu}: no such program")
    warn(f"no {qemu.PROGRAM} on PATH to compare with")
    return sides


def _run(args: Namespace) -> int:
    measure: Callable[[Namespace], int] = args.measure
    return measure(args)


def _vmexit(args: Namespace) -> int:
    runs = count("--runs", args.runs, 1, 1000)
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout)
    file = OutputFile("--json", args.json) if args.json else None
    directory = None if args.directory is None else Path(args.directory)
    line = StatusLine()

    def progress(done: int, total: int, what: str) -> None:
        line.show(f"[{done}/{total}] {what}")

    try:
        if directory is not None:
            vmexit.entries_of(directory)
        sides = _sides(args)
        if directory is not None:
            report = vmexit.suite(directory, sides, runs, timeout_s, progress)
        else:
            report = vmexit.own_guest(sides, runs, timeout_s or vmexit.TIMEOUT_S, progress)
    except SuiteError as error:
        raise CommandError(str(error)) from None
    except SideError as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        line.clear()
    if args.json != STDOUT:
        say(render(report))
    if file is not None:
        file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    complete = all(kind.figures[SOFTKVM].ns is not None for kind in report.kinds)
    return EXIT_OK if complete else EXIT_FAILED


# -- the table


def _cell(figure: Figure) -> str:
    return figure.problem if figure.ns is None else f"{figure.ns:,.0f}"


def _row(kind: Kind, sides: list[str]) -> list[str]:
    row = [kind.name, kind.what, *(_cell(kind.figures[side]) for side in sides)]
    if QEMU in sides:
        ratio = kind.ratio(SOFTKVM, QEMU)
        row.append("" if ratio is None else f"{ratio:,.1f}")
    return row


def render(report: Report) -> str:
    """Return the report as a table for people, with what the problems were below it."""
    sides = list(report.sides)
    titles = [f"{facts['title']} ns" for facts in report.sides.values()]
    header = ["exit", "what it does", *titles, *(["ratio"] if QEMU in sides else [])]
    rows = [_row(kind, sides) for kind in report.kinds]
    lines = table(header, rows)
    problems = [
        f"{kind.name} on {report.sides[side]['title']}: " + ", ".join(filter(None, (figure.problem, figure.detail)))
        for kind in report.kinds
        for side, figure in kind.figures.items()
        if figure.problem
    ]
    return "\n".join([*lines, *([""] if problems else []), *problems])


command = Command(_add_arguments, _run, "Measurements.", EPILOG)
