# SPDX-License-Identifier: Apache-2.0
"""The host's half of a case: sockets that say what they expected."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from softkvm.vmm.vsock.api import Vsock
from softkvm.vmm.vsock.sockets import VsockListener, VsockSocket
from softkvm.vsocktest.control import CaseFailed, Control

STREAM: Final = int(socket.SOCK_STREAM)
SEQPACKET: Final = int(socket.SOCK_SEQPACKET)
DEFAULT_PORT: Final = 1234
BYTE: Final = b"A"
WAIT_S: Final = 60.0
"""How long anything may take: a guest on a busy host has all the time."""


def hash_djb2(data: bytes) -> int:
    """D. J. Bernstein's hash of *data*, of 64 bits, by which halves tell each other what they have seen."""
    value = 5381
    for byte in data:
        value = 33 * value + byte
        if value >> 256:  # now and then is quicker than each time
            value &= (1 << 64) - 1
    return value & (1 << 64) - 1


class Half:
    """What cases are made of."""

    def __init__(
        self, vsock: Vsock, control: Control, port: int = DEFAULT_PORT, *, read_after_close: bool = True
    ) -> None:
        self.vsock = vsock
        self.control = control
        self.port = port
        self.read_after_close = read_after_close
        """Whether a peer's transport keeps data behind its close."""
        self.random = random.Random()
        self._resources = contextlib.ExitStack()

    def close(self) -> None:
        """Close every socket of the case, as the end of a program does."""
        self._resources.close()

    # -- sockets

    def socket(self, kind: int = STREAM) -> VsockSocket:
        """Return a new socket."""
        channel = VsockSocket(self.vsock.hub, kind)
        channel.settimeout(WAIT_S)
        self._resources.callback(channel.close)
        return channel

    def connected(self, kind: int = STREAM) -> VsockSocket:
        """Connect when the guest listens."""
        self.control.expect("LISTENING")
        return self.connect(kind)

    def connect(self, kind: int = STREAM, local_port: int | None = None) -> VsockSocket:
        """Connect."""
        channel = self.socket(kind)
        with self.failing("connect"):
            channel.connect(self.port, local_port=local_port, timeout_s=WAIT_S)
        return channel

    def refused(self, kind: int = STREAM) -> VsockSocket:
        """Connect and be refused; return the socket."""
        channel = self.socket(kind)
        with self.error("connect", errno.ECONNRESET):
            channel.connect(self.port, timeout_s=WAIT_S)
        return channel

    def listening(self, kind: int = STREAM) -> VsockListener:
        """Listen."""
        listener = self.vsock.listen(self.port, kind)
        listener.settimeout(WAIT_S)
        self._resources.callback(listener.close)
        return listener

    def accept(self, listener: VsockListener) -> VsockSocket:
        """Take a connection."""
        with self.failing("accept"):
            channel, (cid, _) = listener.accept()
        channel.settimeout(WAIT_S)
        self._resources.callback(channel.close)
        self.expect("the peer's context ID", cid, self.vsock.cid)
        return channel

    def accepted(self, kind: int = STREAM) -> VsockSocket:
        """Listen, say so, and take the first connection."""
        with contextlib.closing(self.listening(kind)) as listener:
            self.control.put("LISTENING")
            return self.accept(listener)

    # -- expectations

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Let an OSError fail the case."""
        try:
            yield
        except OSError as error:
            raise CaseFailed(f"{what}: {error.strerror or error}") from None

    @contextlib.contextmanager
    def error(self, what: str, *codes: int) -> Iterator[None]:
        """Expect an OSError with one of these errnos."""
        expected = " or ".join(map(os.strerror, codes))
        try:
            yield
        except OSError as error:
            if error.errno not in codes:
                raise CaseFailed(f"{what}: {error.strerror or error}, expected {expected}") from None
            return
        raise CaseFailed(f"{what} succeeds, expected {expected}")

    def expect(self, what: str, found: object, expected: object) -> None:
        """Fail the case unless *found* is *expected*."""
        if found != expected:
            raise CaseFailed(f"{what} is {found!r:.80}, expected {expected!r:.80}")

    # -- data

    def send(self, channel: VsockSocket, data: bytes, flags: int = 0) -> None:
        """Send all of *data*."""
        with self.failing("send"):
            channel.sendall(data, flags)

    def send_byte(self, channel: VsockSocket) -> None:
        """Send the byte that all know."""
        self.send(channel, BYTE)

    def receive(self, channel: VsockSocket, size: int, flags: int = 0) -> bytes:
        """Receive *size* bytes, or one message."""
        wait = socket.MSG_WAITALL if channel.type == STREAM else 0
        with self.failing("recv"):
            data = channel.recv(size, flags | wait)
        self.expect("bytes received", len(data), size)
        return data

    def receive_byte(self, channel: VsockSocket) -> None:
        """Receive the byte that all know."""
        self.expect("the byte", self.receive(channel, 1), BYTE)

    def at_end(self, channel: VsockSocket) -> None:
        """Expect the end."""
        with self.failing("recv"):
            self.expect("what is received", channel.recv(1), b"")

    def would_block(self, channel: VsockSocket, size: int, flags: int = 0) -> None:
        """Expect nothing to be there."""
        with self.error("recv", errno.EAGAIN):
            channel.recv(size, flags | socket.MSG_DONTWAIT)

    def broken_pipe(self, channel: VsockSocket) -> None:
        """Expect that nothing can be sent, at once or soon: the peer's shutdown may be on its way."""
        end = time.monotonic() + WAIT_S
        with self.error("send", errno.EPIPE):
            while time.monotonic() < end:
                channel.send(BYTE)
                time.sleep(0.01)

    def wait_close(self, channel: VsockSocket) -> None:
        """Wait for the guest's close."""
        events = channel.poll(select.POLLRDHUP, WAIT_S)
        if not events & (select.POLLRDHUP | select.POLLHUP):
            raise CaseFailed(f"poll finds {events:#x}, expected the guest's close")

    def wait_sent(self, channel: VsockSocket) -> None:
        """Wait until the guest's device has taken everything."""
        self.wait_until(lambda: not channel.unsent(), "what was sent stays")

    def wait_until(self, condition: Callable[[], object], otherwise: str) -> None:
        """Wait for *condition*."""
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                raise CaseFailed(otherwise)
            time.sleep(0.001)

    def in_background(self, function: Callable[[], object]) -> Callable[[], None]:
        """Call *function* on a thread; return what waits for it and fails if it has."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def join() -> None:
            thread.join(WAIT_S)
            if thread.is_alive():
                raise CaseFailed("it hangs")
            if failures:
                raise failures[0]

        return join
