# SPDX-License-Identifier: Apache-2.0
"""``softkvm list``: the machines that run."""

from __future__ import annotations

import contextlib
import json
from argparse import ArgumentParser, Namespace
from typing import Any

from softkvm.cli import EXIT_OK, Command
from softkvm.cli.output import one_line, say, table
from softkvm.live.asker import Asker, LiveError, processes

EPILOG = """\
Machines of this user: those of `softkvm run`, by their names, and those of clients under `softkvm exec`, which their
programs control (state "client").

states: not started, running, paused, asleep (S3), ended, client

exit status: 0, also when there is none; 2 usage: bad arguments; 128 + n ended by signal n
"""

CLIENT = "client"
"""The state of a machine that its program controls."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def machines() -> list[dict[str, Any]]:
    """Return what every machine says of itself."""
    found = []
    for one in processes():
        with contextlib.suppress(LiveError), Asker(one.pid) as asker:
            about = asker.ask("machines")["machines"] or [
                {
                    "name": one.name,
                    "state": CLIENT,
                    "vcpus": len(machine["vcpus"]),
                    "memory_bytes": machine["memory_bytes"],
                    "uptime_s": None,
                }
                for machine in asker.ask("stats")["machines"]
            ]
            found += [{**machine, "pid": one.pid, "program": one.name, "command": one.command} for machine in about]
    return found


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _run(args: Namespace) -> int:
    found = machines()
    if args.json:
        say(json.dumps(found))
        return EXIT_OK
    rows = [
        [
            one_line(one["name"]),
            one["state"],
            str(one["pid"]),
            str(one["vcpus"]),
            f"{one['memory_bytes'] >> 20}M",
            _time(one["uptime_s"]),
        ]
        for one in found
    ]
    say("\n".join(table(["NAME", "STATE", "PID", "VCPUS", "MEMORY", "UP"], rows)))
    return EXIT_OK


command = Command(_add_arguments, _run, "The machines that run.", EPILOG)
