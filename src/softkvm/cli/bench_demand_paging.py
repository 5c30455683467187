# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench demand-paging``: what memory costs that comes page by page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from softkvm.bench import demand_paging, plot
from softkvm.cli import CommandError
from softkvm.cli.arguments import count, size
from softkvm.cli.measurement import add_kvm_and_files, add_measurement, carry_out
from softkvm.cli.output import table
from softkvm.cli.parameters import open_with_params

EPILOG = """\
As the kernel's demand_paging_test: vCPUs go over memory that is not there. The first pass is without anybody of ours,
the second has each page given:
  missing  by userfaultfd: a copy of another page
  minor    by userfaultfd: the page is in the file, and is only mapped
  exit     by the vCPU's thread, behind KVM_EXIT_MEMORY_FAULT
  auto     missing where the host lets us, else exit

exit status: 0; 1 if the KVM cannot be opened, the host has no userfaultfd for us, or a file not be written at the end;
2 for usage; 128 + n after signal n

examples:
  softkvm bench demand-paging --vcpus 2
  softkvm bench demand-paging --mode minor --overlap --vcpus 4 --json paging.json --plot paging.svg
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    command = add_measurement(
        measurements,
        "demand-paging",
        run,
        description="Measure what memory costs that comes page by page.",
        epilog=EPILOG,
    )
    default = demand_paging.Options()
    option = command.add_argument
    option("--vcpus", metavar="N", default=str(default.vcpus), help=f"vCPUs, a thread each (default: {default.vcpus})")
    option("--memory", metavar="SIZE", default="64M", help="of each vCPU, a multiple of 2M (default: 64M)")
    option("--overlap", action="store_true", help="all vCPUs go over the same memory (default: a part each)")
    option("--mode", choices=demand_paging.MODES, default=default.mode, help="who gives pages (default: auto)")
    option("--write-percent", metavar="P", default="100", help="pages that are written, not read (default: 100)")
    option("--delay", metavar="USEC", default="0", help="how long who gives a page takes beside (default: 0)")
    add_kvm_and_files(command, plot=True)


def _options(args: Namespace, mode: str) -> demand_paging.Options:
    options = demand_paging.Options(
        vcpus=count("--vcpus", args.vcpus, 1, 256),
        bytes_per_vcpu=size("--memory", args.memory, demand_paging.PAGE_2M),
        overlap=args.overlap,
        mode=mode,
        write_percent=count("--write-percent", args.write_percent, 0, 100),
        delay_us=count("--delay", args.delay, 0, demand_paging.MAX_DELAY_US),
    )
    try:
        demand_paging.check(options)
    except demand_paging.BenchError as error:
        raise CommandError(str(error)) from None
    return options


def run(args: Namespace) -> int:
    """Measure, print, write files."""
    modes = ["none"] if args.mode == "none" else ["none", args.mode]
    wanted = [_options(args, mode) for mode in modes]

    def measure(show: Callable[[str], None]) -> list[demand_paging.Report]:
        with open_with_params(args.accel, args.param) as kvm:
            return [
                demand_paging.measure(kvm, options, show, user_mode_only=args.accel == "soft") for options in wanted
            ]

    def draw(reports: list[demand_paging.Report], form: str) -> bytes:
        rates = {"": {report.mode: report.pages_per_second for report in reports}}
        return plot.bars(_title(wanted[0]), "pages in a second", rates, form)

    return carry_out(
        args,
        measure,
        failure=demand_paging.BenchError,
        render=render,
        as_json=lambda reports: [report.as_dict() for report in reports],
        draw=draw,
    )


def _title(options: demand_paging.Options) -> str:
    memory = f"{options.walk.pages * demand_paging.PAGE >> 20:,} MiB"
    shared = ", the same for all" if options.overlap and options.vcpus > 1 else ""
    vcpus = f"{options.vcpus} vCPU{'s' if options.vcpus > 1 else ''}"
    return f"Demand paging: {vcpus}, {memory}{shared}, {options.write_percent} % written"


def render(reports: list[demand_paging.Report]) -> str:
    """Return the reports as a table for people."""
    header = ["mode", "ms", "pages/s", "of each vCPU", "faults"]
    return "\n".join([_title(reports[0].options), "", *table(header, demand_paging.rows(reports))])
