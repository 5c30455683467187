# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench page-reporting``: what free page reporting costs a guest that faults pages in."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from softkvm.bench import page_reporting, plot
from softkvm.cli import CommandError
from softkvm.cli.arguments import count, size
from softkvm.cli.measurement import add_kvm_and_files, add_measurement, carry_out
from softkvm.cli.output import table
from softkvm.cli.parameters import open_with_params
from softkvm.vmm.memory import MIB

EPILOG = """\
As page_fault1 of will-it-scale: tasks map memory, touch every page, unmap it, again and again. Three guests take turns:
without reporting; with reporting to a host that keeps the memory, as with an assigned device; with reporting. A cost is
the median of the rounds', in percent of what the guest without gets through; +: it gets through less. Beside it is the
cost in processor time of the host's for a page, which says more on a busy host, and in instructions of the guest's, in
which the host has no part.

exit status: 0; 1 if a guest cannot be started or a file not be written at the end; 2 for usage; 128 + n after signal n

examples:
  softkvm bench page-reporting
  softkvm bench page-reporting --tasks 1,2,4,8,16 --rounds 5 --json reporting.json
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    default = page_reporting.Options()
    command = add_measurement(
        measurements,
        "page-reporting",
        run,
        description="Measure what free page reporting costs a guest that faults pages in.",
        epilog=EPILOG,
    )
    option = command.add_argument
    option("--tasks", metavar="N,…", default="1,16", help="processes at a time, 1 to 16 (default: 1,16)")
    option("--thp", choices=("on", "off", "both"), default="both", help="the guest's transparent huge pages")
    option("--vcpus", metavar="N", default=str(default.vcpus), help=f"of each guest (default: {default.vcpus})")
    option("--memory", metavar="SIZE", default="768M", help="of each guest (default: 768M)")
    option("--task-memory", metavar="SIZE", default="16M", help="what a task maps at a time (default: 16M)")
    option("--seconds", metavar="N", default=str(default.seconds), help="of a round (default: 3)")
    option("--rounds", metavar="N", default=str(default.rounds), help="of each guest in each setting (default: 3)")
    add_kvm_and_files(command, plot=True)


def _options(args: Namespace) -> page_reporting.Options:
    options = page_reporting.Options(
        tasks=tuple(count("--tasks", text, 1, 16) for text in args.tasks.split(",")),
        thp={"on": (True,), "off": (False,), "both": (False, True)}[args.thp],
        vcpus=count("--vcpus", args.vcpus, 1, 16),
        memory=size("--memory", args.memory, MIB),
        task_memory=size("--task-memory", args.task_memory, MIB),
        seconds=count("--seconds", args.seconds, 1, 600),
        rounds=count("--rounds", args.rounds, 1, 1000),
    )
    try:
        page_reporting.check(options)
    except page_reporting.BenchError as error:
        raise CommandError(str(error)) from None
    return options


def run(args: Namespace) -> int:
    """Measure, print, write files."""
    options = _options(args)
    return carry_out(
        args,
        lambda show: page_reporting.measure(lambda: open_with_params(args.accel, args.param), options, show),
        failure=page_reporting.BenchError,
        render=render,
        as_json=page_reporting.Report.as_dict,
        draw=lambda report, form: plot.bars(_title(options), "pages in a second", _bars(report), form),
    )


def _title(options: page_reporting.Options) -> str:
    return (
        f"Page faults under free page reporting: {options.vcpus} vCPU{'s' * (options.vcpus > 1)}, "
        f"{options.task_memory >> 20} MiB for each task"
    )


def _bars(report: page_reporting.Report) -> dict[str, dict[str, float]]:
    return {
        what: {
            f"{figure.tasks} task{'s' * (figure.tasks > 1)}, {'2 MiB' if figure.thp else '4 KiB'} pages": figure.rate
            for figure in report.figures
            if figure.variant == variant
        }
        for variant, what in page_reporting.VARIANTS.items()
    }


def render(report: page_reporting.Report) -> str:
    """Return the report as a table for people."""
    header = [
        "tasks",
        "THP",
        "off pages/s",
        "kept pages/s",
        "on pages/s",
        "cost kept %",
        "on %",
        "CPU kept %",
        "on %",
        "instr. kept %",
        "on %",
    ]
    lines = [_title(report.options), "", *table(header, list(page_reporting.rows(report))), ""]
    lines += [f"{variant}: {what}" for variant, what in page_reporting.VARIANTS.items()]
    taken = report.reported.get("on", 0)
    return "\n".join([*lines, f"the host has taken {taken >> 20:,} MiB of what was reported"])
