# SPDX-License-Identifier: Apache-2.0
"""The host's vsock sockets for scripts: blocking, with the semantics of Linux's AF_VSOCK sockets.

No file descriptor is behind them: they wait for a condition, not in ``select()``; :meth:`VsockSocket.poll` is theirs.
For asyncio there is ``aio``, for other programs ``unix``.
"""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.vmm.vsock.connection import Connection, State
from softkvm.vmm.vsock.hub import CONNECT_TIMEOUT_S, Hub
from softkvm.vmm.vsock.packet import (
    SHUTDOWN_BOTH,
    TYPES,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    VMADDR_CID_HOST,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

BACKLOG: Final = Size("connections that wait to be accepted", 4096, errno.EINVAL, least=1, where=__name__)
RETRY_S: Final = 0.02
"""How long a connect that retries waits in between."""

_SHUTDOWN: Final = {
    socket.SHUT_RD: VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    socket.SHUT_WR: VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    socket.SHUT_RDWR: SHUTDOWN_BOTH,
}


def os_error(code: int) -> OSError:
    """Return the OSError (of its subclass) of an errno."""
    return OSError(code, os.strerror(code))


class Waiting(Closing):
    """What waits for the hub: a condition on its lock, and a timeout as sockets have it."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._condition = threading.Condition(hub.lock)
        self._timeout: float | None = None

    def settimeout(self, seconds: float | None) -> None:
        """Let calls wait so long; 0: not at all, None: for ever."""
        if seconds is not None and seconds < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = seconds

    def gettimeout(self) -> float | None:
        """Return the timeout."""
        return self._timeout

    def _wait(self, ready: Callable[[], bool], *, at_once: bool = False) -> None:
        """Wait until *ready*, with the hub's lock held; BlockingIOError or TimeoutError if that takes too long."""
        timeout = 0 if at_once else self._timeout
        if ready():
            return
        if timeout == 0:
            raise os_error(errno.EAGAIN)
        if not self._condition.wait_for(ready, timeout):
            raise TimeoutError("timed out")

    def changed(self) -> None:
        """The hub's: something has changed."""
        self._condition.notify_all()


class VsockSocket(Waiting):
    """The host's end of a connection. Methods are those of :class:`socket.socket`; their errors are AF_VSOCK's."""

    def __init__(self, hub: Hub, kind: int) -> None:
        super().__init__(hub)
        self.type = kind
        """SOCK_STREAM or SOCK_SEQPACKET."""
        self.rcvlowat = 1
        """Bytes that a stream has to have before :meth:`poll` and a :meth:`recv` that waits find it readable."""
        self._connection: Connection | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<VsockSocket {self._connection or 'unconnected'}>"

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    # -- connecting

    def connect(self, port: int, *, local_port: int | None = None, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect to the guest's *port*.

        OSError: ECONNRESET if nobody listens there, ETIMEDOUT if no answer comes within *timeout_s*, EISCONN.
        A socket whose connect has failed may try again.
        """
        with self.hub.lock:
            self._check_open()
            if self._connection is not None:
                raise os_error(errno.EISCONN)
            connection = self.hub.connect(port, TYPES[self.type], self, local_port=local_port, timeout_s=timeout_s)
            try:
                self._condition.wait_for(lambda: connection.state is not State.CONNECTING)
            except BaseException:  # a signal: the request is taken back
                connection.close()
                raise
            if connection.state is State.CLOSED and connection.error:
                connection.close()
                raise os_error(connection.error)
            self._connection = connection

    def adopt(self, connection: Connection) -> None:
        """Become the owner of an established connection."""
        connection.owner = self
        self._connection = connection

    def _check_open(self) -> None:
        if self._closed:
            raise os_error(errno.EBADF)

    def _connected(self) -> Connection:
        self._check_open()
        if self._connection is None:
            raise os_error(errno.ENOTCONN)
        return self._connection

    @property
    def connection(self) -> Connection:
        """The connection; OSError (ENOTCONN) if there is none."""
        return self._connected()

    def getpeername(self) -> tuple[int, int]:
        """Return the guest's context ID and port."""
        return self.hub.guest_cid, self._connected().peer_port

    def getsockname(self) -> tuple[int, int]:
        """Return the host's context ID and port."""
        return VMADDR_CID_HOST, self._connected().local_port

    # -- sending

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send *data*, in a stream as much as there is room for, and return how much that is.

        *flags*: MSG_DONTWAIT; MSG_EOR in a SOCK_SEQPACKET socket, where *data* is one message and is sent whole.
        OSError: EPIPE if the peer receives no more, EMSGSIZE for a message that is longer than the peer's buffer.
        """
        with memoryview(data).cast("B") as view, self.hub.lock:
            return self._send(self._connected(), view, flags)

    def _send(self, connection: Connection, view: memoryview, flags: int) -> int:
        at_once = bool(flags & socket.MSG_DONTWAIT)
        self._check_writable(connection)
        if connection.messages:
            size = len(view)
            if size > connection.peer_buf_alloc:
                raise os_error(errno.EMSGSIZE)
            least = min(size, connection.tx_size)
            self._wait(lambda: self._stuck(connection) or connection.writable >= least, at_once=at_once)
            self._check_writable(connection)
            connection.send(view, eor=bool(flags & socket.MSG_EOR))
            return size
        if not view:
            return 0
        self._wait(lambda: self._stuck(connection) or connection.writable > 0, at_once=at_once)
        self._check_writable(connection)
        size = min(len(view), connection.writable)
        connection.send(view[:size])
        return size

    def _stuck(self, connection: Connection) -> bool:
        """Whether nothing can be sent any more."""
        return (
            self._closed
            or connection.state is not State.ESTABLISHED
            or bool(connection.shutdown_wanted & VIRTIO_VSOCK_SHUTDOWN_F_SEND)
            or bool(connection.peer_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE)
        )

    def _check_writable(self, connection: Connection) -> None:
        if self._stuck(connection):
            raise os_error(connection.error or (errno.EBADF if self._closed else errno.EPIPE))

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Send all of *data*."""
        with memoryview(data).cast("B") as view:
            at = 0
            while at < len(view) or not at:
                at += self.send(view[at:], flags)
                if not view:
                    return

    def sendmsg(self, buffers: list[bytes], flags: int = 0) -> int:
        """Send the *buffers* as one."""
        return self.send(b"".join(buffers), flags)

    def unsent(self) -> int:
        """Return how many bytes the guest's device has not taken yet (SIOCOUTQ)."""
        with self.hub.lock:
            return len(self._connected().tx)

    # -- receiving

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return up to *size* bytes; none at the end, or for a message that is empty.

        *flags*: MSG_PEEK, MSG_DONTWAIT, MSG_WAITALL.
        """
        return self.recvmsg(size, flags)[0]

    def recvmsg(self, size: int, flags: int = 0) -> tuple[bytes, int, int]:
        """Return bytes as :meth:`recv`, the message's flags (MSG_EOR, MSG_TRUNC) and its whole length.

        What is cut off a message is lost. In a stream the length is that of the bytes.
        """
        with self.hub.lock:
            data, told, length = self._receive(size, flags)
            if not flags & socket.MSG_WAITALL or flags & socket.MSG_PEEK or self.type != socket.SOCK_STREAM:
                return data, told, length
            pieces, left = [data], size - len(data)
            while left and data:
                data, _, _ = self._receive(left, flags)
                pieces.append(data)
                left -= len(data)
            return b"".join(pieces), 0, size - left

    def _receive(self, size: int, flags: int) -> tuple[bytes, int, int]:
        """Wait for something, and take it unless *flags* has MSG_PEEK."""
        connection = self._connected()
        if connection.error:
            raise os_error(connection.error)
        if connection.shutdown_wanted & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            return b"", 0, 0
        least = 1
        if flags & socket.MSG_PEEK and flags & socket.MSG_WAITALL:
            least = min(size, connection.buf_alloc)
        elif not connection.messages:
            least = min(self.rcvlowat, max(size, 1))
        self._wait(lambda: self._has(connection, least), at_once=bool(flags & socket.MSG_DONTWAIT))
        self._check_open()
        if not connection.readable:
            if connection.error:
                raise os_error(connection.error)
            return b"", 0, 0
        data, length, eor = connection.peek(size)
        if not connection.messages:
            length = len(data)
        if not flags & socket.MSG_PEEK:
            connection.consume(len(data))
        told = (socket.MSG_EOR if eor else 0) | (socket.MSG_TRUNC if len(data) < length else 0)
        return data, told, length

    def _has(self, connection: Connection, least: int) -> bool:
        if self._closed or connection.at_end or connection.shutdown_wanted & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            return True
        return connection.readable if connection.messages else len(connection.rx) >= least

    def recv_into(self, buffer: Buffer, size: int = 0, flags: int = 0) -> int:
        """Receive into *buffer*, at most *size* bytes if that is given; return how many came.

        What cannot be stored stays in a stream; a message is lost.
        """
        with memoryview(buffer).cast("B") as view, self.hub.lock:
            stays = self.type == socket.SOCK_STREAM and not flags & socket.MSG_PEEK
            data = self.recv(min(size, len(view)) if size else len(view), flags | (socket.MSG_PEEK if stays else 0))
            view[: len(data)] = data
            if stays and data:
                self._connected().consume(len(data))
            return len(data)

    def poll(self, events: int, seconds: float | None = None) -> int:
        """Wait for *events* (:data:`select.POLLIN`, POLLOUT, POLLRDHUP) and return those that are there.

        POLLHUP and POLLERR are always among them. 0 if none comes within *seconds*.
        """
        with self.hub.lock:
            connection = self._connected()
            wanted = events | select.POLLHUP | select.POLLERR
            self._condition.wait_for(lambda: self._closed or self._events(connection) & wanted, seconds)
            return self._events(connection) & wanted

    def _events(self, connection: Connection) -> int:
        found = 0
        if connection.error:
            found |= select.POLLERR
        if connection.at_end:
            found |= select.POLLRDHUP
        if self._has(connection, self.rcvlowat):
            found |= select.POLLIN | select.POLLRDNORM
        if self._stuck(connection) or connection.writable > 0:
            found |= select.POLLOUT | select.POLLWRNORM
        if connection.state is State.CLOSED:
            found |= select.POLLHUP
        return found

    @property
    def buffer_size(self) -> int:
        """Bytes that are kept for the reader (SO_VM_SOCKETS_BUFFER_SIZE)."""
        return self._connected().buf_alloc

    @buffer_size.setter
    def buffer_size(self, size: int) -> None:
        with self.hub.lock:
            self._connected().set_buffer_size(size)

    def makefile(self, mode: str = "rb") -> io.BufferedReader | io.BufferedWriter | io.BufferedRWPair:
        """Return a buffered file of the stream: ``rb``, ``wb`` or ``rwb``. The socket has to be closed by itself."""
        raw = _File(self)
        if mode == "rb":
            return io.BufferedReader(raw)
        if mode == "wb":
            return io.BufferedWriter(raw)
        if mode == "rwb":
            return io.BufferedRWPair(raw, _File(self))
        raise ValueError(f"mode={mode!r}: expected rb, wb or rwb")

    # -- the end

    def shutdown(self, how: int) -> None:
        """Receive no more (SHUT_RD), send no more (SHUT_WR), or both."""
        with self.hub.lock:
            connection = self._connected()
            connection.shutdown(_SHUTDOWN[how])

    def close(self) -> None:
        """Close it: what was sent goes out; who waits in it gets EBADF."""
        with self.hub.lock:
            if self._closed:
                return
            self._closed = True
            if self._connection is not None:
                self._connection.close()
            self._condition.notify_all()

    def abort(self) -> None:
        """Reset the connection: what was sent and not taken is lost."""
        with self.hub.lock:
            if self._connection is not None and not self._closed:
                self._connection.abort()
            self.close()


class _File(io.RawIOBase):
    """A socket's bytes."""

    def __init__(self, channel: VsockSocket) -> None:
        self._channel = channel

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        return self._channel.recv_into(buffer)

    def write(self, data: Buffer) -> int:
        return self._channel.send(data)


class VsockListener(Waiting):
    """A port of the host's that the guest connects to."""

    def __init__(self, hub: Hub, port: int, kind: int, backlog: int) -> None:
        super().__init__(hub)
        self.type = kind
        self._closed = True  # until it is in the hub
        self._backlog = BACKLOG.check(backlog)
        self._waiting: deque[VsockSocket] = deque()
        self.port = hub.listen(port, self)
        """Where it listens."""
        self._closed = False

    def __repr__(self) -> str:
        return f"<VsockListener host:{self.port}>"

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def accepts(self, kind: int) -> bool:
        """The hub's: whether there is room."""
        return kind == TYPES[self.type] and len(self._waiting) < self._backlog

    def incoming(self, connection: Connection) -> None:
        """The hub's: one more."""
        accepted = VsockSocket(self.hub, self.type)
        accepted.adopt(connection)
        self._waiting.append(accepted)
        self.changed()

    def accept(self) -> tuple[VsockSocket, tuple[int, int]]:
        """Wait for a connection; return it, and the guest's context ID and port."""
        with self.hub.lock:
            self._wait(lambda: self._closed or bool(self._waiting))
            if self._closed:
                raise os_error(errno.EBADF)
            accepted = self._waiting.popleft()
            return accepted, accepted.getpeername()

    def close(self) -> None:
        """Listen no more; what nobody has accepted is reset."""
        with self.hub.lock:
            if self._closed:
                return
            self._closed = True
            self.hub.unlisten(self.port)
            while self._waiting:
                self._waiting.popleft().abort()
            self._condition.notify_all()


def connect(
    hub: Hub,
    port: int,
    kind: int = socket.SOCK_STREAM,
    *,
    local_port: int | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    retry: bool = False,
) -> VsockSocket:
    """Return a socket that is connected to the guest's *port*, as :meth:`VsockSocket.connect`.

    With *retry* it tries, for *timeout_s* in all, until somebody listens there: a guest that boots.
    """
    end = time.monotonic() + timeout_s
    channel = VsockSocket(hub, kind)
    while True:
        left = end - time.monotonic()
        try:
            channel.connect(port, local_port=local_port, timeout_s=max(left, 0.0))
        except ConnectionResetError:
            if not retry or left < RETRY_S or hub.closed:
                raise
            time.sleep(RETRY_S)
        else:
            return channel
