# SPDX-License-Identifier: Apache-2.0
"""``softkvm stop``, ``pause``, ``resume``, ``reset``: what becomes of machines that run."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import seconds
from softkvm.cli.live import Running, all_machines, connected
from softkvm.cli.output import warn
from softkvm.live.asker import LiveError

STOP_S = 60.0
_PATIENCE_S = 10.0

EPILOG = """\
A machine is one of `softkvm run` of the same user: its name (softkvm run --name; `softkvm list` has all), or its
process; without either the only one that runs.

exit status: 0; 1 if there is no such machine, or it refuses; 2 usage: bad arguments; 128 + n ended by signal n
"""

STOP_EPILOG = f"""\
The power button is pressed, and the guest shuts down by itself if its operating system listens; when it has not within
--timeout, the machine is ended ({STOP_S:g} s by default; 0 leaves it alone then).

{EPILOG}"""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machines", metavar="NAME|PID", nargs="*", help="which (default: the only one)")
    add("-n", "--name", metavar="NAME", action="append", default=[], help="the same, as kvmtool has it")
    add("-a", "--all", action="store_true", help="all of this user's")


def _add_stop_arguments(parser: ArgumentParser) -> None:
    _add_arguments(parser)
    parser.add_argument("-f", "--force", action="store_true", help="end it at once")
    parser.add_argument("--timeout", metavar="SECONDS", help="how long the guest may take to shut down")


def _each(args: Namespace, act: Callable[[Running], object]) -> int:
    """Do *act* to every machine that is meant; the first error is told when all others are done."""
    wanted: list[str | None] = [*args.machines, *args.name]
    if args.all:
        if wanted:
            raise CommandError("--all and the names of machines exclude each other")
        wanted = list(all_machines())
        if not wanted:
            raise CommandError("no machine runs", EXIT_ERROR)
    problems = []
    for one in wanted or [None]:
        try:
            with connected(one) as running:
                act(running)
        except CommandError as error:
            problems.append(error)
    for problem in problems[1:]:
        warn(str(problem))
    if problems:
        raise problems[0]
    return EXIT_OK


def _pause(args: Namespace) -> int:
    return _each(args, lambda running: running.ask_long("pause", _PATIENCE_S, timeout_s=_PATIENCE_S))


def _resume(args: Namespace) -> int:
    return _each(args, lambda running: running.ask_long("resume", _PATIENCE_S))


def _reset(args: Namespace) -> int:
    return _each(args, lambda running: running.ask("reset"))


def _stop(args: Namespace) -> int:
    if args.force and args.timeout is not None:
        raise CommandError("--force does not wait: --timeout is there, too")
    timeout_s = STOP_S if args.timeout is None else seconds("--timeout", args.timeout, zero=True)
    return _each(args, lambda running: stop_one(running, timeout_s, force=args.force, leave=timeout_s == 0))


def stop_one(running: Running, timeout_s: float, *, force: bool = False, leave: bool = False) -> None:
    """Shut one machine down and wait for its end; end it if that takes longer, or at once with *force*."""
    running.ask("events")
    if not force:
        running.ask("power_button")
        if leave or _ended(running, timeout_s):
            return
        warn(f"{running.name}: the guest has not shut down within {timeout_s:g} s: it is ended")
    running.ask("end")
    if not _ended(running, _PATIENCE_S):
        raise CommandError(f"{running.name}: it does not end", EXIT_ERROR)


def _ended(running: Running, timeout_s: float) -> bool:
    """Wait for the end."""
    deadline = time.monotonic() + timeout_s
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            event = running.asker.next(left_s)
            if event is not None and event.get("event") == "ended":
                return True
    except LiveError:  # with its process
        return True
    return False


stop = Command(_add_stop_arguments, _stop, "Shut a machine down, or end it.", STOP_EPILOG)
pause = Command(_add_arguments, _pause, "Let a machine stand until `softkvm resume`.", EPILOG)
resume = Command(_add_arguments, _resume, "Let a paused machine go on.", EPILOG)
reset = Command(_add_arguments, _reset, "Begin a machine anew, as its reset button does.", EPILOG)
