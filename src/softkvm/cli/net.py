# SPDX-License-Identifier: Apache-2.0
"""``softkvm net``: the networks of a running machine, and their cables."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from softkvm.cli import EXIT_OK, Command
from softkvm.cli.live import connected
from softkvm.cli.output import say

EPILOG = """\
Says of each device, or of DEVICE, where its forwarded ports are (those that were free ones, too), which connections
there are and what was counted. --link pulls the cable out of a device, or plugs it in again.

exit status: 0; 1 if there is no such machine or device; 2 usage: bad arguments; 128 + n ended by signal n
"""

_PATIENCE_S = 10.0


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="NAME|PID", help="which machine")
    add("device", metavar="DEVICE", nargs="?", help="which device: net0, or what its id= says")
    add("--link", choices=("up", "down"), help="the cable of DEVICE")
    add("--json", action="store_true", help="print JSON")


def lines(device: dict[str, Any]) -> Iterator[str]:
    """Yield what is to be read of a device."""
    net = device["net"]
    where = net.get("network", net.get("name"))
    yield f"{device['name']}  {device['mac']}  link {device['link']}  {net['kind']} {where}"
    for forward in net.get("forwards", ()):
        yield f"  {forward['protocol']} {forward['host']} -> guest's port {forward['guest_port']}"
    for connection in net.get("connections", ()):
        yield f"  {connection['guest']} - {connection['peer']}  {connection['state']}"
    counters = device["counters"] | net["counters"]
    if counters:
        yield "  " + ", ".join(f"{name} {value}" for name, value in sorted(counters.items()))


def _run(args: Namespace) -> int:
    with connected(args.machine) as running:
        devices = running.ask_long("net", _PATIENCE_S, device=args.device, link=args.link)["net"]
    if args.json:
        say(json.dumps(devices))
    else:
        say("\n".join(line for device in devices for line in lines(device)))
    return EXIT_OK


command = Command(_add_arguments, _run, "The networks of a running machine, and their cables.", EPILOG)
