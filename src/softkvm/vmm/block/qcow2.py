# SPDX-License-Identifier: Apache-2.0
"""qcow2 images, versions 2 and 3, read and written, with backing files, compressed clusters and internal snapshots.

A guest's clusters are found by two levels of tables (L1, L2). Data that have a cluster of their own are read and
written in it, without a lock. All else takes a new cluster: it is counted (:mod:`.refcounts`), the data are written,
with what was there before around them, and the entry is changed in memory. :meth:`Qcow2Image.flush` syncs counts and
data, writes the tables that have changed, syncs, and only then gives back clusters that were replaced. Whenever we, or
the host, come to an end in between, the file's tables are those of a moment between two flushes: nothing that was
flushed is missing. What is compressed is only read, and what a snapshot has as well is left to it.

Source: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from softkvm.vmm.block.hostfile import file_size, lock, read_whole, unlock, write_whole
from softkvm.vmm.block.image import SECTOR, Image, ImageFileError, Views, fill_zeroes, total
from softkvm.vmm.block.qcow2_header import AUTOCLEAR_AT, CORRUPT, DIRTY, ZSTD, Header, read_header
from softkvm.vmm.block.refcounts import Refcounts, damaged

_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_OFFSET: Final = 0x00FFFFFFFFFFFE00
_ZERO: Final = 1

_CACHE_BYTES: Final = 16 << 20
_DIRTY_TABLES: Final = 64
_UNPACKED: Final = 8  # compressed clusters that are kept
_ANY: Final = 1 << 62  # data behind the file's end are zeroes


class _Kind(Enum):
    NONE = 0
    """Nothing here: the backing file's."""
    ZERO = 1
    DATA = 2
    COMPRESSED = 3


class _Extent(NamedTuple):
    """*size* bytes at *at* of the disk that are alike; *host* is their place in the file, or a compressed's entry."""

    kind: _Kind
    at: int
    size: int
    host: int


