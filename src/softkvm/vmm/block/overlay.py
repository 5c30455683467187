# SPDX-License-Identifier: Apache-2.0
"""A layer over an image that takes what is written: the image stays as it is, and the layer goes with the machine.

The layer is a sparse file without a name. Of each chunk it is known whether the layer has it; a chunk that is written
in part is completed from the image first.
"""

from __future__ import annotations

import os
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.block.hostfile import punch, read_whole, write_whole
from softkvm.vmm.block.image import SECTOR, Image, Views, total
from softkvm.vmm.errors import SnapshotError

CHUNK: Final = 4096
_PIECE: Final = 1 << 20
SAVED: Final = Size(
    "packed bytes of an overlay in a snapshot", 128 << 20, SnapshotError, effect="SnapshotError", where=__name__
)


class Overlay(Image):
    """A layer over *below*, which it closes; its file is in *directory*, by default where temporary files are."""

    read_only = False

    def __init__(self, below: Image, directory: str | None = None) -> None:
        self.below = below
        self.name = below.name
        self.size = below.size
        self._chunks = bytearray((self.size + CHUNK - 1) // CHUNK)  # 1: the layer has it
        self._lock = threading.Lock()  # chunks that come to the layer
        self._file = tempfile.TemporaryFile(prefix="softkvm-overlay-", dir=directory)  # noqa: SIM115
        self._fd = self._file.fileno()
        os.ftruncate(self._fd, len(self._chunks) * CHUNK)

    def _runs(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield offset, size, and whether the layer has it, of parts that are alike."""
        end = offset + size
        while offset < end:
            index = offset // CHUNK
            has = self._chunks[index]
            last = (end - 1) // CHUNK
            other = self._chunks.find(1 - has, index, last + 1)
            stop = end if other < 0 else min(end, other * CHUNK)
            yield offset, stop - offset, has
            offset = stop

    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Read each part from where it is."""
        rest = Views(views)
        for at, size, has in self._runs(offset, total(views)):
            pieces = rest.take(size)
            if has:
                read_whole(self._fd, pieces, at)
            else:
                self.below.readv(pieces, at)

    def writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write to the layer."""
        size = total(views)
        with self._lock:
            self._complete(offset, size)
            write_whole(self._fd, views, offset)
            self._take(offset, size)

    def _complete(self, offset: int, size: int) -> None:
        """Copy what a write leaves of its first and its last chunk, unless the layer has them."""
        end = offset + size
        edges = {offset // CHUNK} if offset % CHUNK else set()
        if end % CHUNK and end < self.size:
            edges.add(end // CHUNK)
        for index in edges:
            if not self._chunks[index]:
                start = index * CHUNK
                old = memoryview(bytearray(min(CHUNK, self.size - start)))
                self.below.readv([old], start)
                write_whole(self._fd, [old], start)
                self._chunks[index] = 1

    def _take(self, offset: int, size: int) -> None:
        first, last = offset // CHUNK, (offset + size - 1) // CHUNK
        self._chunks[first : last + 1] = b"\1" * (last + 1 - first)

    def flush(self) -> None:
        """Nothing: the layer doesn't outlive us."""

    def discard(self, offset: int, size: int) -> None:
        """Give room back of whole chunks that the layer has; they read as zeroes."""
        first, end = (offset + CHUNK - 1) // CHUNK, (offset + size) // CHUNK
        if end > first:
            with self._lock:
                for at, length, has in list(self._runs(first * CHUNK, (end - first) * CHUNK)):
                    if has:
                        punch(self._fd, at, length)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make holes of whole chunks, write the rest."""
        first, end = (offset + CHUNK - 1) // CHUNK * CHUNK, (offset + size) // CHUNK * CHUNK
        if end <= first:
            self._write_zeroes(offset, size)
            return
        with self._lock:
            holes = punch(self._fd, first, end - first)
            if holes:
                self._take(first, end - first)
        if not holes:
            self._write_zeroes(first, end - first)
        self._write_zeroes(offset, first - offset)
        self._write_zeroes(end, offset + size - end)

    def _write_zeroes(self, offset: int, size: int) -> None:
        while size:
            piece = min(size, 1 << 20)
            self.writev([memoryview(bytes(piece))], offset)
            offset, size = offset + piece, size - piece

    def files(self) -> list[str]:
        """Return the files below."""
        return self.below.files()

    def save(self) -> dict[str, Any]:
        """What the layer has, packed; SnapshotError if that is more than a snapshot takes."""
        runs, packed = [], 0
        for offset, size, has in self._runs(0, self.size):
            for at in range(offset, offset + size if has else offset, _PIECE):
                data = bytearray(min(_PIECE, offset + size - at))
                read_whole(self._fd, [memoryview(data)], at, short=CHUNK)
                runs.append([at, len(data), zlib.compress(data, 1)])
                packed += len(runs[-1][2])  # type: ignore[arg-type]
                SAVED.check(packed)
        return {"layer": runs}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a layer had."""
        with self._lock:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, len(self._chunks) * CHUNK)
            self._chunks[:] = bytes(len(self._chunks))
            for at, size, packed in state["layer"]:
                data = zlib.decompressobj().decompress(packed, _PIECE)
                if len(data) != size or at % CHUNK or not 0 <= at <= self.size - size:
                    raise ValueError(f"{self.name}: the saved overlay has {size} bytes at {at}")
                write_whole(self._fd, [memoryview(data)], at)
                self._take(at, size)

    def close(self) -> None:
        """Drop the layer, close the image."""
        self._file.close()
        self.below.close()


assert CHUNK % SECTOR == 0
