# SPDX-License-Identifier: Apache-2.0
"""``softkvm exec``: run an unmodified KVM client whose ``/dev/kvm`` is KVM in Python."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from softkvm.cli import EXIT_ERROR, Command, CommandError
from softkvm.cli.arguments import add_param, file_name, param_values
from softkvm.cli.output import warn
from softkvm.cli.tracepoints import add_selection, selecting

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit statuses as the shell's, for a client that cannot be started."""

EPILOG = """\
The client and what it starts find /dev/kvm whether the host has one or not. It is KVM in Python on the software CPU,
in the client's own process. Nothing is printed unless asked for; exit status and signals are the client's.

exit status: the client's; 126 if it cannot be executed, 127 if it is not there, 1 or 2 for an error of softkvm's

examples:
  softkvm exec -- qemu-system-x86_64 -accel kvm -m 512 -nographic -kernel vmlinuz -append console=ttyS0
  softkvm exec --trace trace.txt -- ./my-vmm
  softkvm exec --param nrips=0,halt_poll_ns=50000 --plugin policy.py -- lkvm run -k vmlinuz
"""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_param(parser)
    add("--plugin", metavar="FILE.py", type=file_name, action="append", default=[], help="change KVM's policy")
    add("--trace", metavar="FILE", type=file_name, help="write every request (JSON lines: FILE.json)")
    add(
        "--trace-kvm",
        metavar="FILE",
        type=file_name,
        help="record KVM's tracepoints: a file of trace-cmd's, or FILE.json for Perfetto (`softkvm trace --help`)",
    )
    add_selection(parser)
    add("--stats", metavar="FILE", type=file_name, help="write counts at the end (JSON: FILE.json)")
    add("--loader", action="store_true", help="follow the client's system calls, not its calls of the C library")
    add("client", metavar="CMD", nargs=argparse.REMAINDER, help="the client and its arguments")


def parameters(texts: Sequence[str]) -> dict[str, str]:
    """Return the parameters that ``--param`` names, checked against those there are."""
    from softkvm.kvm.params import Params

    known = Params()
    values = param_values(texts)
    for name, value in values.items():
        try:
            known.assign(name, value)
        except ValueError as error:
            raise CommandError(f"--param {error}") from None
    return values


def _run(args: Namespace) -> int:
    from softkvm.client.launch import LaunchError, execute
    from softkvm.client.settings import Settings

    client = args.client[1:] if args.client[:1] == ["--"] else args.client
    if not client:
        raise CommandError("expected CMD, the client to run; `softkvm exec --help` explains")
    _check_tracepoints(args)
    if args.trace_kvm and os.path.isfile(args.trace_kvm) and os.path.getsize(args.trace_kvm):
        warn(f"{args.trace_kvm}: what is there is replaced")
    written = (("--trace", args.trace), ("--stats", args.stats), ("--trace-kvm", args.trace_kvm))
    for n, (option, path) in enumerate(written):
        _check_writable(option, path)
        for other, earlier in written[:n]:
            if path and earlier and os.path.samefile(path, earlier):
                raise CommandError(f"{option} {path}: expected another file than that of {other}")
    for path in args.plugin:
        if not os.path.exists(path):
            raise CommandError(f"--plugin {path}: {os.strerror(2)}")
    absolute = [os.path.abspath(path) for path in args.plugin]
    trace, stats, tracepoints = (os.path.abspath(path) if path else "" for _, path in written)
    settings = Settings(
        parameters(args.param), absolute, trace, stats, tracepoints, args.trace_event, args.trace_filter
    )
    try:
        execute(client, settings, loader=args.loader)
    except LaunchError as error:
        raise CommandError(str(error), EXIT_ERROR) from None
    except FileNotFoundError as error:
        here = os.path.join(".", client[0])
        there = f" in PATH; {here} is" if "/" not in client[0] and os.path.exists(here) else ""
        raise CommandError(f"{client[0]}: {error.strerror}{there}", NOT_FOUND) from None
    except OSError as error:
        raise CommandError(f"{client[0]}: {error.strerror}", NOT_EXECUTABLE) from None


def _check_tracepoints(args: Namespace) -> None:
    """CommandError for tracepoints that are not there, and filters that are none."""
    if not args.trace_kvm:
        if args.trace_event or args.trace_filter:
            raise CommandError("--trace-event and --trace-filter need --trace-kvm FILE")
        return
    from softkvm.kvm import TRACEPOINTS, trace

    with selecting():
        trace.filters_of(trace.select(TRACEPOINTS, args.trace_event), args.trace_filter)


def _check_writable(option: str, path: str | None) -> None:
    """Begin the file anew, or say why it cannot be written."""
    if path == "-":
        raise CommandError(f"{option} -: expected a file: the standard output is the client's")
    if path:
        try:
            open(path, "w").close()
        except OSError as error:
            raise CommandError(f"{option} {path}: {error.strerror}") from None


command = Command(
    _add_arguments,
    _run,
    description="Run an unmodified KVM client on KVM in Python.",
    epilog=EPILOG,
)
