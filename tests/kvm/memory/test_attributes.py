# SPDX-License-Identifier: Apache-2.0
"""Sets of private frames against sets of numbers."""

from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm.memory.attributes import PrivateFrames

FRAMES = 40
ranges = st.tuples(st.integers(0, FRAMES), st.integers(1, FRAMES), st.booleans())


@given(st.lists(ranges, max_size=12), st.tuples(st.integers(0, FRAMES), st.integers(1, FRAMES)))
def test_they_are_the_frames_that_were_put_in_and_not_taken_out(
    changes: list[tuple[int, int, bool]], asked: tuple[int, int]
) -> None:
    frames, expected = PrivateFrames(), set[int]()
    for start, count, private in changes:
        frames.set(start, start + count, private=private)
        changed = range(start, start + count)
        expected = expected.union(changed) if private else expected.difference(changed)
        assert {n for n in range(2 * FRAMES + 1) if n in frames} == expected
        assert sorted(set(frames._ends)) == frames._ends, "no end is there twice"
    start, count = asked
    members = [n in expected for n in range(start, start + count)]
    assert frames.are_alike(start, start + count) == (all(members) or not any(members))
