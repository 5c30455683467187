# SPDX-License-Identifier: Apache-2.0
"""The control connection: lines between the halves, which wait for each other before, after and within a case."""

from __future__ import annotations

from typing import Final, Protocol

LINE_MAX: Final = 512


class CaseFailed(Exception):
    """A case has failed on the host's side; the text says how."""


class ControlLost(Exception):
    """The guest's half has gone: its case has failed, or it is at its end."""


class Channel(Protocol):
    """What the lines go over: a socket."""

    def recv(self, size: int, flags: int = 0, /) -> bytes: ...
    def sendall(self, data: bytes, flags: int = 0, /) -> object: ...
    def close(self) -> None: ...


class Control:
    """Lines to the guest's half."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._received = bytearray()

    def put(self, line: str | int) -> None:
        """Send a line; ControlLost if nobody is there."""
        try:
            self._channel.sendall(f"{line}\n".encode())
        except OSError as error:
            raise ControlLost(f"the guest's half is gone: {error.strerror or error}") from None

    def get(self) -> str:
        """Return the next line; ControlLost at the end or if none comes in time."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > LINE_MAX:
                raise ControlLost("a control line without an end")
            try:
                more = self._channel.recv(4096)
            except TimeoutError:
                raise ControlLost("the guest's half says nothing") from None
            except OSError as error:
                raise ControlLost(f"the guest's half is gone: {error.strerror or error}") from None
            if not more:
                raise ControlLost("the guest's half is gone")
            self._received += more
        line = self._received[:end].decode("utf-8", "replace")
        del self._received[: end + 1]
        return line

    def expect(self, line: str) -> None:
        """Wait for *line*; CaseFailed for another."""
        found = self.get()
        if found != line:
            raise CaseFailed(f'the guest says "{found}", expected "{line}"')

    def number(self) -> int:
        """Wait for a number."""
        found = self.get()
        if not found.isdecimal():
            raise CaseFailed(f'the guest says "{found}", expected a number')
        return int(found)

    def close(self) -> None:
        """End it."""
        self._channel.close()
