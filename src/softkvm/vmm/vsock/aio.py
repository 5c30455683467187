# SPDX-License-Identifier: Apache-2.0
"""The host's vsock connections in asyncio: a transport, and with it asyncio's own StreamReader and StreamWriter.

A connection's packets come and go on the device's thread; the transport hears of them on the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

from softkvm.vmm.vsock.connection import Connection, State
from softkvm.vmm.vsock.hub import CONNECT_TIMEOUT_S, Hub
from softkvm.vmm.vsock.packet import (
    TYPES,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    VMADDR_CID_HOST,
)

_READ_SIZE: Final = 64 << 10
_HIGH_WATER: Final = 64 << 10

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


class VsockTransport(asyncio.Transport):
    """A stream connection towards an asyncio protocol."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hub: Hub) -> None:
        super().__init__()
        self._loop = loop
        self._hub = hub
        self._connection: Connection | None = None
        self._protocol: asyncio.BaseProtocol | None = None
        self._connected: asyncio.Future[None] = loop.create_future()
        self._buffer = bytearray()
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        self._reading = True
        self._writing_paused = False
        self._eof_received = self._eof_written = self._closing = self._lost = False
        self._asked = False

    # -- the hub's thread

    def changed(self) -> None:
        """The hub's: something has changed. The loop looks at it."""
        if not self._asked:
            self._asked = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._look)

    # -- the loop's

    async def connect(self, port: int, timeout_s: float) -> None:
        """Connect to the guest's *port*; OSError as for a blocking socket."""
        with self._hub.lock:
            self._connection = self._hub.connect(port, TYPES[socket.SOCK_STREAM], self, timeout_s=timeout_s)
        try:
            await self._connected
        except BaseException:
            with self._hub.lock:
                self._connection.close()
            self._lost = True
            raise

    def adopt(self, connection: Connection) -> None:
        """Become the owner of an established connection."""
        self._connection = connection
        connection.owner = self
        self.changed()

    def start(self, protocol: asyncio.BaseProtocol) -> None:
        """Begin to tell *protocol*."""
        connection = self._connection
        assert connection is not None
        self._extra = {
            "peername": (self._hub.guest_cid, connection.peer_port),
            "sockname": (VMADDR_CID_HOST, connection.local_port),
        }
        self._protocol = protocol
        protocol.connection_made(self)
        self.changed()

    def _look(self) -> None:
        """Do what there is to do, for the protocol and for the connection."""
        self._asked = False
        connection = self._connection
        if connection is None or self._lost:
            return
        with self._hub.lock:
            if not self._connected.done():
                if connection.state is State.CLOSED and connection.error:
                    self._connected.set_exception(OSError(connection.error, os.strerror(connection.error)))
                elif connection.state is not State.CONNECTING:
                    self._connected.set_result(None)
            if self._protocol is None:
                return
            self._fill(connection)
            data = self._take(connection)
        if data:
            self._protocol.data_received(data)  # type: ignore[attr-defined]
            self.changed()
        elif self._reading and not self._eof_received and connection.at_end and not connection.readable:
            self._end_of_data(connection)
        self._look_at_water()
        if connection.state is State.CLOSED and (self._eof_received or not self._reading) and not connection.readable:
            self._lose(connection.error)

    def _take(self, connection: Connection) -> bytes:
        if not self._reading or self._closing or not connection.readable:
            return b""
        data, _, _ = connection.peek(_READ_SIZE)
        connection.consume(len(data))
        return data

    def _end_of_data(self, connection: Connection) -> None:
        self._eof_received = True
        if connection.error or self._protocol is None or self._closing:
            return
        if not self._protocol.eof_received():  # type: ignore[attr-defined]
            self.close()

    def _fill(self, connection: Connection) -> None:
        """Give the connection what was written."""
        if self._buffer and connection.peer_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            self._buffer.clear()
        size = min(len(self._buffer), connection.writable)
        if size:
            connection.send(self._buffer[:size])
            del self._buffer[:size]
        if not self._buffer and connection.state is State.ESTABLISHED:
            if self._closing:
                connection.close()
                self._loop.call_soon(self._lose, 0)
            elif self._eof_written and not connection.shutdown_wanted & VIRTIO_VSOCK_SHUTDOWN_F_SEND:
                connection.shutdown(VIRTIO_VSOCK_SHUTDOWN_F_SEND)

    def _look_at_water(self) -> None:
        protocol = self._protocol
        if protocol is None:
            return
        if not self._writing_paused and len(self._buffer) > self._high:
            self._writing_paused = True
            protocol.pause_writing()
        elif self._writing_paused and len(self._buffer) <= self._low:
            self._writing_paused = False
            protocol.resume_writing()

    def _lose(self, code: int) -> None:
        """It is over, for the protocol too."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._buffer.clear()
        if self._connection is not None:
            with self._hub.lock:
                self._connection.close()
        if self._protocol is not None:
            self._protocol.connection_lost(OSError(code, os.strerror(code)) if code else None)

    # -- asyncio.Transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        assert self._protocol is not None
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Have another one from now on."""
        self._protocol = protocol

    def is_reading(self) -> bool:
        """Whether the protocol is told of data."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """Let data wait: the guest's writer does, in the end."""
        self._reading = False

    def resume_reading(self) -> None:
        """Go on."""
        self._reading = True
        self.changed()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*, when there is room."""
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or self._connection is None:
            return
        self._buffer += data
        with self._hub.lock:
            self._fill(self._connection)
        self._look_at_water()

    def write_eof(self) -> None:
        """Send no more behind what has been written."""
        self._eof_written = True
        if self._connection is not None and not self._closing:
            with self._hub.lock:
                self._fill(self._connection)

    def can_write_eof(self) -> bool:
        """True."""
        return True

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait for room."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and the high water mark."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks of :meth:`asyncio.WriteTransport.set_write_buffer_limits`."""
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._look_at_water()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Close it when everything has been sent."""
        if self._closing:
            return
        self._closing = True
        if self._connection is None or self._connection.state is not State.ESTABLISHED:
            self._loop.call_soon(self._lose, 0)
            return
        with self._hub.lock:
            self._connection.shutdown(VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE)
            self._fill(self._connection)

    def abort(self) -> None:
        """Reset it at once."""
        if self._connection is not None:
            with self._hub.lock:
                self._connection.abort()
        self._loop.call_soon(self._lose, 0)


class VsockServer:
    """What listens at a port of the host's, as :class:`asyncio.Server` does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hub: Hub, client_connected: ClientConnected, port: int) -> None:
        self._loop = loop
        self._hub = hub
        self._client_connected = client_connected
        self._closed = loop.create_future()
        self.port = hub.listen(port, self)
        """Where it listens."""

    def accepts(self, kind: int) -> bool:
        """The hub's: streams."""
        return kind == TYPES[socket.SOCK_STREAM]

    def incoming(self, connection: Connection) -> None:
        """The hub's: the loop makes a reader and a writer of it."""
        transport = VsockTransport(self._loop, self._hub)
        transport.adopt(connection)
        try:
            self._loop.call_soon_threadsafe(self._begin, transport)
        except RuntimeError:  # the loop is closed
            connection.abort()

    def _begin(self, transport: VsockTransport) -> None:
        reader = asyncio.StreamReader(loop=self._loop)
        transport.start(asyncio.StreamReaderProtocol(reader, self._client_connected, loop=self._loop))

    def is_serving(self) -> bool:
        """Whether it still listens."""
        return not self._closed.done()

    def close(self) -> None:
        """Listen no more; connections go on."""
        if not self._closed.done():
            self._hub.unlisten(self.port)
            self._closed.set_result(None)

    async def wait_closed(self) -> None:
        """Wait until it is closed."""
        await asyncio.shield(self._closed)

    async def __aenter__(self) -> VsockServer:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self.close()


async def open_connection(
    hub: Hub, port: int, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the guest's *port*; OSError as for a blocking socket."""
    loop = asyncio.get_running_loop()
    transport = VsockTransport(loop, hub)
    await transport.connect(port, timeout_s)
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport.start(protocol)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(hub: Hub, client_connected: ClientConnected, port: int) -> VsockServer:
    """Call *client_connected* with reader and writer of each connection that the guest makes to *port*."""
    return VsockServer(asyncio.get_running_loop(), hub, client_connected, port)
