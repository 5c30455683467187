# SPDX-License-Identifier: Apache-2.0
"""``softkvm selftests``: runs the kernel's KVM selftests from a build of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import add_param, count, file_name, seconds
from softkvm.cli.exec import parameters
from softkvm.cli.output import say
from softkvm.cli.results import Printer, Reports, add_report_options
from softkvm.client.launch import LaunchError
from softkvm.client.settings import Settings as ClientSettings
from softkvm.reports.result import Status
from softkvm.selftests.build import BuildError, Program, programs
from softkvm.selftests.runner import SUITE, Settings, run_all

EXIT_FAILED = 1

EPILOG = """\
DIR is your own build of the kernel's KVM selftests: tools/testing/selftests/kvm after `make headers_install` at the
top and `make` there. Each program runs as under `softkvm exec`. One that skips for another reason than the one that
is expected fails. FILE - is standard output, in place of the lines.

exit status:
  0  nothing failed
  1  a program failed, no client can be started, or a file cannot be written at the end
  2  usage: bad arguments, no build in DIR, no such program, a file that cannot be written at all
  128 + n  ended by signal n

examples:
  softkvm selftests ~/linux/tools/testing/selftests/kvm                      all programs
  softkvm selftests ~/linux/tools/testing/selftests/kvm debug_regs -v        one, with what it prints
  softkvm selftests ~/linux/tools/testing/selftests/kvm --tap - --html report.html
"""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", type=file_name, help="build of the kernel's KVM selftests")
    add("names", metavar="NAME", nargs="*", help="programs to run, with or without their directory (default: all)")
    add("--list", action="store_true", help="list the programs instead of running them")
    add("-j", "--jobs", metavar="N", default="1", help="programs at the same time (default: 1)")
    add("--timeout", metavar="SECONDS", help="for every program, instead of its own limit; 0 for none")
    add_param(parser)
    add_report_options(parser)
    add("-v", "--verbose", action="store_true", help="print the log of every program")


def select(found: Sequence[Program], names: Sequence[str]) -> list[Program]:
    """Return the programs with these names, all without any; CommandError for a name that none has."""
    for name in names:
        if not any(name in (program.name, program.path.name) for program in found):
            raise CommandError(f"no program is named {name}; --list names all")
    return [program for program in found if not names or program.name in names or program.path.name in names]


def _run(args: Namespace) -> int:
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout, zero=True)
    settings = Settings(timeout_s, ClientSettings(parameters(args.param)))
    jobs = count("-j", args.jobs, 1, 256)
    try:
        found = programs(Path(args.directory).absolute())
    except BuildError as error:
        raise CommandError(str(error)) from None
    selected = select(found, args.names)
    if args.list:
        for program in selected:
            say(program.name if program.built else f"{program.name}  (not built)")
        return EXIT_OK
    files = Reports(args)
    printer = Printer(len(selected), verbose=args.verbose, quiet=files.take_stdout)
    try:
        results = run_all(selected, settings, jobs, finished=printer.finished, tick=printer.tick)
    except LaunchError as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        printer.clear()
    printer.summary()
    files.write(results, SUITE)
    return EXIT_FAILED if any(result.status is Status.FAIL for result in results) else EXIT_OK


command = Command(
    _add_arguments, _run, "Run the kernel's KVM selftests, each a client of KVM in Python.", EPILOG, intermixed=True
)
