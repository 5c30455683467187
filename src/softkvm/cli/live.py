# SPDX-License-Identifier: Apache-2.0
"""Which running machine a command means: ``PID|NAME``, or the only one there is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import one_line, table
from softkvm.live import names
from softkvm.live.asker import Asker, LiveError, Process, process, processes

RULE_WIDTH = 80
"""A command may be long; the rule above it need not."""
SHOWN = 64
"""Characters of a name in a message."""


def choose(wanted: str | None) -> Process:
    """Return the process that *wanted* names: by its number, its machine's name or its program's.

    CommandError if there is none, or more than one.
    """
    if wanted is not None and wanted.isdecimal() and len(wanted) < 10:
        return process(int(wanted))
    if wanted is not None and (pid := names.process_of(wanted)) is not None:
        return process(pid)
    found = [one for one in processes() if wanted in (None, one.name)]
    if len(found) == 1:
        return found[0]
    shown = wanted if wanted is None or len(wanted) <= SHOWN else f"{wanted[:SHOWN]}…"
    if not found:
        what = "no machine runs" if wanted is None else f"{shown}: no machine of this name runs"
        raise CommandError(f"{what} (as this user, with SOFTKVM_LIVE unset)", EXIT_ERROR)
    several = ", ".join(f"{one.pid} ({one.name})" for one in found)
    raise CommandError(f"{shown or 'which machine'}: expected one of these processes: {several}")


def listed(found: list[Process], width: int | None = None) -> list[str]:
    """Return a table of processes, its lines no longer than *width*."""
    rows = [[str(one.pid), one.name, one_line(one.command)] for one in found]
    lines = table(["PID", "NAME", "COMMAND"], rows, left=3)
    lines[1] = lines[1][:RULE_WIDTH]
    return [line[:width] for line in lines]


@dataclass(frozen=True, slots=True)
class Running:
    """A machine under control: a connection to its process, and what its process says of it."""

    asker: Asker
    process: Process
    name: str

    def ask(self, what: str, descriptor: int | None = None, **more: Any) -> dict[str, Any]:
        """Ask it; CommandError for a refusal, or no answer."""
        with errors():
            return self.asker.ask(what, descriptor, machine=self.name, **more)

    def ask_long(self, what: str, wait_s: float, **more: Any) -> dict[str, Any]:
        """Ask for what takes up to *wait_s*."""
        with errors():
            return self.asker.ask_long(what, wait_s, machine=self.name, **more)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Say in one line what a machine has refused."""
    try:
        yield
    except LiveError as error:
        raise CommandError(str(error), EXIT_ERROR) from None


@contextlib.contextmanager
def connected(wanted: str | None) -> Iterator[Running]:
    """Return the machine that *wanted* names, or the only one that runs; CommandError if nobody may control it."""
    chosen = choose(wanted)
    with errors():
        asker = Asker(chosen.pid)
    with asker:
        with errors():
            machines = [machine["name"] for machine in asker.ask("machines")["machines"]]
        found = [name for name in machines if wanted == name] or machines
        if not found:
            raise CommandError(
                f"process {chosen.pid} ({chosen.name}): a client's machine, which its program controls", EXIT_ERROR
            )
        if len(found) > 1:
            raise CommandError(f"process {chosen.pid} has several machines: expected one of {', '.join(found)}")
        yield Running(asker, chosen, found[0])


def all_machines() -> list[str]:
    """Return the names of all machines that can be told what to do."""
    found = []
    for one in processes():
        with contextlib.suppress(LiveError), Asker(one.pid) as asker:
            found += [machine["name"] for machine in asker.ask("machines")["machines"]]
    return found
