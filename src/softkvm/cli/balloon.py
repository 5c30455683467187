# SPDX-License-Identifier: Apache-2.0
"""``softkvm balloon``: how much memory a running machine has, and have it give some back."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from softkvm.cli import EXIT_OK, Command
from softkvm.cli.arguments import size
from softkvm.cli.live import connected
from softkvm.cli.output import say

EPILOG = """\
SIZE is what the balloon takes away from the guest: 128M, 1G, 0. The guest's driver gives it over little by little;
without SIZE the command says how far it is, and what the guest tells of its memory. With --reclaim the guest is asked
for all its free pages first, and has them again afterwards.

exit status: 0; 1 if there is no such machine, or it has no balloon; 2 usage: bad arguments; 128 + n ended by signal n
"""

_PATIENCE_S = 60.0


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", help="which machine")
    add("size", metavar="SIZE", nargs="?", help="what the balloon shall hold")
    add("--reclaim", action="store_true", help="ask the guest for all its free pages (--balloon hinting)")
    add("--json", action="store_true", help="print JSON")


def _run(args: Namespace) -> int:
    target = None if args.size is None else 0 if args.size == "0" else size("SIZE", args.size)
    with connected(args.machine) as running:
        answer = running.ask_long("balloon", _PATIENCE_S, target_bytes=target, reclaim=args.reclaim)["balloon"]
    if args.json:
        say(json.dumps(answer))
    else:
        width = max(map(len, answer), default=0)
        say("\n".join(f"{name.ljust(width)}  {value}" for name, value in answer.items()))
    return EXIT_OK


command = Command(_add_arguments, _run, "How much memory a machine has, and have it give some back.", EPILOG)
