# SPDX-License-Identifier: Apache-2.0
"""A hostile guest's packets and any user's calls, in any order: the hub stays within its bounds."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.vsock import CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SEQPACKET, SHUTDOWN, STREAM, Clock

from softkvm.vmm.vsock.connection import State
from softkvm.vmm.vsock.hub import BUDGET, CONNECTIONS, Hub
from softkvm.vmm.vsock.packet import Header
from softkvm.vmm.vsock.sockets import VsockListener, VsockSocket

PORTS = st.sampled_from((0, 1, 2, 3, 0xFFFFFFFF))
NUMBERS = st.sampled_from((0, 1, 10, 4096, 1 << 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)) | st.integers(0, 0xFFFFFFFF)
PACKETS = st.builds(
    lambda op, kind, guest, host, data, length, flags, buf_alloc, fwd_cnt, cids: (
        Header(
            cids[0], cids[1], guest, host, len(data) if length is None else length, kind, op, flags, buf_alloc, fwd_cnt
        ),
        data,
    ),
    st.sampled_from((REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE)) | st.integers(0, 0xFFFF),
    st.sampled_from((STREAM, SEQPACKET)) | st.integers(0, 0xFFFF),
    PORTS,
    PORTS,
    st.sampled_from((b"", b"x", bytes(100), bytes(5000), bytes(70_000))),
    st.none() | st.none() | NUMBERS,
    st.integers(0, 3) | NUMBERS,
    NUMBERS,
    NUMBERS,
    st.sampled_from(((3, 2), (3, 2), (3, 2), (2, 3), (0, 2), (3, 0xFFFFFFFF))),
)
CALLS = st.tuples(
    st.sampled_from(("listen", "unlisten", "accept", "connect", "send", "recv", "shutdown", "close", "abort", "size")),
    st.integers(0, 7),
    st.sampled_from((0, 1, 100, 5000, 300_000)),
)
STEPS = st.lists(
    st.one_of(
        PACKETS,
        PACKETS,
        CALLS,
        st.tuples(st.just("transmit"), st.sampled_from((0, 1, 100, 4096, 1 << 20))),
        st.tuples(st.just("time"), st.sampled_from((0.1, 1.0, 9.0))),
        st.just(("reset", 0)),
    ),
    max_size=60,
)


class User:
    """Whoever uses the hub, and never waits."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.listeners: list[VsockListener] = []
        self.sockets: list[VsockSocket] = []

    def call(self, name: str, which: int, size: int) -> None:
        with contextlib.suppress(OSError):
            getattr(self, name)(which, size)

    def listen(self, which: int, size: int) -> None:
        kind = socket.SOCK_STREAM if size % 2 else socket.SOCK_SEQPACKET
        self.listeners.append(VsockListener(self.hub, which % 4, kind, 2))
        self.listeners[-1].settimeout(0)

    def unlisten(self, which: int, size: int) -> None:
        if self.listeners:
            self.listeners.pop(which % len(self.listeners)).close()

    def accept(self, which: int, size: int) -> None:
        if self.listeners:
            self._add(self.listeners[which % len(self.listeners)].accept()[0])

    def connect(self, which: int, size: int) -> None:
        kind = socket.SOCK_STREAM if size % 2 else socket.SOCK_SEQPACKET
        channel = VsockSocket(self.hub, kind)
        channel.adopt(self.hub.connect(which % 4, STREAM if size % 2 else SEQPACKET, local_port=size % 4))
        self._add(channel)

    def _add(self, channel: VsockSocket) -> None:
        channel.settimeout(0)
        self.sockets.append(channel)

    def _with(self, which: int, action: Callable[[VsockSocket], Any]) -> None:
        if self.sockets:
            action(self.sockets[which % len(self.sockets)])

    def send(self, which: int, size: int) -> None:
        self._with(which, lambda channel: channel.send(bytes(size)))

    def recv(self, which: int, size: int) -> None:
        self._with(which, lambda channel: channel.recv(size))

    def shutdown(self, which: int, size: int) -> None:
        how = (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)[size % 3]
        self._with(which, lambda channel: channel.shutdown(how))

    def close(self, which: int, size: int) -> None:
        self._with(which, lambda channel: channel.close())

    def abort(self, which: int, size: int) -> None:
        self._with(which, lambda channel: channel.abort())

    def size(self, which: int, size: int) -> None:
        self._with(which, lambda channel: setattr(channel, "buffer_size", size))

    def close_all(self) -> None:
        for closing in (*self.listeners, *self.sockets):
            closing.close()


def check(hub: Hub) -> None:
    """What holds at any time."""
    known = hub.connections
    assert len(known) + len(hub._unread) <= CONNECTIONS.most
    assert hub._reserved == sum(connection.buf_alloc for connection in (*known, *hub._unread)) <= BUDGET.most
    for connection in (*known, *hub._unread):
        assert len(connection.rx) <= connection._promised - connection.fwd_cnt or not connection.rx
        assert len(connection.tx) <= max(connection.tx_size, 300_000)  # a message is taken whole
        assert sum(size >> 1 for size in connection.rx_messages) + connection.rx_partial == (
            len(connection.rx) if connection.messages else 0
        )
        assert sum(size >> 1 for size in connection.tx_messages) == (len(connection.tx) if connection.messages else 0)
        assert connection.tx_cnt - connection._peer_forwarded >= 0
    assert all(connection.state is State.CLOSED for connection in hub._unread)
    assert set(hub._ready) == hub._ready_set


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_whatever_comes_the_hub_keeps_its_bounds(steps: list[Any]) -> None:
    clock = Clock()
    hub = Hub(3, clock=clock)
    user = User(hub)
    for step in steps:
        if isinstance(step[0], Header):
            resets = len(hub._resets)
            hub.receive(*step)
            if step[0].op == RST:
                assert len(hub._resets) == resets  # an RST is never answered
        elif step[0] == "transmit":
            packet = hub.transmit(step[1])
            if packet is not None:
                header = Header.unpack(packet[0])
                assert header.len == len(packet[1]) <= step[1]
                assert (header.src_cid, header.dst_cid) == (2, 3)
                assert header.op in range(1, 8) and (header.op == RW or not packet[1])
        elif step[0] == "time":
            clock.now += step[1]
            hub.expire()
        elif step[0] == "reset":
            hub.reset()
        else:
            user.call(*step)
        check(hub)
    user.close_all()
    clock.now += 100
    hub.expire()
    assert not hub.connections and not hub._unread and hub._reserved == 0
    while hub.has_output:
        packet = hub.transmit(0)
        assert packet is not None and Header.unpack(packet[0]).op == RST


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200_000), NUMBERS, NUMBERS), max_size=30))
def test_no_more_goes_out_than_any_promise_allows(steps: list[tuple[int, int, int]]) -> None:
    """Whatever the guest says of its buffer: what was sent is at most what it has ever had room for."""
    hub = Hub(3)
    connection = hub.connect(1, STREAM)
    packet = hub.transmit(0)
    assert packet is not None
    port = Header.unpack(packet[0]).src_port
    hub.receive(Header(3, 2, 1, port, 0, STREAM, RESPONSE, 0, 0, 0), b"")
    sent = allowed = 0
    for size, buf_alloc, fwd_cnt in steps:
        hub.receive(Header(3, 2, 1, port, 0, STREAM, CREDIT_UPDATE, 0, buf_alloc, fwd_cnt), b"")
        allowed = max(allowed, sent + buf_alloc)
        connection.send(bytes(min(size, connection.writable)))
        while (packet := hub.transmit(4096)) is not None:
            sent += len(packet[1])
        assert sent <= allowed
    hub.close()
