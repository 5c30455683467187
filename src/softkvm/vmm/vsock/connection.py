# SPDX-License-Identifier: Apache-2.0
"""The host's end of one vsock connection: its states, its two buffers and the credit for them.

A connection belongs to a hub (``hub.py``), whose lock is held whenever anything here is called, and
has an *owner*, who reads and writes, and who is told (``changed``) when there may be something for him to do.

**Credit** (VIRTIO 1.3, 5.10.6.3). Each end says with each packet how many bytes it has room for (``buf_alloc``) and how
many it has passed on (``fwd_cnt``). A peer that sends more than it was ever promised is reset. What we have promised
lies in memory at worst, so promises come out of the hub's budget.

**Close.** Linux's rules: who closes sends SHUTDOWN with both flags behind its last byte, and waits for RST. Whoever
receives such a SHUTDOWN answers with RST and forgets the connection; its owner may still read what has come. Where no
RST comes within CLOSE_TIMEOUT_S of anything else that goes on, the connection is reset and freed.
"""

from __future__ import annotations

import errno
from collections import deque
from enum import Enum, auto
from typing import Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.vsock.packet import (
    MAX_PACKET_BYTES,
    SHUTDOWN_BOTH,
    VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_INVALID,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_SEQ_EOM,
    VIRTIO_VSOCK_SEQ_EOR,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
    Header,
)

CLOSE_TIMEOUT_S: Final = 8.0
"""How long a closed connection waits for its peer's RST (Linux: VSOCK_CLOSE_TIMEOUT)."""

ASK_AGAIN_S: Final = 0.5
"""How long who has data and no credit waits before he asks again. A reader that waits for more than its buffer can hold
announces no room by itself (Linux before 6.8, with SO_RCVLOWAT), and neither would ever go on."""

BUFFER_SIZE: Final = 256 << 10
"""Bytes that a connection keeps for its reader unless it is told otherwise, and as many for its writer (Linux:
VSOCK_DEFAULT_BUFFER_SIZE)."""

SMALL_BUFFER_SIZE: Final = 16 << 10
"""The same when memory is short."""

BUFFER: Final = Size(
    "bytes that a vsock connection keeps for its reader",
    4 << 20,
    errno.EINVAL,
    least=4096,
    where=__name__,
)
EMPTY_MESSAGES: Final = Size(
    "messages of 0 bytes that nobody has read in a vsock connection",
    1024,
    None,
    giver="guest",
    effect="RST",
    where=__name__,
)

_WRAP: Final = 0xFFFFFFFF


class State(Enum):
    """Where a connection is in its life."""

    CONNECTING = auto()
    """REQUEST is sent, or about to be."""
    ESTABLISHED = auto()
    CLOSING = auto()
    """Its owner has closed it; the peer has not let it go yet."""
    CLOSED = auto()
    """The hub knows it no more; what has been received can still be read."""


class Owner(Protocol):
    """Who has a connection."""

    def changed(self) -> None:
        """Something has changed: data, room, state or shutdown. With the hub's lock held; must not block."""


class Connections(Protocol):
    """What a connection asks of the hub that it belongs to."""

    def ready(self, connection: Connection) -> None:
        """Let it send."""

    def arm(self, connection: Connection, seconds: float) -> None:
        """Give it up after so long, unless it is armed again."""

    def ask_again(self, connection: Connection, seconds: float) -> None:
        """Have it ask for credit once more after so long."""

    def reserve_for(self, connection: Connection, size: int) -> None:
        """Let it promise so many bytes; OSError if that is more than there is."""

    def forget(self, connection: Connection, code: int) -> None:
        """It is no more; its owner gets errno *code*."""

    def emptied(self, connection: Connection) -> None:
        """It is no more, and nothing is left to be read."""

    def reset_connection(self, connection: Connection, code: int) -> None:
        """Tell the peer that it is no more, and forget it."""


