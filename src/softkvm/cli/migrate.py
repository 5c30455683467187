# SPDX-License-Identifier: Apache-2.0
"""``softkvm migrate``: a running machine moves to another process, which waits for it with ``run --incoming``."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace
from typing import Any

from softkvm.cli import EXIT_ERROR, EXIT_OK, Command, CommandError
from softkvm.cli.arguments import seconds
from softkvm.cli.live import Running, connected, errors
from softkvm.cli.output import say, warn
from softkvm.progress import TerminalProgress

EPILOG = """\
The other process is there first, and waits: `softkvm run --incoming WHERE`. It gets memory while the guest runs, then
what the guest has changed meanwhile, again and again, and the rest while the guest stands. A guest that writes faster
than that is slowed down. Until the other process has all of it, and has said so, the machine is this one's: cancelling
(Ctrl-C, --cancel, a process that is killed) or any failure leaves it running here, as it was.

exit status: 0 when it has moved; 1 if it has not; 2 usage; 128 + n ended by signal n, and the machine stays

examples:
  softkvm run --incoming unix:/tmp/here
  softkvm migrate web unix:/tmp/here
"""

_CONNECT_S = 60.0
_WAIT_S = 3600.0


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", help="which machine")
    add("where", metavar="WHERE", nargs="?", help="where the other process waits: unix:PATH or tcp:127.0.0.1:PORT")
    add("--downtime", metavar="SECONDS", help="how long the guest may stand, about (default: 0.3)")
    add("--cancel", action="store_true", help="let a migration that is under way be")


def _run(args: Namespace) -> int:
    if args.cancel == (args.where is not None):
        raise CommandError("expected WHERE, or --cancel")
    more = {} if args.downtime is None else {"downtime_s": seconds("--downtime", args.downtime)}
    with connected(args.machine) as running:
        if args.cancel:
            running.ask("migrate_cancel")
            return EXIT_OK
        running.ask_long("migrate", _CONNECT_S, where=args.where, **more)
        return _follow(running)


def _follow(running: Running) -> int:
    """Show how it goes; return the exit status."""
    progress = TerminalProgress()
    begun = 0
    with contextlib.closing(progress):
        while True:
            with errors():
                event = running.asker.next(_WAIT_S)
            if event is None or event.get("event") != "migration":
                continue
            if event["state"] == "active":
                if not begun:
                    progress.step(f"{running.name}: memory")
                begun = max(begun, event["left"], 1)
                progress.fraction(max(0.0, 1 - event["left"] / begun))
                continue
            if event["state"] == "completed":
                progress.done()
                break
            raise CommandError(f"{running.name}: it stays here: {event['text']}", EXIT_ERROR)
    _say(running, event)
    return EXIT_OK


def _say(running: Running, event: dict[str, Any]) -> None:
    say(f"{running.name} has moved: {event['text']}")
    if event["percent"] < 100:
        warn(f"{running.name}: its vCPUs were slowed down to {event['percent']} % for it")


command = Command(_add_arguments, _run, "Move a running machine to another process.", EPILOG)
