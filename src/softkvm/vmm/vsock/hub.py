# SPDX-License-Identifier: Apache-2.0
"""All of a vsock device's connections, and who listens: packets of the guest's in, packets for the guest out.

What carries the packets calls :meth:`Hub.receive` and :meth:`Hub.transmit`, and is woken (``wake``) when there is
something to transmit. Anybody may call the rest, on any thread.

Nothing here grows with what a guest does: connections are counted (CONNECTIONS), what they promise to keep comes out of
a budget (BUDGET), answers to packets without a connection are one for each pair of ports, and while there are too many
of those that the guest does not take (:attr:`Hub.congested`), nothing of the guest's should be received.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.vsock.connection import BUFFER_SIZE, SMALL_BUFFER_SIZE, Connection, Owner, State
from softkvm.vmm.vsock.packet import (
    HEADER,
    PORT_ANY,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
    VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
    Header,
)

CONNECTIONS: Final = Size(
    "connections of a vsock device", 1024, errno.ENOBUFS, giver="guest", effect="RST; ENOBUFS", where=__name__
)
BUDGET: Final = Size(
    "bytes that a vsock device's connections keep for their readers, together",
    64 << 20,
    errno.ENOBUFS,
    giver="guest",
    effect="smaller buffers",
    where=__name__,
)
RESETS: Final = Size(
    "answers that a guest has not taken, of a vsock device",
    1024,
    None,
    giver="guest",
    effect="it waits",
    where=__name__,
)
_SHORT: Final = CONNECTIONS.most * SMALL_BUFFER_SIZE
"""When so little of the budget is left, new connections get small buffers: those are there for all."""

CONNECT_TIMEOUT_S: Final = 2.0
"""How long a request of the host's waits for an answer (Linux: VSOCK_DEFAULT_CONNECT_TIMEOUT)."""

EPHEMERAL_START: Final = 1 << 30
"""Where the ports begin that the host's ends get if they don't ask for one."""


class Acceptor(Protocol):
    """Who listens at a port of the host's."""

    def accepts(self, kind: int) -> bool:
        """Whether there is room for one more connection of such a kind."""

    def incoming(self, connection: Connection) -> None:
        """Take a connection, which is established. With the hub's lock held."""