class Qcow2Image(Image):
    """The file *fd*, which is the image's from now on, over *backing*, which it closes.

    ImageFileError for a file that is damaged or has what we don't know.
    """

    def __init__(
        self, fd: int, name: str, *, read_only: bool, header: Header | None = None, backing: Image | None = None
    ) -> None:
        self.name = name
        self.read_only = read_only
        self._fd = fd
        self.header = header or read_header(fd, name)
        self.backing = backing
        self.size = self.header.size
        if self.size % SECTOR:
            raise ImageFileError(f"{name}: a disk of {self.size} bytes, expected a multiple of {SECTOR}")
        self._cluster = self.header.cluster_size
        self._entries = self._cluster // 8
        self._lock = threading.Lock()  # all tables and counts
        self._flushing = threading.Lock()
        self._tables: OrderedDict[int, array[int]] = OrderedDict()  # L2 tables by their place in the file
        self._dirty: set[int] = set()  # those that the file has otherwise
        self._busy: set[int] = set()  # those being written
        self._l1_dirty = False
        self._to_free: list[int] = []  # clusters that the file's tables may still name
        self._flying = 0  # accesses to data outside the lock
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        file_size(fd, name)
        try:
            self._l1 = self._read_table(self.header.l1_at, self.header.l1_entries)
            if not read_only:
                self._begin_writing()
        except OSError as error:
            raise ImageFileError(f"{name}: {error.strerror}") from None

    def _begin_writing(self) -> None:
        header = self.header
        if header.incompatible & CORRUPT:
            raise ImageFileError(f"{self.name}: the image is marked as damaged: qemu-img check -r all may mend it")
        if header.incompatible & DIRTY:
            raise ImageFileError(f"{self.name}: the image was not closed: qemu-img check -r all mends it")
        self._refcounts = Refcounts(self._fd, header)
        if not self._refcounts.get(0):
            raise ImageFileError(f"{self.name}: damaged: its first cluster is not counted as used")
        if header.version == 3 and header.autoclear:  # what we don't keep up to date: persistent bitmaps
            write_whole(self._fd, [memoryview(bytes(8))], AUTOCLEAR_AT)
            header.autoclear = 0

    # -- tables

    def _read_table(self, at: int, entries: int) -> array[int]:
        data = bytearray(8 * entries)
        if data:
            read_whole(self._fd, [memoryview(data)], at)
        table = array("Q", bytes(data))
        table.byteswap()
        return table

    def _place(self, entry: int, what: str) -> int:
        """The offset that an entry names."""
        at = entry & _OFFSET
        if at % self._cluster:
            raise damaged(f"{what} at {at:#x}")
        return at

    def _table(self, l1_index: int) -> array[int] | None:
        """Return the L2 table of an L1 entry, if there is one."""
        entry = self._l1[l1_index]
        at = self._place(entry, "an L2 table")
        if not at:
            return None
        table = self._tables.get(at)
        if table is None:
            table = self._read_table(at, self._entries)
            self._keep(at, table)
        else:
            self._tables.move_to_end(at)
        return table

    def _keep(self, at: int, table: array[int]) -> None:
        self._tables[at] = table
        most = max(_CACHE_BYTES // self._cluster, 2)
        if len(self._tables) > most:
            for old in self._tables:
                if old not in self._dirty and old not in self._busy and old != at:
                    del self._tables[old]
                    return

    def _own_table(self, l1_index: int) -> array[int]:
        """Return the L2 table of an L1 entry, which is going to change.

        It is made if there is none, and copied if a snapshot has it too.
        """
        entry = self._l1[l1_index]
        table = self._table(l1_index)
        if table is not None and entry & _COPIED:
            self._dirty.add(entry & _OFFSET)  # and so it stays in memory
            return table
        at, _ = self._refcounts.allocate(1)
        if table is None:
            table = array("Q", bytes(self._cluster))
        else:
            table = array("Q", table)
            self._to_free.append((entry & _OFFSET) // self._cluster)
        self._l1[l1_index] = at | _COPIED
        self._l1_dirty = True
        self._dirty.add(at)
        self._keep(at, table)
        return table

    def _kind_of(self, entry: int) -> _Kind:
        if entry & _COMPRESSED:
            return _Kind.COMPRESSED
        if entry & _ZERO and self.header.version >= 3:
            return _Kind.ZERO
        return _Kind.DATA if entry & _OFFSET else _Kind.NONE

    def _extents(self, offset: int, size: int) -> list[_Extent]:
        """Return what a range of the disk is made of."""
        found: list[_Extent] = []
        end, cluster = offset + size, self._cluster
        while offset < end:
            index = offset // cluster
            within = offset - index * cluster
            piece = min(cluster - within, end - offset)
            table = self._table(index // self._entries)
            if table is None:
                until = (index // self._entries + 1) * self._entries * cluster
                piece = min(until, end) - offset
                kind, host = _Kind.NONE, 0
            else:
                entry = table[index % self._entries]
                kind = self._kind_of(entry)
                host = entry
                if kind is _Kind.DATA:
                    host = self._place(entry, "a cluster") + within
            last = found[-1] if found else None
            if (
                last is not None
                and last.kind is kind
                and kind is not _Kind.COMPRESSED
                and (kind is not _Kind.DATA or last.host + last.size == host)
            ):
                found[-1] = last._replace(size=last.size + piece)
            else:
                found.append(_Extent(kind, offset, piece, host))
            offset += piece
        return found

    # -- reading

    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Read each part from where it is."""
        size = total(views)
        with self._lock:
            extents = self._extents(offset, size)
            self._flying += 1
        try:
            if len(extents) == 1:
                self._read_extent(extents[0], views)
                return
            rest = Views(views)
            for extent in extents:
                self._read_extent(extent, rest.take(extent.size))
        finally:
            with self._lock:
                self._flying -= 1

    def _read_extent(self, extent: _Extent, views: Sequence[memoryview]) -> None:
        if extent.kind is _Kind.DATA:
            read_whole(self._fd, views, extent.host, short=_ANY)
        elif extent.kind is _Kind.COMPRESSED:
            data = memoryview(self._unpack(extent.host))
            at = extent.at % self._cluster
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
        elif extent.kind is _Kind.NONE and self.backing is not None:
            below = min(max(self.backing.size - extent.at, 0), extent.size)
            rest = Views(views)
            if below:
                self.backing.readv(rest.take(below), extent.at)
            fill_zeroes(rest.take(extent.size))
        else:
            fill_zeroes(views)

    def _unpack(self, entry: int) -> bytes:
        """Return the contents of a compressed cluster."""
        data = self._unpacked.get(entry)
        if data is None:
            at, size = self._compressed_at(entry)
            packed = os.pread(self._fd, size, at)
            data = self._decompress(packed, at)
            self._unpacked[entry] = data
            if len(self._unpacked) > _UNPACKED:
                self._unpacked.pop(next(iter(self._unpacked)), None)
        return data

    def _compressed_at(self, entry: int) -> tuple[int, int]:
        """The offset of a compressed cluster, and how many bytes it has at most."""
        bits = 62 - (self.header.cluster_bits - 8)
        at = entry & (1 << bits) - 1
        sectors = (entry & _COMPRESSED - 1) >> bits
        return at, (sectors + 1) * SECTOR - at % SECTOR

    def _decompress(self, packed: bytes, at: int) -> bytes:
        try:
            if self.header.compression == ZSTD:
                import zstandard

                reader = zstandard.ZstdDecompressor().stream_reader(packed)
                data = reader.read(self._cluster)
            else:
                data = zlib.decompressobj(-12).decompress(packed, self._cluster)
        except Exception as error:  # each library has its own
            raise damaged(f"a compressed cluster at {at:#x}: {error}") from None
        if len(data) != self._cluster:
            raise damaged(f"a compressed cluster at {at:#x}: {len(data)} bytes")
        return bytes(data)

    # -- writing

    def writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write to clusters that are the disk's own, and to new ones."""
        size = total(views)
        with self._lock:
            in_place = self._in_place(offset, size)
            if in_place:
                self._flying += 1
        if in_place:
            try:
                rest = Views(views)
                for at, length in in_place:
                    write_whole(self._fd, views if len(in_place) == 1 else rest.take(length), at)
            finally:
                with self._lock:
                    self._flying -= 1
            return
        rest = Views(views)
        with self._lock:
            end = offset + size
            while offset < end:
                done = self._write_some(rest, offset, end - offset)
                offset += done
        if len(self._dirty) > _DIRTY_TABLES:
            self._write_tables()

    def _in_place(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Return places and lengths in the file if all of a range is in clusters that nobody else has; else nothing."""
        found: list[tuple[int, int]] = []
        end, cluster, entries = offset + size, self._cluster, self._entries
        while offset < end:
            index = offset // cluster
            table = self._table(index // entries)
            entry = 0 if table is None else table[index % entries]
            if not entry & _COPIED or self._kind_of(entry) is not _Kind.DATA:
                return []
            within = offset - index * cluster
            piece = min(cluster - within, end - offset)
            at = self._place(entry, "a cluster") + within
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + piece
            else:
                found.append((at, piece))
            offset += piece
        return found

    def _write_some(self, rest: Views, offset: int, size: int) -> int:
        """Write what can be written in a row from *offset* on; return how many bytes that was."""
        cluster, entries = self._cluster, self._entries
        index = offset // cluster
        within = offset - index * cluster
        table = self._own_table(index // entries)
        place = index % entries
        entry = table[place]
        if entry & _COPIED and self._kind_of(entry) is _Kind.DATA:
            piece = min(cluster - within, size)
            write_whole(self._fd, rest.take(piece), self._place(entry, "a cluster") + within)
            return piece
        # clusters, up to the table's end, that need new ones
        most = min((within + size + cluster - 1) // cluster, entries - place)
        count = 1
        while count < most and not (
            table[place + count] & _COPIED and self._kind_of(table[place + count]) is _Kind.DATA
        ):
            count += 1
        own = self._place(entry, "a cluster") if entry & _COPIED and not entry & _COMPRESSED else 0
        if own:  # zeroes with a cluster to write to
            host, count = own, 1
        else:
            host, count = self._refcounts.allocate(count)
        piece = min(count * cluster - within, size)
        try:
            self._write_new(rest, offset, piece, host, count)
        except OSError:
            if not own:
                for number in range(count):
                    self._refcounts.release(host // cluster + number)
            raise
        for number in range(count):
            self._replaced(table[place + number], keep=own)
            table[place + number] = host + number * cluster | _COPIED
        return piece

    def _write_new(self, rest: Views, offset: int, size: int, host: int, count: int) -> None:
        """Fill new clusters: with data, and before and behind these with what was there."""
        cluster = self._cluster
        start = offset - offset % cluster
        before = self._old(start, offset - start)
        behind = self._old(offset + size, start + count * cluster - offset - size)
        write_whole(self._fd, [*before, *rest.take(size), *behind], host)

    def _old(self, offset: int, size: int) -> list[memoryview]:
        """Return the contents of a range that is about to be copied."""
        if not size:
            return []
        data = memoryview(bytearray(size))
        inside = min(max(self.size - offset, 0), size)
        if inside:
            rest = Views([data])
            for extent in self._extents(offset, inside):
                self._read_extent(extent, rest.take(extent.size))
        return [data]

    def _replaced(self, entry: int, *, keep: int = 0) -> None:
        """Note that the clusters of an entry are not used any more, but for the one at *keep*."""
        if entry & _COMPRESSED:
            at, size = self._compressed_at(entry)
            first, last = at // self._cluster, (at + size - 1) // self._cluster
            self._to_free += range(first, last + 1)
        elif entry & _OFFSET and entry & _OFFSET != keep:
            self._to_free.append((entry & _OFFSET) // self._cluster)

    # -- zeroes

    def discard(self, offset: int, size: int) -> None:
        """Give whole clusters back. They read as zeroes from now on, where the format can say that."""
        self._unmap(offset, size)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Note that whole clusters are zeroes, write the rest."""
        first, last = self._unmap(offset, size, keep=not unmap) if self.header.version >= 3 else (offset, offset)
        self._write_zeroes(offset, first - offset)
        self._write_zeroes(last, offset + size - last)

    def _unmap(self, offset: int, size: int, *, keep: bool = False) -> tuple[int, int]:
        """Drop the whole clusters of a range, or *keep* their places; return where these begin and end."""
        cluster, entries = self._cluster, self._entries
        first = (offset + cluster - 1) // cluster
        last = (offset + size) // cluster
        if offset + size == self.size:
            last = (self.size + cluster - 1) // cluster
        if last <= first:
            return offset, offset
        empty = 0 if self.backing is None and not keep else _ZERO
        if empty and self.header.version < 3:
            return offset, offset
        with self._lock:
            for index in range(first, last):
                table = self._table(index // entries)
                if table is None and self.backing is None:
                    continue
                old = 0 if table is None else table[index % entries]
                kind = self._kind_of(old)
                if old == empty or (kind is _Kind.NONE and self.backing is None) or (keep and kind is _Kind.ZERO):
                    continue
                table = self._own_table(index // entries)
                if keep and kind is _Kind.DATA and old & _COPIED:
                    table[index % entries] = old | _ZERO
                else:
                    table[index % entries] = _ZERO if empty else 0
                    self._replaced(old)
        return first * cluster, min(last * cluster, self.size)

    def _write_zeroes(self, offset: int, size: int) -> None:
        while size:
            piece = min(size, 1 << 20)
            self.writev([memoryview(bytes(piece))], offset)
            offset, size = offset + piece, size - piece

    # -- order

    def flush(self) -> None:
        """Sync data, then the tables that name them."""
        if self._dirty or self._l1_dirty or self._to_free:
            self._write_tables()
        else:
            os.fdatasync(self._fd)

    def _write_tables(self) -> None:
        with self._flushing:
            with self._lock:
                tables = {at: array("Q", self._tables[at]) for at in self._dirty}
                self._dirty -= set(tables)
                self._busy = set(tables)
                l1 = array("Q", self._l1) if self._l1_dirty else None
                self._l1_dirty = False
                to_free, self._to_free = self._to_free, []
            try:
                os.fdatasync(self._fd)
                if tables:
                    for at, table in tables.items():
                        table.byteswap()
                        write_whole(self._fd, [memoryview(table).cast("B")], at)
                    os.fdatasync(self._fd)
                if l1 is not None:
                    l1.byteswap()
                    write_whole(self._fd, [memoryview(l1).cast("B")], self.header.l1_at)
                    os.fdatasync(self._fd)
            except OSError:
                with self._lock:
                    self._dirty |= set(tables)
                    self._l1_dirty |= l1 is not None
                    self._to_free += to_free
                    self._busy = set()
                raise
            with self._lock:
                self._busy = set()
                if self._flying:  # somebody may be in them still
                    self._to_free += to_free
                    return
                for cluster in to_free:
                    self._refcounts.release(cluster)
                self._unpacked.clear()

    def files(self) -> list[str]:
        """Return this file and those behind it."""
        return [self.name, *(self.backing.files() if self.backing is not None else [])]

    def let_go(self) -> None:
        """Write what is left to be written, give the locks back, unless the file is only read."""
        if not self.read_only:
            self.flush()
            unlock(self._fd)

    def take_back(self) -> None:
        """Take the locks again."""
        if not self.read_only:
            lock(self._fd, self.name, write=True, grow=True)

    def close(self) -> None:
        """Write what is left to be written, close the files."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if not self.read_only:
                self._fd = fd
                self.flush()
                self._fd = -1
        finally:
            self._fd = -1
            os.close(fd)
            if self.backing is not None:
                self.backing.close()
