# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench pmu``: what a guest's performance counters cost."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from softkvm.bench import pmu
from softkvm.cli import EXIT_ERROR, EXIT_OK, CommandError
from softkvm.cli.arguments import count, param_values
from softkvm.cli.measurement import add_kvm_and_files, add_measurement
from softkvm.cli.output import STDOUT, OutputFile, say, table
from softkvm.cli.parameters import assign_params, open_with_params
from softkvm.progress import StatusLine

EPILOG = """\
Exits while a guest counts, and overflows of its counter. An overflow is no reason to program the counter anew; what
that would cost is measured, too, with the parameter pmu_reprogram_always (not with --accel kvm).

exit status: 0; 1 if the KVM cannot be opened or has no counters, or a file not be written at the end; 2 for usage;
128 + n after signal n

examples:
  softkvm bench pmu
  softkvm bench pmu --period 100000 --json pmu.json
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    command = add_measurement(
        measurements, "pmu", run, description="Measure what performance counters cost.", epilog=EPILOG
    )
    default = pmu.Options()
    option = command.add_argument
    option("--exits", metavar="N", default=str(default.exits), help=f"exits of a run (default: {default.exits})")
    option(
        "--overflows",
        metavar="N",
        default=str(default.overflows),
        help=f"of a run, about (default: {default.overflows})",
    )
    option(
        "--period",
        metavar="N",
        default=str(default.period),
        help=f"instructions from one overflow to the next (default: {default.period})",
    )
    option(
        "--runs", metavar="N", default=str(default.runs), help=f"runs; figures are medians (default: {default.runs})"
    )
    add_kvm_and_files(command)


def run(args: Namespace) -> int:
    """Measure, print, write the file."""
    options = pmu.Options(
        exits=count("--exits", args.exits, 1, 10_000_000),
        overflows=count("--overflows", args.overflows, 1, 10_000_000),
        period=count("--period", args.period, pmu.PERIOD_MIN, 1 << 31),
        runs=count("--runs", args.runs, 1, 1000),
    )
    file = OutputFile("--json", args.json) if args.json else None
    line = StatusLine()
    try:
        with ExitStack() as stack:
            kvm = stack.enter_context(open_with_params(args.accel, args.param))
            anew = None
            if args.accel == "soft":
                from softkvm.kvm import Kvm, Params

                anew = stack.enter_context(Kvm(Params()))
                assign_params(anew, param_values(args.param) | {"pmu_reprogram_always": "1"})
            report = pmu.measure(kvm, anew, options, line.show)
    except OSError as error:
        raise CommandError(f"--accel {args.accel}: {error.strerror}", EXIT_ERROR) from None
    except pmu.BenchError as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        line.clear()
    if args.json != STDOUT:
        say("\n".join(table(["what", "ns"], pmu.rows(report))))
    if file is not None:
        file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    return EXIT_OK