class Hub:
    """The host's ends of the connections with the guest whose context ID is *guest_cid*."""

    def __init__(self, guest_cid: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.RLock()
        self.guest_cid = guest_cid
        self.kinds: frozenset[int] = frozenset((VIRTIO_VSOCK_TYPE_STREAM, VIRTIO_VSOCK_TYPE_SEQPACKET))
        """What types of connections there are: what the driver has accepted."""
        self.wake: Callable[[], None] = lambda: None
        """Called when there is something to transmit."""
        self.wake_at: Callable[[float], None] = lambda seconds: None
        """Called to have :meth:`expire` called after so many seconds."""
        self.fallback: Callable[[int, int], Acceptor | None] = lambda port, kind: None
        """Asked who listens at a port, where nobody does here."""
        self.dropped = 0
        """Packets that were for nobody, and were not answered."""
        self._clock = clock
        self._connections: dict[tuple[int, int], Connection] = {}
        self._acceptors: dict[int, Acceptor] = {}
        self._ready: deque[Connection] = deque()
        self._ready_set: set[Connection] = set()
        self._resets: dict[tuple[int, int], int] = {}
        self._wake_at: float | None = None
        self._unread: set[Connection] = set()
        self._next_port = EPHEMERAL_START
        self._reserved = 0
        self.closed = False
        """Whether the device is gone."""

    def __repr__(self) -> str:
        return f"<Hub of guest {self.guest_cid}: {len(self._connections)} connections>"

    @property
    def connections(self) -> list[Connection]:
        """Every connection that is known, orphans that wait for their end among them."""
        with self.lock:
            return list(self._connections.values())

    # -- what carries the packets calls

    def receive(self, header: Header, payload: bytes) -> None:
        """Take a packet of the guest's, whatever it is."""
        with self.lock:
            if header.src_cid != self.guest_cid or header.dst_cid != VMADDR_CID_HOST or header.len > len(payload):
                self.dropped += 1  # as Linux's host side does it
                return
            if header.len < len(payload):
                payload = payload[: header.len]
            key = (header.dst_port, header.src_port)
            connection = self._connections.get(key)
            if header.type not in self.kinds or (connection is not None and connection.kind != header.type):
                self._reset(key, header)
            elif connection is not None:
                connection.receive(header, payload)
            elif header.op == VIRTIO_VSOCK_OP_REQUEST:
                self._receive_request(key, header)
            else:
                self._reset(key, header)

    def _receive_request(self, key: tuple[int, int], header: Header) -> None:
        acceptor = None
        if not self.closed and CONNECTIONS.allows(self._room() + 1):
            acceptor = self._acceptors.get(header.dst_port) or self.fallback(header.dst_port, header.type)
        if acceptor is None or not acceptor.accepts(header.type):
            self._reset(key, header)
            return
        self._resets.pop(key, None)  # of a connection that the guest has forgotten
        connection = self._add(key, header.type, State.ESTABLISHED)
        connection.take_credit(header)
        connection.response_due = True
        self.ready(connection)
        acceptor.incoming(connection)

    def _reset(self, key: tuple[int, int], header: Header) -> None:
        """Answer with RST; never an RST with one."""
        if header.op == VIRTIO_VSOCK_OP_RST:
            return
        self._queue_reset(key, header.type)

    def _queue_reset(self, key: tuple[int, int], kind: int) -> None:
        self._resets[key] = kind
        self.wake()

    @property
    def congested(self) -> bool:
        """Whether the guest should take some answers before it is listened to."""
        return len(self._resets) >= RESETS.most

    @property
    def has_output(self) -> bool:
        """Whether :meth:`transmit` is worth a try."""
        return bool(self._resets or self._ready)

    def transmit(self, room: int) -> tuple[bytes, bytes] | None:
        """Return the next packet's header and its data, of *room* bytes at most; None if there is none.

        Connections take turns.
        """
        with self.lock:
            if self._resets:
                (local, peer), kind = next(iter(self._resets.items()))
                del self._resets[local, peer]
                return self._header(local, peer, 0, kind, VIRTIO_VSOCK_OP_RST, 0, 0, 0), b""
            for _ in range(len(self._ready)):
                connection = self._ready.popleft()
                self._ready_set.discard(connection)
                packet = connection.produce(room)
                buf_alloc, fwd_cnt = connection.announce() if packet is not None else (0, 0)
                if connection.output_due():
                    self._ready.append(connection)
                    self._ready_set.add(connection)
                if packet is None:  # there is no room, or no credit
                    continue
                op, flags, data = packet
                if data:
                    connection.tell()  # there is room
                ports = connection.local_port, connection.peer_port
                return self._header(*ports, len(data), connection.kind, op, flags, buf_alloc, fwd_cnt), data
            return None

    def _header(
        self, local: int, peer: int, size: int, kind: int, op: int, flags: int, buf_alloc: int, fwd_cnt: int
    ) -> bytes:
        return HEADER.pack(VMADDR_CID_HOST, self.guest_cid, local, peer, size, kind, op, flags, buf_alloc, fwd_cnt)

    def expire(self) -> None:
        """Give up what is due."""
        with self.lock:
            self._wake_at = None
            now = self._clock()
            for connection in self.connections:
                if connection.ask_again_at is not None and connection.ask_again_at <= now:
                    connection.ask_again()
                if connection.deadline is None or connection.deadline > now:
                    continue
                if connection.request_due:
                    self.forget(connection, errno.ETIMEDOUT)
                else:
                    self.reset_connection(connection, errno.ETIMEDOUT)
            self._wake_for_next()

    def reset(self) -> None:
        """All connections that the guest knows of end (ECONNRESET), orphans too. Who listens still does.

        For a driver that resets its device, and for a guest that was told so itself (TRANSPORT_RESET).
        """
        with self.lock:
            self._resets.clear()
            for connection in self.connections:
                if not connection.request_due:
                    self.forget(connection, errno.ECONNRESET)

    def close(self) -> None:
        """The device goes away: connections end, whatever they wait for, and there will be none."""
        with self.lock:
            self.closed = True
            self._resets.clear()
            for connection in self.connections:
                self.forget(connection, errno.ECONNRESET)
            self._acceptors.clear()

    # -- what users of connections call

    def connect(
        self,
        port: int,
        kind: int,
        owner: Owner | None = None,
        *,
        local_port: int | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Connection:
        """Ask for a connection to the guest's *port*; *owner* is told what comes of it.

        OSError: EADDRINUSE for a *local_port* that is taken, EPROTONOSUPPORT for a kind that the driver does not have,
        ENOBUFS for too many connections, ESHUTDOWN where the device is gone.
        """
        with self.lock:
            if self.closed:
                raise _error(errno.ESHUTDOWN)
            if kind not in self.kinds:
                raise _error(errno.EPROTONOSUPPORT)
            CONNECTIONS.check(self._room() + 1)
            if local_port is None:
                local_port = self._free_port(port)
            elif (local_port, port) in self._connections or local_port in self._acceptors:
                raise _error(errno.EADDRINUSE)
            connection = self._add((local_port, port), kind, State.CONNECTING)
            connection.owner = owner
            connection.request_due = True
            self.arm(connection, timeout_s)
            self.ready(connection)
            return connection

    def listen(self, port: int, acceptor: Acceptor) -> int:
        """Let *acceptor* have what the guest connects to *port*, or to one that is free (PORT_ANY); return the port.

        OSError (EADDRINUSE) if somebody listens there.
        """
        with self.lock:
            if self.closed:
                raise _error(errno.ESHUTDOWN)
            if port == PORT_ANY:
                port = self._free_port(None)
            elif port in self._acceptors:
                raise _error(errno.EADDRINUSE)
            self._acceptors[port] = acceptor
            return port

    def unlisten(self, port: int) -> None:
        """Nobody listens at *port* any more."""
        with self.lock:
            self._acceptors.pop(port, None)

    def _free_port(self, peer_port: int | None) -> int:
        """Return a port of the host's at which nobody listens, and that has no connection with the guest's port."""
        while True:
            port = self._next_port
            self._next_port = port + 1 if port + 1 < PORT_ANY else EPHEMERAL_START
            if port not in self._acceptors and (peer_port is None or (port, peer_port) not in self._connections):
                return port

    # -- what connections call

    def _room(self) -> int:
        """How many connections there are, those among them of which only what was received is left."""
        return len(self._connections) + len(self._unread)

    def _add(self, key: tuple[int, int], kind: int, state: State) -> Connection:
        size = BUFFER_SIZE if self._reserved + BUFFER_SIZE <= BUDGET.most - _SHORT else SMALL_BUFFER_SIZE
        connection = Connection(self, kind, *key, state, size)
        self._reserved += size
        self._connections[key] = connection
        return connection

    def reserve_for(self, connection: Connection, size: int) -> None:
        """Let *connection* promise *size* bytes; OSError (ENOBUFS) if that is more than there is."""
        if connection.state is not State.CLOSED:
            reserved = self._reserved + size - connection.buf_alloc
            if size > connection.buf_alloc:
                BUDGET.check(reserved)
            self._reserved = reserved
            connection.buf_alloc = size

    def ready(self, connection: Connection) -> None:
        """Let *connection* send."""
        if connection not in self._ready_set and connection.state is not State.CLOSED:
            self._ready_set.add(connection)
            self._ready.append(connection)
            self.wake()

    def arm(self, connection: Connection, seconds: float) -> None:
        """Give *connection* up after so long, unless it is armed again."""
        connection.deadline = self._clock() + seconds
        self._wake_by(connection.deadline)

    def ask_again(self, connection: Connection, seconds: float) -> None:
        """Have *connection* ask for credit once more after so long."""
        connection.ask_again_at = self._clock() + seconds
        self._wake_by(connection.ask_again_at)

    def _wake_by(self, when: float) -> None:
        if self._wake_at is None or when < self._wake_at:
            self._wake_for_next()

    def _wake_for_next(self) -> None:
        times = (when for known in self._connections.values() for when in (known.deadline, known.ask_again_at))
        due = [when for when in times if when is not None]
        if due:
            self._wake_at = min(due)
            self.wake_at(max(self._wake_at - self._clock(), 0.0))

    def forget(self, connection: Connection, code: int) -> None:
        """It is no more; its owner's calls get errno *code* unless that is 0, when what has come has been read."""
        if connection.state is State.CLOSED:
            return
        connection.state = State.CLOSED
        connection.error = code
        connection.deadline = None
        connection.tx.clear()
        connection.tx_messages.clear()
        connection.drop_partial()
        key = (connection.local_port, connection.peer_port)
        del self._connections[key]
        if connection in self._ready_set:
            self._ready_set.discard(connection)
            self._ready.remove(connection)
        self._unread.add(connection)
        connection.tell()
        if connection.owner is None or not connection.rx:
            self.emptied(connection)

    def emptied(self, connection: Connection) -> None:
        """Nothing is left to be read of a connection that is no more."""
        if connection in self._unread:
            self._unread.discard(connection)
            self._reserved -= connection.buf_alloc

    def reset_connection(self, connection: Connection, code: int) -> None:
        """Tell the peer that it is no more, and forget it."""
        if connection.state is not State.CLOSED:
            self.forget(connection, code)
            self._queue_reset((connection.local_port, connection.peer_port), connection.kind)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
