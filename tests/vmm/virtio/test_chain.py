# SPDX-License-Identifier: Apache-2.0
"""What a device reads and writes of a buffer, in whatever pieces, is what is in the segments one after the other."""

from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.virtio.queue import Chain

SEGMENTS = st.lists(st.binary(min_size=1, max_size=20), max_size=6)


def chain(readable: list[bytes], writable: list[int]) -> Chain:
    return Chain(
        0, [memoryview(bytearray(data)) for data in readable], [memoryview(bytearray(size)) for size in writable], []
    )


@given(SEGMENTS, st.lists(st.integers(0, 30), max_size=10))
def test_reads_go_on_where_the_last_one_ended(segments: list[bytes], sizes: list[int]) -> None:
    buffer, whole = chain(segments, []), b"".join(segments)
    assert buffer.readable_size == len(whole)
    at = 0
    for size in sizes:
        assert buffer.read(size) == whole[at : at + size]
        at += size
    assert buffer.read() == whole[at:]
    assert buffer.read() == b""
    assert buffer.read(5) == b""


@given(st.lists(st.integers(1, 20), max_size=6), st.lists(st.binary(max_size=30), max_size=8))
def test_writes_go_on_where_the_last_one_ended(sizes: list[int], pieces: list[bytes]) -> None:
    buffer, room = chain([], sizes), sum(sizes)
    assert buffer.writable_size == room
    whole = b"".join(pieces)
    for piece in pieces:
        left = room - buffer.written
        assert buffer.write(piece) == min(left, len(piece))
    assert buffer.written == min(room, len(whole))
    assert b"".join(buffer.writable)[: buffer.written] == whole[: buffer.written]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.data())
def test_what_a_device_stored_itself_can_be_skipped(sizes: list[int], data: st.DataObject) -> None:
    buffer = chain([], sizes)
    skipped = data.draw(st.integers(0, sum(sizes)))
    buffer.skip(skipped)
    rest = sum(sizes) - skipped
    assert buffer.write(b"x" * 200) == rest
    assert b"".join(buffer.writable) == bytes(skipped) + b"x" * rest
    assert buffer.written == sum(sizes)
