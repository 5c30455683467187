# SPDX-License-Identifier: Apache-2.0
"""States, credit, close and RST of the host's ends, packet by packet (VIRTIO 1.3, 5.10.6; Linux's net/vmw_vsock)."""

from __future__ import annotations

import errno
import gc
import socket
import weakref

import pytest
from tests.support.vsock import (
    BUF_ALLOC,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EOM,
    EOR,
    RCV,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SEND,
    SEQPACKET,
    SHUTDOWN,
    STREAM,
    Clock,
    Guest,
)

from softkvm.vmm.vsock.connection import ASK_AGAIN_S, BUFFER_SIZE, CLOSE_TIMEOUT_S, Connection, State
from softkvm.vmm.vsock.hub import BUDGET, CONNECTIONS, RESETS, Hub
from softkvm.vmm.vsock.sockets import VsockListener, VsockSocket

GUEST_PORT, HOST_PORT = 7000, 1234


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> Hub:
    return Hub(3, clock=clock)


@pytest.fixture
def guest(hub: Hub) -> Guest:
    return Guest(hub)


def accept(hub: Hub, guest: Guest, kind: int = STREAM, port: int = GUEST_PORT) -> VsockSocket:
    """A connection that the guest has made."""
    sockets = {STREAM: socket.SOCK_STREAM, SEQPACKET: socket.SOCK_SEQPACKET}
    listener = VsockListener(hub, HOST_PORT, sockets[kind], 1)
    guest.send(REQUEST, port, HOST_PORT, kind=kind)
    accepted, peer = listener.accept()
    assert peer == (3, port)
    listener.close()
    ((header, _),) = guest.all()
    assert (header.op, header.src_port, header.dst_port, header.type) == (RESPONSE, HOST_PORT, port, kind)
    return accepted


def connect(hub: Hub, guest: Guest, kind: int = STREAM, *, buf_alloc: int | None = None) -> tuple[Connection, int]:
    """A connection that the host has made, and the host's port."""
    connection = hub.connect(GUEST_PORT, kind)
    ((header, _),) = guest.all()
    assert (header.op, header.dst_port, header.type) == (REQUEST, GUEST_PORT, kind)
    assert header.buf_alloc == BUFFER_SIZE and header.fwd_cnt == 0
    guest.send(RESPONSE, GUEST_PORT, header.src_port, kind=kind, buf_alloc=buf_alloc)
    assert connection.state is State.ESTABLISHED
    return connection, header.src_port


# -- connecting


def test_a_request_to_nobody_is_reset(hub: Hub, guest: Guest) -> None:
    guest.send(REQUEST, GUEST_PORT, HOST_PORT)
    ((header, _),) = guest.all()
    assert (header.op, header.src_port, header.dst_port) == (RST, HOST_PORT, GUEST_PORT)


def test_a_listener_of_the_other_type_is_nobody(hub: Hub, guest: Guest) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_SEQPACKET, 1)
    guest.send(REQUEST, GUEST_PORT, HOST_PORT, kind=STREAM)
    assert guest.ops() == [RST]
    listener.close()


def test_a_full_backlog_resets(hub: Hub, guest: Guest) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 1)
    guest.send(REQUEST, 1, HOST_PORT)
    guest.send(REQUEST, 2, HOST_PORT)
    assert sorted(guest.ops()) == [RESPONSE, RST]
    listener.close()
    assert guest.ops() == [RST]  # nobody had accepted it


def test_a_port_is_listened_at_once(hub: Hub) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 1)
    with pytest.raises(OSError) as error:
        VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 1)
    assert error.value.errno == errno.EADDRINUSE
    listener.close()
    VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 1).close()


@pytest.mark.parametrize(
    ("op", "code", "answer"),
    [(RST, errno.ECONNRESET, []), (RW, errno.EPROTO, [RST]), (SHUTDOWN, errno.EPROTO, [RST])],
)
def test_any_answer_but_a_response_ends_a_request(
    hub: Hub, guest: Guest, op: int, code: int, answer: list[int]
) -> None:
    connection = hub.connect(GUEST_PORT, STREAM)
    ((header, _),) = guest.all()
    guest.send(op, GUEST_PORT, header.src_port)
    assert (connection.state, connection.error) == (State.CLOSED, code)
    assert guest.ops() == answer and not hub.connections


