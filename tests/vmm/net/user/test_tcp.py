# SPDX-License-Identifier: Apache-2.0
"""TCP's states, segment by segment, with a guest that writes its own (RFC 9293; sections are of that)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from tests.support.net import GUEST_MAC, Loop, TestLink, give, tcp_options

from softkvm.vmm.devices.virtio_net import parse
from softkvm.vmm.net import wire
from softkvm.vmm.net.link import HEADER, Offloads
from softkvm.vmm.net.spec import UserNet
from softkvm.vmm.net.user.connections import CONNECTIONS, HALF_OPEN
from softkvm.vmm.net.user.segment import ACK, FIN, PSH, RST, SYN
from softkvm.vmm.net.user.sender import QUEUED, RTO_S, WINDOW
from softkvm.vmm.net.user.stack import UserStack
from softkvm.vmm.net.user.tcp import Connection

GUEST = b"\x0a\x00\x02\x0f"
GATEWAY = b"\x0a\x00\x02\x02"
GATEWAY_MAC = b"\x52\x55" + GATEWAY
ISS = 0xFFFFFF00  # sequence numbers pass zero early


class Segment(NamedTuple):
    """A segment to the guest."""

    sequence: int
    acknowledgement: int
    bits: int
    window: int
    options: bytes
    data: bytes


class World:
    """A stack, a listening socket on the host, and a guest that sends what a test says."""

    def __init__(self, options: str = "user", takes: Offloads | None = None) -> None:
        net = parse(options).net
        assert isinstance(net, UserNet)
        self.loop = Loop(frozen=True)
        self.link = TestLink(self.loop, takes or Offloads(True, True, True))
        self.stack = UserStack(net, clock=self.loop.clock)
        self.stack.start(self.link)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(10)
        self.port = self.server.getsockname()[1]
        self.guest_port = 40000
        self.next = ISS  # the guest's next sequence number
        self.seen = 0  # what it has of the other side
        self.host: socket.socket | None = None

    def close(self) -> None:
        """Give all back."""
        if self.host is not None:
            self.host.close()
        self.server.close()
        self.stack.close()
        self.loop.close()

    def send(self, bits: int, data: bytes = b"", *, sequence: int | None = None, acknowledgement: int | None = None,
             window: int = 0xFFFF, options: bytes = b"", port: int | None = None, to: bytes = GATEWAY,
             damage: bool = False) -> None:  # fmt: skip
        """Send a segment."""
        path = wire.Path(GATEWAY_MAC, GUEST_MAC, GUEST, to)
        ports = struct.pack(">HH", self.guest_port, self.port if port is None else port)
        at = self.next if sequence is None else sequence
        seen = self.seen if acknowledgement is None else acknowledgement
        head = bytearray(path.tcp(ports, at & 0xFFFFFFFF, seen & 0xFFFFFFFF, bits, window, options, len(data)))
        segment = bytes(head[34:]) + data
        head[50:52] = (wire.checksum(segment) ^ damage).to_bytes(2, "big")
        give(self.stack, bytes(head) + data)
        self.loop.settle()

    def take(self) -> list[Segment]:
        """Return the segments for the guest, whose addresses are right."""
        found = []
        for frame in self.link.take():
            if frame[12:14] != b"\x08\x00" or frame[23] != wire.TCP:
                continue
            assert frame[:6] == GUEST_MAC and frame[30:34] == GUEST
            sequence, seen, bits, window = struct.unpack_from(">IIHH", frame, 38)
            data = 34 + (bits >> 12) * 4
            found.append(Segment(sequence, seen, bits & 0x3F, window, frame[54:data], frame[data:]))
        return found

    def one(self) -> Segment:
        """Return the one segment there is."""
        if not self.link.sent:
            self.loop.advance(0.25)  # an acknowledgement may be put off
        (segment,) = self.take()
        return segment

    def connect(self, options: bytes = tcp_options(1460, 7), window: int = 0xFFFF) -> Connection:
        """Do the handshake."""
        self.send(SYN, window=window, options=options)
        answer = self.one()
        assert answer.bits == SYN | ACK
        self.next += 1
        assert answer.acknowledgement == self.next & 0xFFFFFFFF
        self.seen = answer.sequence + 1
        self.send(ACK, window=window)
        assert self.take() == []
        self.host, _ = self.server.accept()
        self.host.settimeout(10)
        return self.connection

    @property
    def connection(self) -> Connection:
        """The only connection."""
        (connection,) = self.stack.connections.by_key.values()
        return connection

    def host_sends(self, data: bytes) -> list[Segment]:
        """Let the host send; return the guest's segments."""
        assert self.host is not None
        self.host.sendall(data)
        self.loop.run(lambda: self.link.sent, 5)
        self.loop.settle()
        return self.take()


