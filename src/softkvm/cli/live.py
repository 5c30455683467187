# SPDX-License-Identifier: Apache-2.0
"""Which running machine a command means: ``PID|NAME``, or the only one there is."""

from __future__ import annotations

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import one_line, table
from softkvm.live.asker import Process, process, processes

RULE_WIDTH = 80
"""A command may be long; the rule above it need not."""


def choose(wanted: str | None) -> Process:
    """Return the process that *wanted* names; CommandError if there is none, or more than one."""
    if wanted is not None and wanted.isdecimal() and len(wanted) < 10:
        return process(int(wanted))
    found = [one for one in processes() if wanted in (None, one.name)]
    if len(found) == 1:
        return found[0]
    if not found:
        what = "no machine runs" if wanted is None else f"{wanted}: no machine of this name runs"
        raise CommandError(f"{what} (as this user, with SOFTKVM_LIVE unset)", EXIT_ERROR)
    names = ", ".join(f"{one.pid} ({one.name})" for one in found)
    raise CommandError(f"{wanted or 'which machine'}: expected one of these processes: {names}")


def listed(found: list[Process], width: int | None = None) -> list[str]:
    """Return a table of processes, its lines no longer than *width*."""
    rows = [[str(one.pid), one.name, one_line(one.command)] for one in found]
    lines = table(["PID", "NAME", "COMMAND"], rows, left=3)
    lines[1] = lines[1][:RULE_WIDTH]
    return [line[:width] for line in lines]
