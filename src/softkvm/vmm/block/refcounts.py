# SPDX-License-Identifier: Apache-2.0
"""How often each cluster of a qcow2 file is used, and where there are free ones.

A count is in the file as soon as it is changed. The order in which things come to the disk is the image's: what it uses
was counted and synced before, what it frees it has stopped using. So after a crash a cluster can be counted and unused,
which costs room, and never used and not counted.

Source: QEMU, docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from typing import Final

from softkvm.vmm.block.hostfile import punch, read_whole, write_whole
from softkvm.vmm.block.qcow2_header import REFCOUNT_TABLE_AT, Header

_OFFSET: Final = 0x00FFFFFFFFFFFE00


def damaged(what: str) -> OSError:
    """Return the error for a file whose contents contradict each other."""
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: damaged qcow2 image: {what}")


class Refcounts:
    """The counts of the file *fd*; the image's lock is held in every call."""

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd
        self._header = header
        self._cluster = header.cluster_size
        self._bits = 1 << header.refcount_order
        self._per_block = self._cluster * 8 // self._bits
        self._most = (1 << self._bits) - 1
        data = bytearray(header.refcount_table_clusters * self._cluster)
        read_whole(fd, [memoryview(data)], header.refcount_table_at)
        self._table = array("Q", bytes(data))
        self._table.byteswap()
        self._blocks: dict[int, bytearray] = {}
        self._hint = 1  # no cluster below is free

    def get(self, cluster: int) -> int:
        """Return the count of a cluster, by its number in the file."""
        block = self._block(cluster // self._per_block)
        return 0 if block is None else self._get(block, cluster % self._per_block)

    def _get(self, block: bytearray, index: int) -> int:
        bits = self._bits
        if bits >= 8:
            width = bits // 8
            return int.from_bytes(block[index * width : (index + 1) * width], "big")
        at = index * bits
        return block[at // 8] >> at % 8 & self._most

    def _set(self, block: bytearray, index: int, value: int) -> tuple[int, int]:
        """Set a count; return the block's bytes, from and to, that have changed."""
        bits = self._bits
        if bits >= 8:
            width = bits // 8
            block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
            return index * width, (index + 1) * width
        at = index * bits
        block[at // 8] = block[at // 8] & ~(self._most << at % 8) | value << at % 8
        return at // 8, at // 8 + 1

    def _block(self, number: int) -> bytearray | None:
        block = self._blocks.get(number)
        if block is None:
            at = self._table[number] & _OFFSET if number < len(self._table) else 0
            if not at:
                return None
            if at % self._cluster:
                raise damaged(f"a refcount block at {at:#x}")
            block = bytearray(self._cluster)
            read_whole(self._fd, [memoryview(block)], at)
            self._blocks[number] = block
        return block

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Count up to *wanted* free clusters in a row as used; return the first one's offset in the file, and how many.

        OSError if the disk is full.
        """
        cluster = self._hint
        while True:
            number, index = divmod(cluster, self._per_block)
            block = self._block(number)
            if block is None:
                self._new_block(number)
                continue
            while index < self._per_block and self._get(block, index):
                index += 1
            if index < self._per_block:
                break
            cluster = (number + 1) * self._per_block
        count = 0
        first, last = self._cluster, 0
        while count < wanted and index + count < self._per_block and not self._get(block, index + count):
            low, high = self._set(block, index + count, 1)
            first, last = min(first, low), max(last, high)
            count += 1
        start = number * self._per_block + index
        try:
            self._write(number, block, first, last)
        except OSError:
            for place in range(index, index + count):
                self._set(block, place, 0)
            raise
        self._hint = start + count
        return start * self._cluster, count

    def _write(self, number: int, block: bytearray, first: int, last: int) -> None:
        write_whole(self._fd, [memoryview(block)[first:last]], (self._table[number] & _OFFSET) + first)

    def _new_block(self, number: int) -> None:
        """Make a block for clusters that none has had yet: its own is the first of them."""
        if number >= len(self._table):
            self._grow_table(number)
            return
        block = bytearray(self._cluster)
        self._set(block, 0, 1)
        at = number * self._per_block * self._cluster
        write_whole(self._fd, [memoryview(block)], at)
        self._write_table_entry(number, at)
        self._blocks[number] = block

    def _write_table_entry(self, number: int, at: int) -> None:
        os.fdatasync(self._fd)  # the block first
        write_whole(self._fd, [memoryview(struct.pack(">Q", at))], self._header.refcount_table_at + 8 * number)
        self._table[number] = at

    def _grow_table(self, number: int) -> None:
        """Make a larger table, behind all that the old one counts, and blocks that count it and themselves."""
        old_at, old_clusters = self._header.refcount_table_at, self._header.refcount_table_clusters
        first = len(self._table)  # the block, by number, of which the new clusters are
        per_table_cluster = self._cluster // 8
        blocks, clusters = 1, 0
        while True:
            clusters = max(
                (max(first + blocks, number + 1) + per_table_cluster - 1) // per_table_cluster, 2 * old_clusters
            )
            if blocks * self._per_block >= clusters + blocks:
                break
            blocks += 1
        start = first * self._per_block * self._cluster
        table = array("Q", self._table)
        table.extend([0] * (clusters * per_table_cluster - len(table)))
        new_blocks = {}
        for n in range(blocks):
            at = start + (clusters + n) * self._cluster
            block = bytearray(self._cluster)
            for index in range(min(self._per_block, max(0, clusters + blocks - n * self._per_block))):
                self._set(block, index, 1)
            write_whole(self._fd, [memoryview(block)], at)
            table[first + n] = at
            new_blocks[first + n] = block
        swapped = array("Q", table)
        swapped.byteswap()
        write_whole(self._fd, [memoryview(swapped).cast("B")], start)
        os.fdatasync(self._fd)
        write_whole(self._fd, [memoryview(struct.pack(">QI", start, clusters))], REFCOUNT_TABLE_AT)
        os.fdatasync(self._fd)
        self._header.refcount_table_at, self._header.refcount_table_clusters = start, clusters
        self._table = table
        self._blocks.update(new_blocks)
        for n in range(old_clusters):
            self.release(old_at // self._cluster + n)

    def release(self, cluster: int) -> None:
        """Count one use less of a cluster; what nobody uses any more becomes a hole."""
        number, index = divmod(cluster, self._per_block)
        block = self._block(number)
        count = 0 if block is None else self._get(block, index)
        if block is None or not count:
            raise damaged(f"cluster {cluster:#x} is used and not counted")
        first, last = self._set(block, index, count - 1)
        self._write(number, block, first, last)
        if count == 1:
            self._hint = min(self._hint, cluster)
            punch(self._fd, cluster * self._cluster, self._cluster)