class Connection:
    """One end; made by :meth:`Hub.connect` and by a request of the guest's."""

    def __init__(
        self, hub: Connections, kind: int, local_port: int, peer_port: int, state: State, buffer_size: int
    ) -> None:
        self.hub = hub
        self.kind = kind
        """The packets' type."""
        self.messages = kind == VIRTIO_VSOCK_TYPE_SEQPACKET
        """Whether the bounds of what is sent are kept (seqpacket)."""
        self.local_port = local_port
        self.peer_port = peer_port
        self.state = state
        self.owner: Owner | None = None
        self.error = 0
        """The errno that the owner's next call gets, and all further ones."""
        self.deadline: float | None = None
        """When the hub gives it up, of the hub's clock."""
        self.ask_again_at: float | None = None
        """When credit is asked for once more."""

        self.rx = bytearray()
        self.rx_messages: deque[int] = deque()
        """Of each whole message in ``rx`` twice its length, and 1 if it has MSG_EOR."""
        self.rx_partial = 0
        """Bytes at the end of ``rx`` of a message whose end has not come."""
        self._rx_empty = 0
        self._rx_count = 0
        self.fwd_cnt = 0
        self.buf_alloc = buffer_size
        self._announced = 0  # of the bytes of all time, how many the peer may send, as it was told last
        self._promised = 0  # … and as it was ever told

        self.tx = bytearray()
        self.tx_messages: deque[int] = deque()
        """Of each message in ``tx`` twice the length that is left, and 1 for MSG_EOR."""
        self.tx_size = BUFFER_SIZE
        """Bytes that the writer may be ahead of the peer."""
        self.tx_cnt = 0
        self.peer_buf_alloc = 0
        self._peer_forwarded = 0  # of the bytes of all time

        self.peer_shutdown = 0
        """What the peer does no more: VIRTIO_VSOCK_SHUTDOWN_F_*."""
        self.shutdown_wanted = 0
        """What this end does no more."""
        self._shutdown_sent = 0
        self.response_due = False
        self.request_due = False
        self._update_due = False
        self._credit_asked = False

    def __repr__(self) -> str:
        return f"<Connection host:{self.local_port} guest:{self.peer_port} {self.state.name}>"

    # -- from the peer

    def receive(self, header: Header, payload: bytes) -> None:
        """Take a packet of the peer's for this connection."""
        self.take_credit(header)
        op = header.op
        if self.state is State.CONNECTING:
            self._receive_connecting(op)
        elif op == VIRTIO_VSOCK_OP_RW:
            self._receive_data(header.flags, payload)
        elif op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self._receive_shutdown(header.flags)
        elif op == VIRTIO_VSOCK_OP_RST:
            self._gone()
        elif op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            self._update_due = True
        elif op not in (VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_INVALID):
            self.hub.reset_connection(self, errno.EPROTO)
            return
        if self.state is not State.CLOSED:
            self._credit_asked = self._credit_asked and self._credit() == 0
            if self.output_due():
                self.hub.ready(self)
        self.tell()

    def take_credit(self, header: Header) -> None:
        """Take what the peer says of its buffer.

        A packet may have been overtaken by another of the peer's, and a peer may claim to have passed on what it has
        never got: neither moves the count.
        """
        self.peer_buf_alloc = header.buf_alloc
        forwarded = self._peer_forwarded + (header.fwd_cnt - self._peer_forwarded & _WRAP)
        if forwarded <= self.tx_cnt:
            self._peer_forwarded = forwarded

    def _receive_connecting(self, op: int) -> None:
        if op == VIRTIO_VSOCK_OP_RESPONSE:
            self.state = State.ESTABLISHED
            self.deadline = None
        elif op == VIRTIO_VSOCK_OP_RST:
            self.hub.forget(self, errno.ECONNRESET)
        elif op != VIRTIO_VSOCK_OP_INVALID:
            self.hub.reset_connection(self, errno.EPROTO)

    def _receive_data(self, flags: int, payload: bytes) -> None:
        self._rx_count += len(payload)
        if self._rx_count > self._promised:
            self.hub.reset_connection(self, errno.EPROTO)
            return
        if self.state is State.CLOSING or self.shutdown_wanted & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            self.fwd_cnt += len(payload)  # nobody reads it
            return
        self.rx += payload
        if self.messages:
            self.rx_partial += len(payload)
            if flags & VIRTIO_VSOCK_SEQ_EOM:
                self._rx_empty += self.rx_partial == 0
                if not EMPTY_MESSAGES.allows(self._rx_empty):  # they cost no credit
                    self.hub.reset_connection(self, errno.EPROTO)
                    return
                self.rx_messages.append(2 * self.rx_partial + bool(flags & VIRTIO_VSOCK_SEQ_EOR))
                self.rx_partial = 0

    def _receive_shutdown(self, flags: int) -> None:
        self.peer_shutdown |= flags & SHUTDOWN_BOTH
        if self.peer_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            self.tx.clear()
            self.tx_messages.clear()
        if self.peer_shutdown == SHUTDOWN_BOTH:
            self.hub.reset_connection(self, self.error)

    def _gone(self) -> None:
        """The peer has let it go: for a reader as if it had shut down; a message without its end is none."""
        self.peer_shutdown = SHUTDOWN_BOTH
        self.hub.forget(self, self.error)

    # -- to the peer

    def output_due(self) -> bool:
        """Whether :meth:`produce` has something to send, credit given."""
        return (
            self.request_due
            or self.response_due
            or self._update_due
            or self._shutdown_due() != 0
            or (self._has_data() and (self._credit() > 0 or not self._credit_asked or self._next_is_empty()))
        )

    def _has_data(self) -> bool:
        return bool(self.tx or self.tx_messages) and self.state in (State.ESTABLISHED, State.CLOSING)

    def _next_is_empty(self) -> bool:
        return bool(self.tx_messages) and self.tx_messages[0] < 2

    def _credit(self) -> int:
        """Bytes that the peer has room for."""
        return max(self.peer_buf_alloc - (self.tx_cnt - self._peer_forwarded), 0)

    def _shutdown_due(self) -> int:
        """The flags to send; that we send no more comes behind the last byte."""
        if self.state not in (State.ESTABLISHED, State.CLOSING):
            return 0
        flags = self.shutdown_wanted & ~self._shutdown_sent
        return flags & ~VIRTIO_VSOCK_SHUTDOWN_F_SEND if self.tx or self.tx_messages else flags

    def produce(self, room: int) -> tuple[int, int, bytes] | None:
        """Return operation, flags and data, of *room* bytes at most, of the next packet; None if there is none."""
        if self.request_due:
            self.request_due = False
            return VIRTIO_VSOCK_OP_REQUEST, 0, b""
        if self.response_due:
            self.response_due = False
            return VIRTIO_VSOCK_OP_RESPONSE, 0, b""
        if self._has_data():
            packet = self._produce_data(room)
            if packet is not None:
                return packet
        flags = self._shutdown_due()
        if flags:
            self._shutdown_sent |= flags
            return VIRTIO_VSOCK_OP_SHUTDOWN, self._shutdown_sent, b""
        if self._update_due:
            return VIRTIO_VSOCK_OP_CREDIT_UPDATE, 0, b""
        return None

    def _produce_data(self, room: int) -> tuple[int, int, bytes] | None:
        credit = self._credit()
        # As with Linux's host side no piece goes over a multiple of 64 KiB: a guest counts a piece as read when it is
        # read whole, and the kernel's vsock_test reads 64 KiB.
        size = min(len(self.tx), room, credit, MAX_PACKET_BYTES - self.tx_cnt % MAX_PACKET_BYTES)
        flags = 0
        if self.messages:
            left, eor = divmod(self.tx_messages[0], 2)
            size = min(size, left)
            if size == left:
                self.tx_messages.popleft()
                flags = VIRTIO_VSOCK_SEQ_EOM | (VIRTIO_VSOCK_SEQ_EOR if eor else 0)
            elif size:
                self.tx_messages[0] -= 2 * size
        if not size and not flags:
            if credit or self._credit_asked:
                return None
            self._credit_asked = True
            self.hub.ask_again(self, ASK_AGAIN_S)
            return VIRTIO_VSOCK_OP_CREDIT_REQUEST, 0, b""
        with memoryview(self.tx) as whole:
            data = bytes(whole[:size])
        del self.tx[:size]
        self.tx_cnt += size
        if self.state is State.CLOSING:
            self.hub.arm(self, CLOSE_TIMEOUT_S)
        return VIRTIO_VSOCK_OP_RW, flags, data

    def ask_again(self) -> None:
        """Ask for credit once more, if it still has data and none."""
        self.ask_again_at = None
        if self._has_data() and not self._credit():
            self._credit_asked = False
            self.hub.ready(self)

    def announce(self) -> tuple[int, int]:
        """Return ``buf_alloc`` and ``fwd_cnt`` for a packet that goes out now."""
        self._update_due = False
        self._announced = self.fwd_cnt + self.buf_alloc
        self._promised = max(self._promised, self._announced)
        return self.buf_alloc, self.fwd_cnt & _WRAP

    # -- the owner's

    def tell(self) -> None:
        """Tell the owner that something has changed."""
        if self.owner is not None:
            self.owner.changed()

    @property
    def readable(self) -> bool:
        """Whether :meth:`consume` has something to consume: bytes, or a whole message."""
        return bool(self.rx_messages if self.messages else self.rx)

    @property
    def at_end(self) -> bool:
        """Whether nothing more comes than is there."""
        return self.state is State.CLOSED or bool(self.peer_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND)

    @property
    def writable(self) -> int:
        """Bytes that :meth:`send` takes now."""
        if self.state is not State.ESTABLISHED:
            return 0
        return max(self.tx_size - len(self.tx), 0)

    def peek(self, size: int) -> tuple[bytes, int, bool]:
        """Return the first *size* bytes, of the first message; and that one's length, and whether it has MSG_EOR."""
        length, eor = divmod(self.rx_messages[0], 2) if self.messages else (len(self.rx), 0)
        with memoryview(self.rx) as whole:
            return bytes(whole[: min(size, length)]), length, bool(eor)

    def consume(self, size: int) -> None:
        """Take *size* bytes away, or the first message whatever its size, and let the peer know of the room."""
        if self.messages:
            size = self.rx_messages.popleft() >> 1
            self._rx_empty -= size == 0
        del self.rx[:size]
        self._forward(size)

    def _forward(self, size: int) -> None:
        self.fwd_cnt += size
        self._look_at_window()
        if self.state is State.CLOSED and not self.rx:
            self.hub.emptied(self)

    def _look_at_window(self) -> None:
        """Send an update where the peer knows of little room and there is more."""
        known = self._announced - self._rx_count
        now = self.fwd_cnt + self.buf_alloc - self._rx_count
        if self.state is State.ESTABLISHED and known < min(MAX_PACKET_BYTES, self.buf_alloc // 2) and known < now:
            self._update_due = True
            self.hub.ready(self)

    def set_buffer_size(self, size: int) -> None:
        """Keep up to *size* bytes for the reader (SO_VM_SOCKETS_BUFFER_SIZE); OSError if there is no memory for it."""
        BUFFER.check(size)
        self.hub.reserve_for(self, size)
        if self.state is State.ESTABLISHED:
            self._update_due = True
            self.hub.ready(self)

    def send(self, data: bytes | bytearray | memoryview, *, eor: bool = False) -> None:
        """Queue *data*, which :attr:`writable` has room for; in a seqpacket connection it is one message."""
        self.tx += data
        if self.messages:
            self.tx_messages.append(2 * len(data) + eor)
        self.hub.ready(self)

    def shutdown(self, flags: int) -> None:
        """Send no more, receive no more, or both (VIRTIO_VSOCK_SHUTDOWN_F_*)."""
        self.shutdown_wanted |= flags
        if flags & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            self._drop_received()
        if self.state is not State.CLOSED:
            self.hub.ready(self)
        self.tell()

    def _drop_received(self) -> None:
        size = len(self.rx)
        self.rx.clear()
        self.rx_messages.clear()
        self._rx_empty = self.rx_partial = 0
        self._forward(size)

    def drop_partial(self) -> None:
        """The end of a message will not come."""
        if self.rx_partial:
            del self.rx[-self.rx_partial :]
            self.rx_partial = 0

    def close(self) -> None:
        """The owner wants it no more: what it has sent still goes out."""
        self.owner = None
        self._drop_received()
        if self.state is State.CONNECTING:
            if self.request_due:
                self.hub.forget(self, errno.ECONNABORTED)  # nobody has heard of it
            else:
                self.hub.reset_connection(self, errno.ECONNABORTED)
        elif self.state is State.ESTABLISHED:
            self.state = State.CLOSING
            self.shutdown_wanted = SHUTDOWN_BOTH
            self.hub.arm(self, CLOSE_TIMEOUT_S)
            self.hub.ready(self)

    def abort(self) -> None:
        """Reset it at once."""
        self.owner = None
        if self.state is not State.CLOSED:
            self.hub.reset_connection(self, errno.ECONNABORTED)
