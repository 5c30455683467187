# SPDX-License-Identifier: Apache-2.0
"""The trace that a recorder leaves, in the format that the file's name asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from softkvm.trace import chrome
from softkvm.trace.dat import TraceFile
from softkvm.trace.event import Event
from softkvm.trace.record import Recorder, assemble

JSON = ".json"


def save(recorder: Recorder, file: BinaryIO, name: str) -> None:
    """Write what was recorded, and stop that; see :func:`write`."""
    recorder.stop()
    write(file, name, recorder.spool, recorder.events, recorder.threads)


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
