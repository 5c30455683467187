# SPDX-License-Identifier: Apache-2.0
"""Segments and modules in guest memory."""

import itertools
from collections.abc import Iterator

import pytest

from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module, Reserved, Segment, load_modules, load_segments
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(4 * MIB)
    yield ram
    ram.close()


def test_segments_may_touch_but_not_overlap(memory: GuestMemory) -> None:
    image = Image("kernel", b"abcd")
    touching = [Segment(0x102000, 0x1000, 0, 2), Segment(0x101000, 0x1000, 2, 2)]
    assert load_segments(memory, image, touching) == 0x103000
    assert memory.read(0x101000, 3) == b"cd\0"
    assert memory.read(0x102000, 3) == b"ab\0"
    with pytest.raises(ImageError, match="at 0x101fff to 0x102fff overlaps another, which ends at 0x102000"):
        load_segments(memory, image, [Segment(0x101FFF, 0x1000, 0, 1), touching[1]])


def test_nothing_is_written_unless_everything_fits(memory: GuestMemory) -> None:
    image = Image("kernel", b"abcd")
    with pytest.raises(ImageError, match="there are 4 MiB"):
        load_segments(memory, image, [Segment(0x100000, 4, 0, 4), Segment(4 * MIB - 4, 8, 0, 4)])
    assert memory.read(0x100000, 4) == bytes(4)


def test_reserved_addresses_are_named(memory: GuestMemory) -> None:
    reserved = [Reserved(0x2000, 0x3000, "treasure")]
    load_segments(memory, Image("kernel", b"a"), [Segment(0x1FFF, 1, 0, 1), Segment(0x3000, 1, 0, 1)], reserved)
    with pytest.raises(ImageError, match="overlaps the loader's treasure"):
        load_segments(memory, Image("kernel", b"a"), [Segment(0x1FFF, 2, 0, 1)], reserved)


def test_modules_lie_page_aligned_apart_from_each_other_and_above_the_kernel(memory: GuestMemory) -> None:
    sizes = (5000, 1, 4096)
    modules = [Module(Image("module", bytes([index + 1]) * size)) for index, size in enumerate(sizes)]
    places = load_modules(memory, modules, 0x200000)
    spans = sorted(zip(places, sizes, strict=True))
    assert all(place % 4096 == 0 for place in places)
    assert spans[0][0] >= 0x200000
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
    for index, (place, size) in enumerate(zip(places, sizes, strict=True)):
        assert memory.read(place, size) == bytes([index + 1]) * size


def test_modules_that_do_not_fit_together_are_refused(memory: GuestMemory) -> None:
    modules = [Module(Image("module", bytes(MIB)))] * 3
    with pytest.raises(ImageError, match="module of 1048576 bytes does not fit"):
        load_modules(memory, modules, 2 * MIB)