@pytest.fixture
def world() -> Iterator[World]:
    """A world."""
    world = World()
    yield world
    world.close()


def test_a_syn_is_answered_when_the_host_is_connected(world: World) -> None:
    """Options: the MTU's segment, and a scale only if the guest has offered one (3.7.1; RFC 7323, 2.2)."""
    world.send(SYN, options=tcp_options(1460, 7))
    answer = world.one()
    assert (answer.bits, answer.acknowledgement) == (SYN | ACK, ISS + 1)
    assert answer.options == struct.pack(">BBHBBBB", 2, 4, 1460, 1, 3, 3, 4)
    assert world.connection.name == "SYN-RECEIVED"


def test_without_the_guests_scale_there_is_none(world: World) -> None:
    world.send(SYN, options=tcp_options(1460))
    assert world.one().options == struct.pack(">BBH", 2, 4, 1460)


def test_a_refused_connection_is_reset(world: World) -> None:
    """3.5.2: the reset acknowledges the SYN."""
    world.server.close()
    world.send(SYN)
    answer = world.one()
    assert (answer.sequence, answer.acknowledgement, answer.bits) == (0, ISS + 1, RST | ACK)
    assert not world.stack.connections.by_key and not world.stack.connections.half_open


def test_a_syn_that_comes_again_gets_the_same_answer(world: World) -> None:
    world.send(SYN)
    first = world.one()
    world.send(SYN)
    assert world.one() == first


def test_an_unanswered_synack_is_sent_again_and_given_up(world: World) -> None:
    world.send(SYN)
    first = world.one()
    world.loop.advance(RTO_S + 0.5)
    assert world.one() == first
    world.loop.advance(300)
    assert world.take()[-1].bits & RST
    assert not world.stack.connections.by_key and not world.stack.connections.half_open


def test_a_wrong_acknowledgement_of_the_synack_is_reset(world: World) -> None:
    """3.10.7.4: SYN-RECEIVED, an unacceptable ACK: <SEQ=SEG.ACK><CTL=RST>."""
    world.send(SYN)
    answer = world.one()
    world.send(ACK, sequence=ISS + 1, acknowledgement=answer.sequence + 77)
    reset = world.one()
    assert (reset.sequence, reset.bits) == ((answer.sequence + 77) & 0xFFFFFFFF, RST)


@pytest.mark.parametrize("bits", [ACK, FIN | ACK, SYN | ACK])
def test_what_belongs_to_no_connection_is_reset_with_its_acknowledgement(world: World, bits: int) -> None:
    """3.10.7.1."""
    world.send(bits, acknowledgement=12345)
    answer = world.one()
    assert (answer.sequence, answer.bits) == (12345, RST)


def test_what_acknowledges_nothing_and_belongs_to_none_is_reset_with_an_acknowledgement(world: World) -> None:
    world.send(FIN, b"abc", sequence=1000)
    answer = world.one()
    assert (answer.sequence, answer.acknowledgement, answer.bits) == (0, 1004, RST | ACK)


def test_a_reset_that_belongs_to_none_is_ignored(world: World) -> None:
    world.send(RST)
    assert world.take() == []


