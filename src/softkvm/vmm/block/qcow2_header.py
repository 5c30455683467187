# SPDX-License-Identifier: Apache-2.0
"""The header of a qcow2 file: read, looked at, written.

Source: QEMU, docs/interop/qcow2.txt, versions 2 and 3.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.block.image import ImageFileError

MAGIC: Final = b"QFI\xfb"
_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
V2_LENGTH: Final = _V2.size
V3_LENGTH: Final = V2_LENGTH + _V3.size
REFCOUNT_TABLE_AT: Final = 48  # offset and clusters, 12 bytes
AUTOCLEAR_AT: Final = 88

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION, EXTENDED_L2 = (1 << number for number in range(5))
_UNDERSTOOD: Final = DIRTY | CORRUPT | COMPRESSION
_UNUSABLE: Final = {EXTERNAL_DATA: "an external data file", EXTENDED_L2: "subclusters (extended L2 entries)"}

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA

DEFLATE, ZSTD = 0, 1


def _size(name: str, most: int, element: int = 1, least: int = 0) -> Size:
    return Size(
        name, most, ImageFileError, element=element, least=least, giver="file", effect="refused", where=__name__
    )


_CLUSTER_BITS: Final = _size("bits of a qcow2 cluster's size", 21, least=9)
_L1_ENTRIES: Final = _size("entries of a qcow2 L1 table", 4 << 20, 8)
_REFCOUNT_CLUSTERS: Final = _size("clusters of a qcow2 refcount table", 1 << 14, least=1)
_REFCOUNT_TABLE: Final = _size("bytes of a qcow2 refcount table", 64 << 20)
_BACKING_NAME: Final = _size("bytes of a qcow2 backing file's name", 1023)
_DISK: Final = _size("bytes of a disk", 1 << 60)


@dataclass(slots=True)
class Header:
    """What the header says; sizes and offsets are bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_at: int
    refcount_table_at: int
    refcount_table_clusters: int
    refcount_order: int = 4
    snapshots: int = 0
    incompatible: int = 0
    autoclear: int = 0
    compression: int = DEFLATE
    backing_file: str = ""
    backing_format: str = ""

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits


def read_header(fd: int, name: str) -> Header:
    """Return the header of the file, as far as its contents make sense; ImageFileError says what does not."""
    try:
        return _read(os.pread(fd, 1 << 16, 0), os.fstat(fd).st_size)
    except ImageFileError as error:
        raise ImageFileError(f"{name}: {error}") from None


def _read(data: bytes, file_size: int) -> Header:
    if len(data) < V2_LENGTH or data[:4] != MAGIC:
        raise ImageFileError("no qcow2 image")
    (
        _, version, backing_at, backing_size, cluster_bits, size, encryption, l1_entries, l1_at,
        refcount_at, refcount_clusters, snapshots, _,
    ) = _V2.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        raise ImageFileError(f"qcow2 version {version}, expected 2 or 3")
    if encryption:
        raise ImageFileError("an encrypted qcow2 image: these are not supported")
    _CLUSTER_BITS.check(cluster_bits)
    header = Header(
        version, cluster_bits, _DISK.check(size), l1_entries, l1_at, refcount_at, refcount_clusters, snapshots=snapshots
    )
    length = V2_LENGTH
    if version == 3:
        length = _read_v3(header, data)
    _check(header, file_size)
    _read_extensions(header, data, length, backing_at or len(data))
    if backing_at:
        _BACKING_NAME.check(backing_size)
        raw = data[backing_at : backing_at + backing_size]
        if len(raw) != backing_size or b"\0" in raw or not raw:
            raise ImageFileError(f"damaged: the backing file's name, {backing_size} bytes at {backing_at}")
        header.backing_file = os.fsdecode(raw)
    return header


