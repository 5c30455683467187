# SPDX-License-Identifier: Apache-2.0
"""The trace that a recorder leaves, in the format that the file's name asks for."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from softkvm.trace import chrome
from softkvm.trace.dat import TraceFile
from softkvm.trace.event import Event
from softkvm.trace.record import Recorder, assemble

JSON = ".json"
#: What opens Chrome's trace events.
VIEWER = "https://ui.perfetto.dev"


def save(recorder: Recorder, file: BinaryIO, name: str) -> None:
    """Write what was recorded, and stop that; see :func:`write`."""
    recorder.stop()
    write(file, name, recorder.spool, recorder.events, recorder.threads)


def told(name: str, count: int, lost: int, *, replaced: bool = False) -> str:
    """Return what people want to know of a trace that has been written: what is in it, and how it is opened."""
    losses = f"{lost:,} lost (they came faster than they could be written)" if lost else "none lost"
    what = f"{count:,} event{'s' if count != 1 else ''}, {losses}" if count or lost else "no events"
    how = f"{VIEWER} opens it" if name.endswith(JSON) else f"`softkvm trace report {shlex.quote(name)}` prints it"
    return f"{name}: {what}{', in place of an older file' if replaced else ''}; {how}"


def write(file: BinaryIO, name: str, spool: BinaryIO, events: Sequence[Event], threads: Mapping[int, str]) -> None:
    """Write what a spool has: Chrome's trace events if *name* ends in ``.json``, else a file of trace-cmd's."""
    if not name.endswith(JSON):
        assemble(file, spool, events, threads)
        return
    with tempfile.NamedTemporaryFile("w+b") as whole:
        assemble(whole.file, spool, events, threads)
        whole.flush()
        trace = TraceFile.open(whole.name)
        for piece in chrome.convert(trace, trace.records()):
            file.write(piece.encode())