def test_two_full_segments_are_acknowledged_at_once_and_less_with_the_answer(world: World) -> None:
    """3.8.6.3: every second full segment; what is less goes with data in the other direction."""
    world.connect()
    world.send(ACK, b"x" * 1460)
    assert world.take() == []
    world.send(ACK, b"x" * 1460, sequence=world.next + 1460)
    (answer,) = world.take()
    assert answer.acknowledgement == world.next + 2920 & 0xFFFFFFFF
    world.send(ACK, b"question", sequence=world.next + 2920)
    (answer,) = world.host_sends(b"answer")
    assert (answer.data, answer.acknowledgement) == (b"answer", world.next + 2928 & 0xFFFFFFFF)
    world.loop.advance(0.25)
    assert world.take() == []


def test_data_reaches_the_host_and_is_acknowledged(world: World) -> None:
    world.connect()
    assert world.host is not None
    world.send(ACK | PSH, b"hello")
    assert world.host.recv(100) == b"hello"
    answer = world.one()
    assert (answer.bits, answer.acknowledgement) == (ACK, (ISS + 6) & 0xFFFFFFFF)
    assert answer.window << 4 == WINDOW


def test_old_data_is_cut_off_and_only_what_is_new_goes_on(world: World) -> None:
    """3.10.7.4: segments are trimmed to the window."""
    world.connect()
    assert world.host is not None
    world.send(ACK, b"abc")
    world.send(ACK, b"abcdef")
    assert world.host.recv(100) == b"abcdef"
    assert world.one().acknowledgement == world.next + 6 & 0xFFFFFFFF
    world.send(ACK, b"abcdef")
    assert world.one().acknowledgement == world.next + 6 & 0xFFFFFFFF
    world.host.settimeout(0.05)
    with pytest.raises(TimeoutError):
        world.host.recv(1)


def test_data_with_a_gap_before_it_is_asked_for_again(world: World) -> None:
    """RFC 5681, 4.2: an immediate duplicate acknowledgement."""
    world.connect()
    assert world.host is not None
    world.send(ACK, b"def", sequence=world.next + 3)
    assert world.one().acknowledgement == world.next & 0xFFFFFFFF
    world.send(ACK, b"abc")
    world.send(ACK, b"def", sequence=world.next + 3)
    assert world.host.recv(100) == b"abcdef"


def test_data_behind_the_window_is_not_taken(world: World) -> None:
    """The host's program doesn't read: the window closes, and what doesn't fit is neither taken nor acknowledged."""
    connection = world.connect()
    piece, sent = bytes(60000), 0
    for _ in range(1000):
        world.send(ACK, piece, sequence=world.next + sent)
        sent += len(piece)
        if sent > (connection.rcv_nxt - world.next) & 0xFFFFFFFF:
            break
    taken = (connection.rcv_nxt - world.next) & 0xFFFFFFFF
    assert connection.rcv_nxt == connection.edge and connection.buffered <= WINDOW
    assert world.take()[-1].window == 0
    assert world.host is not None
    received = 0
    while received < taken:
        received += len(world.host.recv(1 << 20))
        world.loop.settle()
    assert received == taken
    assert world.take()[-1].window << 4 == WINDOW


def test_a_window_probe_is_answered(world: World) -> None:
    """Linux's probe: the last byte's number, and nothing (tcp_xmit_probe_skb)."""
    world.connect()
    world.send(ACK, sequence=world.next - 1)
    answer = world.one()
    assert (answer.bits, answer.acknowledgement) == (ACK, world.next & 0xFFFFFFFF)


def test_data_for_the_guest_is_one_uncut_segment(world: World) -> None:
    """VIRTIO 1.3, 5.1.6.4: TCPv4, the guest's segment size, the headers' length, the checksum's place."""
    world.connect(window=0xFFFF)
    data = bytes(range(256)) * 20
    world.host_sends(data)
    world.send(ACK, acknowledgement=world.seen + len(data))
    world.link.take()
    assert world.host is not None
    world.host.sendall(data)
    world.loop.run(lambda: world.link.sent, 5)
    ((frame, header),) = world.link.sent
    assert HEADER.unpack(header) == (1, 1, 54, 1460, 34, 16)
    assert frame[54:] == data
    assert int.from_bytes(frame[16:18], "big") == len(data) + 40