def test_a_request_without_an_answer_times_out_and_a_late_answer_is_reset(hub: Hub, guest: Guest, clock: Clock) -> None:
    connection = hub.connect(GUEST_PORT, STREAM, timeout_s=2)
    ((header, _),) = guest.all()
    clock.now = 1.9
    hub.expire()
    assert connection.state is State.CONNECTING
    clock.now = 2.0
    hub.expire()
    assert (connection.state, connection.error) == (State.CLOSED, errno.ETIMEDOUT)
    assert guest.ops() == [RST]
    guest.send(RESPONSE, GUEST_PORT, header.src_port)
    assert guest.ops() == [RST]


def test_a_request_that_was_cancelled_before_it_went_out_does_not(hub: Hub, guest: Guest) -> None:
    hub.connect(GUEST_PORT, STREAM).close()
    assert guest.ops() == [] and not hub.connections


def test_a_request_that_was_cancelled_behind_is_reset(hub: Hub, guest: Guest) -> None:
    connection = hub.connect(GUEST_PORT, STREAM)
    assert guest.ops() == [REQUEST]
    connection.close()
    assert guest.ops() == [RST] and not hub.connections


def test_a_driver_that_resets_its_device_does_not_see_requests_from_before_end(hub: Hub, guest: Guest) -> None:
    waiting = hub.connect(GUEST_PORT, STREAM)
    hub.reset()
    assert waiting.state is State.CONNECTING
    assert guest.ops() == [REQUEST]
    hub.reset()
    assert (waiting.state, waiting.error) == (State.CLOSED, errno.ECONNRESET)


# -- packets for nobody


def test_what_is_not_the_guests_or_not_for_the_host_is_dropped(hub: Hub, guest: Guest) -> None:
    guest.send(REQUEST, GUEST_PORT, HOST_PORT, src_cid=4)
    guest.send(REQUEST, GUEST_PORT, HOST_PORT, dst_cid=1)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"abc", length=4)
    assert guest.ops() == [] and hub.dropped == 3


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 77])
def test_a_packet_without_a_connection_is_reset(hub: Hub, guest: Guest, op: int) -> None:
    guest.send(op, GUEST_PORT, HOST_PORT)
    assert guest.ops() == [RST]


def test_rst_is_never_answered(hub: Hub, guest: Guest) -> None:
    guest.send(RST, GUEST_PORT, HOST_PORT)
    guest.send(RST, GUEST_PORT, HOST_PORT, kind=9)
    assert guest.ops() == []


@pytest.mark.parametrize("kind", [0, 3, 0xFFFF])
def test_an_unknown_type_is_reset(hub: Hub, guest: Guest, kind: int) -> None:
    guest.send(REQUEST, GUEST_PORT, HOST_PORT, kind=kind)
    ((header, _),) = guest.all()
    assert (header.op, header.type) == (RST, kind)


def test_a_type_that_was_not_negotiated_is_reset(hub: Hub, guest: Guest) -> None:
    hub.kinds = frozenset((STREAM,))
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_SEQPACKET, 1)
    guest.send(REQUEST, GUEST_PORT, HOST_PORT, kind=SEQPACKET)
    assert guest.ops() == [RST]
    with pytest.raises(OSError) as error:
        hub.connect(GUEST_PORT, SEQPACKET)
    assert error.value.errno == errno.EPROTONOSUPPORT
    listener.close()


def test_a_packet_of_the_other_type_is_reset_and_the_connection_stays(hub: Hub, guest: Guest) -> None:
    connection, port = connect(hub, guest)
    guest.send(RW, GUEST_PORT, port, b"x", kind=SEQPACKET)
    assert guest.ops() == [RST]
    assert connection.state is State.ESTABLISHED and not connection.rx


# -- data and credit


