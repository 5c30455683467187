# SPDX-License-Identifier: Apache-2.0
"""``softkvm unittests``: runs kvm-unit-tests from a build of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from softkvm.cli import EXIT_OK, Command, CommandError
from softkvm.cli.arguments import add_param, count, factor, file_name, pairs, param_values, seconds
from softkvm.cli.output import say
from softkvm.cli.parameters import open_with_params
from softkvm.cli.results import Printer, Reports, add_report_options
from softkvm.reports.result import Status
from softkvm.unittests import config
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.runner import DEVICES, TIMEOUT_SCALE, Settings, suite_of
from softkvm.unittests.suite import SuiteRun, select

EXIT_FAILED = 1

EPILOG = """\
DIR is your own build of kvm-unit-tests: a checkout after `./configure && make`, or `./configure --arch=i386 && make`.
FILE - is standard output, in place of the lines.

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
    add_param(parser)
    add(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="variable of the tests' environment, such as NR_CPUS=1",
    )
    add_report_options(parser)
    add("-v", "--verbose", action="store_true", help="print the log of every test, and what it ignored")


def _settings(args: Namespace) -> Settings:
    timeout_s = None if args.timeout is None else seconds("--timeout", args.timeout, zero=True)
    scale = None if args.timeout_scale is None else factor("--timeout-scale", args.timeout_scale)
    return Settings(
        args.accel,
        timeout_s,
        scale,
        run_nodefault=args.all or bool(args.names) or bool(args.group),
        params=param_values(args.param),
        environment=pairs("--env", args.env),
    )


def _check_kvm(settings: Settings, args: Namespace) -> None:
    """Fail before the first test if none can run."""
    open_with_params(settings.accel, args.param).close()


def _list(entries: Sequence[Entry]) -> None:
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        facts = [entry.file, f"smp={entry.smp}" if entry.smp != "1" else "", entry.arch]
        facts += [f"groups: {' '.join(entry.groups)}"] if entry.groups else []
        say(f"{entry.name.ljust(width)}  {'  '.join(fact for fact in facts if fact)}".rstrip())


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
    files = Reports(args)
    _check_kvm(settings, args)
    printer = Printer(len(entries), verbose=args.verbose, quiet=files.take_stdout)
    run = SuiteRun(directory, entries, settings, jobs, finished=printer.finished, tick=printer.tick)
    try:
        results = run.run()
    finally:
        printer.clear()
    printer.summary()
    files.write(results, suite_of(settings.accel, config.architecture(directory)))
    return EXIT_FAILED if any(result.status is Status.FAIL for result in results) else EXIT_OK


command = Command(
    _add_arguments, _run, "Run kvm-unit-tests, the test programs of the KVM developers.", EPILOG, intermixed=True
)