def _read_v3(header: Header, data: bytes) -> int:
    """Read what version 3 has more; return the header's length."""
    if len(data) < V3_LENGTH:
        raise ImageFileError("damaged: the file ends in its header")
    header.incompatible, _, header.autoclear, header.refcount_order, length = _V3.unpack_from(data, V2_LENGTH)
    if not V3_LENGTH <= length <= header.cluster_size or length % 8 or header.refcount_order > 6:
        raise ImageFileError(f"damaged: header length {length}, refcount order {header.refcount_order}")
    for feature, what in _UNUSABLE.items():
        if header.incompatible & feature:
            raise ImageFileError(f"a qcow2 image with {what}: these are not supported")
    if unknown := header.incompatible & ~_UNDERSTOOD:
        raise ImageFileError(f"a qcow2 image with features {unknown:#x} that are not known")
    if header.incompatible & COMPRESSION:
        header.compression = data[V3_LENGTH] if length > V3_LENGTH else DEFLATE
        if header.compression not in (DEFLATE, ZSTD):
            raise ImageFileError(f"a qcow2 image with compression {header.compression}, expected zlib or zstd")
    return int(length)


def _check(header: Header, file_size: int) -> None:
    """Look whether tables can be where they are said to be."""
    cluster = header.cluster_size
    _L1_ENTRIES.check(header.l1_entries)
    _REFCOUNT_CLUSTERS.check(header.refcount_table_clusters)
    _REFCOUNT_TABLE.check(header.refcount_table_clusters * cluster)
    if header.l1_entries * (cluster // 8) * cluster < header.size:
        raise ImageFileError(f"damaged: an L1 table of {header.l1_entries} entries for {header.size} bytes")
    for what, at, length in (
        ("L1 table", header.l1_at, 8 * header.l1_entries),
        ("refcount table", header.refcount_table_at, header.refcount_table_clusters * cluster),
    ):
        if length and (at % cluster or not cluster <= at <= file_size - length):
            raise ImageFileError(f"damaged: its {what}, {length} bytes at {at:#x} of {file_size:#x}")


def _read_extensions(header: Header, data: bytes, at: int, end: int) -> None:
    while at + 8 <= min(end, len(data)):
        kind, length = struct.unpack_from(">II", data, at)
        if kind == EXTENSION_END:
            return
        if at + 8 + length > min(end, len(data)):
            raise ImageFileError(f"damaged: a header extension of {length} bytes at {at}")
        if kind == EXTENSION_BACKING_FORMAT:
            header.backing_format = data[at + 8 : at + 8 + length].decode("ascii", "replace")
        at += 8 + (length + 7 & ~7)


def write_new(fd: int, size: int, *, cluster_bits: int = 16, backing_file: str = "", backing_format: str = "") -> None:
    """Write an empty image of version 3 into an empty file."""
    cluster = 1 << _CLUSTER_BITS.check(cluster_bits)
    _DISK.check(size)
    covered = cluster * (cluster // 8)
    l1_entries = _L1_ENTRIES.check((size + covered - 1) // covered)
    l1_clusters = (8 * l1_entries + cluster - 1) // cluster
    name = os.fsencode(backing_file)
    extensions = b""
    if backing_file:
        kind = backing_format.encode("ascii")
        extensions += struct.pack(">II", EXTENSION_BACKING_FORMAT, len(kind)) + kind.ljust(len(kind) + 7 & ~7, b"\0")
    extensions += bytes(8)
    backing_at = V3_LENGTH + len(extensions) if name else 0
    _BACKING_NAME.check(len(name))
    if backing_at + len(name) > cluster:
        raise ImageFileError(f"a backing file's name of {len(name)} bytes does not fit a cluster of {cluster}")
    # clusters: header, refcount table, refcount blocks, L1 table
    per_block = cluster * 8 // 16
    blocks = 1
    while blocks * per_block < 2 + blocks + l1_clusters:
        blocks += 1
    table_clusters = (8 * blocks + cluster - 1) // cluster
    used = 1 + table_clusters + blocks + l1_clusters
    while blocks * per_block < used:
        blocks += 1
        used += 1
    blocks_at = (1 + table_clusters) * cluster
    l1_at = blocks_at + blocks * cluster
    header = _V2.pack(
        MAGIC, 3, backing_at, len(name), cluster_bits, size, 0, l1_entries, l1_at, cluster, table_clusters, 0, 0
    ) + _V3.pack(0, 0, 0, 4, V3_LENGTH)
    os.ftruncate(fd, used * cluster)
    os.pwrite(fd, b"".join(struct.pack(">Q", blocks_at + n * cluster) for n in range(blocks)), cluster)
    os.pwrite(fd, struct.pack(">H", 1) * used, blocks_at)
    os.pwrite(fd, header + extensions + name, 0)
