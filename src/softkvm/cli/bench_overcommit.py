# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench overcommit``: how many guests a host has memory for."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from softkvm.bench import overcommit, plot
from softkvm.cli import CommandError
from softkvm.cli.arguments import count, size
from softkvm.cli.measurement import add_kvm_and_files, add_measurement, carry_out
from softkvm.cli.output import table
from softkvm.cli.parameters import open_with_params
from softkvm.vmm.memory import MIB

EPILOG = """\
One guest after the other is started and uses most of its memory once. A guest fits if, while it runs, all guests so far
take no more of the host than the budget.

modes:
  off         Linux, gives nothing back
  reporting   Linux, free page reporting (virtio-balloon): two seconds after memory became free, without being asked
  hinting     Linux, free page hinting (virtio-balloon): asked for behind each run
  bare        a bare-metal guest, gives nothing back
  hypercall   the same with a hypercall for each huge page that becomes free (KVM in Python only)

the budget:
  cgroup      a control group limits the guests' process; what is more goes to the host's swap or ends the process
  accounting  what guests have of the host is measured. What is more than the budget is taken to be in swap, the guest
              first that has not run for longest; the time for that is modelled, bytes by --swap-speed, and shown apart
  auto        cgroup where the host has swap and lets us make one, else accounting

exit status: 0; 1 if a guest cannot be started or a file not be written at the end; 2 for usage; 128 + n after signal n

examples:
  softkvm bench overcommit
  softkvm bench overcommit --modes off,reporting --guests 8 --json overcommit.json --plot overcommit.svg
  softkvm bench overcommit --modes bare,hypercall --memory 128M
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    command = add_measurement(
        measurements,
        "overcommit",
        run,
        description="Measure how many guests a host has memory for, and how long they take when it is short.",
        epilog=EPILOG,
    )
    option = command.add_argument
    option("--guests", metavar="N", default="6", help="guests that are started at most (default: 6)")
    option("--memory", metavar="SIZE", default="256M", help="of each guest, up to 1G (default: 256M)")
    option("--hog", metavar="SIZE", help="what each uses in its run (default: five eighths of its memory)")
    option("--budget", metavar="SIZE", help="what the host has for all (default: 3.2 times a guest's memory)")
    option(
        "--modes",
        metavar="MODE,…",
        default=",".join(overcommit.DEFAULT_MODES),
        help=f"what gives memory back (default: {','.join(overcommit.DEFAULT_MODES)})",
    )
    option("--enforce", choices=overcommit.ENFORCE, default="auto", help="who keeps to the budget (default: auto)")
    option("--swap", metavar="SIZE", help="swap of the accounting (default: as much as it takes)")
    option("--swap-speed", metavar="SIZE", default="100M", help="a second, of the accounting (default: 100M)")
    add_kvm_and_files(command, plot=True)


def _options(args: Namespace) -> overcommit.Options:
    options = overcommit.Options(
        guests=count("--guests", args.guests, 1, 64),
        memory=size("--memory", args.memory, 2 * MIB),
        hog=0 if args.hog is None else size("--hog", args.hog, MIB),
        budget=0 if args.budget is None else size("--budget", args.budget, MIB),
        modes=tuple(args.modes.split(",")),
        enforce=args.enforce,
        swap=1 << 40 if args.swap is None else size("--swap", args.swap),
        swap_speed=size("--swap-speed", args.swap_speed),
    )
    try:
        overcommit.check(options)
    except overcommit.BenchError as error:
        raise CommandError(str(error)) from None
    return options


def run(args: Namespace) -> int:
    """Measure, print, write files."""
    options = _options(args)
    return carry_out(
        args,
        lambda show: overcommit.measure(args.accel, lambda: open_with_params(args.accel, args.param), options, show),
        failure=overcommit.BenchError,
        render=render,
        as_json=overcommit.Report.as_dict,
        draw=lambda report, form: plot.panels(_title(options), _panels(report), form),
    )


def _title(options: overcommit.Options) -> str:
    return (
        f"Overcommit: guests of {options.memory >> 20:,} MiB that use {options.hog_bytes >> 20:,} MiB, "
        f"a host of {options.budget_bytes >> 20:,} MiB"
    )


def _panels(report: overcommit.Report) -> list[plot.Panel]:
    memory = {mode: [(at, total / MIB) for at, total, _ in series.samples] for mode, series in report.series.items()}
    times = {mode: [(run.guest, run.seconds) for run in series.runs] for mode, series in report.series.items()}
    level = ("budget", report.options.budget_bytes / MIB)
    return [
        plot.Panel("what the guests have of the host", "seconds", "MiB", memory, level),
        plot.Panel("a guest's run, with the time for swap", "guest", "seconds", times, marked=True),
    ]


def render(report: overcommit.Report) -> str:
    """Return the report as a table for people."""
    header = ["mode", "guest", "boot s", "run s", "swap s", "in all s", "peak MiB", "after MiB", "fits"]
    lines = [_title(report.options), "", *table(header, list(overcommit.rows(report))), ""]
    for mode, series in report.series.items():
        told = f"{mode} ({overcommit.MODES[mode]}; {series.enforced}): {series.fit} guests fit"
        if series.runs:
            seconds = [run.seconds for run in series.runs]
            told += f", a run takes {min(seconds):.1f} to {max(seconds):.1f} s"
        lines.append(told + (f"; {series.ended}" if series.ended else ""))
    return "\n".join(lines)
