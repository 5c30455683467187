# SPDX-License-Identifier: Apache-2.0
"""The TDP MMU: builds the nested page tables that the processor walks (N_CR3).

Tables are ordinary pages of the machine. Each :class:`TdpTable` mirrors the structure (which entries point
to which child) so that a walk costs a few dictionary look-ups; the entries themselves live in the page alone,
because the processor sets accessed and dirty bits there.

What a guest does cannot make them many: every table but the root covers a frame of some memory slot. Where there is no
slot one entry says so for the largest range that has none (:meth:`TdpMmu.set_mmio_spte`), and a table whose last leaf
goes with its slot is given back (:meth:`TdpMmu.zap_range`).

Locking: every method but :meth:`TdpMmu.lookup_mmio` is called with ``mmu_lock`` held. Entries that the processor may
be using are changed with the machine's atomic helpers only.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.host_mappings import NO_ACCESS, READ_WRITE, HostMappings
from softkvm.kvm.memory.pages import (
    HPAGE_GFN_SHIFT,
    PAGE_SHIFT,
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    gfn_round_for_level,
    pages_per_hpage,
)
from softkvm.kvm.tlb import TlbsDirty
from softkvm.kvm.x86.mmu.spte import (
    ACC_ALL,
    MMIO_SPTE_GEN_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_WRITABLE_MASK,
    ROOT_LEVEL,
    SPTE_HOST_WRITABLE,
    SPTES_PER_PAGE,
    is_mmio_spte,
    make_mmio_spte,
    make_nonleaf_spte,
    make_small_spte,
    make_spte,
    mmio_spte_generation,
)

if TYPE_CHECKING:
    from softkvm._softcpu import Machine, Page
    from softkvm.kvm.memory.attributes import PrivateFrames
    from softkvm.kvm.memory.memslots import MemorySlot, Memslots

_INDEX_MASK: Final = SPTES_PER_PAGE - 1

#: Results of :meth:`TdpMmu.map_gfn` (``enum`` RET_PF_* of the kernel).
RET_PF_RETRY: Final = 0
RET_PF_EMULATE: Final = 1
RET_PF_FIXED: Final = 2
RET_PF_SPURIOUS: Final = 3


class TdpTable:
    """One page of nested page-table entries."""

    __slots__ = ("address", "children", "gfn", "leaves", "level", "page", "q")

    def __init__(self, page: Page, level: int, gfn: int) -> None:
        self.page = page
        self.address = page.address
        self.q = memoryview(page).cast("B").cast("Q")
        self.level = level
        #: First guest frame that the table covers.
        self.gfn = gfn
        self.children: dict[int, TdpTable] = {}
        #: How many of the entries are present leaves.
        self.leaves = 0

    def subtables(self) -> Iterator[TdpTable]:
        """Yield this table and every table below it."""
        yield self
        for child in self.children.values():
            yield from child.subtables()


class TdpMmu:
    """Nested page tables of one VM (one root; the guest's paging mode doesn't matter to them)."""

    __slots__ = (
        "_dirty_later",
        "_free_later",
        "_host",
        "_machine",
        "_prefetch",
        "_private",
        "mapping_level",
        "max_level",
        "pages",
        "root",
        "tables",
        "tlbs_dirty",
    )

    def __init__(
        self,
        machine: Machine,
        max_level: int = PG_LEVEL_1G,
        host: HostMappings | None = None,
        prefetch: int = 1,
        private: PrivateFrames | None = None,
    ) -> None:
        self._machine = machine
        self._host = host
        #: Frames that are mapped from their slot's guest_memfd; None: there are none.
        self._private = private
        #: How many small pages one fault maps; all of them are in one table.
        self._prefetch = 1 << min(max(prefetch, 1).bit_length(), SPTES_PER_PAGE.bit_length()) - 1
        self.max_level = max_level
        #: A policy other than "as large as possible": returns the level for a slot, a frame and the largest level.
        self.mapping_level: Callable[[MemorySlot, int, int], int] | None = None
        self.root = TdpTable(machine.alloc_page(), ROOT_LEVEL, 0)
        #: What has been taken from the entries and may be in TLBs: wherever a method tells to flush, this says what.
        self.tlbs_dirty = TlbsDirty()
        self._free_later: list[TdpTable] = []
        #: Frames and sizes in pages of leaves zapped while dirty.
        self._dirty_later: list[tuple[int, int]] = []
        #: Leaves present, by level (``pages_4k`` ... of KVM's statistics).
        self.pages = [0, 0, 0, 0]
        self.tables = 1

    @property
    def root_address(self) -> int:
        """The value for N_CR3."""
        return self.root.address

    # --- walks -------------------------------------------------------------------------------------

    def get_spte(self, gfn: int) -> tuple[int, int]:
        """Return the lowest entry for ``gfn`` and its level."""
        table = self.root
        level = ROOT_LEVEL
        while True:
            index = gfn >> HPAGE_GFN_SHIFT[level] & _INDEX_MASK
            child = table.children.get(index)
            if child is None:
                return table.q[index], level
            table = child
            level -= 1

    def mmio_generation_matches(self, spte: int, generation: int) -> bool:
        """Tell whether an MMIO SPTE was made under memory-slot ``generation``."""
        return mmio_spte_generation(spte) == generation & MMIO_SPTE_GEN_MASK

    def lookup_mmio(self, gfn: int, generation: int) -> bool:
        """Tell whether ``gfn`` has a valid MMIO SPTE. The fast path of an MMIO exit, without ``mmu_lock``."""
        try:
            spte, _ = self.get_spte(gfn)
        except ValueError:  # the table was zapped and given back on the way down
            return False
        return is_mmio_spte(spte) and self.mmio_generation_matches(spte, generation)

    def _descend(self, gfn: int, to_level: int, *, log: bool = False) -> TdpTable:
        """Return the table of ``to_level`` for ``gfn``, making those that are missing, splitting leaves.

        With ``log`` the leaves that a protected one is split into are writable and clean: their dirty bits are the log.
        """
        table = self.root
        level = ROOT_LEVEL
        while level > to_level:
            index = gfn >> HPAGE_GFN_SHIFT[level] & _INDEX_MASK
            child = table.children.get(index)
            if child is None:
                child = TdpTable(self._machine.alloc_page(), level - 1, gfn_round_for_level(gfn, level))
                self.tables += 1
                old = table.q[index]
                if old & PT_PRESENT_MASK:
                    self._split_into(table, index, child, log)
                else:
                    self._machine.pte_store(table.address + index * 8, make_nonleaf_spte(child.address))
                table.children[index] = child
            table = child
            level -= 1
        return table

    # --- mapping -----------------------------------------------------------------------------------

    def max_mapping_level(self, slot: MemorySlot, gfn: int) -> int:
        """Return the largest level at which ``gfn`` may be mapped: alignment, slot size, dirty logging, attributes."""
        private = self._private
        is_private = private is not None and gfn in private
        level = min(self.max_level, slot.private_level if is_private else slot.max_level)
        if slot.dirty_logging:
            return PG_LEVEL_4K
        while level > PG_LEVEL_4K:
            first = gfn_round_for_level(gfn, level)
            end = first + pages_per_hpage(level)
            if first >= slot.base_gfn and end <= slot.end_gfn and (private is None or private.are_alike(first, end)):
                break
            level -= 1
        return level

    def map_gfn(self, slot: MemorySlot, gfn: int, *, write: bool) -> int:
        """Map ``gfn`` from ``slot`` after a nested page fault; returns a RET_PF_* code.

        Raises EFAULT where the process cannot reach the host memory itself.
        """
        if write and slot.readonly:
            return RET_PF_EMULATE
        old, at = self.get_spte(gfn)
        present = old & PT_PRESENT_MASK
        if present and (not write or old & PT_WRITABLE_MASK):
            return RET_PF_SPURIOUS  # another vCPU was here first
        # Where a table of smaller mappings exists already, the leaf goes there.
        largest = self.max_mapping_level(slot, gfn)
        if self.mapping_level is not None:
            largest = max(PG_LEVEL_4K, min(largest, self.mapping_level(slot, gfn, largest)))
        level = min(largest, at)
        hva, access = self._host_page(slot, gfn, level)
        if access != READ_WRITE and level > PG_LEVEL_4K:
            level = PG_LEVEL_4K
            hva, access = self._host_page(slot, gfn, level)
        if access == NO_ACCESS or (write and access != READ_WRITE):
            self._machine.fill_holes(hva)
            raise kvm_error(errno.EFAULT, f"no host memory at userspace_addr={hva:#x}")
        table = self._descend(gfn, level, log=slot.dirty_logging and slot.dirty_bitmap is not None)
        writable = access == READ_WRITE and not slot.readonly
        if slot.dirty_logging and slot.dirty_bitmap is None:
            writable = write  # the first write goes into a ring
        spte = make_spte(hva, level, writable=writable)
        self._machine.pte_store(table.address + (gfn >> HPAGE_GFN_SHIFT[level] & _INDEX_MASK) * 8, spte)
        if not present:
            self.pages[level] += 1
            table.leaves += 1
            if level == PG_LEVEL_4K and self._prefetch > 1 and self.mapping_level is None:
                self._direct_pte_prefetch(slot, table, gfn, access)
        return RET_PF_FIXED

    def _direct_pte_prefetch(self, slot: MemorySlot, table: TdpTable, gfn: int, access: int) -> None:
        """Map the frames around ``gfn``, too, where the process may do with them all what it may with that one.

        Not for a ring of dirty pages: what is in it has been written.
        """
        if slot.dirty_logging and slot.dirty_bitmap is None:
            return
        around = gfn & -self._prefetch
        first, end = max(around, slot.base_gfn), min(around + self._prefetch, slot.end_gfn)
        if self._private is not None and not self._private.are_alike(first, end):
            return
        hva = (first << PAGE_SHIFT) + self._offset(slot, gfn)
        if self._host is not None and self._host.access(hva, end - first << PAGE_SHIFT, NO_ACCESS) != access:
            return
        spte = make_spte(hva, PG_LEVEL_4K, writable=access == READ_WRITE and not slot.readonly)
        address = table.address + (first & _INDEX_MASK) * 8
        filled = self._machine.pte_fill(address, end - first, spte, pages_per_hpage(PG_LEVEL_4K) << PAGE_SHIFT)
        self.pages[PG_LEVEL_4K] += filled
        table.leaves += filled

    def _offset(self, slot: MemorySlot, gfn: int) -> int:
        """Return what is added to guest-physical addresses in ``gfn`` to get the host's."""
        return slot.private_offset if self._private is not None and gfn in self._private else slot.hva_offset

    def _host_page(self, slot: MemorySlot, gfn: int, level: int) -> tuple[int, int]:
        """Return the address of the host's page at ``level`` and what the process may do with it."""
        hva = (gfn_round_for_level(gfn, level) << PAGE_SHIFT) + self._offset(slot, gfn)
        if self._host is None:
            return hva, READ_WRITE
        return hva, self._host.access(hva, pages_per_hpage(level) << PAGE_SHIFT)

    def set_mmio_spte(self, gfn: int, slots: Memslots, access: int = ACC_ALL) -> None:
        """Remember that there is no memory slot at ``gfn``, nor in the largest range around it that one entry is for.

        A guest that looks at all of its empty address space gets an entry for each hole, and no tables.
        """
        _, level = self.get_spte(gfn)
        while level > PG_LEVEL_4K:
            first = gfn_round_for_level(gfn, level)
            if next(slots.meeting(first, first + pages_per_hpage(level)), None) is None:
                break
            level -= 1
        shift = HPAGE_GFN_SHIFT[level]
        self._machine.pte_store(
            self._descend(gfn, level).address + (gfn >> shift & _INDEX_MASK) * 8,
            make_mmio_spte(gfn_round_for_level(gfn, level), slots.generation & MMIO_SPTE_GEN_MASK, access),
        )

    # --- zapping -----------------------------------------------------------------------------------

    def _overlapping(self, table: TdpTable, start: int, end: int) -> range:
        """Return the indexes of ``table`` whose frames meet [start, end)."""
        shift = HPAGE_GFN_SHIFT[table.level]
        first = max(start - table.gfn, 0) >> shift
        last = min((end - table.gfn + (1 << shift) - 1) >> shift, SPTES_PER_PAGE)
        return range(first, max(first, last))

    def _drop(self, table: TdpTable) -> None:
        """Forget an unlinked table and those below it; the pages go after the next flush."""
        for sub in table.subtables():
            self._free_later.append(sub)
            self.tables -= 1
            self.pages[sub.level] -= sub.leaves

    def _unlink(self, table: TdpTable, index: int) -> None:
        """Take the child at ``index`` out of ``table``."""
        self._machine.pte_exchange(table.address + index * 8, 0)
        self._drop(table.children.pop(index))
        self._note_dirty_tlbs(table, index, index + 1)

    def _note_dirty_tlbs(self, table: TdpTable, first: int, end: int) -> None:
        """Entries of a table have changed: what they were, whole leaves, may be in TLBs."""
        shift = HPAGE_GFN_SHIFT[table.level]
        self.tlbs_dirty.add(table.gfn + (first << shift), table.gfn + (end << shift))

    def zap_range(self, start: int, end: int) -> bool:
        """Remove every mapping of the guest frames [start, end); True if a TLB flush is needed.

        Tables that map nothing any more go, too.
        """
        return self._zap(self.root, start, end)

    def _zap(self, table: TdpTable, start: int, end: int) -> bool:
        flush = False
        shift = HPAGE_GFN_SHIFT[table.level]
        q = table.q
        gone: list[int] = []
        for index in self._overlapping(table, start, end):
            child = table.children.get(index)
            first = table.gfn + (index << shift)
            if child is not None:
                whole = start <= first and first + (1 << shift) <= end
                if not whole:
                    flush |= self._zap(child, start, end)
                if whole or not (child.leaves or child.children):
                    self._unlink(table, index)
                    flush = True
            elif q[index]:
                old = self._machine.pte_exchange(table.address + index * 8, 0)
                if old & PT_PRESENT_MASK:
                    self.pages[table.level] -= 1
                    table.leaves -= 1
                    gone.append(index)
                    if old & PT_DIRTY_MASK:
                        self._dirty_later.append((first, 1 << shift))
        if gone:
            self._note_dirty_tlbs(table, gone[0], gone[-1] + 1)
            flush = True
        return flush

    def zap_all(self) -> bool:
        """Remove every mapping; True if a TLB flush is needed."""
        return self.zap_range(0, 1 << 36)

    def free_zapped(self, mark_dirty: Callable[[int, int], None] | None = None) -> None:
        """Give back the tables unlinked so far; the caller has flushed every processor's TLB since.

        ``mark_dirty`` gets (first frame, pages) of what was dirty in the leaves that are gone: only now no
        processor can write through them any more.
        """
        dirty, self._dirty_later = self._dirty_later, []
        tables, self._free_later = self._free_later, []
        if mark_dirty is not None:
            for gfn, count in dirty:
                mark_dirty(gfn, count)
        for table in tables:
            if mark_dirty is not None:
                self._mark_dirty_leaves(table, mark_dirty)
            table.q.release()
            table.page.free()

    def _mark_dirty_leaves(self, table: TdpTable, mark_dirty: Callable[[int, int], None]) -> None:
        address, shift = table.address, HPAGE_GFN_SHIFT[table.level]
        bits = int.from_bytes(self._machine.pte_test_and_clear(address, SPTES_PER_PAGE, PT_DIRTY_MASK), "little")
        while bits:
            index = (bits & -bits).bit_length() - 1
            bits &= bits - 1
            entry = table.q[index]  # the generation of an MMIO SPTE may have the same bits
            if entry & PT_PRESENT_MASK and (table.level == PG_LEVEL_4K or entry & PT_PAGE_SIZE_MASK):
                mark_dirty(table.gfn + (index << shift), 1 << shift)

    def has_zapped_tables(self) -> bool:
        """Tell whether unlinked tables wait for a flush."""
        return bool(self._free_later)

    # --- dirty logging -----------------------------------------------------------------------------

    def _split_into(self, table: TdpTable, index: int, child: TdpTable, log: bool) -> None:
        """Replace the large leaf at ``index`` by ``child``, filled with the same mappings one level down."""
        address = table.address + index * 8
        huge = self._machine.pte_load(address)
        while True:
            first = make_small_spte(huge, table.level, 0)
            if log and first & SPTE_HOST_WRITABLE:
                first = first & ~PT_DIRTY_MASK | PT_WRITABLE_MASK
            step = pages_per_hpage(child.level) << PAGE_SHIFT
            child.q[:] = memoryview(array("Q", range(first, first + SPTES_PER_PAGE * step, step)))
            # The processor may set accessed or dirty in the large leaf while the table is being filled.
            found = self._machine.pte_compare_exchange(address, huge, make_nonleaf_spte(child.address))
            if found == huge:
                break
            huge = found
        self.pages[table.level] -= 1
        self.pages[child.level] += SPTES_PER_PAGE
        table.leaves -= 1
        child.leaves = SPTES_PER_PAGE

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

    def leaf_tables(self, start: int, end: int) -> Iterator[tuple[TdpTable, int, int]]:
        """Yield (table, first index, count) for the level-1 tables that meet [start, end)."""
        yield from self._leaf_tables(self.root, start, end)

    def _leaf_tables(self, table: TdpTable, start: int, end: int) -> Iterator[tuple[TdpTable, int, int]]:
        indexes = self._overlapping(table, start, end)
        if table.level == PG_LEVEL_4K:
            if indexes:
                yield table, indexes.start, len(indexes)
            return
        children = table.children
        for index in indexes:
            child = children.get(index)
            if child is not None:
                yield from self._leaf_tables(child, start, end)

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

    def collapse(self, slot: MemorySlot, start: int, most: int) -> tuple[int, bool]:
        """Unlink tables of small leaves, from frame ``start`` on, whose frames a large one could map: ``most`` of them.

        Returns the frame to go on at, the slot's end after the last, and whether a flush is needed.
        """
        doomed: list[tuple[TdpTable, int]] = []
        for table, index in self._collapsible(self.root, slot, start):
            doomed.append((table, index))
            if len(doomed) == most:
                break
        for table, index in doomed:
            self._unlink(table, index)
        if len(doomed) < most:
            return slot.end_gfn, bool(doomed)
        table, index = doomed[-1]
        return table.gfn + (index + 1) * pages_per_hpage(table.level), True

    def _collapsible(self, table: TdpTable, slot: MemorySlot, start: int) -> Iterator[tuple[TdpTable, int]]:
        for index in self._overlapping(table, max(start, slot.base_gfn), slot.end_gfn):
            child = table.children.get(index)
            if child is None:
                continue
            first = table.gfn + (index << HPAGE_GFN_SHIFT[table.level])
            if PG_LEVEL_2M <= table.level <= PG_LEVEL_1G and self.max_mapping_level(slot, first) >= table.level:
                yield table, index
            else:
                yield from self._collapsible(child, slot, start)
