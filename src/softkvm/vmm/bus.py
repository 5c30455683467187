# SPDX-License-Identifier: Apache-2.0
"""The buses of a machine: which device answers at a port or at a guest physical address.

A device is an object with ``read`` and ``write``; it registers the ranges where it wants to be asked::

    pio.add(0x3F8, 8, uart, "com1")

Offsets are relative to the start of the range, sizes are bytes (1, 2, 4; 8 on the memory bus). An access that is wider
than the device takes is split, and one that no range holds entirely is made byte by byte; where nobody is it reads ones
and loses its write. So a PC's ISA bus does it (IBM PC AT Technical Reference, "I/O channel": -I/O CS16).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple, Protocol


class Device(Protocol):
    """What the bus asks of a device. vCPU threads call it, several at once: a device locks what it shares."""

    def read(self, offset: int, size: int) -> int:
        """Return the *size* bytes at *offset* of the device's range, as an unsigned little-endian number."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the *size* bytes of *value* at *offset* of the device's range."""


class Range(NamedTuple):
    """Addresses ``start <= address < end`` of one device, accessed by *width* bytes at most."""

    start: int
    end: int
    device: Device
    name: str
    width: int


CACHE_ENTRIES = 4096
"""Most look-ups that a cache keeps: a guest that scans addresses must not fill our memory."""


class Bus:
    """A table of address ranges. Look-ups are cached: the hot path is one dictionary access."""

    def __init__(self, name: str, address_bits: int) -> None:
        self.name = name
        self.limit = 1 << address_bits
        # (starts, ranges, look-ups): sorted by start, never overlapping; replaced as a whole, so that a vCPU's thread
        # that looks something up sees one state or the other
        self._table: tuple[list[int], list[Range], dict[int, Range | None]] = ([], [], {})
        self._caches: list[dict[Any, Any]] = []

    def __repr__(self) -> str:
        ranges = ", ".join(f"{entry.start:#x} {entry.name}" for entry in self.ranges)
        return f"<Bus of {self.name}s: {ranges}>"

    @property
    def ranges(self) -> list[Range]:
        """Every range, sorted by its start."""
        return self._table[1]

    def new_cache(self) -> dict[Any, Any]:
        """Return a dictionary that is emptied whenever a range comes or goes, for what a caller derives from them."""
        cache: dict[Any, Any] = {}
        self._caches.append(cache)
        return cache

    def _replace(self, ranges: list[Range]) -> None:
        self._table = ([entry.start for entry in ranges], ranges, {})
        for cache in self._caches:
            cache.clear()

    def add(self, start: int, length: int, device: Device, name: str, *, width: int = 8) -> None:
        """Let *device* answer for *length* addresses from *start*, and see no access of more than *width* bytes.

        Raises ValueError if the range is empty, leaves the bus or overlaps another device's.
        """
        end = start + length
        if length <= 0 or start < 0 or end > self.limit:
            raise ValueError(f"{name}: range {start:#x}+{length:#x} is not within the {self.name} bus")
        starts, ranges, _ = self._table
        index = bisect_right(starts, start)
        for other in ranges[max(index - 1, 0) : index + 1]:
            if start < other.end and other.start < end:
                raise ValueError(
                    f"{name}: range {start:#x}-{end - 1:#x} overlaps {other.name} "
                    f"at {other.start:#x}-{other.end - 1:#x}"
                )
        self._replace([*ranges[:index], Range(start, end, device, name, width), *ranges[index:]])

    def remove(self, start: int) -> None:
        """Take away the range that begins at *start*; KeyError if there is none."""
        starts, ranges, _ = self._table
        index = bisect_right(starts, start) - 1
        if index < 0 or starts[index] != start:
            raise KeyError(start)
        self._replace([*ranges[:index], *ranges[index + 1 :]])

    def find(self, address: int) -> Range | None:
        """Return the range that holds *address*."""
        starts, ranges, cache = self._table
        try:
            return cache[address]
        except KeyError:
            pass
        index = bisect_right(starts, address) - 1
        found = ranges[index] if index >= 0 and address < ranges[index].end else None
        if len(cache) < CACHE_ENTRIES:
            cache[address] = found
        return found

    def whole(self, address: int, size: int) -> Range | None:
        """Return the range that takes *size* bytes at *address* in one access."""
        found = self.find(address)
        return found if found is not None and size <= found.width and address + size <= found.end else None

    def read(self, address: int, size: int) -> int:
        """Return what the devices at *address* and behind answer; ones where nobody is."""
        found = self.whole(address, size)
        if found is not None:
            return found.device.read(address - found.start, size) & (1 << size * 8) - 1
        if size == 1:
            return 0xFF
        pieces = self._pieces(address, size)
        return sum(self.read(at, piece) << 8 * (at - address) for at, piece in pieces)

    def write(self, address: int, size: int, value: int) -> None:
        """Hand *value* to the devices at *address* and behind; nobody there: nothing happens."""
        found = self.whole(address, size)
        if found is not None:
            found.device.write(address - found.start, size, value)
        elif size > 1:
            for at, piece in self._pieces(address, size):
                self.write(at, piece, value >> 8 * (at - address) & (1 << 8 * piece) - 1)

    def _pieces(self, address: int, size: int) -> list[tuple[int, int]]:
        """The accesses, by address and size, that one becomes which is too wide."""
        found = self.find(address)
        piece = found.width if found is not None and address + size <= found.end else 1
        return [(at, piece) for at in range(address, address + size, piece)]
