# SPDX-License-Identifier: Apache-2.0
"""The host's side as UNIX sockets, by Firecracker's convention (``docs/vsock.md`` there), so that its clients work.

- A program of the host's connects to the socket at PATH, writes ``CONNECT <port>\\n`` and reads ``OK <host's port>\\n``
  when the guest has accepted, or the end of the file when it has not.
- What the guest connects to port N of the host goes to the UNIX socket PATH_N, if a program listens there.

Both are streams. For seqpacket connections it is the same with SOCK_SEQPACKET sockets, where a message is one message,
and the socket for the host's programs is PATH_seqpacket. All runs on the device's worker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import stat
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.vsock.connection import Connection, State
from softkvm.vmm.vsock.hub import CONNECT_TIMEOUT_S, Hub
from softkvm.vmm.vsock.packet import (
    TYPES,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
)

if TYPE_CHECKING:
    from softkvm.vmm.virtio.worker import Timer, Worker

_UNIX_PATH_MAX: Final = 107
"""Bytes of a path in ``struct sockaddr_un`` without its NUL."""
_LONGEST_SUFFIX: Final = len("_4294967295")
PATH: Final = Size(
    "bytes of the path of a vsock device's UNIX socket",
    _UNIX_PATH_MAX - _LONGEST_SUFFIX,
    ConfigError,
    least=1,
    giver="client",
    effect="ConfigError",
    where=__name__,
)
LINE: Final = Size("bytes of a CONNECT line", 32, None, giver="client", effect="closed", where=__name__)
HANDSHAKES: Final = Size(
    "UNIX clients that have not said CONNECT", 128, None, giver="client", effect="closed", where=__name__
)
HANDSHAKE_S: Final = 5.0
"""How long a program may take to write its line."""

_CONNECT: Final = re.compile(rb"CONNECT (\d{1,10})\r?\n", re.IGNORECASE)
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_READ_SIZE: Final = 64 << 10
_MESSAGE_SIZE: Final = 256 << 10


def check_path(path: str) -> None:
    """Look whether UNIX sockets can be named after *path*, PATH_4294967295 too; ConfigError if not."""
    PATH.check(len(os.fsencode(path)), called="bytes of the vsock path")
    if "\0" in path:
        raise ConfigError("vsock path: expected no NUL character")


class Bridge:
    """Carries data between a connection and a UNIX socket, both ways, with each one's half-close and end."""

    def __init__(self, hub: Hub, worker: Worker, channel: socket.socket, bridges: set[Bridge]) -> None:
        channel.setblocking(False)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_SIZE)  # a message has to fit whole
        self._hub = hub
        self._bridges = bridges  # all that there are
        self._worker = worker
        self._channel = channel
        self._connection: Connection | None = None
        self._events = 0  # what the worker waits for
        self._asked = False
        self._greeting = b""
        self._greet = False
        self._host_ended = False  # the program has shut its side down for writing
        self._guest_ended = False  # and we have ours, after the guest

    def adopt(self, connection: Connection, *, greet: bool = False) -> None:
        """Begin with *connection*; *greet* the program when it is established."""
        self._connection = connection
        self._bridges.add(self)
        self._greet = greet
        connection.owner = self
        self.changed()

    def changed(self) -> None:
        """The hub's: something has changed, on whatever thread."""
        if not self._asked:
            self._asked = True
            self._worker.call(self._look)

    def _look(self) -> None:
        self._asked = False
        self._pump(0)

    def _pump(self, events: int) -> None:
        """Move what can be moved."""
        connection = self._connection
        if connection is None:
            return
        with self._hub.lock:
            try:
                self._move(connection, events)
            except OSError:  # the program is gone
                connection.abort()
                self.close()
                return
            if self._connection is None:
                return
            self._wait(connection)

    def _move(self, connection: Connection, events: int) -> None:
        if connection.state is State.CONNECTING:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                raise ConnectionResetError
            return
        if self._greet:
            self._greet = False
            if connection.state is State.ESTABLISHED:
                self._greeting = b"OK %d\n" % connection.local_port
        self._to_host(connection)
        self._to_guest(connection, events)
        if connection.state is State.CLOSED and not connection.readable and not self._greeting:
            self.close()

    def _to_host(self, connection: Connection) -> None:
        try:
            while self._greeting:
                self._greeting = self._greeting[self._channel.send(self._greeting) :]
            while connection.readable:
                data, _, _ = connection.peek(_READ_SIZE if not connection.messages else 1 << 32)
                connection.consume(self._channel.send(data))
        except BlockingIOError:
            return
        if connection.at_end and not self._guest_ended:
            self._guest_ended = True
            self._channel.shutdown(socket.SHUT_WR)

    def _to_guest(self, connection: Connection, events: int) -> None:
        while not self._host_ended and self._room(connection):
            size = _MESSAGE_SIZE if connection.messages else min(connection.writable, _READ_SIZE)
            try:
                data, _, flags, _ = self._channel.recvmsg(size)
            except BlockingIOError:
                return
            if flags & socket.MSG_TRUNC or (connection.messages and len(data) > connection.peer_buf_alloc):
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            if not data and (not connection.messages or self._is_over(select.POLLRDHUP)):  # else an empty message
                self._host_ended = True
                if events & select.EPOLLHUP or self._is_over(select.POLLHUP):
                    self._hub_close(connection)
                else:
                    connection.shutdown(VIRTIO_VSOCK_SHUTDOWN_F_SEND)
                return
            connection.send(data)

    def _is_over(self, event: int) -> bool:
        """Whether the program has closed its socket (POLLHUP), or at least shut it down for writing (POLLRDHUP)."""
        poll = select.poll()
        poll.register(self._channel, event)
        return any(found & event for _, found in poll.poll(0))

    def _hub_close(self, connection: Connection) -> None:
        """The program reads no more: what it has written still goes out."""
        self._detach()
        connection.close()

    @staticmethod
    def _room(connection: Connection) -> bool:
        """Whether the guest can be sent something: a whole message, or any bytes."""
        if connection.peer_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            return False
        return connection.writable > 0 if not connection.messages else not connection.tx and connection.writable > 0

    def _wait(self, connection: Connection) -> None:
        """Have the worker wait for what is of use now; for nothing, not even a hang-up, where nothing can be done."""
        events = 0
        if connection.state is State.CONNECTING or (not self._host_ended and self._room(connection)):
            events |= _READ if connection.state is not State.CONNECTING else select.EPOLLHUP
        if connection.readable or self._greeting:
            events |= _WRITE
        if events == self._events:
            return
        if not self._events:
            self._worker.add(self._channel, events, self._pump)
        elif events:
            self._worker.modify(self._channel, events)
        else:
            self._worker.remove(self._channel)
        self._events = events

    def _detach(self) -> None:
        if self._events:
            self._worker.remove(self._channel)
            self._events = 0
        self._channel.close()
        self._connection = None
        self._bridges.discard(self)

    def close(self) -> None:
        """Close both ends."""
        connection = self._connection
        if connection is not None:
            self._detach()
            with self._hub.lock:
                connection.close()