def test_without_tso_segments_are_the_guests_and_checksums_whole() -> None:
    world = World(takes=Offloads())
    try:
        world.connect(options=tcp_options(1000))
        frames = []
        assert world.host is not None
        world.host.sendall(b"x" * 2500)
        world.loop.run(lambda: sum(len(f) - 54 for f, _ in world.link.sent) == 2500, 5)
        frames = world.link.take()
        assert [len(frame) - 54 for frame in frames] == [1000, 1000, 500]
        for frame in frames:
            segment = frame[34:]
            pseudo = frame[26:34] + struct.pack(">HH", 6, len(segment))
            assert wire.checksum(pseudo + segment) == 0
    finally:
        world.close()


def test_no_more_is_sent_than_the_guests_window(world: World) -> None:
    """3.8.6: and what is read from the host is no more, either."""
    world.connect(window=1000, options=tcp_options(536))
    sent = world.host_sends(b"x" * 5000)
    assert sum(len(segment.data) for segment in sent) == 1000
    assert world.connection.queued == 1000
    world.send(ACK, acknowledgement=world.seen + 1000, window=0)
    assert world.take() == []
    world.send(ACK, acknowledgement=world.seen + 1000, window=536)
    assert [len(segment.data) for segment in world.take()] == [536]


def test_a_closed_window_is_asked_for(world: World) -> None:
    """3.8.6.1: a window update that is lost must not stop everything."""
    world.connect(window=1000, options=tcp_options(536))
    world.host_sends(b"x" * 5000)
    world.send(ACK, acknowledgement=world.seen + 1000, window=0)
    world.take()
    world.loop.advance(6)
    probe = world.one()
    assert (probe.sequence, probe.bits, probe.data) == ((world.seen + 999) & 0xFFFFFFFF, ACK, b"")
    for _ in range(40):  # for as long as the guest answers
        world.send(ACK, acknowledgement=world.seen + 1000, window=0)
        world.loop.advance(6)
    assert world.connection.name == "ESTABLISHED"
    world.take()
    world.send(ACK, acknowledgement=world.seen + 1000, window=4000)
    assert sum(len(segment.data) for segment in world.take()) == 4000


def test_unacknowledged_data_is_sent_again_and_given_up_in_the_end(world: World) -> None:
    world.connect()
    (first,) = world.host_sends(b"hello")
    world.loop.advance(RTO_S + 0.5)
    again = world.one()
    assert (again.sequence, again.data) == (first.sequence, b"hello")
    world.loop.advance(400)
    assert world.take()[-1].bits & RST
    assert world.host is not None
    with pytest.raises(ConnectionResetError):
        world.host.recv(1)


def test_three_duplicate_acknowledgements_have_it_sent_again_at_once(world: World) -> None:
    """RFC 5681, 3.2."""
    world.connect()
    world.host_sends(b"hello")
    for _ in range(2):
        world.send(ACK)
    assert world.take() == []
    world.send(ACK)
    assert world.one().data == b"hello"


def test_part_of_what_was_sent_may_be_acknowledged(world: World) -> None:
    world.connect()
    world.host_sends(b"hello")
    world.send(ACK, acknowledgement=world.seen + 2)
    world.loop.advance(RTO_S + 0.5)
    again = world.one()
    assert (again.sequence, again.data) == ((world.seen + 2) & 0xFFFFFFFF, b"llo")


def test_an_acknowledgement_of_what_was_never_sent_is_answered_and_ignored(world: World) -> None:
    world.connect()
    world.send(ACK, b"abc", acknowledgement=world.seen + 1000)
    answer = world.one()
    assert (answer.bits, answer.acknowledgement) == (ACK, world.next & 0xFFFFFFFF)


