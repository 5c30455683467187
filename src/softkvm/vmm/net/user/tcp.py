# SPDX-License-Identifier: Apache-2.0
"""One TCP connection of the guest's, ended here and continued by a socket of the host's.

The guest's side is RFC 9293; section numbers below are of that. What it leaves out, because the link neither loses nor
reorders: selective acknowledgements, timestamps, congestion control. What a guest itself loses (a full backlog, a
firewall) is sent once more, from the first byte that it has not acknowledged.

Data is copied once on its way to the guest, and kept until it is acknowledged; on its way to the host, sockets read
the guest's memory. What the host's socket does not take at once is kept, and the window is smaller by it.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from softkvm.vmm.net.link import (
    HANG_UP,
    READ,
    WRITE,
)
from softkvm.vmm.net.user.segment import ACK, FIN, MASK, RST, SYN, Options, before, behind, signed
from softkvm.vmm.net.user.sender import (
    CLOSED,
    DEFAULT_MSS,
    OPEN,
    WINDOW,
    Sender,
    SenderTable,
)
from softkvm.vmm.net.wire import TCP_HEADER, Path

WINDOW_SCALE: Final = 4

RETRIES: Final = 10
SYN_RETRIES: Final = 6
CONNECT_S: Final = 75.0
TIME_WAIT_S: Final = 2.0
"""Far less than twice a segment's lifetime, as a segment on this link doesn't live long."""

#: RFC 9293's names by (our FIN sent, ours acknowledged, the guest's FIN received).
_STATES: Final = {
    (False, False, False): "ESTABLISHED",
    (True, False, False): "FIN-WAIT-1",
    (True, True, False): "FIN-WAIT-2",
    (False, False, True): "CLOSE-WAIT",
    (True, False, True): "CLOSING",
    (True, True, True): "TIME-WAIT",
}

CONNECTING: Final = "CONNECTING"
SYN_SENT: Final = "SYN-SENT"
SYN_RECEIVED: Final = "SYN-RECEIVED"

_RESET: Final = struct.pack("ii", 1, 0)  # struct linger: on, no time

MSS_MIN: Final = 88
"""A smaller one is taken for this, as Linux does (TCP_MIN_SND_MSS)."""


class Table(SenderTable, Protocol):
    """What a connection asks of the table of all."""

    options: bytes
    buffered: int

    @property
    def mtu(self) -> int:
        """Bytes of an IP packet."""

    def reset(self, path: Path, ports: bytes, sequence: int) -> None:
        """Send a reset with this sequence number."""

    def connect_ended(self, connection: Connection, error: int) -> None:
        """The host's socket is connected, or *error* says why not."""

    def opened(self, connection: Connection) -> None:
        """*connection* is established."""

    def forget(self, connection: Connection) -> None:
        """*connection* is no more."""

    def finish(self) -> None:
        """The end of a batch."""


