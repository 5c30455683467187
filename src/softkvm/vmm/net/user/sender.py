# SPDX-License-Identifier: Apache-2.0
"""The half of a TCP connection that sends to the guest: what is queued, what fits its window, what is sent once more.

Sections are RFC 9293's. Data is kept until it is acknowledged; what a guest loses is sent from the first byte on that
it hasn't acknowledged.
"""

from __future__ import annotations

import secrets
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.net.link import (
    HEADER,
    READ,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    Data,
    Link,
    Offloads,
)
from softkvm.vmm.net.user.segment import ACK, FIN, MASK, PSH, signed
from softkvm.vmm.net.wire import TCP_CHECKSUM, TCP_HEADER, Path

WINDOW: Final = 512 << 10
"""Bytes that a guest may send ahead of the host's socket."""

IN_FLIGHT: Final = 1 << 20
"""Most bytes on their way to the guest that it has not acknowledged, of one connection."""

IN_FLIGHT_LEAST: Final = 16 << 10
"""The same while there are very many of all connections."""

QUEUED: Final = Size(
    "bytes of a user-mode network's that a guest hasn't acknowledged", 64 << 20, None, giver="guest",
    effect="16 KiB a connection", where=__name__,
)  # fmt: skip

PACKET_MAX: Final = 65535

RTO_S: Final = 1.0
RTO_MAX_S: Final = 30.0
PROBE_S: Final = 5.0
"""How long a window may be closed before we ask whether it still is (3.8.6.1)."""

DEFAULT_MSS: Final = {4: 536, 6: 1220}
"""What a peer takes that says nothing (3.7.1)."""

OPEN: Final = "OPEN"
CLOSED: Final = "CLOSED"

NOW: Final = 2
SOON: Final = 1


class SenderTable(Protocol):
    """What a sender asks of the table of all connections."""

    link: Link
    clock: Callable[[], float]
    due: list[Sender]
    soon: list[Sender]
    blocked: dict[Sender, None]
    queued: int
    retransmitted: int

    @property
    def takes(self) -> Offloads:
        """What the driver takes."""

    def room(self) -> int:
        """Bytes that may still be kept for slow sockets, over all connections."""

    def emit(self, head: bytes, payload: Sequence[Data], header: bytes) -> None:
        """Send a segment whose checksum is the pseudo header's alone."""

    def tick_soon(self) -> None:
        """Call :meth:`Sender.expired` in a while."""

    def acknowledge_soon(self) -> None:
        """Call :meth:`Sender.acknowledge_due` of those in :attr:`soon` in a moment."""


