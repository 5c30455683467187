# SPDX-License-Identifier: Apache-2.0
"""``softkvm run --gdb``."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import warn
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.gdb.address import GdbSpec, parse
from softkvm.vmm.gdb.server import GdbServer
from softkvm.vmm.machine import Machine


def add_gdb(parser: ArgumentParser) -> None:
    """Add ``--gdb``."""
    parser.add_argument(
        "--gdb",
        metavar="WHERE",
        help="let gdb look inside: tcp::PORT (of the loopback interface; 0: any) or unix:PATH; with ,wait behind it "
        "the guest waits for gdb",
    )


def gdb_spec(args: Namespace) -> GdbSpec | None:
    """Return where gdb connects to, if it is to."""
    if args.gdb is None:
        return None
    try:
        return parse(args.gdb)
    except ConfigError as error:
        raise CommandError(f"--gdb {error}") from None


def let_debug(machine: Machine, spec: GdbSpec, stack: contextlib.ExitStack) -> None:
    """Listen for gdb until *stack* ends, and say where."""
    try:
        server = stack.enter_context(GdbServer(machine, spec))
    except OSError as error:
        raise CommandError(f"--gdb: {spec.path or f'port {spec.port}'}: {error.strerror}", EXIT_ERROR) from None
    warn(f"gdb: target remote {server.target}{', which the guest waits for' if spec.wait else ''}")