def test_bytes_arrive_in_order(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"abc")
    guest.send(RW, GUEST_PORT, HOST_PORT, b"defg", length=2)  # what is behind the length is no data
    assert accepted.recv(2) == b"ab"
    assert accepted.recv(9, socket.MSG_PEEK) == b"cde"
    assert accepted.recv(9) == b"cde"


def test_no_more_is_sent_than_the_peer_has_room_for(hub: Hub, guest: Guest) -> None:
    connection, port = connect(hub, guest, buf_alloc=1000)
    connection.send(bytes(2500))
    packets = guest.all()
    assert [(header.op, len(data)) for header, data in packets] == [(RW, 1000), (CREDIT_REQUEST, 0)]
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=1000, fwd_cnt=400)
    assert [len(data) for header, data in guest.all() if header.op == RW] == [400]
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=5000, fwd_cnt=1400)
    assert [len(data) for header, data in guest.all() if header.op == RW] == [1100]
    assert connection.tx_cnt == 2500


def test_credit_is_asked_for_once(hub: Hub, guest: Guest) -> None:
    connection, port = connect(hub, guest, buf_alloc=10)
    connection.send(bytes(30))
    assert guest.ops() == [RW, CREDIT_REQUEST]
    connection.send(bytes(30))
    assert guest.ops() == []
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=10, fwd_cnt=0)
    assert guest.ops() == []
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=10, fwd_cnt=10)
    assert guest.ops() == [RW, CREDIT_REQUEST]


def test_credit_is_asked_for_again_after_a_while(hub: Hub, guest: Guest, clock: Clock) -> None:
    connection, port = connect(hub, guest, buf_alloc=10)
    connection.send(bytes(30))
    assert guest.ops() == [RW, CREDIT_REQUEST]
    clock.now = ASK_AGAIN_S
    hub.expire()
    assert guest.ops() == [CREDIT_REQUEST]
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=100, fwd_cnt=10)
    assert guest.ops() == [RW]
    clock.now = 2 * ASK_AGAIN_S
    hub.expire()
    assert guest.ops() == []


def test_counters_wrap(hub: Hub, guest: Guest) -> None:
    connection, port = connect(hub, guest, buf_alloc=100)
    connection.tx_cnt = (1 << 32) - 50  # as if it had sent so much
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=100, fwd_cnt=(1 << 32) - 60)
    connection.send(bytes(200))
    assert sum(len(data) for _, data in guest.all()) == 90
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=100, fwd_cnt=40)
    assert [len(data) for header, data in guest.all() if header.op == RW] == [100]


@pytest.mark.parametrize("fwd_cnt", [51, 9, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_lie_or_old_news_about_what_was_passed_on_gives_no_credit(hub: Hub, guest: Guest, fwd_cnt: int) -> None:
    connection, port = connect(hub, guest, buf_alloc=50)
    connection.send(bytes(200))
    assert [len(data) for header, data in guest.all() if header.op == RW] == [50]
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=50, fwd_cnt=10)
    assert [len(data) for header, data in guest.all() if header.op == RW] == [10]
    guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=50, fwd_cnt=fwd_cnt + 10 & 0xFFFFFFFF)
    sent = sum(len(data) for header, data in guest.all() if header.op == RW)
    assert sent == (9 if fwd_cnt == 9 else 0)