class UnixSockets(Closing):
    """The UNIX sockets of a device, around *path*. ConfigError if that is too long, or is something else's."""

    def __init__(self, hub: Hub, worker: Worker, path: str) -> None:
        check_path(path)
        self._hub = hub
        self._worker = worker
        self.path = path
        self._listeners: dict[str, socket.socket] = {}
        self._handshakes: dict[socket.socket, Timer] = {}
        self._bridges: set[Bridge] = set()
        try:
            self._listen(path, socket.SOCK_STREAM)
            self._listen(f"{path}_seqpacket", socket.SOCK_SEQPACKET)
        except BaseException:
            self.close()
            raise
        hub.fallback = self.find

    # -- programs of the host's that connect

    def _listen(self, path: str, kind: socket.SocketKind) -> None:
        listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            _take_away_stale(path, kind)
            listener.bind(path)
            os.chmod(path, 0o600)  # before anybody can connect
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise ConfigError(f"vsock path {path}: {error.strerror or error}") from None
        except BaseException:
            listener.close()
            raise
        self._listeners[path] = listener
        self._worker.add(listener, _READ, lambda events: self._accept(listener, kind))

    def _accept(self, listener: socket.socket, kind: int) -> None:
        try:
            channel, _ = listener.accept()
        except OSError:
            return
        if not HANDSHAKES.allows(len(self._handshakes) + 1):
            channel.close()
            return
        channel.setblocking(False)
        self._handshakes[channel] = self._worker.call_later(HANDSHAKE_S, self._give_up, channel)
        self._worker.add(channel, _READ, lambda events: self._handshake(channel, kind))

    def _give_up(self, channel: socket.socket) -> None:
        timer = self._handshakes.pop(channel, None)
        if timer is not None:
            timer.cancel()
            self._worker.remove(channel)
            channel.close()

    def _handshake(self, channel: socket.socket, kind: int) -> None:
        """Look at the line as far as it has come, and take it when it is whole."""
        try:
            seen = channel.recv(LINE.most, socket.MSG_PEEK)
            line, newline, _ = seen.partition(b"\n")
            if not newline and kind == socket.SOCK_STREAM and 0 < len(seen) < LINE.most:
                # A level-triggered wait would come back at once for the bytes that are there: ask again a bit later.
                self._worker.remove(channel)
                self._worker.call_later(0.005, self._look_again, channel, kind)
                return
            match = _CONNECT.fullmatch(line + newline if newline else seen + b"\n")
            if match is None or int(match[1]) > 0xFFFFFFFF:
                self._give_up(channel)
                return
            channel.recv(len(line) + 1 if kind == socket.SOCK_STREAM else LINE.most)
        except BlockingIOError:
            return
        except OSError:
            self._give_up(channel)
            return
        self._handshakes.pop(channel).cancel()
        self._worker.remove(channel)
        self._dial(channel, int(match[1]), kind)

    def _look_again(self, channel: socket.socket, kind: int) -> None:
        if channel in self._handshakes:
            self._worker.add(channel, _READ, lambda events: self._handshake(channel, kind))

    def _dial(self, channel: socket.socket, port: int, kind: int) -> None:
        bridge = Bridge(self._hub, self._worker, channel, self._bridges)
        try:
            with self._hub.lock:
                connection = self._hub.connect(port, TYPES[kind], timeout_s=CONNECT_TIMEOUT_S)
                bridge.adopt(connection, greet=True)
        except OSError:
            channel.close()

    # -- connections of the guest's

    def find(self, port: int, kind: int) -> _Program | None:
        """The hub's: return the program that listens at PATH_port, connected; None if none does."""
        packets = kind == VIRTIO_VSOCK_TYPE_SEQPACKET
        type = socket.SOCK_SEQPACKET if packets else socket.SOCK_STREAM
        channel = socket.socket(socket.AF_UNIX, type | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            channel.connect(f"{self.path}_{port}")
        except OSError:
            channel.close()
            return None
        return _Program(Bridge(self._hub, self._worker, channel, self._bridges))

    def close(self) -> None:
        """Listen no more, take the sockets' files away and close all connections."""
        for path, listener in self._listeners.items():
            with contextlib.suppress(OSError):
                os.unlink(path)
            self._worker.remove(listener)
            listener.close()
        self._listeners.clear()
        for channel in list(self._handshakes):
            self._give_up(channel)
        for bridge in list(self._bridges):
            bridge.close()


class _Program:
    """A program of the host's that has accepted a connection of the guest's."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def accepts(self, kind: int) -> bool:
        """Yes."""
        return True

    def incoming(self, connection: Connection) -> None:
        """Join the two."""
        self._bridge.adopt(connection)


def _take_away_stale(path: str, kind: socket.SocketKind) -> None:
    """Remove the socket of a process that is no more; OSError (EADDRINUSE) if it still is, or if it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EADDRINUSE, "is there, and no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass
    raise OSError(errno.EADDRINUSE, "another process listens there")
