# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench task-work``: how soon a vCPU's thread does what was called for."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from softkvm.bench import task_work
from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.arguments import count
from softkvm.cli.measurement import add_kvm_and_files, add_measurement
from softkvm.cli.output import STDOUT, OutputFile, say, table
from softkvm.cli.parameters import open_with_params
from softkvm.progress import StatusLine

EPILOG = """\
Task work runs on the vCPU's own thread, out of the guest. The times are those from the call for it on another thread,
and of CPU timers the CPU time that the vCPU had behind the expiry: up to a tick of the host's.

exit status: 0; 1 if the KVM cannot be opened or a file not be written at the end; 2 for usage; 128 + n after signal n
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    command = add_measurement(
        measurements,
        "task-work",
        run,
        description="Measure how soon a vCPU's thread does what was called for.",
        epilog=EPILOG,
    )
    option = command.add_argument
    option("--samples", metavar="N", default="1000", help="of each kind (default: 1000)")
    add_kvm_and_files(command)


def run(args: Namespace) -> int:
    """Measure, print, write files."""
    samples = count("--samples", args.samples, 1, 1_000_000)
    file = OutputFile("--json", args.json) if args.json else None
    line = StatusLine()
    try:
        with open_with_params(args.accel, args.param) as kvm:
            report = task_work.measure(kvm, samples, line.show)
    except OSError as error:
        raise CommandError(f"--accel {args.accel}: {error.strerror}", EXIT_ERROR) from None
    except task_work.BenchError as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        line.clear()
    if args.json != STDOUT:
        say(render(report))
    if file is not None:
        file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    return EXIT_OK


def render(report: task_work.Report) -> str:
    """Return the report as a table for people, in microseconds."""
    header = ["guest", "what it is", "least", "median", "90 %", "99 %", "most us"]
    rows = [
        [name, task_work.GUESTS[name][0]]
        + [f"{report.percentile(name, percent) / 1e3:,.1f}" for percent in task_work.PERCENTILES]
        for name in report.samples
    ]
    return "\n".join(table(header, rows))