def test_a_credit_request_is_answered(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    guest.send(RW, GUEST_PORT, HOST_PORT, bytes(100))
    assert accepted.recv(60) == bytes(60)
    assert guest.ops() == []
    guest.send(CREDIT_REQUEST, GUEST_PORT, HOST_PORT)
    ((header, _),) = guest.all()
    assert (header.op, header.buf_alloc, header.fwd_cnt) == (CREDIT_UPDATE, BUFFER_SIZE, 60)


def test_the_peer_is_told_of_room_when_it_knows_of_little(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    for _ in range(4):
        guest.send(RW, GUEST_PORT, HOST_PORT, bytes(64 << 10))
    assert guest.ops() == []
    accepted.recv(1000)
    ((header, _),) = guest.all()
    assert (header.op, header.fwd_cnt) == (CREDIT_UPDATE, 1000)


def test_a_peer_that_sends_more_than_it_was_promised_is_reset(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    guest.send(RW, GUEST_PORT, HOST_PORT, bytes(BUFFER_SIZE))
    assert accepted.connection.state is State.ESTABLISHED
    guest.send(RW, GUEST_PORT, HOST_PORT, b"x")
    assert guest.ops() == [RST] and not hub.connections
    with pytest.raises(OSError) as error:
        accepted.recv(1)
    assert error.value.errno == errno.EPROTO


def test_a_buffer_that_becomes_smaller_keeps_what_was_promised(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.buffer_size = 8192
    ((header, _),) = guest.all()
    assert (header.op, header.buf_alloc) == (CREDIT_UPDATE, 8192)
    guest.send(RW, GUEST_PORT, HOST_PORT, bytes(BUFFER_SIZE))  # it was on its way
    assert len(accepted.recv(1 << 20)) == BUFFER_SIZE


def test_room_of_no_bytes_holds_data_back_and_loses_none(hub: Hub, guest: Guest) -> None:
    connection, _ = connect(hub, guest)
    connection.send(b"hello")
    guest.room = 0
    assert guest.all() == [] and hub.has_output
    guest.room = 3
    assert [data for _, data in guest.all()] == [b"hel", b"lo"]


def test_connections_take_turns(hub: Hub, guest: Guest) -> None:
    pairs = [connect(hub, guest) for _ in range(3)]
    for connection, _ in pairs:
        connection.send(bytes(3 * 4096))
    ports = [header.src_port for header, _ in guest.all()]
    assert ports == 3 * [port for _, port in pairs]


# -- messages


def test_messages_keep_their_bounds_however_they_are_cut(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest, SEQPACKET)
    accepted.settimeout(0)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"one", kind=SEQPACKET, flags=EOM)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"tw", kind=SEQPACKET)
    assert accepted.recv(10) == b"one"
    with pytest.raises(BlockingIOError):
        accepted.recv(10)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"o", kind=SEQPACKET, flags=EOM | EOR)
    guest.send(RW, GUEST_PORT, HOST_PORT, kind=SEQPACKET, flags=EOM)
    assert accepted.recvmsg(2, socket.MSG_PEEK) == (b"tw", socket.MSG_EOR | socket.MSG_TRUNC, 3)
    assert accepted.recvmsg(3) == (b"two", socket.MSG_EOR, 3)
    assert accepted.recvmsg(3) == (b"", 0, 0)


def test_what_is_cut_off_a_message_is_lost(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest, SEQPACKET)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"abcdef", kind=SEQPACKET, flags=EOM)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"next", kind=SEQPACKET, flags=EOM)
    assert accepted.recvmsg(2) == (b"ab", socket.MSG_TRUNC, 6)
    assert accepted.recv(9) == b"next"
    assert accepted.connection.fwd_cnt == 10


def test_a_messages_end_is_with_its_last_fragment(hub: Hub, guest: Guest) -> None:
    connection, _ = connect(hub, guest, SEQPACKET)
    connection.send(bytes(5000), eor=True)
    connection.send(b"")
    connection.send(b"z")
    assert [(len(data), header.flags) for header, data in guest.all()] == [
        (4096, 0), (904, EOM | EOR), (0, EOM), (1, EOM),
    ]  # fmt: skip


def test_a_message_that_does_not_fit_the_peers_buffer_is_emsgsize(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest, SEQPACKET)
    with pytest.raises(OSError) as error:
        accepted.send(bytes(BUF_ALLOC + 1))
    assert error.value.errno == errno.EMSGSIZE
    assert accepted.send(bytes(BUF_ALLOC)) == BUF_ALLOC


def test_empty_messages_are_bounded(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest, SEQPACKET)
    for _ in range(1024):
        guest.send(RW, GUEST_PORT, HOST_PORT, kind=SEQPACKET, flags=EOM)
    assert hub.connections
    accepted.recv(1)
    guest.send(RW, GUEST_PORT, HOST_PORT, kind=SEQPACKET, flags=EOM)
    assert hub.connections
    guest.send(RW, GUEST_PORT, HOST_PORT, kind=SEQPACKET, flags=EOM)
    assert guest.ops() == [RST] and not hub.connections


