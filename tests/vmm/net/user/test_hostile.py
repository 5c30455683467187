# SPDX-License-Identifier: Apache-2.0
"""Whatever frames a guest sends, the user-mode network goes on, keeps a bounded amount, and lets it nowhere else."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.net import GUEST_MAC, give
from tests.vmm.net.user.test_tcp import GATEWAY, GATEWAY_MAC, GUEST, World

from softkvm.vmm.net import wire
from softkvm.vmm.net.link import HEADER, Frame
from softkvm.vmm.net.user import connections, udp
from softkvm.vmm.net.user.policy import NETWORK6
from softkvm.vmm.net.user.segment import ACK, FIN, RST, SYN
from softkvm.vmm.net.user.sender import WINDOW

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(0, 0xFFFFFFFF))


class Watched(socket.socket):
    """A socket that goes nowhere but to the loopback."""

    def _check(self, address: object) -> None:
        assert isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"), address

    def connect(self, address: object) -> None:
        """Check and connect."""
        self._check(address)
        super().connect(address)  # type: ignore[arg-type]

    def connect_ex(self, address: object) -> int:
        """Check and connect."""
        self._check(address)
        return super().connect_ex(address)  # type: ignore[arg-type]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world whose stack's sockets are watched."""
    world = World()
    monkeypatch.setattr(socket, "socket", Watched)
    yield world
    world.close()


def answers(world: World) -> bool:
    """Whether the stack still answers an echo."""
    world.link.take()
    message = b"\x08\0\xf7\xff" + bytes(4)
    packet = wire.ipv4(GUEST, GATEWAY, wire.ICMP, len(message)) + message
    give(world.stack, wire.ethernet(GATEWAY_MAC, GUEST_MAC, wire.ETHERTYPE_IPV4) + packet)
    return any(frame[34:36] == b"\0\0" for frame in world.link.take())


def bounded(world: World) -> None:
    """What the stack keeps is no more than it may."""
    table = world.stack.connections
    assert len(table.by_key) <= connections.CONNECTIONS.most
    assert table.half_open == sum(1 for c in table.by_key.values() if c.state not in ("OPEN", "CLOSED"))
    assert table.half_open <= connections.HALF_OPEN.most
    assert table.buffered == sum(c.buffered for c in table.by_key.values())
    assert table.queued == sum(c.queued for c in table.by_key.values())
    assert all(c.buffered <= WINDOW for c in table.by_key.values())
    assert len(world.stack.datagrams.flows) <= udp.FLOWS.most


FRAMES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda data: GATEWAY_MAC + GUEST_MAC + data),
    st.tuples(st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x81\x00"]), st.binary(max_size=200)).map(
        lambda pair: GATEWAY_MAC + GUEST_MAC + pair[0] + pair[1]
    ),
)


@settings(max_examples=150)
@given(frames=st.lists(FRAMES, max_size=20), pieces=st.integers(1, 5), header=st.binary(min_size=10, max_size=10))
def test_random_frames_change_nothing(world: World, frames: list[bytes], pieces: int, header: bytes) -> None:
    for frame in frames:
        step = len(frame) // pieces + 1
        views = [memoryview(bytearray(frame[at : at + step])) for at in range(0, len(frame), step)]
        world.stack.receive(Frame(views, header))
    world.stack.received()
    world.loop.settle()
    assert answers(world)


IPV4 = st.tuples(
    st.sampled_from([0x45, 0x46, 0x4F, 0x44, 0x40, 0x65]),
    st.integers(0, 255),
    st.one_of(st.none(), st.integers(0, 0xFFFF)),
    st.integers(0, 3),
    st.sampled_from([0, 0x4000, 0x2000, 1, 0x2001, 0x3FFF]),
    st.sampled_from([1, 2, 6, 17, 41, 58, 255]),
    st.sampled_from([GUEST, GATEWAY, bytes(4), b"\xff" * 4, b"\xc0\0\2\1"]),
    st.sampled_from([GATEWAY, b"\x0a\0\2\3", b"\xff" * 4, b"\xe0\0\0\1", b"\x7f\0\0\1", b"\xc0\0\2\1", GUEST]),
    st.binary(max_size=120),
    st.booleans(),
)


