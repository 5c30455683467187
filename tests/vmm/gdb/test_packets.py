# SPDX-License-Identifier: Apache-2.0
"""Framing of the remote serial protocol (gdb's manual, E.1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.gdb.packets import INTERRUPT, PACKET_BYTES, Decoder, ProtocolError, escape, frame, unescape


def test_a_packet_has_the_sum_of_its_bytes_behind_it() -> None:
    assert frame(b"OK") == b"$OK#9a"  # as gdb's manual has it
    assert frame(b"") == b"$#00"


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_packets_and_interrupts_come_in_any_pieces(piece: int) -> None:
    decoder = Decoder()
    data = b"+$?#3f\x03$g#67"
    found = [packet for at in range(0, len(data), piece) for packet in decoder.feed(data[at : at + piece])]
    assert found == [b"?", INTERRUPT, b"g"]
    assert decoder.replies == b"++"


def test_a_wrong_checksum_is_asked_for_again() -> None:
    decoder = Decoder()
    assert decoder.feed(b"$?#00") == []
    assert decoder.feed(b"$?#zz") == []
    assert decoder.replies == b"--"
    decoder.acknowledge = False
    decoder.replies.clear()
    assert decoder.feed(b"$?#00-") == [b"?"], "without acknowledgements nobody could send it again"
    assert not decoder.replies
    assert not decoder.repeat


def test_a_refused_packet_is_sent_again() -> None:
    decoder = Decoder()
    assert decoder.feed(b"-") == []
    assert decoder.repeat


@given(st.binary(max_size=300))
def test_binary_data_comes_back_as_it_was(data: bytes) -> None:
    escaped = escape(data)
    assert unescape(escaped) == data
    assert not set(b"#$*") & set(escaped), "what ends or begins a packet, or repeats a byte, is escaped"


@pytest.mark.parametrize("end", [b"", b"#00"])
def test_a_packet_without_bounds_ends_the_connection(end: bytes) -> None:
    assert Decoder().feed(frame(b"x" * PACKET_BYTES)) == [b"x" * PACKET_BYTES]
    with pytest.raises(ProtocolError, match="more than"):
        Decoder().feed(b"$" + b"x" * (PACKET_BYTES + 1) + end)


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_noise_is_taken_or_refused_and_never_kept(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        for packet in decoder.feed(piece):
            assert packet == INTERRUPT or len(packet) <= PACKET_BYTES
