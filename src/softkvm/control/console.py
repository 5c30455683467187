# SPDX-License-Identifier: Apache-2.0
"""A machine's console for any number of terminals that come and go."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.threads import start_quiet

TAIL: Final = Size(
    "bytes of a console's past that a terminal is shown", 64 << 10, None, giver="guest", effect="cut", where=__name__
)
_PENDING: Final = Size(
    "bytes of a console that a terminal has not taken", 1 << 20, None, giver="guest", effect="cut", where=__name__
)
_PIECE: Final = 4096
_LOOK_MS: Final = 50
_GRACE_S: Final = 1.0


class Line(Protocol):
    """Where a console's input goes: a serial port."""

    @property
    def pending_input(self) -> int:
        """Bytes that wait to be taken."""

    def feed(self, data: bytes) -> None:
        """Take *data*, without waiting."""


class ConsoleHub(Closing):
    """Gives what a guest says to everybody who is there, and them what was said before; takes what they type.

    Nobody holds the guest up: who does not read loses what is older than the last mebibyte.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tail = bytearray()
        self._terminals: tuple[_Terminal, ...] = ()
        self.line: Line | None = None

    @property
    def terminals(self) -> int:
        """How many are there."""
        return len(self._terminals)

    def output(self, data: bytes) -> None:
        """Take output of the guest."""
        with self._lock:
            self._tail += data
            del self._tail[: -TAIL.most]
            terminals = self._terminals
        for terminal in terminals:
            terminal.output(data)

    def attach(self, channel: socket.socket, end: Callable[[], object] = lambda: None, *, past: bool = True) -> None:
        """Serve the terminal at the other end of *channel* until it hangs up; *end* is called then."""
        with self._lock:
            terminal = _Terminal(self, channel, bytes(self._tail) if past else b"", end)
            self._terminals = (*self._terminals, terminal)
        terminal.start()

    def gone(self, terminal: _Terminal) -> None:
        """A terminal has hung up."""
        with self._lock:
            self._terminals = tuple(other for other in self._terminals if other is not terminal)

    def close(self) -> None:
        """Hang up, when what is on its way has been taken or after a second."""
        for terminal in self._terminals:
            terminal.close()


class _Terminal:
    """One that is there; a thread writes to it and reads from it."""

    def __init__(self, hub: ConsoleHub, channel: socket.socket, past: bytes, end: Callable[[], object]) -> None:
        self._hub = hub
        self._channel = channel
        self._channel.setblocking(False)
        self._end = end
        self._lock = threading.Lock()
        self._pending = bytearray(past)
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = start_quiet(self._serve, "softkvm-console")

    def output(self, data: bytes) -> None:
        """Have *data* written."""
        with self._lock:
            self._pending += data
            del self._pending[: -_PENDING.most]
        self._poke()

    def close(self) -> None:
        """Hang up."""
        self._closing = True
        self._poke()
        if self._thread is not None:
            self._thread.join(_GRACE_S)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        try:
            with contextlib.suppress(OSError):
                while self._turn():
                    pass
        finally:
            self._hub.gone(self)
            with contextlib.suppress(Exception):
                self._end()
            self._channel.close()
            os.close(self._wake)

    def _turn(self) -> bool:
        """Wait for something, and do it; False at the end."""
        with self._lock:
            piece = bytes(self._pending[: _PIECE * 16])
        if not piece and self._closing:
            return False
        line = self._hub.line
        takes = line is not None and line.pending_input < _PIECE
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._channel.fileno(), (select.POLLIN if takes else 0) | (select.POLLOUT if piece else 0))
        for fd, event in poll.poll(None if takes else _LOOK_MS):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            if event & select.POLLOUT:
                sent = self._channel.send(piece)
                with self._lock:
                    # what was cut off meanwhile was the oldest, which these bytes are
                    if self._pending.startswith(piece[:sent]):
                        del self._pending[:sent]
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                data = self._channel.recv(_PIECE)
                if not data:
                    return False
                if line is not None:
                    line.feed(data)
        return True
