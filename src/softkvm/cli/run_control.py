# SPDX-License-Identifier: Apache-2.0
"""``softkvm run``: how the machine is called, who may control it, and running without a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import say
from softkvm.control.machine import MachineControl, NotControlled
from softkvm.control.qmp import QmpServer
from softkvm.live import names
from softkvm.live.place import directory

if TYPE_CHECKING:
    from softkvm.control.console import ConsoleHub
    from softkvm.vmm.machine import Machine

_STARTED: Final = b"\0"
_WHAT_IS_SAID: Final = 1 << 16

_started: list[tuple[int, str]] = []
"""In a process that runs detached: where to say that the machine has started, and the name of its log."""


def add_control_arguments(parser: ArgumentParser) -> None:
    """Add them."""
    add = parser.add_argument
    add("--name", metavar="NAME", help="what the machine is called in `softkvm list`, `stop` … (default: guest-PID)")
    add("--qmp", metavar="unix:PATH", help="serve QEMU's monitor protocol at a UNIX socket (docs/control.md)")
    add(
        "--detach",
        action="store_true",
        help="run in the background, print the name once the machine runs; `softkvm console` leads to its console",
    )


def _qmp_path(text: str) -> str:
    """Return the path of ``unix:PATH[,server=on][,wait=off]``, as QEMU has it."""
    where, *options = text.split(",")
    kind, _, path = where.partition(":")
    wrong = [option for option in options if option not in ("server", "server=on", "wait=off", "nowait")]
    if kind != "unix" or not path or "\0" in path or wrong:
        raise CommandError(f"--qmp {text}: expected unix:PATH, with server=on and wait=off if anything")
    return path


def checked_name(args: Namespace) -> str | None:
    """Return the name that was given; CommandError if no machine can have it."""
    try:
        return None if args.name is None else names.check_name(args.name)
    except names.NameRefused as error:
        raise CommandError(f"--name {error}") from None


def control(
    machine: Machine, args: Namespace, hub: ConsoleHub, stack: contextlib.ExitStack, extra: Mapping[str, Any]
) -> None:
    """Let the machine be controlled until *stack* ends, and say that it starts if nobody looks; CommandError.

    *extra* goes with it into another process.
    """
    stack.enter_context(hub)
    try:
        controlled = stack.enter_context(MachineControl(machine, checked_name(args), hub, extra))
    except NotControlled as error:
        raise CommandError(f"--name {error}") from None
    if args.qmp is not None:
        path = _qmp_path(args.qmp)
        try:
            stack.enter_context(QmpServer(machine, path, controlled.name))
        except OSError as error:
            raise CommandError(f"--qmp {args.qmp}: {error.strerror or error}") from None
    if _started:
        fd, log = _started.pop()
        _let_go(fd, controlled.name, log, stack)


def detached(args: Namespace) -> bool:
    """Go on in another process, without a terminal: True there, False in this one once the machine runs.

    CommandError, with the other's status, if it does not come to that.
    """
    checked_name(args)
    where = directory(make=True)
    if where is None:
        raise CommandError("--detach: there is no directory for sockets that is this user's alone", EXIT_ERROR)
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        _wait_for(child, reader)
        return False
    os.close(reader)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(writer, 2)  # what is wrong before the start the user sees
    os.close(null)
    _started.append((writer, str(where / f"{args.name or names.default_name(os.getpid())}.log")))
    return True


def _wait_for(child: int, reader: int) -> None:
    said = bytearray()
    with open(reader, "rb", buffering=0) as pipe:
        while (data := pipe.read(4096)) and len(said) < _WHAT_IS_SAID:
            said += data
            if _STARTED in said:
                break
    text, started, name = bytes(said).partition(_STARTED)
    if text:
        with contextlib.suppress(OSError):
            os.write(2, text)
    if started:
        say(name.decode().strip())
        return
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    raise CommandError("", status if status > 0 else 128 - status)


def _let_go(fd: int, name: str, log: str, stack: contextlib.ExitStack) -> None:
    """Say that the machine starts; what is said from now on goes into a log, which is there if there is anything."""
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    stack.callback(_remove_if_empty, Path(log))
    os.dup2(file, 2)
    os.close(file)
    os.write(fd, _STARTED + name.encode() + b"\n")
    os.close(fd)


def _remove_if_empty(log: Path) -> None:
    with contextlib.suppress(OSError):
        if not log.stat().st_size:
            log.unlink()
