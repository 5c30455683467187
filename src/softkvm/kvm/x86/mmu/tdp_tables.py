# SPDX-License-Identifier: Apache-2.0
"""The structure of the nested page tables: a tree of pages that the processor walks (N_CR3), and a mirror of it.

Tables are ordinary pages of the machine. Each :class:`TdpTable` mirrors the structure (which entries point
to which child) so that a walk costs a few dictionary look-ups; the entries themselves live in the page alone,
because the processor sets accessed and dirty bits there.

What changes an entry that the processor may be using does so with the machine's atomic helpers, and notes which frames'
translations may be in TLBs; pages of tables that are unlinked are given back behind the flush.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from softkvm.kvm.memory.pages import HPAGE_GFN_SHIFT, PAGE_SHIFT, PG_LEVEL_4K, gfn_round_for_level, pages_per_hpage
from softkvm.kvm.tlb import TlbsDirty
from softkvm.kvm.x86.mmu.spte import (
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_WRITABLE_MASK,
    ROOT_LEVEL,
    SPTE_HOST_WRITABLE,
    SPTES_PER_PAGE,
    make_nonleaf_spte,
    make_small_spte,
)

if TYPE_CHECKING:
    from softkvm._softcpu import Machine, Page

INDEX_MASK: Final = SPTES_PER_PAGE - 1


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


class TdpTables:
    """The tables of one root, how many there are, and how many leaves are in them."""

    __slots__ = ("_dirty_later", "_free_later", "_machine", "pages", "root", "tables", "tlbs_dirty")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
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

    def get_spte(self, gfn: int) -> tuple[int, int]:
        """Return the lowest entry for ``gfn`` and its level."""
        table = self.root
        level = ROOT_LEVEL
        while True:
            index = gfn >> HPAGE_GFN_SHIFT[level] & INDEX_MASK
            child = table.children.get(index)
            if child is None:
                return table.q[index], level
            table = child
            level -= 1

    def _descend(self, gfn: int, to_level: int, *, log: bool = False) -> TdpTable:
        """Return the table of ``to_level`` for ``gfn``, making those that are missing, splitting leaves.

        With ``log`` the leaves that a protected one is split into are writable and clean: their dirty bits are the log.
        """
        table = self.root
        level = ROOT_LEVEL
        while level > to_level:
            index = gfn >> HPAGE_GFN_SHIFT[level] & INDEX_MASK
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

    def _unlink(self, table: TdpTable, index: int, leaf: int = 0) -> None:
        """Take the child at ``index`` out of ``table``, for a leaf if there is one."""
        self._machine.pte_exchange(table.address + index * 8, leaf)
        self._drop(table.children.pop(index))
        self._note_dirty_tlbs(table, index, index + 1)

    def _note_dirty_tlbs(self, table: TdpTable, first: int, end: int) -> None:
        """Entries of a table have changed: what they were, whole leaves, may be in TLBs."""
        shift = HPAGE_GFN_SHIFT[table.level]
        self.tlbs_dirty.add(table.gfn + (first << shift), table.gfn + (end << shift))

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
