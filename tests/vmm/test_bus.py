# SPDX-License-Identifier: Apache-2.0
import pytest

from softkvm.vmm.bus import CACHE_ENTRIES, Bus


class Recorder:
    """Answers with its offset and notes writes."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x1234_5678_9ABC_DE00 | offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


@pytest.fixture
def bus() -> Bus:
    return Bus("I/O port", 16)


def test_device_sees_offsets_and_answers_are_cut_to_the_size(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x3F8, 8, device, "com1")
    assert bus.read(0x3F8, 1) == 0x00
    assert bus.read(0x3FB, 2) == 0xDE03
    assert bus.read(0x3FC, 4) == 0x9ABCDE04
    bus.write(0x3FF, 1, 7)
    assert device.writes == [(7, 1, 7)]


@pytest.mark.parametrize(("address", "size"), [(0x3F7, 1), (0x400, 1), (0x3F0, 4)])
def test_where_nobody_is_an_access_reads_ones(bus: Bus, address: int, size: int) -> None:
    device = Recorder()
    bus.add(0x3F8, 8, device, "com1")
    assert bus.read(address, size) == (1 << 8 * size) - 1
    bus.write(address, size, 0)
    assert device.writes == []


def test_access_beyond_a_range_is_made_byte_by_byte(bus: Bus) -> None:
    first, second = Recorder(), Recorder()
    bus.add(0x60, 1, first, "data")
    bus.add(0x63, 2, second, "other")
    assert bus.read(0x60, 4) == 0x00FFFF00
    bus.write(0x60, 4, 0x44332211)
    assert (first.writes, second.writes) == ([(0, 1, 0x11)], [(0, 1, 0x44)])
    assert bus.read(0x64, 2) == 0xFF01
    bus.write(0x5F, 2, 0x2211)
    assert first.writes[1:] == [(0, 1, 0x22)]


def test_access_that_is_too_wide_is_split(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x70, 4, device, "cmos", width=1)
    bus.add(0x80, 8, device, "16 bits wide", width=2)
    bus.write(0x70, 2, 0x2211)
    bus.write(0x80, 4, 0x44332211)
    assert device.writes == [(0, 1, 0x11), (1, 1, 0x22), (0, 2, 0x2211), (2, 2, 0x4433)]
    assert bus.read(0x70, 2) == 0x0100
    assert bus.read(0x84, 4) == 0xDE06DE04


@pytest.mark.parametrize(("start", "length"), [(0x3F0, 9), (0x3FF, 1), (0x3FA, 2), (0x300, 0x200)])
def test_overlapping_ranges_are_refused(bus: Bus, start: int, length: int) -> None:
    bus.add(0x3F8, 8, Recorder(), "com1")
    with pytest.raises(ValueError, match="overlaps com1 at 0x3f8-0x3ff"):
        bus.add(start, length, Recorder(), "other")


@pytest.mark.parametrize(("start", "length"), [(0x10000, 1), (0xFFFF, 2), (-1, 1), (0, 0)])
def test_ranges_outside_the_bus_are_refused(bus: Bus, start: int, length: int) -> None:
    with pytest.raises(ValueError, match="not within the I/O port bus"):
        bus.add(start, length, Recorder(), "other")


def test_adjacent_ranges_fit(bus: Bus) -> None:
    for start in (0x20, 0x10, 0x30):
        bus.add(start, 0x10, Recorder(), f"at {start:#x}")
    assert [r.start for r in bus.ranges] == [0x10, 0x20, 0x30]


def test_ranges_come_and_go_whatever_was_looked_up_before(bus: Bus) -> None:
    cache = bus.new_cache()
    assert bus.find(0x60) is None
    cache["derived"] = 1
    bus.add(0x60, 1, Recorder(), "kbd")
    assert cache == {}
    assert bus.read(0x60, 1) == 0
    bus.remove(0x60)
    assert bus.read(0x60, 1) == 0xFF
    with pytest.raises(KeyError):
        bus.remove(0x60)


def test_scan_of_all_addresses_does_not_grow_the_cache_for_ever() -> None:
    bus = Bus("memory", 52)
    for address in range(3 * CACHE_ENTRIES):
        bus.find(address)
    assert len(bus._table[2]) == CACHE_ENTRIES