def test_the_guest_closes_first(world: World) -> None:
    """3.6, case 2: CLOSE-WAIT, LAST-ACK."""
    world.connect()
    assert world.host is not None
    world.send(FIN | ACK, b"bye")
    world.next += 4
    assert world.one().acknowledgement == world.next & 0xFFFFFFFF
    assert world.connection.name == "CLOSE-WAIT"
    assert world.host.recv(10) == b"bye" and world.host.recv(10) == b""
    (data,) = world.host_sends(b"still here")
    assert data.data == b"still here"
    world.seen += 10
    world.host.close()
    world.loop.run(lambda: world.link.sent, 5)
    fin = world.one()
    assert fin.bits == FIN | ACK and fin.sequence == world.seen & 0xFFFFFFFF
    assert world.connection.name == "LAST-ACK"
    world.send(ACK, acknowledgement=world.seen + 1)
    assert world.connection.name == "TIME-WAIT"
    world.loop.advance(5)
    assert not world.stack.connections.by_key


def test_the_host_closes_first(world: World) -> None:
    """3.6, case 1: FIN-WAIT-1, FIN-WAIT-2, TIME-WAIT, where a repeated FIN is acknowledged once more."""
    world.connect()
    assert world.host is not None
    world.host.shutdown(socket.SHUT_WR)
    world.loop.run(lambda: world.link.sent, 5)
    assert world.one().bits == FIN | ACK
    assert world.connection.name == "FIN-WAIT-1"
    world.seen += 1
    world.send(ACK)
    assert world.connection.name == "FIN-WAIT-2"
    world.send(ACK, b"more")
    assert world.host.recv(10) == b"more"
    world.next += 4
    world.take()
    world.send(FIN | ACK)
    assert world.one().acknowledgement == world.next + 1 & 0xFFFFFFFF
    assert world.connection.name == "TIME-WAIT"
    world.send(FIN | ACK)
    assert world.one().acknowledgement == world.next + 1 & 0xFFFFFFFF
    world.loop.advance(5)
    assert not world.stack.connections.by_key


def test_both_close_at_once(world: World) -> None:
    """3.6, case 3: CLOSING."""
    world.connect()
    assert world.host is not None
    world.host.shutdown(socket.SHUT_WR)
    world.loop.run(lambda: world.link.sent, 5)
    world.take()
    world.send(FIN | ACK)
    assert world.connection.name == "CLOSING"
    world.next += 1
    world.send(ACK, acknowledgement=world.seen + 1)
    assert world.connection.name == "TIME-WAIT"


def test_ports_in_time_wait_may_be_used_again(world: World) -> None:
    """3.6.1."""
    world.connect()
    assert world.host is not None
    world.host.close()
    world.loop.run(lambda: world.link.sent, 5)
    world.seen += 1
    world.take()
    world.send(FIN | ACK)
    assert world.connection.name == "TIME-WAIT"
    world.take()
    world.next += 1000
    world.connect()
    assert world.connection.name == "ESTABLISHED"


def test_a_lost_fin_is_sent_again(world: World) -> None:
    world.connect()
    assert world.host is not None
    world.host.sendall(b"last words")
    world.host.close()
    world.loop.run(lambda: world.connection.fin_sent, 5)
    world.take()
    world.loop.advance(RTO_S + 0.5)
    again = world.take()
    assert b"".join(segment.data for segment in again) == b"last words"
    assert again[-1].bits & FIN
    world.seen += 11
    world.send(ACK)
    assert world.connection.name == "FIN-WAIT-2"


def test_a_reset_with_the_expected_number_ends_it_and_another_is_challenged(world: World) -> None:
    """RFC 5961, 3.2."""
    world.connect()
    world.send(RST, sequence=world.next + 100)
    assert world.one().bits == ACK
    world.send(RST, sequence=world.next - 100)
    world.send(RST, sequence=world.next + (1 << 21))
    assert world.take() == []
    world.send(RST)
    assert not world.stack.connections.by_key
    assert world.host is not None
    with pytest.raises(ConnectionResetError):
        world.host.recv(1)


