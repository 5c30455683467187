# SPDX-License-Identifier: Apache-2.0
"""Memory in a file: as large as the memory, every byte at its offset, and pages of zeroes nowhere (a sparse file).

So it can be mapped in the memory's place, and no page of it is read before the guest touches it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from softkvm.vmm.host_memory import merged
from softkvm.vmm.memory import MIB, PAGE_SIZE, GuestMemory
from softkvm.vmm.snapshot.dirty import Ranges

_PAGEMAP: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_PRESENT_OR_SWAPPED: Final = 0xC0  # bits 63 and 62 of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst)
_MAPPED: Final = bytes(int(bool(byte & _PRESENT_OR_SWAPPED)) for byte in range(256))
_BATCH_PAGES: Final = 1 << 20
_PIECE: Final = 1 * MIB
_ZERO: Final = bytes(PAGE_SIZE)


def used_ranges(memory: GuestMemory) -> Ranges:
    """Return the memory that may have anything but zeroes, found without touching any of it.

    It is what the host has pages for, and where *memory* is mapped from files, what those have.
    """
    address = memory.ranges[0].hva
    found: list[tuple[int, int]] = []
    for part in memory.files:
        found += data_ranges(part.fd, part.offset, part.offset + part.size)
    try:
        with open(_PAGEMAP, "rb", buffering=0) as pagemap:
            for first in range(0, memory.size // PAGE_SIZE, _BATCH_PAGES):
                count = min(_BATCH_PAGES, memory.size // PAGE_SIZE - first)
                entries = os.pread(
                    pagemap.fileno(), count * _ENTRY_BYTES, (address // PAGE_SIZE + first) * _ENTRY_BYTES
                )
                if len(entries) != count * _ENTRY_BYTES:
                    return [(0, memory.size)]
                flags = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_MAPPED)
                found += [
                    ((first + match.start()) * PAGE_SIZE, (match.end() - match.start()) * PAGE_SIZE)
                    for match in re.finditer(rb"\x01+", flags)
                ]
    except OSError:  # /proc is not there, or not all of it
        return [(0, memory.size)]
    return merged(found)


def data_ranges(fd: int, at: int, end: int) -> Ranges:
    """Return where a file has anything from *at* to *end*: all of it, on a file system that doesn't tell."""
    found: Ranges = []
    first = at
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind
                break
            return [(first, end - first)]
        if start < end:
            found.append((start & -PAGE_SIZE, min(at, end) - (start & -PAGE_SIZE)))
    return merged(found)


def not_zero(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of the runs of pages in *data*, which begins at *offset*, that are not all zeroes."""
    start = None
    for at in range(0, len(data), PAGE_SIZE):
        if data[at : at + PAGE_SIZE] == _ZERO:
            if start is not None:
                yield offset + start, at - start
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield offset + start, len(data) - start


def pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield *ranges* cut at the multiples of a mebibyte."""
    for start, size in ranges:
        at, end = start, start + size
        while at < end:
            cut = min((at // _PIECE + 1) * _PIECE, end)
            yield at, cut - at
            at = cut


def write(memory: GuestMemory, fd: int, ranges: Ranges, *, zeroes: bool = False) -> int:
    """Write *ranges* of memory that stands into an empty file; return how many bytes it takes.

    Pages of zeroes are left out, unless the file is to be mapped over another one (*zeroes*). OSError for a full disk.
    """
    os.ftruncate(fd, memory.size)
    stored = 0
    for offset, size in pieces(ranges):
        data = bytes(memory.view[offset : offset + size])
        for start, length in [(offset, size)] if zeroes else not_zero(data, offset):
            write_all(fd, memoryview(data)[start - offset : start - offset + length], start)
            stored += length
    return stored


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write *data* at *offset*, all of it."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def digest(fd: int, size: int, ranges: Ranges | None = None) -> str:
    """Return the SHA-256 of what a file has: its pages that are not zeroes, each run behind its offset and size.

    Runs end at multiples of a mebibyte. So it is the same for the same contents, wherever the file has holes. With
    *ranges* only those.
    """
    hash = hashlib.sha256()
    for offset, length in pieces(data_ranges(fd, 0, size) if ranges is None else ranges):
        data = read_all(fd, length, offset)
        for start, count in not_zero(data, offset):
            hash.update(struct.pack("<QQ", start, count))
            hash.update(memoryview(data)[start - offset : start - offset + count])
    return hash.hexdigest()


def read_all(fd: int, size: int, offset: int) -> bytes:
    """Return *size* bytes at *offset*; EOFError if the file has not so many."""
    data = bytearray()
    while len(data) < size:
        part = os.pread(fd, size - len(data), offset + len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
