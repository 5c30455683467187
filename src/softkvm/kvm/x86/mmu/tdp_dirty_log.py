# SPDX-License-Identifier: Apache-2.0
"""What the dirty log asks of the nested page tables: leaves that are clean or protected, and which were written."""

from __future__ import annotations

from softkvm.kvm.memory.pages import PG_LEVEL_4K
from softkvm.kvm.x86.mmu.spte import PT_DIRTY_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, PT_WRITABLE_MASK
from softkvm.kvm.x86.mmu.tdp_tables import TdpTable, TdpTables


class TdpDirtyLog(TdpTables):
    """Tables whose leaves can be logged; every method with ``mmu_lock`` held."""

    __slots__ = ()

    def protect_huge_pages(self, start: int, end: int) -> bool:
        """Let writes to large leaves that meet [start, end) fault, and forget that they are dirty; True to flush.

        Each is split by the first write to it.
        """
        return self._protect(self.root, start, end)

    def _protect(self, table: TdpTable, start: int, end: int) -> bool:
        if table.level == PG_LEVEL_4K:
            return False
        indexes = self._overlapping(table, start, end)
        flush = False
        if table.leaves and indexes:
            address, bits = table.address + indexes.start * 8, PT_WRITABLE_MASK | PT_DIRTY_MASK
            flush = bool(self._machine.pte_clear_bits(address, len(indexes), bits, PT_PRESENT_MASK | PT_PAGE_SIZE_MASK))
            if flush:
                self._note_dirty_tlbs(table, indexes.start, indexes.stop)
        for index, child in table.children.items():
            if index in indexes:
                flush |= self._protect(child, start, end)
        return flush

    def harvest_dirty(self, start: int, end: int) -> tuple[int, bool]:
        """Clear the dirty bits of the 4 KiB leaves in [start, end).

        Returns the frames that were dirty as a bit mask relative to ``start``, and whether a flush is needed.
        """
        dirty = bytearray((end - start + 7) // 8 + 66)
        test_and_clear = self._machine.pte_test_and_clear
        low = high = -1  # frames to flush that are not noted yet
        for table, first, count in self.leaf_tables(start, end):
            found = test_and_clear(table.address + first * 8, count, PT_DIRTY_MASK)
            bits = int.from_bytes(found, "little")
            if not bits:
                continue
            gfn = table.gfn + first
            at = gfn - start
            if at & 7:
                byte, chunk = at >> 3, bits << (at & 7)
                size = (chunk.bit_length() + 7) // 8
                merged = int.from_bytes(dirty[byte : byte + size], "little") | chunk
                dirty[byte : byte + size] = merged.to_bytes(size, "little")
            else:
                dirty[at >> 3 : (at >> 3) + len(found)] = found
            lowest = gfn + (bits & -bits).bit_length() - 1
            if lowest != high:
                if high >= 0:
                    self.tlbs_dirty.add(low, high)
                low = lowest
            high = gfn + bits.bit_length()
        if high >= 0:
            self.tlbs_dirty.add(low, high)
        return int.from_bytes(dirty, "little"), high >= 0

    def clear_dirty(self, start: int, end: int) -> bool:
        """Clear the dirty bits of the 4 KiB leaves in [start, end); True if a flush is needed."""
        return self._clear(start, end, PT_DIRTY_MASK)

    def write_protect(self, start: int, end: int) -> bool:
        """Let writes to the 4 KiB leaves in [start, end) fault; True if a flush is needed."""
        return self._clear(start, end, PT_WRITABLE_MASK)

    def _clear(self, start: int, end: int, bits: int) -> bool:
        clear = self._machine.pte_clear_bits
        flush = False
        for table, first, count in self.leaf_tables(start, end):
            if clear(table.address + first * 8, count, bits):
                self._note_dirty_tlbs(table, first, first + count)
                flush = True
        return flush