def test_a_syn_in_a_connection_is_challenged(world: World) -> None:
    """RFC 5961, 4.2."""
    world.connect()
    for sequence in (world.next, world.next + 5, world.next - 5):
        world.send(SYN, sequence=sequence)
        assert world.one().bits == ACK
    assert world.connection.name == "ESTABLISHED"


def test_a_segment_without_ack_is_ignored(world: World) -> None:
    """3.10.7.4, fifth."""
    world.connect()
    world.send(PSH, b"x")
    assert world.take() == []


def test_a_wrong_checksum_is_thrown_away_and_counted(world: World) -> None:
    world.send(SYN, damage=True)
    assert world.take() == [] and world.stack.counters["malformed"] == 1


def test_a_flood_of_syns_holds_a_bounded_number_of_sockets(world: World) -> None:
    """The rest is ignored, as by a full backlog; afterwards there is room again."""
    for number in range(HALF_OPEN.most + 50):
        world.guest_port = 1024 + number
        world.send(SYN)
    assert len(world.stack.connections.by_key) == world.stack.connections.half_open == HALF_OPEN.most
    assert world.stack.counters["tcp_half_open_full"] == 50
    world.loop.advance(300)
    assert not world.stack.connections.by_key
    world.take()
    world.guest_port = 5
    world.server.close()
    world.server = socket.create_server(("127.0.0.1", 0))
    world.port = world.server.getsockname()[1]
    world.send(SYN)
    assert world.one().bits == SYN | ACK


