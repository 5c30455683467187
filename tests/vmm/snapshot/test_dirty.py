# SPDX-License-Identifier: Apache-2.0
"""Which pages have changed: KVM's bitmaps as ranges, and what devices say."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.machines import open_soft

from softkvm.vmm.boot import layout
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB, PAGE_SIZE, GuestMemory
from softkvm.vmm.snapshot import memory_file
from softkvm.vmm.snapshot.dirty import DirtyPages, bitmap_ranges, whole_pages


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, size in ranges for page in range(start // PAGE_SIZE, (start + size) // PAGE_SIZE)}


@given(st.binary(max_size=40) | st.lists(st.sampled_from([0, 0xFF, 1, 0x80, 0x7E]), max_size=40).map(bytes))
def test_a_bitmap_is_the_ranges_of_its_ones(bitmap: bytes) -> None:
    found = bitmap_ranges(bitmap, 16 * PAGE_SIZE)
    expected = {16 + 8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}
    assert pages(found) == expected
    assert all(a + b < c for (a, b), (c, _) in pairwise(found))  # in order, and apart


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 14)), max_size=20))
def test_parts_of_pages_are_whole_pages(ranges: list[tuple[int, int]]) -> None:
    touched = {at // PAGE_SIZE for start, size in ranges for at in range(start, start + size, 512)}
    touched |= {(start + size - 1) // PAGE_SIZE for start, size in ranges if size}
    assert pages(whole_pages(ranges)) == touched


def test_devices_tell_while_they_are_asked() -> None:
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB)) as machine:
        memory = machine.memory
        memory.write(MIB, b"before")
        watching = DirtyPages(machine.vm, memory)
        watching.start()
        assert memory.logging
        memory.write(2 * MIB - 1, b"two")
        memory.slice(4 * MIB, 3)[:] = b"abc"
        memory.mark_written(4 * MIB, 3)
        memory.clear(6 * MIB, 3 * PAGE_SIZE)
        memory.discard(8 * MIB, PAGE_SIZE)
        expected = {2 * MIB // PAGE_SIZE - 1, 2 * MIB // PAGE_SIZE, 4 * MIB // PAGE_SIZE, 8 * MIB // PAGE_SIZE}
        expected |= {6 * MIB // PAGE_SIZE + n for n in range(3)}
        assert pages(watching.take()) == expected
        assert watching.take() == []
        watching.stop()
        assert not memory.logging


def test_what_many_devices_write_is_kept_in_bounds() -> None:
    memory = GuestMemory(32 * MIB)
    for n in range(200_000):
        memory.mark_written(n % 4096 * PAGE_SIZE, 8)
    assert len(memory._written) <= 1 << 16
    assert len(pages(whole_pages(memory.take_written()))) == 4096
    with pytest.raises(IndexError):
        memory.mark_written(32 * MIB, 1)
    memory.close()


def test_the_firmwares_alias_is_memory_too() -> None:
    """A guest writes its RAM at the reset vector's address: it is the same page."""
    write = bytes.fromhex("b800f0 8ed8 c606 0010 5a fa f4")  # ds = F000: the byte at F000:1000
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB)) as machine:
        machine.load(write, raw=True)
        watching = DirtyPages(machine.vm, machine.memory)
        watching.start()
        machine.run(20)
        found = pages(watching.take())
        assert (layout.FIRMWARE + 0x1000) // PAGE_SIZE in found
        assert {offset for _, _, offset in machine.memory.slots()} == {0, layout.FIRMWARE}
        watching.stop()


# -- memory in a file


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 20), st.integers(0, 255)), max_size=12), st.booleans())
@settings(max_examples=40)
def test_memory_in_a_file_is_the_same_memory(parts: list[tuple[int, int, int]], all_of_it: bool) -> None:
    memory = GuestMemory(2 * MIB)
    fd = os.memfd_create("memory")
    try:
        for page, count, value in parts:
            size = min(count * PAGE_SIZE, memory.size - page * PAGE_SIZE)
            memory.view[page * PAGE_SIZE : page * PAGE_SIZE + size] = bytes([value]) * size
        ranges = [(0, memory.size)] if all_of_it else memory_file.used_ranges(memory)
        stored = memory_file.write(memory, fd, ranges)
        assert os.fstat(fd).st_size == memory.size
        assert os.pread(fd, memory.size, 0) == bytes(memory.view)
        assert stored == memory.size - bytes(memory.view).count(0)  # other values fill whole pages
        digest = memory_file.digest(fd, memory.size)
        assert digest == memory_file.digest(fd, memory.size, [(0, memory.size)])
        os.pwrite(fd, b"\1" if os.pread(fd, 1, MIB) == b"\0" else b"\0", MIB)
        assert digest != memory_file.digest(fd, memory.size)
    finally:
        os.close(fd)
        memory.close()


def test_memory_that_was_never_touched_stays_so(tmp_path: Path) -> None:
    memory = GuestMemory(8 << 30)
    try:
        memory.view[5 << 30] = 1
        ranges = memory_file.used_ranges(memory)
        assert sum(size for _, size in ranges) <= 4 * MIB
        with open(tmp_path / "memory", "w+b") as file:
            assert memory_file.write(memory, file.fileno(), ranges) == PAGE_SIZE
        assert sum(size for _, size in memory_file.used_ranges(memory)) <= 4 * MIB
    finally:
        memory.close()