# -- half-close and close


def test_a_peer_that_sends_no_more_can_still_be_sent_to(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"last")
    guest.send(SHUTDOWN, GUEST_PORT, HOST_PORT, flags=SEND)
    assert accepted.recv(9) == b"last"
    assert accepted.recv(9) == b""
    assert accepted.send(b"still") == 5
    assert [(header.op, data) for header, data in guest.all()] == [(RW, b"still")]


def test_a_peer_that_receives_no_more_is_epipe(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.send(b"on its way")
    guest.send(SHUTDOWN, GUEST_PORT, HOST_PORT, flags=RCV)
    with pytest.raises(BrokenPipeError):
        accepted.send(b"x")
    assert guest.ops() == []
    guest.send(RW, GUEST_PORT, HOST_PORT, b"data")
    assert accepted.recv(9) == b"data"


def test_our_half_close_goes_behind_the_last_byte(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.send(bytes(5000))
    accepted.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        accepted.send(b"x")
    assert [(header.op, header.flags, len(data)) for header, data in guest.all()] == [
        (RW, 0, 4096), (RW, 0, 904), (SHUTDOWN, SEND, 0),
    ]  # fmt: skip
    accepted.shutdown(socket.SHUT_RD)
    assert [(header.op, header.flags) for header, _ in guest.all()] == [(SHUTDOWN, RCV | SEND)]


def test_a_peers_close_is_answered_with_rst_and_what_it_sent_can_be_read(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    guest.send(RW, GUEST_PORT, HOST_PORT, b"A")
    guest.send(SHUTDOWN, GUEST_PORT, HOST_PORT, flags=RCV | SEND)
    assert guest.ops() == [RST] and not hub.connections
    with pytest.raises(BrokenPipeError):
        accepted.send(b"x")
    assert (accepted.recv(1), accepted.recv(1)) == (b"A", b"")
    accepted.close()
    assert guest.ops() == []


def test_the_guests_port_can_be_used_again_after_its_close(hub: Hub, guest: Guest) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 8)
    for text in (b"first", b"second"):
        guest.send(REQUEST, GUEST_PORT, HOST_PORT)
        assert RESPONSE in guest.ops()
        guest.send(RW, GUEST_PORT, HOST_PORT, text)
        guest.send(SHUTDOWN, GUEST_PORT, HOST_PORT, flags=RCV | SEND)
    assert [listener.accept()[0].recv(9) for _ in range(2)] == [b"first", b"second"]
    listener.close()


def test_our_close_waits_for_the_peers_rst(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.send(b"A")
    accepted.close()
    assert [(header.op, header.flags) for header, _ in guest.all()] == [(RW, 0), (SHUTDOWN, RCV | SEND)]
    assert len(hub.connections) == 1
    guest.send(RW, GUEST_PORT, HOST_PORT, b"late")  # dropped
    assert guest.ops() == []
    guest.send(RST, GUEST_PORT, HOST_PORT)
    assert not hub.connections and guest.ops() == []


def test_both_close_at_once(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.close()
    guest.send(SHUTDOWN, GUEST_PORT, HOST_PORT, flags=RCV | SEND)
    assert guest.ops() == [RST] and not hub.connections


def test_what_was_sent_before_a_close_still_goes_out_as_credit_comes(hub: Hub, guest: Guest, clock: Clock) -> None:
    connection, port = connect(hub, guest, buf_alloc=10)
    connection.send(bytes(25))
    connection.close()
    sent = 0
    packets = []
    for _ in range(3):
        clock.now += CLOSE_TIMEOUT_S - 1  # slowly, but it goes on
        hub.expire()
        packets += guest.all()
        sent = sum(len(data) for _, data in packets)
        guest.send(CREDIT_UPDATE, GUEST_PORT, port, buf_alloc=10, fwd_cnt=sent)
    assert sent == 25
    assert (packets[-1][0].op, packets[-1][0].flags) == (SHUTDOWN, RCV | SEND)


def test_an_abort_is_a_reset(hub: Hub, guest: Guest) -> None:
    accepted = accept(hub, guest)
    accepted.send(b"lost")
    accepted.abort()
    assert guest.ops() == [RST] and not hub.connections


# -- row 12: orphans


def orphan(hub: Hub, guest: Guest, port: int) -> weakref.ref[Connection]:
    """A connection that its owner has closed, and whose guest doesn't answer."""
    accepted = accept(hub, guest, port=port)
    found = weakref.ref(accepted.connection)
    accepted.close()
    assert guest.ops() == [SHUTDOWN]
    return found


def test_an_orphan_is_freed_when_closing_times_out(hub: Hub, guest: Guest, clock: Clock) -> None:
    due: list[float] = []
    hub.wake_at = due.append
    orphans = [orphan(hub, guest, port) for port in range(20)]
    assert due[0] == CLOSE_TIMEOUT_S
    clock.now = CLOSE_TIMEOUT_S - 0.001
    hub.expire()
    assert len(hub.connections) == 20
    clock.now = CLOSE_TIMEOUT_S
    hub.expire()
    assert not hub.connections and guest.ops() == [RST] * 20
    gc.collect()
    assert [found() for found in orphans] == [None] * 20


@pytest.mark.parametrize("goes", ["reset", "close"])
def test_an_orphan_is_freed_when_the_device_goes_with_the_timeout_pending(
    hub: Hub, guest: Guest, clock: Clock, goes: str
) -> None:
    orphans = [orphan(hub, guest, port) for port in range(20)]
    assert len(hub.connections) == 20
    getattr(hub, goes)()
    assert not hub.connections and guest.ops() == []
    gc.collect()
    assert [found() for found in orphans] == [None] * 20
    clock.now = CLOSE_TIMEOUT_S
    hub.expire()  # the timeout comes, and finds nothing
    assert guest.ops() == []


def test_orphans_of_an_earlier_boot_do_not_touch_the_next(hub: Hub, guest: Guest, clock: Clock) -> None:
    orphan(hub, guest, GUEST_PORT)
    hub.reset()
    accepted = accept(hub, guest)  # the same ports
    clock.now = CLOSE_TIMEOUT_S + 1
    hub.expire()
    assert accepted.connection.state is State.ESTABLISHED


# -- bounds


def test_connections_and_their_memory_are_bounded(hub: Hub, guest: Guest) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 4096)
    for port in range(CONNECTIONS.most + 10):
        guest.send(REQUEST, port, HOST_PORT)
    packets = guest.all()
    assert [header.op for header, _ in packets].count(RESPONSE) == CONNECTIONS.most == len(hub.connections)
    assert sum(header.buf_alloc for header, _ in packets) <= BUDGET.most
    with pytest.raises(OSError) as error:
        hub.connect(1, STREAM)
    assert error.value.errno == errno.ENOBUFS
    listener.close()


def test_what_closed_connections_have_left_unread_counts(hub: Hub, guest: Guest) -> None:
    listener = VsockListener(hub, HOST_PORT, socket.SOCK_STREAM, 4096)
    kept = []
    for port in range(CONNECTIONS.most + 1):
        guest.send(REQUEST, port, HOST_PORT)
        guest.all()
        guest.send(RW, port, HOST_PORT, b"unread")
        guest.send(SHUTDOWN, port, HOST_PORT, flags=RCV | SEND)
        guest.all()
        if port < CONNECTIONS.most:
            kept.append(listener.accept()[0])
    assert not hub.connections
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert kept[0].recv(9) == b"unread"
    guest.send(REQUEST, 1, HOST_PORT)
    assert guest.ops() == [RESPONSE]
    listener.close()


def test_answers_that_nobody_takes_are_bounded(hub: Hub, guest: Guest) -> None:
    for port in range(RESETS.most):
        assert not hub.congested
        guest.send(RW, port, 1)
    assert hub.congested
    for _ in range(10):
        guest.send(RW, 5, 1)
    assert guest.ops() == [RST] * RESETS.most
    assert not hub.congested
