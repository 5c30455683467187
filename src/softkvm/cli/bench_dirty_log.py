# SPDX-License-Identifier: Apache-2.0
"""``softkvm bench dirty-log``: what dirty logging costs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from softkvm.bench import dirty_log, plot
from softkvm.cli import CommandError
from softkvm.cli.arguments import count, size
from softkvm.cli.measurement import add_kvm_and_files, add_measurement, carry_out
from softkvm.cli.output import table
from softkvm.cli.parameters import open_with_params

EPILOG = """\
As the kernel's dirty_log_perf_test: vCPUs go over memory, once to populate it, then under logging. The log is fetched
and cleared behind each pass.

exit status: 0; 1 if the KVM cannot be opened or a file not be written at the end; 2 for usage; 128 + n after signal n

examples:
  softkvm bench dirty-log
  softkvm bench dirty-log --vcpus 2 --memory 2G --write-percent 50
  softkvm bench dirty-log --overlap --accel kvm --json log.json --plot log.svg
"""


def add(measurements: Any) -> None:
    """Add the measurement to those of ``softkvm bench``."""
    command = add_measurement(
        measurements, "dirty-log", run, description="Measure what dirty logging costs.", epilog=EPILOG
    )
    default = dirty_log.Options()
    option = command.add_argument
    option("--vcpus", metavar="N", default=str(default.vcpus), help=f"vCPUs, a thread each (default: {default.vcpus})")
    option("--memory", metavar="SIZE", default="256M", help="of each vCPU, a multiple of 2M (default: 256M)")
    option("--iterations", metavar="N", default=str(default.iterations), help="passes under logging (default: 3)")
    option("--write-percent", metavar="P", default="100", help="pages that a pass writes, not reads (default: 100)")
    option("--overlap", action="store_true", help="all vCPUs go over the same memory (default: a part each)")
    option("--backing", choices=dirty_log.BACKINGS, default=default.backing, help="kind of memory (default: anonymous)")
    option(
        "--manual-protect",
        choices=("0", "1", "3"),
        default="1",
        help="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0: bits are cleared as they are fetched; 3: all are set at first",
    )
    add_kvm_and_files(command, plot=True)


def _options(args: Namespace) -> dirty_log.Options:
    options = dirty_log.Options(
        vcpus=count("--vcpus", args.vcpus, 1, 256),
        bytes_per_vcpu=size("--memory", args.memory, dirty_log.PAGE_2M),
        iterations=count("--iterations", args.iterations, 1, 10000),
        write_percent=count("--write-percent", args.write_percent, 0, 100),
        overlap=args.overlap,
        backing=args.backing,
        manual_protect=int(args.manual_protect),
    )
    try:
        dirty_log.check(options)
    except dirty_log.BenchError as error:
        raise CommandError(str(error)) from None
    return options


def run(args: Namespace) -> int:
    """Measure, print, write files."""
    options = _options(args)

    def measure(show: Callable[[str], None]) -> dirty_log.Report:
        with open_with_params(args.accel, args.param) as kvm:
            return dirty_log.measure(kvm, options, show)

    return carry_out(
        args,
        measure,
        failure=dirty_log.BenchError,
        render=render,
        as_json=dirty_log.Report.as_dict,
        draw=lambda report, form: plot.bars(_title(options), "milliseconds", _milliseconds(report), form),
    )


def _title(options: dirty_log.Options) -> str:
    memory = f"{options.pages * dirty_log.PAGE >> 20:,} MiB"
    shared = ", the same for all" if options.overlap and options.vcpus > 1 else ""
    vcpus = f"{options.vcpus} vCPU{'s' if options.vcpus > 1 else ''}"
    return f"Dirty logging: {vcpus}, {memory}{shared}, {options.write_percent} % written"


def _milliseconds(report: dirty_log.Report) -> dict[str, dict[str, float]]:
    return {"": {dirty_log.PHASES[name]: seconds * 1e3 for name, seconds in report.seconds.items()}}


def render(report: dirty_log.Report) -> str:
    """Return the report as a table for people."""
    lines = [_title(report.options), "", *table(["phase", "what it is", "ms", "pages/s"], dirty_log.rows([report]))]
    logs = ", ".join(f"{pages:,}" for pages in report.dirty_pages)
    return "\n".join([*lines, "", f"pages in the logs: {logs} of {report.options.pages:,}"])
