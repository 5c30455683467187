# SPDX-License-Identifier: Apache-2.0
"""What comes of one connection goes to another, both ways, each until its end."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Final, Protocol

from softkvm.threads import start_quiet

_PIECE: Final = 1 << 16


class Stream(Protocol):
    """A connection: what of a socket is used."""

    def recv(self, size: int, /) -> bytes:
        """Receive up to *size* bytes, none at the end."""

    def sendall(self, data: bytes, /) -> Any:
        """Send all of *data*."""

    def shutdown(self, how: int, /) -> Any:
        """End a direction."""

    def close(self) -> Any:
        """End the connection."""


def bridge(one: Stream, other: Stream) -> None:
    """Begin to; both are closed when both directions have ended, or one of them has failed."""
    left = [2]
    lock = threading.Lock()

    def carry(source: Stream, target: Stream) -> None:
        try:
            while data := source.recv(_PIECE):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        with lock:
            left[0] -= 1
            last = not left[0]
        if last:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.close()

    start_quiet(carry, "bridge", one, other)
    start_quiet(carry, "bridge", other, one)
