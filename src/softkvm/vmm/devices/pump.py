# SPDX-License-Identifier: Apache-2.0
"""What a guest sends byte by byte, handed on in pieces by a thread of its own."""

import threading
import time
from collections.abc import Callable
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.threads import start_quiet

_FLUSH_DELAY_S: Final = 0.004
_BACKLOG_LIMIT: Final = Size(
    "bytes that a guest's line has sent",
    1 << 20,
    None,
    giver="guest",
    effect="the vCPU waits",
    where=__name__,
).most


class Pump:
    """Collects bytes and hands them to *sink*, a few milliseconds after the first byte of a piece.

    A sink that blocks stops who puts bytes in only when a mebibyte waits. One that raises OSError gets no more.
    """

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self._buffer = bytearray()
        self._lock = threading.Lock()  # the buffer
        self._delivery = threading.Lock()  # the order of pieces at the sink
        self._wake = threading.Event()
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._broken = False
        self._thread: threading.Thread | None = None

    def put(self, value: int) -> None:
        """Add a byte."""
        with self._lock:
            buffer = self._buffer
            buffer.append(value)
            length = len(buffer)
            if 1 < length < _BACKLOG_LIMIT:
                return
            if self._closed:
                buffer.clear()
                return
            if length == 1:
                if self._thread is None:
                    self._thread = start_quiet(self._loop, "serial output")
                self._wake.set()
                return
            while len(self._buffer) >= _BACKLOG_LIMIT and not self._closed:
                self._room.wait()

    def flush(self) -> None:
        """Hand over what is there before returning."""
        with self._delivery:
            with self._lock:
                data, self._buffer = bytes(self._buffer), bytearray()
                self._room.notify_all()
            if data and not self._broken:
                try:
                    self._sink(data)
                except OSError:
                    self._broken = True  # the far end is gone: the line is open, the guest need not know

    def close(self) -> None:
        """Flush and end the thread; what comes from now on is dropped."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._room.notify_all()
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.flush()

    def _loop(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            if not self._closed:
                # Let a line gather.
                time.sleep(_FLUSH_DELAY_S)
            self.flush()
