# SPDX-License-Identifier: Apache-2.0
"""All TCP connections of a guest's: which segment belongs to which, who may begin one, and how many there may be."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.net.link import HEADER, VIRTIO_NET_HDR_F_NEEDS_CSUM, Data, Link, Offloads
from softkvm.vmm.net.user.forward import Listener
from softkvm.vmm.net.user.icmp import quote_of
from softkvm.vmm.net.user.policy import Target
from softkvm.vmm.net.user.segment import ACK, RST, SYN, UNREACHABLE
from softkvm.vmm.net.user.sender import CLOSED, OPEN, Sender
from softkvm.vmm.net.user.tcp import CONNECTING, Connection
from softkvm.vmm.net.user.whole import Whole
from softkvm.vmm.net.wire import TCP, TCP_CHECKSUM, TCP_HEADER, Packet, Path

CONNECTIONS: Final = Size(
    "TCP connections of a user-mode network", 1024, None, giver="guest", effect="reset", where=__name__
)
HALF_OPEN: Final = Size(
    "TCP connections of a user-mode network that are not established yet", 128, None, giver="guest",
    effect="the SYN is ignored", where=__name__,
)  # fmt: skip
BUFFERED: Final = Size(
    "bytes that a user-mode network keeps for slow sockets", 64 << 20, None, giver="guest",
    effect="windows stay closed", where=__name__,
)  # fmt: skip

TICK_S: Final = 0.25
DELAY_S: Final = 0.002
"""How long a small amount may go without an acknowledgement (RFC 9293, 3.8.6.3: less than 0.5 s)."""

_SEGMENT: Final = struct.Struct(">4sIIHHHH")


class Connections:
    """The connections of *stack*."""

    def __init__(self, stack: Whole) -> None:
        self.stack = stack
        self.link: Link = stack.link
        self.clock = stack.clock
        self.by_key: dict[bytes, Connection] = {}
        self.half_open = 0
        self.buffered = 0
        self.queued = 0
        self.retransmitted = 0
        self.due: list[Sender] = []
        """Those that have an acknowledgement to send at the end of the batch."""
        self.soon: list[Sender] = []
        """Those whose acknowledgement may wait for data."""
        self._acknowledging = False
        self.blocked: dict[Sender, None] = {}
        """Those that wait until the driver takes frames."""
        self.options = b""
        """Of the segment that is looked at."""
        self._ticking = False
        self._port = 49151

    @property
    def takes(self) -> Offloads:
        """What the driver takes."""
        return self.link.takes

    @property
    def mtu(self) -> int:
        """Bytes of an IP packet."""
        return self.link.mtu

    def room(self) -> int:
        """Bytes that may still be kept for slow sockets, over all connections."""
        return max(BUFFERED.most - self.buffered, 0)

    def emit(self, head: bytes, payload: Sequence[Data], header: bytes) -> None:
        """Send a segment whose checksum is the pseudo header's alone."""
        self.stack.emit(head, payload, header)

    # -- from the guest

    def receive(self, packet: Packet) -> None:
        """Take a segment."""
        head, start = packet.frame.head, packet.start
        size = packet.end - start
        if size < TCP_HEADER or len(head) < start + TCP_HEADER:
            self.stack.count("malformed")
            return
        ports, sequence, acknowledgement, bits, window, _, _ = _SEGMENT.unpack_from(head, start)
        data = (bits >> 12) * 4
        if data < TCP_HEADER or data > size or not packet.sum_is_right():
            self.stack.count("malformed")
            return
        self.options = head[start + TCP_HEADER : start + data]
        key = packet.source + packet.destination + ports
        connection = self.by_key.get(key)
        if connection is not None:
            if not (connection.waiting and bits & (SYN | ACK | RST) == SYN):
                size -= data
                payload = packet.frame.views(start + data, packet.end) if size else ()
                connection.input(sequence, acknowledgement, bits & 0x3F, window, payload, size)
                return
            connection.drop()  # its ports are used once more (3.6.1)
        own = ports[2:] + ports[:2]
        if bits & (SYN | ACK | RST) == SYN:
            self._begin(packet, key, own, sequence, window)
        elif not bits & RST:
            # 3.10.7.1
            path = self.stack.path_back(packet)
            if bits & ACK:
                self.reset(path, own, acknowledgement)
            else:
                after = sequence + size - data + (bits & 1) + (bits >> 1 & 1)
                head = path.tcp(own, 0, after & 0xFFFFFFFF, RST | ACK, 0, b"", 0)
                self.emit(head, (), self._plain(path))

    def _begin(self, packet: Packet, key: bytes, ports: bytes, sequence: int, window: int) -> None:
        """The guest asks for a connection."""
        port = int.from_bytes(ports[:2], "big")
        target = self.stack.policy.target(TCP, packet.destination, port)
        if target is None:
            self.stack.refuse(packet, port, "tcp")
            return
        if not HALF_OPEN.allows(self.half_open + 1):
            self.stack.count("tcp_half_open_full")
            return
        path = self.stack.path_back(packet)
        host = self._socket(target)
        if host is None or not self._has_room():
            self.stack.count("tcp_full")
            after = (sequence + 1) & 0xFFFFFFFF
            self.emit(path.tcp(ports, 0, after, RST | ACK, 0, b"", 0), (), self._plain(path))
            if host is not None:
                host.close()
            return
        connection = Connection(self, key, path, ports, host)
        connection.take_syn(sequence, window, self.options)
        self._add(connection)
        error = host.connect_ex(target.address)
        if error == errno.EINPROGRESS:  # on the loopback it is connected as soon as the call is over
            error = host.connect_ex(target.address)
        if error == errno.EALREADY:
            connection.connect()
        else:
            connection.state = CONNECTING
            self.connect_ended(connection, error)

    def _has_room(self) -> bool:
        """Whether there may be another connection; one that only waits for its time to be over makes room."""
        if not CONNECTIONS.allows(len(self.by_key) + 1):
            waiting = next((connection for connection in self.by_key.values() if connection.waiting), None)
            if waiting is None:
                return False
            waiting.drop()
        return True

    def _socket(self, target: Target) -> socket.socket | None:
        """Return a socket for a connection to *target*; None if the host has no more."""
        try:
            host = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:
            self.stack.link.report(f"no socket for a connection of the guest's: {error.strerror}")
            return None
        return ready(host)

    def connect_ended(self, connection: Connection, error: int) -> None:
        """The host's socket is connected, or *error* says why not."""
        if not error:
            connection.connected()
        elif error in UNREACHABLE:
            connection.drop()
            path, ports = connection.path, connection.ports
            guest, peer = path.destination, path.source
            quote = quote_of(guest, peer, TCP, ports[2:] + ports[:2], (connection.rcv_nxt - 1) & 0xFFFFFFFF)
            self.stack.unreachable(peer, guest, UNREACHABLE[error], quote)
        else:
            connection.refuse()

    # -- from the host

    def accept(self, listener: Listener, host: socket.socket) -> None:
        """A client has connected to a forwarded port."""
        source, destination = self.stack.forward_addresses(listener)
        if not self._has_room() or not HALF_OPEN.allows(self.half_open + 1):
            self.stack.count("tcp_full")
            host.close()
            return
        ready(host)
        for _ in range(CONNECTIONS.most + 1):
            self._port = 49152 if self._port == 65535 else self._port + 1
            ports = struct.pack(">HH", self._port, listener.forward.guest_port)
            key = destination + source + ports[2:] + ports[:2]
            if key not in self.by_key:
                break
        path = self.stack.path_to(source, destination)
        connection = Connection(self, key, path, ports, host)
        self._add(connection)
        connection.open()
        self.finish()

    # -- what connections tell

    def _add(self, connection: Connection) -> None:
        self.by_key[connection.key] = connection
        self.half_open += 1

    def opened(self, connection: Connection) -> None:
        """*connection* is established."""
        self.half_open -= 1

    def forget(self, connection: Connection) -> None:
        """*connection* is no more."""
        if self.by_key.pop(connection.key, None) is not None and connection.state not in (OPEN, CLOSED):
            self.half_open -= 1
        self.blocked.pop(connection, None)

    def _plain(self, path: Path) -> bytes:
        return HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, 0, 0, path.tcp_start, TCP_CHECKSUM)

    def reset(self, path: Path, ports: bytes, sequence: int) -> None:
        """Send a reset with this sequence number (3.10.7.1)."""
        self.emit(path.tcp(ports, sequence, 0, RST, 0, b"", 0), (), self._plain(path))

    def finish(self) -> None:
        """The end of a batch: acknowledge what came, show the driver what was sent."""
        if self.due:
            due, self.due = self.due, []
            for connection in due:
                connection.acknowledge_due()
        self.link.flush()

    def acknowledge_soon(self) -> None:
        """Have those in :attr:`soon` acknowledge in a moment."""
        if not self._acknowledging:
            self._acknowledging = True
            self.link.worker.call_later(DELAY_S, self._acknowledge)

    def _acknowledge(self) -> None:
        self._acknowledging = False
        soon, self.soon = self.soon, []
        for connection in soon:
            connection.acknowledge_due()
        self.finish()

    def room_again(self) -> None:
        """The driver takes frames again."""
        blocked, self.blocked = self.blocked, {}
        for connection in blocked:
            connection.unblock()
        self.finish()

    def offloads(self) -> None:
        """The driver takes something else than before."""
        for connection in self.by_key.values():
            connection.offloads()

    # -- time

    def tick_soon(self) -> None:
        """Look at the clock for as long as a connection has a deadline."""
        if not self._ticking:
            self._ticking = True
            self.link.worker.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        now = self.clock()
        for connection in list(self.by_key.values()):
            connection.expired(now)
        if any(connection.deadline for connection in self.by_key.values()):
            self.tick_soon()
        self.finish()

    # -- the end

    def drop_all(self) -> None:
        """Break all connections off, on the host's side."""
        for connection in list(self.by_key.values()):
            connection.drop(reset=not connection.waiting)
        self.due.clear()
        self.soon.clear()

    def save(self) -> list[dict[str, Any]]:
        """What it takes to reset each connection towards the guest."""
        return [
            {
                "source": connection.path.source,
                "destination": connection.path.destination,
                "mac": connection.path.mac,
                "ports": connection.ports,
                "sequence": connection.snd_una,
                "acknowledgement": connection.rcv_nxt,
            }
            for connection in self.by_key.values()
            if connection.state == OPEN and not connection.waiting
        ]

    def reset_saved(self, saved: list[dict[str, Any]]) -> None:
        """Tell the guest that these connections are no more."""
        for entry in saved:
            path = Path(entry["mac"], self.stack.mac, entry["source"], entry["destination"])
            head = path.tcp(entry["ports"], entry["sequence"], entry["acknowledgement"], RST | ACK, 0, b"", 0)
            self.emit(head, (), self._plain(path))
        self.finish()

    def describe(self) -> list[dict[str, Any]]:
        """The connections, for whoever asks."""
        return [
            {
                "guest": self.stack.name_of(connection.path.destination, int.from_bytes(connection.ports[2:], "big")),
                "peer": self.stack.name_of(connection.path.source, int.from_bytes(connection.ports[:2], "big")),
                "state": connection.name,
            }
            for connection in self.by_key.values()
        ]


def ready(host: socket.socket) -> socket.socket:
    """Make a socket one that we can work with: it never waits, and sends at once."""
    host.setblocking(False)
    try:
        host.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass  # a UNIX socket
    return host