class Connection(Sender):
    """A connection of *path* and *ports* (ours, the guest's, 2 bytes each), continued by *host*, a socket.

    *key* is what names it in its *table*.
    """

    __slots__ = (
        "duplicates", "host_shut", "key", "scale", "to_host",
    )  # fmt: skip

    table: Table

    def __init__(self, table: Table, key: bytes, path: Path, ports: bytes, host: socket.socket) -> None:
        super().__init__(table, path, ports, host)
        self.key = key
        self.scale = 0
        self.to_host: deque[bytes] = deque()
        self.host_shut = False
        self.duplicates = 0

    def __repr__(self) -> str:
        return f"<Connection {self.key.hex()} {self.name}>"

    @property
    def name(self) -> str:
        """The state's name in RFC 9293 (3.3.2), CONNECTING while the host's socket isn't connected."""
        if self.state != OPEN:
            return self.state
        name = _STATES[self.fin_sent, self.fin_acknowledged, self.fin_received]
        return "LAST-ACK" if name == "CLOSING" and self._second else name

    # -- beginning

    def take_syn(self, sequence: int, window: int, options: bytes) -> None:
        """Take over what a SYN says."""
        found = Options(options)
        most = self.table.mtu - TCP_HEADER - (20 if self.path.version == 4 else 40)
        self.mss = min(max(found.mss or DEFAULT_MSS[self.path.version], MSS_MIN), most)
        if found.scale is not None:
            self.scale, self.scale_own = found.scale, WINDOW_SCALE
        self.rcv_nxt = self.edge = (sequence + 1) & MASK
        self.snd_wnd = window  # never scaled in a SYN (RFC 7323, 2.2)
        self.offloads()

    def connect(self) -> None:
        """The guest's SYN has come and the host's socket is on its way: answer when it has arrived."""
        self.state = CONNECTING
        self.deadline = self.table.clock() + CONNECT_S
        self.table.tick_soon()
        self._watch(WRITE)

    def connected(self) -> None:
        """The host's socket is connected: answer the SYN (3.10.7.2)."""
        self._watch(0)
        self.state = SYN_RECEIVED
        self._send_syn(ACK)

    def open(self) -> None:
        """A client has connected on the host: ask the guest (3.10.1)."""
        self.state = SYN_SENT
        self.scale_own = WINDOW_SCALE  # until the answer says that there is none
        self._send_syn(0)

    def _send_syn(self, bits: int) -> None:
        options = struct.pack(">BBH", 2, 4, self.table.mtu - TCP_HEADER - (20 if self.path.version == 4 else 40))
        if self.scale_own:
            options += bytes((1, 3, 3, WINDOW_SCALE))
        self.snd_nxt = self.snd_max = (self.iss + 1) & MASK
        window = min(WINDOW, 0xFFFF)
        acknowledgement = self.rcv_nxt if bits & ACK else 0
        self.edge = (self.rcv_nxt + window) & MASK
        head = self.path.tcp(self.ports, self.iss, acknowledgement, SYN | bits, window, options, 0)
        self.table.emit(head, (), self._header)
        self._arm()

    def _established(self) -> None:
        self.state = OPEN
        self._retries = 0
        self.deadline = 0.0
        self.table.opened(self)
        self._watch(READ)

    # -- segments of the guest's

    def input(
        self, sequence: int, acknowledgement: int, bits: int, window: int, payload: Sequence[memoryview], size: int
    ) -> None:
        """Take a segment whose checksum is right, with *size* bytes of data (3.10.7)."""
        if self.state == SYN_SENT:
            self._input_syn_sent(sequence, acknowledgement, bits, window)
            return
        if self.state == CONNECTING:
            if bits & RST:  # the guest has given up
                self.drop()
            return
        offset = signed(sequence - self.rcv_nxt)
        if offset:
            if bits & RST:
                if 0 < offset < signed(self.edge - self.rcv_nxt):
                    self._acknowledge_now()  # RFC 5961, 3.2
                return
            if offset > 0:
                self._acknowledge_now()  # something is missing before it
                return
            if bits & SYN:
                if self.state == SYN_RECEIVED and offset == -1:
                    self._resend_syn()
                else:
                    self._acknowledge_now()  # RFC 5961, 4.2
                return
            old = -offset
            if old > size or (old == size and not bits & FIN):
                # Nothing new, such as a probe. An acknowledgement in it is as good as another, and a duplicate of
                # old data must not count as one of ours.
                self._acknowledge_now()
                if self.state == SYN_RECEIVED or old > size + 1 or not bits & ACK:
                    return
                self._take_acknowledgement(acknowledgement, window, plain=False)
                return
            payload, size = behind(payload, old), size - old
        elif bits & (RST | SYN):
            if bits & RST:
                self.drop(reset=True)
            else:
                self._acknowledge_now()
            return
        if not bits & ACK:
            return
        plain = not size and not bits & FIN
        if self.state == SYN_RECEIVED:
            if signed(acknowledgement - self.iss) != 1:
                self.table.reset(self.path, self.ports, acknowledgement)
                return
            self.snd_una = acknowledgement
            self.snd_wnd = window << self.scale
            self._established()
        elif not self._take_acknowledgement(acknowledgement, window, plain):
            return
        if size and self.state == OPEN:
            size = self._take_data(payload, size)
        if bits & FIN and not self.fin_received and self.state == OPEN and size >= 0:
            self.fin_received = True
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK
            self._later(1)  # the host's end often follows at once
            if not self.buffered:
                self._shut_host()
        self._look()

    def _input_syn_sent(self, sequence: int, acknowledgement: int, bits: int, window: int) -> None:
        """3.10.7.3."""
        if bits & ACK and signed(acknowledgement - self.iss) != 1:
            if not bits & RST:
                self.table.reset(self.path, self.ports, acknowledgement)
            return
        if bits & RST:
            if bits & ACK:
                self.drop(reset=True)
            return
        if not bits & SYN:
            return
        options = self.table.options
        if Options(options).scale is None:
            self.scale_own = 0
        self.take_syn(sequence, window, options)
        if not bits & ACK:  # both have begun at once
            self.state = SYN_RECEIVED
            self._send_syn(ACK)
            return
        self.snd_una = acknowledgement
        self._acknowledge_now()
        self._established()

    def _resend_syn(self) -> None:
        self._send_syn(ACK if self.state == SYN_RECEIVED else 0)

    def _take_acknowledgement(self, acknowledgement: int, window: int, plain: bool) -> bool:
        """Take ACK and window; False if the segment is to be thrown away. *plain*: the segment has nothing else."""
        acknowledged = signed(acknowledgement - self.snd_una)
        if acknowledged > signed(self.snd_max - self.snd_una):
            self._acknowledge_now()
            return False
        if acknowledged < 0:
            return True
        window <<= self.scale
        if acknowledged:
            self.snd_una = acknowledgement
            if signed(self.snd_nxt - acknowledgement) < 0:
                self.snd_nxt = acknowledgement
            self.duplicates = self._retries = 0
            if self.fin_sent and acknowledgement == self.snd_max:
                self.fin_acknowledged = True
                acknowledged -= 1
            self._release(acknowledged)
            if self.snd_una == self.snd_max:
                self.deadline = 0.0
            else:
                self._arm()
        elif not window:
            self._retries = 0  # closed, and there to say so
        elif plain and window == self.snd_wnd and self.snd_una != self.snd_max:
            self.duplicates += 1
            if self.duplicates == 3:  # RFC 5681, 3.2
                self._go_back()
        opened = window > self.snd_wnd
        self.snd_wnd = window
        if (acknowledged or opened) and self.state == OPEN:
            if not self.host_eof:
                if not self._events & READ or self.snd_nxt != self.snd_max:  # else we are called when there is some
                    self.pump()
            elif self.snd_nxt != self.snd_max or self.queued or not self.fin_sent:
                self.output()
        return True

    def _take_data(self, payload: Sequence[memoryview], size: int) -> int:
        """Hand data on to the host; return how much, -1 if not all, as it is behind the window."""
        room = signed(self.edge - self.rcv_nxt)
        cut = size > room
        if cut:
            size = max(room, 0)
            payload = before(payload, size)
        if self.fin_received:
            return 0
        sent = 0
        if not self.buffered and size:
            try:
                sent = self.host.sendmsg(payload)
            except BlockingIOError:
                pass
            except OSError:
                self.abort()
                return -1
        if sent < size:
            rest = behind(payload, sent)
            self.to_host.append(b"".join(rest))
            self.buffered += size - sent
            self.table.buffered += size - sent
            self._watch(self._events | WRITE)
        self.rcv_nxt = (self.rcv_nxt + size) & MASK
        self._later(0 if cut else size)
        return -1 if cut else size

    # -- time

    def expired(self, now: float) -> None:
        """A while has passed."""
        if not self.deadline or now < self.deadline:
            return
        if self.state == OPEN and self.fin_acknowledged and self.fin_received and self.host_shut:
            self.drop()  # TIME-WAIT is over
            return
        if self.blocked:
            self._arm()
            return
        self._retries += 1
        if self.state == CONNECTING:
            self.drop()
        elif self.state in (SYN_SENT, SYN_RECEIVED):
            if self._retries > SYN_RETRIES:
                self.abort()
            else:
                self._resend_syn()
        elif self._retries > RETRIES:
            self.abort()
        elif self.snd_wnd:
            self._go_back()
        else:
            self._segment((self.snd_una - 1) & MASK, ACK)  # its answer has the window
            self._probe_later()

    # -- the host's side

    def _host_event(self, events: int) -> None:
        if events & HANG_UP:  # what we try next finds out how
            events = self._events
        if self.state == CONNECTING:
            self.table.connect_ended(self, self.host.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        elif self.state == OPEN:
            if events & WRITE and self._events & WRITE:
                self._flush_host()
            if events & READ and self._events & READ and self.state == OPEN:
                self.pump()
        self.table.finish()

    def _flush_host(self) -> None:
        """Hand kept data on."""
        while self.to_host:
            try:
                sent = self.host.sendmsg(list(self.to_host)[:64])
            except BlockingIOError:
                break
            except OSError:
                self.abort()
                return
            self.buffered -= sent
            self.table.buffered -= sent
            while self.to_host and sent >= len(self.to_host[0]):
                sent -= len(self.to_host.popleft())
            if sent:
                self.to_host[0] = self.to_host[0][sent:]
        if not self.to_host:
            self._watch(self._events & ~WRITE)
            if self.fin_received:
                self._shut_host()
                self._look()
                return
        # A window that has grown by much is news (3.8.6.2.2).
        if self.state == OPEN and (self._window() << self.scale_own) - signed(self.edge - self.rcv_nxt) >= WINDOW // 4:
            self._later()

    def _shut_host(self) -> None:
        """Everything of the guest's has gone on: tell the host that no more comes."""
        if not self.host_shut:
            self.host_shut = True
            try:
                self.host.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it is gone already; reading finds out how

    def _look(self) -> None:
        """Whether both sides are done."""
        if self.state == OPEN and self.fin_acknowledged and self.fin_received and self.host_shut:
            self._watch(0)
            self.host.close()
            self.deadline = self.table.clock() + TIME_WAIT_S
            self.table.tick_soon()

    @property
    def waiting(self) -> bool:
        """Whether it is in TIME-WAIT."""
        return self.state == OPEN and self.fin_acknowledged and self.fin_received and self.host_shut

    def abort(self) -> None:
        """Something went wrong on the host's side: reset the guest's (3.10.5)."""
        if self.state in (SYN_RECEIVED, OPEN):
            self.table.emit(
                self.path.tcp(self.ports, self.snd_nxt, self.rcv_nxt, RST | ACK, 0, b"", 0), (), self._header
            )
        self.drop(reset=True)

    def refuse(self) -> None:
        """Answer the guest's SYN with a reset."""
        self.table.emit(self.path.tcp(self.ports, 0, self.rcv_nxt, RST | ACK, 0, b"", 0), (), self._header)
        self.drop()

    def drop(self, *, reset: bool = False) -> None:
        """Forget the connection; *reset*: the host's peer is told that it broke."""
        if self.state == CLOSED:
            return
        self._watch(0)
        self.table.forget(self)
        self.state = CLOSED
        self.table.buffered -= self.buffered
        self.table.queued -= self.queued
        self.buffered = self.queued = 0
        self.to_host.clear()
        self._chunks.clear()
        if reset:
            try:
                self.host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            except OSError:
                pass
        self.host.close()