class Sender(ABC):
    """Sends from *host*, a socket, by *path* and *ports* (ours, the guest's, 2 bytes each)."""

    __slots__ = (
        "_chunks", "_consumed", "_events", "_header", "_header_gso", "_retries", "_second", "_unacknowledged",
        "acknowledge", "blocked", "buffered", "deadline", "edge", "fin_acknowledged", "fin_received", "fin_sent",
        "fin_wanted", "host", "host_eof", "iss", "mss", "path", "ports", "queued", "rcv_nxt", "scale_own", "segment",
        "snd_max", "snd_nxt", "snd_una", "snd_wnd", "state", "table",
    )  # fmt: skip

    def __init__(self, table: SenderTable, path: Path, ports: bytes, host: socket.socket) -> None:
        self.table = table
        self.path = path
        self.ports = ports
        self.host = host
        self.state = CLOSED
        self.iss = secrets.randbits(32)
        self.snd_una = self.iss
        """The first sequence number that the guest hasn't acknowledged."""
        self.snd_nxt = self.iss
        """What is sent next; behind what is sent once more it is less than :attr:`snd_max`."""
        self.snd_max = self.iss
        self.snd_wnd = 0
        self.rcv_nxt = 0
        self.edge = 0
        """The first sequence number behind the window that the guest knows of."""
        self.scale_own = 0
        self.mss = DEFAULT_MSS[path.version]
        self.segment = self.mss
        """Bytes of the largest segment, cut or not."""
        self.queued = 0
        """Bytes for the guest that it has not acknowledged, sent or not."""
        self._chunks: deque[bytes] = deque()
        self._consumed = 0  # bytes of the first chunk that are acknowledged
        self.buffered = 0
        """Bytes for the host that its socket hasn't taken."""
        self.fin_wanted = False
        self.fin_sent = False
        self.fin_acknowledged = False
        self.fin_received = False
        self.host_eof = False
        self.acknowledge = 0
        """Whether an acknowledgement is due: NOW, SOON or not at all."""
        self._unacknowledged = 0
        self.blocked = False
        self._events = 0
        self.deadline = 0.0
        """When :meth:`expired` has something to do; 0: never."""
        self._retries = 0
        self._second = False  # whether our FIN came behind the guest's
        self.offloads()

    @abstractmethod
    def _host_event(self, events: int) -> None:
        """The host's socket has events."""

    @abstractmethod
    def _look(self) -> None:
        """Look whether both sides are done."""

    @abstractmethod
    def abort(self) -> None:
        """Something went wrong on the host's side: reset the guest's (3.10.5)."""

    @abstractmethod
    def expired(self, now: float) -> None:
        """A while has passed."""

    def offloads(self) -> None:
        """Make the virtio headers of a segment, whole or cut, of what the driver takes."""
        start = self.path.tcp_start
        self._header = HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, 0, 0, start, TCP_CHECKSUM)
        four = self.path.version == 4
        kind = VIRTIO_NET_HDR_GSO_TCPV4 if four else VIRTIO_NET_HDR_GSO_TCPV6
        size = start + TCP_HEADER
        self._header_gso = HEADER.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, size, self.mss, start, TCP_CHECKSUM)
        takes = self.table.takes
        uncut = takes.checksum and (takes.tso4 if four else takes.tso6)
        # A packet of 65,535 with IPv4's header, or behind IPv6's.
        most = PACKET_MAX - TCP_HEADER - (20 if four else 0)
        self.segment = most // self.mss * self.mss if uncut else self.mss

    def _window(self) -> int:
        """What the window is to be now; the guest knows :attr:`edge`, which never goes back (3.8.6)."""
        room = min(WINDOW, self.table.room()) - self.buffered if self.buffered else WINDOW
        room = max(room, signed(self.edge - self.rcv_nxt), 0)
        return min(room, 0xFFFF << self.scale_own) >> self.scale_own

    def _segment(self, sequence: int, bits: int, payload: Sequence[Data] = (), size: int = 0) -> None:
        window = self._window()
        self.edge = (self.rcv_nxt + (window << self.scale_own)) & MASK
        self.acknowledge = self._unacknowledged = 0
        head = self.path.tcp(self.ports, sequence, self.rcv_nxt, bits, window, b"", size)
        self.table.emit(head, payload, self._header if size <= self.mss else self._header_gso)

    def _later(self, size: int = 0) -> None:
        """Acknowledge *size* bytes: two full segments, or what is urgent, at the end of the batch, less in a while.

        Data that goes the other way does it before (RFC 9293, 3.8.6.3; RFC 5681, 4.2).
        """
        self._unacknowledged += size
        if not size or self._unacknowledged >= 2 * self.mss:
            if self.acknowledge != NOW:
                self.acknowledge = NOW
                self.table.due.append(self)
        elif not self.acknowledge:
            self.acknowledge = SOON
            self.table.soon.append(self)
            self.table.acknowledge_soon()

    def acknowledge_due(self) -> None:
        """Send the acknowledgement that was put off, if nothing has had it since."""
        if self.acknowledge and self.state == OPEN:
            self._segment(self.snd_nxt, ACK)

    def _acknowledge_now(self) -> None:
        self._segment(self.snd_nxt, ACK)

    def _room(self) -> int:
        """How many more bytes the guest has room for, and may be kept until it acknowledges them."""
        most = IN_FLIGHT if self.table.queued < QUEUED.most else IN_FLIGHT_LEAST
        return min(self.snd_wnd, most) - self.queued

    def pump(self) -> None:
        """Read from the host's socket what the guest has room for, and send it."""
        link = self.table.link
        if self.snd_nxt != self.snd_max or self.blocked:
            self.output()
        while not self.host_eof:
            room = self._room()
            if room <= 0 or (room < self.mss and self.queued):  # no silly windows (3.8.6.2.1)
                self._watch(self._events & ~READ)
                if not self.deadline:
                    self._probe_later()
                return
            if self.blocked or not link.ready():
                self._block()
                return
            asked = min(room, self.segment)
            try:
                data = self.host.recv(asked)
            except BlockingIOError:
                self._watch(self._events | READ)
                return
            except OSError:
                self.abort()
                return
            if not data:
                self.host_eof = self.fin_wanted = True
                self._watch(self._events & ~READ)
                self.output()
                self._look()
                return
            size = len(data)
            self._chunks.append(data)
            self.queued += size
            self.table.queued += size
            if self.snd_nxt == self.snd_max and not self.blocked:
                self._send_next((data,), size)
            else:
                self.output()
            if size < asked:  # that was all; if more has come meanwhile, we are called
                self._watch(self._events | READ)
                return

    def _send_next(self, payload: Sequence[Data], size: int) -> None:
        """Send the next *size* bytes."""
        last = signed(self.snd_nxt - self.snd_una) + size == self.queued
        self._segment(self.snd_nxt, ACK | PSH if last else ACK, payload, size)
        self.snd_nxt = (self.snd_nxt + size) & MASK
        if signed(self.snd_nxt - self.snd_max) > 0:
            self.snd_max = self.snd_nxt
        if not self.deadline:
            self._arm()

    def output(self) -> None:
        """Send what is queued and has not been sent, or is to be sent once more; then FIN, if nothing comes behind."""
        link = self.table.link
        while True:
            at = signed(self.snd_nxt - self.snd_una)
            left = min(self.queued, self.snd_wnd) - at
            if left <= 0:
                break
            if not link.ready():
                self._block()
                return
            size = min(left, self.segment)
            self._send_next(self._gather(at, size), size)
        self.blocked = False
        if self.fin_wanted and not self.fin_acknowledged and at == self.queued:
            self._segment(self.snd_nxt, FIN | ACK)
            self.snd_nxt = (self.snd_nxt + 1) & MASK
            self.snd_max = self.snd_nxt
            self._second = self.fin_received if not self.fin_sent else self._second
            self.fin_sent = True
            if not self.deadline:
                self._arm()

    def _gather(self, at: int, size: int) -> list[memoryview]:
        """Return *size* queued bytes, *at* bytes behind the first unacknowledged one."""
        at += self._consumed
        found = []
        for chunk in self._chunks:
            if at < len(chunk):
                piece = memoryview(chunk)[max(at, 0) : at + size] if at >= 0 else memoryview(chunk)[:size]
                found.append(piece)
                size -= len(piece)
                at = 0
                if not size:
                    break
            else:
                at -= len(chunk)
        return found

    def _block(self) -> None:
        """Go on when the driver has made room."""
        self.blocked = True
        self._watch(self._events & ~READ)
        self.table.blocked[self] = None

    def unblock(self) -> None:
        """The driver has made room."""
        self.blocked = False
        if self.state == OPEN:
            self.output()
            if not self.host_eof and not self.blocked:
                self.pump()

    def _arm(self) -> None:
        self.deadline = self.table.clock() + min(RTO_S * (1 << self._retries), RTO_MAX_S)
        self.table.tick_soon()

    def _probe_later(self) -> None:
        """Ask in a while whether the window is still closed."""
        self.deadline = self.table.clock() + PROBE_S
        self.table.tick_soon()

    def _go_back(self) -> None:
        """Send everything once more that is not acknowledged."""
        self.snd_nxt = self.snd_una
        self.table.retransmitted += 1
        self._arm()
        self.output()

    def _release(self, size: int) -> None:
        """Forget *size* bytes that the guest has."""
        self.queued -= size
        self.table.queued -= size
        size += self._consumed
        chunks = self._chunks
        while chunks and size >= len(chunks[0]):
            size -= len(chunks.popleft())
        self._consumed = size

    def _watch(self, events: int) -> None:
        if events != self._events:
            worker = self.table.link.worker
            if not events:
                worker.remove(self.host)
            elif self._events:
                worker.modify(self.host, events)
            else:
                worker.add(self.host, events, self._host_event)
            self._events = events
