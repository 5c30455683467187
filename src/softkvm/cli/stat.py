# SPDX-License-Identifier: Apache-2.0
"""``softkvm stat``: live counters of a running machine, as kvm_stat shows them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

from softkvm.cli import EXIT_OK, Command, CommandError
from softkvm.cli.arguments import count, seconds
from softkvm.cli.live import choose, listed
from softkvm.cli.output import say, table
from softkvm.live.asker import Asker, LiveError, Process, processes

EPILOG = """\
The machine is one of `softkvm run`, or of a client under `softkvm exec`, of the same user: its process, or the name of
its program; without either the only one there is. `exit_…` are exits by reason, of which `exits` is the sum.

exit status: 0, when the machine has ended, too; 1 if there is no such machine; 2 usage; 128 + n ended by signal n

examples:
  softkvm stat
  softkvm stat qemu-system-x86 --interval 0.5 --vcpu 1
  softkvm stat 4711 --once --json
"""

MAX_VCPU = 4095
#: Times and states, which are no counts of events.
_NO_EVENTS = ("_ns", "blocking")
_CLEAR = "\x1b[H\x1b[J"


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("machine", metavar="PID|NAME", nargs="?", help="which machine (default: the only one)")
    add("--list", action="store_true", help="print the machines that run")
    add("--once", action="store_true", help="print the counters once")
    add("--json", action="store_true", help="print JSON, a line each time")
    add("--interval", metavar="SECONDS", default="1", help="how often (default: 1)")
    add("--vcpu", metavar="N", help="of one vCPU (default: the sum of all)")


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at a moment."""

    time_s: float
    counters: dict[str, int]
    vcpus: list[dict[str, Any]]
    answer: dict[str, Any]


def sample(asker: Asker, vcpu: int | None = None) -> Sample:
    """Ask for the counters; CommandError if the machine has no such vCPU."""
    answer = asker.ask("stats")
    counters: dict[str, int] = {}
    vcpus = []
    for machine in answer["machines"]:
        for one in machine["vcpus"]:
            if vcpu is None or one["id"] == vcpu:
                vcpus.append(one)
                for name, value in one["stats"].items():
                    counters[name] = counters.get(name, 0) + value
    if vcpu is not None and not vcpus:
        raise CommandError(f"--vcpu {vcpu}: the machine has no such vCPU")
    if vcpu is None:
        for machine in answer["machines"]:
            for name, value in machine["stats"].items():
                counters[name] = counters.get(name, 0) + value
    return Sample(time.monotonic(), counters, vcpus, answer)


def rows(now: Sample, before: Sample | None) -> list[list[str]]:
    """Return the table's rows: what has come most often since *before* first."""
    passed = now.time_s - before.time_s if before is not None else 0.0
    exits = max(now.counters.get("exits", 0), 1)
    lines = []
    for name, value in now.counters.items():
        if not value or name.endswith(_NO_EVENTS):
            continue
        rate = (value - before.counters.get(name, 0)) / passed if before is not None and passed else 0.0
        share = f"{100 * value / exits:.1f}" if name.startswith("exit_") else ""
        lines.append((name.startswith("exit_"), rate, value, name, share))
    lines.sort(key=lambda line: (line[0], -line[1], -line[2], line[3]))
    return [
        [name, f"{value:,}", share, f"{rate:,.0f}" if before is not None else ""]
        for _, rate, value, name, share in lines
    ]


def _title(process: Process, now: Sample) -> str:
    states = " ".join(f"{one['id']}:{one['state']}" for one in now.vcpus)
    return f"{process.name} {process.pid}: vCPUs {states or 'none'}"


def _show(process: Process, now: Sample, before: Sample | None, height: int | None) -> str:
    header = ["Event", "Total", "%Exits", "CurAvg/s"]
    found = rows(now, before)
    lines = [_title(process, now), "", *table(header, found, left=1)]
    if height is not None and len(lines) > height - 1:
        shown = max(height - 2, 0)
        left = len(lines) - shown
        lines = [*lines[:shown], f"({left} more rows: a taller terminal shows them, or `softkvm stat --once`)"]
    return "\n".join(lines)


def _run(args: Namespace) -> int:
    interval_s = seconds("--interval", args.interval)
    vcpu = None if args.vcpu is None else count("--vcpu", args.vcpu, 0, MAX_VCPU)
    if args.list:
        found = processes()
        if args.json:
            say(json.dumps([{"pid": one.pid, "name": one.name, "command": one.command} for one in found]))
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            say("\n".join(listed(found, width)))
        return EXIT_OK
    process = choose(args.machine)
    try:
        with Asker(process.pid) as asker:
            return _watch(process, asker, args, interval_s, vcpu)
    except LiveError as error:
        raise CommandError(str(error), 1) from None


def _watch(process: Process, asker: Asker, args: Namespace, interval_s: float, vcpu: int | None) -> int:
    before = None
    now = sample(asker, vcpu)
    terminal = sys.stdout.isatty() and not args.json and not args.once
    while True:
        if args.json:
            say(json.dumps({"pid": process.pid, "name": process.name, "counters": now.counters, **now.answer}))
        elif terminal:
            height = shutil.get_terminal_size().lines
            say(_CLEAR + _show(process, now, before, height))
        else:
            say(_show(process, now, before, None) + ("" if args.once else "\n"))
        if args.once:
            return EXIT_OK
        time.sleep(interval_s)
        before = now
        try:
            now = sample(asker, vcpu)
        except LiveError:  # it was there before: it has ended
            return EXIT_OK


command = Command(_add_arguments, _run, "Live counters of a running machine, as kvm_stat shows them.", EPILOG)