@settings(max_examples=200)
@given(packets=st.lists(IPV4, max_size=12))
def test_damaged_ipv4_headers_change_nothing(world: World, packets: list[tuple]) -> None:  # type: ignore[type-arg]
    """Short and long lengths, options, fragments, foreign addresses, right and wrong checksums."""
    for first, tos, size, ident, fragment, protocol, source, to, rest, right in packets:
        size = 20 + len(rest) if size is None else size
        head = struct.pack(">BBHHHBBH4s4s", first, tos, size, ident, fragment, 64, protocol, 0, source, to)
        packet = bytearray(head + rest)
        if right:
            header = bytes(packet[: (first & 15) * 4])
            packet[10:12] = wire.checksum(header).to_bytes(2, "big")
        give(world.stack, GATEWAY_MAC + GUEST_MAC + b"\x08\x00" + bytes(packet))
    world.loop.settle()
    bounded(world)
    assert answers(world)


SEGMENTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which of the guest's ports
        st.sampled_from([0, SYN, ACK, RST, FIN, SYN | ACK, FIN | ACK, RST | ACK, SYN | FIN, 0x3F, ACK | 0x20]),
        NUMBERS, NUMBERS,  # from what is right
        st.integers(0, 0xFFFF),
        st.sampled_from([b"", b"x", b"y" * 1400, b"z" * 60000]),
        st.binary(max_size=40),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=120)
@given(segments=SEGMENTS, seconds=st.integers(0, 40))
def test_any_sequence_of_segments_leaves_tcp_whole(world: World, segments: list[tuple], seconds: int) -> None:  # type: ignore[type-arg]
    """Numbers around what is right, flags of all kinds, options of noise: nothing leaks, and a new connection works."""
    for which, bits, sequence, seen, window, data, options in segments:
        world.guest_port = 5000 + which
        found = [c for c in world.stack.connections.by_key.values() if c.ports[2:] == struct.pack(">H", 5000 + which)]
        base, ours = (found[0].rcv_nxt, found[0].snd_nxt) if found else (1000, 0)
        options = options[: len(options) & ~3]
        world.send(bits, data, sequence=base + sequence, acknowledgement=ours + seen, window=window, options=options)
    world.loop.advance(seconds)
    bounded(world)
    world.link.take()
    world.guest_port, world.next = 9999, 77
    world.server.close()
    world.server = socket.create_server(("127.0.0.1", 0))
    world.server.settimeout(5)
    world.port = world.server.getsockname()[1]
    world.send(SYN)
    assert [s.bits for s in world.take() if s.acknowledgement == 78] == [SYN | ACK]
    world.stack.stop()
    table = world.stack.connections
    assert not table.by_key and not table.buffered and not table.queued
    world.stack.start(world.link)


@settings(max_examples=100)
@given(data=st.lists(st.binary(max_size=1500), max_size=10), protocol=st.sampled_from([6, 17, 58, 0, 60, 44, 59]))
def test_damaged_ipv6_packets_change_nothing(world: World, data: list[bytes], protocol: int) -> None:
    source = NETWORK6[0x99].packed
    for number, piece in enumerate(data):
        to = NETWORK6[2 + number % 3].packed
        packet = wire.ipv6(source, to, protocol, len(piece) + (number % 5 == 4) * 100) + piece
        give(world.stack, GATEWAY_MAC + GUEST_MAC + b"\x86\xdd" + packet)
    world.loop.settle()
    assert answers(world)


def test_the_guests_header_cannot_have_a_short_frame_read_beyond_its_end(world: World) -> None:
    """A virtio header that says anything of lengths and places is not believed."""
    path = wire.Path(GATEWAY_MAC, GUEST_MAC, GUEST, GATEWAY)
    head = path.tcp(struct.pack(">HH", 5, world.port), 1, 0, SYN, 0xFFFF, b"", 0)
    for header in (HEADER.pack(1, 1, 0xFFFF, 0, 0xFFFF, 0xFFFF), HEADER.pack(0xFF, 0xFF, 0, 0xFFFF, 0, 0)):
        for size in range(len(head)):
            give(world.stack, head[:size], header=header)
    assert answers(world)
    assert not world.stack.connections.by_key
