# SPDX-License-Identifier: Apache-2.0
"""``softkvm vsock-test``: the vsock test suite, between the host and a guest."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.accel import AUTO, KVM, SOFT, open_kvm
from softkvm.cli.arguments import count, file_name, size
from softkvm.cli.output import say, warn
from softkvm.cli.results import Printer, Reports, add_report_options
from softkvm.progress import TerminalProgress
from softkvm.reports.result import Result, Status
from softkvm.reports.suite import Suite
from softkvm.vmm.guest import GuestUnavailable, prepare
from softkvm.vmm.machine import MAX_VCPUS
from softkvm.vsocktest.cases import CASES
from softkvm.vsocktest.guest import TRANSPORTS, VIRTIO, Settings, run
from softkvm.vsocktest.half import DEFAULT_PORT
from softkvm.vsocktest.session import MODES

EXIT_FAILED = 1


EPILOG = """\
The cases are those of the kernel's tools/testing/vsock, by its names, and some of our own. Each is done by two halves,
one on the host and one in the default guest, which is client first and then server. --kernels FILE has the kernel's own
program (static: make LDFLAGS=-static) do the guest's half; with --transport loopback both halves are in the guest, ours
and the kernel's, or ours twice. FILE - is standard output, in place of the lines.

exit status:
  0  nothing failed
  1  a case failed, the guest did not do its half, or a file cannot be written at the end
  2  usage: bad arguments, no such case, a file that cannot be read or written at all
  128 + n  ended by signal n

examples:
  softkvm vsock-test                                  all cases, both ways
  softkvm vsock-test --pick 4 --mode server           a hundred connections that the host makes
  softkvm vsock-test --kernels ./vsock_test --json r.json
"""


def _suite(accel: str) -> Suite:
    engine = "KVM in Python on the software CPU" if accel == SOFT else "/dev/kvm"
    origin = "of the kernel's tools/testing/vsock, and some cases of ours"
    return Suite("vsock-test", "The vsock test suite", "vsock-test", accel, engine, f"--accel {accel}", "", origin)


def _table(results: Sequence[Result]) -> str:
    """Return a line for each case, with what came of it in each mode."""
    ways: dict[str, dict[str, Result]] = {}
    for result in results:
        way, _, case = result.name.partition(": ")
        ways.setdefault(way, {})[case or "(all)"] = result
    cases = list(dict.fromkeys(case for found in ways.values() for case in found))
    width = max(map(len, cases))
    lines = [f"{'':{width}}  {'  '.join(ways)}"]
    for case in cases:
        cells = [f"{_cell(found.get(case)):{len(way)}}" for way, found in ways.items()]
        lines.append(f"{case:{width}}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{result.status} {result.time_s:.2f} s" if result.status is Status.PASS and result.time_s else result.status


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--list", action="store_true", help="list the cases instead of doing them")
    add(
        "--pick",
        metavar="ID",
        action="append",
        default=[],
        help="do this case only, by number or name; may be repeated",
    )
    add("--skip", metavar="ID", action="append", default=[], help="leave this case out; may be repeated")
    add("--mode", choices=MODES, help="what the guest's half is (default: client, then server)")
    add(
        "--transport",
        choices=TRANSPORTS,
        default=VIRTIO,
        help="virtio: the host and the guest (default); loopback: both halves in the guest; vmci: virtio, by the rules "
        "for VMCI, where nothing is read behind a close",
    )
    add("--kernels", metavar="FILE", type=file_name, help="the kernel's own vsock_test does the guest's half")
    add("--port", metavar="N", default=str(DEFAULT_PORT), help=f"port of the cases (default: {DEFAULT_PORT})")
    add("-m", "--mem", metavar="SIZE", default="256M", help="guest memory (default: 256M)")
    add("-c", "--vcpus", metavar="N", default="1", help="virtual processors (default: 1)")
    add("--accel", choices=(SOFT, KVM, AUTO), default=SOFT, help="soft (default), kvm or auto, as for `softkvm run`")
    add_report_options(parser)
    add("-v", "--verbose", action="store_true", help="print what the guest's half has printed")


def _names(option: str, texts: Sequence[str]) -> set[str]:
    """Return the names of cases that are named by number or name."""
    names = [case.name for case in CASES]
    found = set()
    for text in texts:
        if text.isdecimal() and len(text) < 5 and int(text) < len(names):
            found.add(names[int(text)])
        elif text in names:
            found.add(text)
        else:
            raise CommandError(f"{option} {text}: expected a case's name, or its number from 0 to {len(names) - 1}")
    return found


def _picked(args: Namespace) -> Callable[[str], bool]:
    picked, skipped = _names("--pick", args.pick), _names("--skip", args.skip)
    return lambda name: name not in skipped and (not args.pick or name in picked)


def _run(args: Namespace) -> int:
    picked = _picked(args)
    if args.list:
        for number, case in enumerate(CASES):
            if picked(case.name):
                say(f"{number}\t{case.name}")
        return EXIT_OK
    settings = Settings(
        modes=MODES if args.mode is None else (args.mode,),
        picked=picked,
        transport=args.transport,
        kernels=None if args.kernels is None else Path(args.kernels),
        port=count("--port", args.port, 1, 0xFFFF),
        memory_size=size("--mem", args.mem),
        vcpus=count("--vcpus", args.vcpus, 1, MAX_VCPUS),
    )
    if settings.kernels is not None and not settings.kernels.is_file():
        raise CommandError(f"--kernels {settings.kernels}: expected a file")
    if settings.kernels is not None and settings.port != DEFAULT_PORT:
        raise CommandError(f"--port {settings.port}: the kernel's vsock_test has {DEFAULT_PORT}")
    files = Reports(args)
    printer = Printer(len(CASES) * len(settings.modes), verbose=args.verbose, quiet=files.take_stdout)
    try:
        guest = prepare(TerminalProgress())
        kvm, accel = open_kvm(args.accel)
        with kvm:
            outcome = run(kvm, guest, settings, printer.finished)
    except (GuestUnavailable, FileNotFoundError) as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    finally:
        printer.clear()
    if len(outcome.results) > 1 and not files.take_stdout:
        say(f"\n{_table(outcome.results)}\n")
    printer.summary()
    files.write(outcome.results, _suite(accel))
    if outcome.trouble:
        if args.verbose:
            say(outcome.log)
        warn(outcome.trouble)
    failed = outcome.trouble or any(result.status is Status.FAIL for result in outcome.results)
    return EXIT_FAILED if failed else EXIT_OK


command = Command(_add_arguments, _run, "Test sockets between host and guest (AF_VSOCK).", EPILOG)
