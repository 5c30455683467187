# SPDX-License-Identifier: Apache-2.0
"""A trace as text, in the manner of ``trace-cmd report``: a line for each event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from softkvm.trace.dat import Record, TraceFile

_NAME_WIDTH: Final = 21


def line(trace: TraceFile, record: Record) -> str:
    """Return the line of one record: thread, "processor", time in seconds, event, and what its print format says."""
    if record.event is None:
        (count,) = record.values
        return f"CPU:{record.cpu} [{f'{count} ' if count >= 0 else ''}EVENTS DROPPED]"
    name = trace.threads.get(record.pid, "<...>")
    seconds, us = divmod((record.time_ns + 500) // 1000, 1_000_000)
    event = f"{record.event.name}:".ljust(_NAME_WIDTH)
    text = record.event.printer(record.values)
    return f"{name:>16}-{record.pid:<5} [{record.cpu:03}] {seconds:5}.{us:06}: {event} {text}"


def report(trace: TraceFile, records: Iterable[Record]) -> Iterator[str]:
    """Yield the lines of a trace."""
    yield f"cpus={trace.cpus}"
    for record in records:
        yield line(trace, record)