def test_there_are_no_more_connections_than_there_may_be(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one too many is refused."""
    monkeypatch.setattr(CONNECTIONS, "most", 3)
    for number in range(4):
        world.guest_port = 1024 + number
        world.send(SYN)
    assert [segment.bits for segment in world.take()] == [SYN | ACK] * 3 + [RST | ACK]


def test_a_connection_that_is_over_makes_room_for_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """TIME-WAIT is the guest's protection from old segments, which there are none of; it must not refuse new ones."""
    monkeypatch.setattr(CONNECTIONS, "most", 1)
    world.connect()
    assert world.host is not None
    world.host.close()
    world.loop.run(lambda: world.link.sent, 5)
    world.seen += 1
    world.take()
    world.send(FIN | ACK)
    assert world.connection.name == "TIME-WAIT"
    world.take()
    world.guest_port += 1
    world.connect()
    assert world.connection.name == "ESTABLISHED"


def test_what_guests_do_not_acknowledge_is_bounded_over_all_connections(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QUEUED, "most", 100_000)
    options = tcp_options(1460, 7)
    for number in range(4):
        world.guest_port, world.next = 6000 + number, 1
        world.send(SYN, options=options)
        answer = next(segment for segment in world.take() if segment.bits & SYN)
        world.send(ACK, sequence=2, acknowledgement=answer.sequence + 1)
        host, _ = world.server.accept()
        host.setblocking(False)
        with host, contextlib.suppress(BlockingIOError):
            while True:
                host.send(bytes(1 << 20))
                world.loop.settle()
    queued = sorted(connection.queued for connection in world.stack.connections.by_key.values())
    assert queued[-1] >= 100_000 and queued[:3] == [16384] * 3
    assert world.stack.connections.queued == sum(queued)


def test_a_host_without_descriptors_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE leaves the connection in the backlog: looking at once again would be looking all the time."""
    world = World("user,hostfwd=tcp::0-:22")
    try:
        listener = world.stack.listeners[0]
        refused = []

        class Exhausted:
            def accept(self) -> None:
                refused.append(1)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        real, listener.socket = listener.socket, Exhausted()  # type: ignore[assignment]
        listener.socket.fileno = real.fileno  # type: ignore[method-assign]
        with socket.create_connection(("127.0.0.1", real.getsockname()[1]), 5):
            assert world.loop.run(lambda: refused, 5)
            for _ in range(5):
                world.loop.step(0.01)
            assert len(refused) == 1
            assert world.link.reports == [f"hostfwd={listener.forward}: Too many open files"]
            listener.socket = real
            world.loop.advance(2)
            assert len(world.stack.connections.by_key) == 1
    finally:
        world.close()


def test_a_driver_without_room_holds_the_host_up_and_goes_on_later(world: World) -> None:
    """What the driver has no buffers for is not read from the host's socket."""
    world.connect()
    world.link.full = True
    assert world.host is not None
    world.host.sendall(b"hello")
    for _ in range(10):
        world.loop.step(0.01)
    assert world.take() == [] and world.connection.queued == 0
    world.link.full = False
    world.stack.room()
    world.loop.settle()
    assert world.one().data == b"hello"


def test_stopping_resets_the_hosts_side(world: World) -> None:
    world.connect()
    world.stack.stop()
    assert world.host is not None
    with pytest.raises(ConnectionResetError):
        world.host.recv(1)


def test_after_a_restore_connections_are_reset(world: World) -> None:
    """The guest's kernel takes a reset whose number is the next it expects (RFC 5961)."""
    world.connect()
    state = world.stack.save()
    other = UserStack(UserNet(), clock=world.loop.clock)
    other.restore(state)
    link = TestLink(world.loop)
    other.start(link)
    world.link = link
    reset = world.one()
    assert reset.bits & RST and reset.sequence == world.seen & 0xFFFFFFFF
    other.close()
    assert UserStack(UserNet()).save() == {"connections": []}


def test_a_forwarded_connection_asks_the_guest(world: World) -> None:
    """3.10.7.3: SYN, its answer, and data."""
    world.close()
    world = World("user,hostfwd=tcp::0-:22")
    try:
        listener = world.stack.listeners[0]
        client = socket.create_connection(("127.0.0.1", listener.port), 5)
        with client:
            world.loop.run(lambda: world.link.sent, 5)
            frames = world.link.sent
            asks = [frame for frame, _ in frames if frame[12:14] == b"\x08\x06"]
            assert asks and asks[0][38:42] == GUEST  # who has the address
            syn = world.one()
            assert syn.bits == SYN
            (connection,) = world.stack.connections.by_key.values()
            world.port, world.guest_port = int.from_bytes(connection.ports[:2], "big"), 22
            assert connection.name == "SYN-SENT"
            world.send(ACK, acknowledgement=syn.sequence + 55)
            assert world.one().bits == RST
            world.send(SYN | ACK, acknowledgement=syn.sequence + 1, options=tcp_options(1460, 7))
            world.next, world.seen = world.next + 1, syn.sequence + 1
            answer = world.one()
            assert (answer.bits, answer.acknowledgement) == (ACK, world.next & 0xFFFFFFFF)
            client.sendall(b"knock")
            world.loop.run(lambda: world.link.sent, 5)
            assert world.one().data == b"knock"
            world.send(ACK, b"who is there", acknowledgement=world.seen + 5)
            client.settimeout(5)
            assert client.recv(100) == b"who is there"
    finally:
        world.close()


def test_both_sides_may_begin_at_once(world: World) -> None:
    """3.5, figure 8."""
    world.close()
    world = World("user,hostfwd=tcp::0-:22")
    try:
        with socket.create_connection(("127.0.0.1", world.stack.listeners[0].port), 5):
            world.loop.run(lambda: world.link.sent, 5)
            syn = world.one()
            (connection,) = world.stack.connections.by_key.values()
            world.port, world.guest_port = int.from_bytes(connection.ports[:2], "big"), 22
            world.send(SYN)
            answer = world.one()
            assert (answer.bits, answer.sequence) == (SYN | ACK, syn.sequence)
            world.next, world.seen = world.next + 1, syn.sequence + 1
            world.send(ACK)
            assert connection.name == "ESTABLISHED"
    finally:
        world.close()
