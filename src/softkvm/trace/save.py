# SPDX-License-Identifier: Apache-2.0
"""The trace that a recorder leaves, in the format that the file's name asks for."""

from __future__ import annotations

import io
from typing import BinaryIO

from softkvm.trace import chrome
from softkvm.trace.dat import TraceFile
from softkvm.trace.record import Recorder

JSON = ".json"


def save(recorder: Recorder, file: BinaryIO, name: str) -> None:
    """Write what was recorded: Chrome's trace events if *name* ends in ``.json``, else a file of trace-cmd's."""
    recorder.stop()
    if not name.endswith(JSON):
        recorder.save(file)
        return
    whole = io.BytesIO()
    recorder.save(whole)
    trace = TraceFile.parse(whole.getvalue())
    for piece in chrome.convert(trace, trace.records()):
        file.write(piece.encode())
