# SPDX-License-Identifier: Apache-2.0
"""Headers and the checksum, by the examples of RFCs and by a plain implementation of them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.net import wire
from softkvm.vmm.net.link import Frame


def plain_checksum(data: bytes) -> int:
    """RFC 1071, 4.1, word by word."""
    data += b"\0" * (len(data) % 2)
    value: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value ^ 0xFFFF


def test_the_sum_of_the_rfcs_example_is_ddf2() -> None:
    """RFC 1071, section 3: 0001 f203 f4f5 f6f7."""
    assert wire.total(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


@given(st.binary(max_size=3000))
def test_checksums_are_those_of_adding_word_by_word(data: bytes) -> None:
    assert wire.checksum(data) == plain_checksum(data)


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xff", b"\xff\xff" * 2, b"\xff", b"\0\0\xff\xff"])
def test_checksums_of_zeroes_and_of_ones_are_told_apart(data: bytes) -> None:
    assert wire.checksum(data) == plain_checksum(data)


@given(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4), st.binary(max_size=100))
def test_a_segments_headers_are_right_whatever_is_in_them(source: bytes, destination: bytes, data: bytes) -> None:
    path = wire.Path(b"\2" * 6, b"\4" * 6, source, destination)
    head = path.tcp(b"\1\2\3\4", 5, 6, 0x10, 7, b"\1\1\1\0", len(data))
    frame = Frame([memoryview(bytearray(head + data))])
    packet, _, fragment = wire.read_ipv4(frame)  # its checksum
    assert (packet.source, packet.destination, packet.protocol, fragment) == (source, destination, wire.TCP, 0)
    assert packet.end == len(head + data) and packet.start == path.tcp_start
    segment = bytearray((head + data)[packet.start :])
    assert struct.unpack_from(">HHIIHH", segment) == (0x102, 0x304, 5, 6, 6 << 12 | 0x10, 7)
    stored = int.from_bytes(segment[16:18], "big")
    segment[16:18] = b"\0\0"
    pseudo = source + destination + struct.pack(">HH", wire.TCP, len(segment))
    assert stored == plain_checksum(pseudo) ^ 0xFFFF


def test_a_segments_ipv6_header_is_right() -> None:
    source, destination = bytes(range(16)), bytes(range(16, 32))
    head = wire.Path(b"\2" * 6, b"\4" * 6, source, destination).tcp(b"\1\2\3\4", 5, 6, 2, 7, b"", 9)
    packet = wire.read_ipv6(Frame([memoryview(bytearray(head + bytes(9)))]))
    assert (packet.source, packet.destination, packet.protocol) == (source, destination, wire.TCP)
    assert (packet.start, packet.end) == (54, 54 + 20 + 9)


def test_datagrams_checksums_verify() -> None:
    data = wire.udp(b"\1\2\3\4", 5, b"\6\7\x08\x09", 10, b"odd")
    pseudo = wire.pseudo_sum(b"\1\2\3\4", b"\6\7\x08\x09", wire.UDP, len(data))
    assert wire.checksum(data, pseudo) == 0


@pytest.mark.parametrize("size", [0, 1, 1480, 1481, 4000, 65515])
def test_fragments_fit_and_carry_everything_once(size: int) -> None:
    data = bytes(number & 0xFF for number in range(size))
    found, last = {}, False
    for packet in wire.fragments(b"\1" * 4, b"\2" * 4, wire.UDP, data, 1500, 7):
        assert len(packet) <= 1500 and plain_checksum(packet[:20]) == 0
        flags = int.from_bytes(packet[6:8], "big")
        found[(flags & 0x1FFF) * 8] = packet[20:]
        last = last or not flags & 0x2000
    assert last and b"".join(found[at] for at in sorted(found)) == data


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(-5, 900), st.integers(0, 900))
def test_a_frames_pieces_are_those_of_its_bytes(pieces: list[bytes], start: int, end: int) -> None:
    frame = Frame([memoryview(bytearray(piece)) for piece in pieces])
    whole = b"".join(pieces)
    assert frame.size == len(whole) and frame.head == whole[:256]
    start = max(start, 0)
    assert b"".join(frame.views(start, end)) == whole[start:end]
    assert frame.copy(start, end) == whole[start:end]
