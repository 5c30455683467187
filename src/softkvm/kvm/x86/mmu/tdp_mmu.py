# SPDX-License-Identifier: Apache-2.0
"""The TDP MMU: builds the nested page tables that the processor walks (N_CR3).

Their structure is :mod:`.tdp_tables`, what the dirty log asks of them :mod:`.tdp_dirty_log`.

What a guest does cannot make them many: every table but the root covers a frame of some memory slot. Where there is no
slot one entry says so for the largest range that has none (:meth:`TdpMmu.set_mmio_spte`), and a table whose last leaf
goes with its slot is given back (:meth:`TdpMmu.zap_range`).

Locking: every method but :meth:`TdpMmu.lookup_mmio` is called with ``mmu_lock`` held. Entries that the processor may
be using are changed with the machine's atomic helpers only.
"""

from __future__ import annotations

import errno
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
from softkvm.kvm.x86.mmu.spte import (
    ACC_ALL,
    MMIO_SPTE_GEN_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_WRITABLE_MASK,
    SPTES_PER_PAGE,
    is_mmio_spte,
    make_mmio_spte,
    make_spte,
    mmio_spte_generation,
)
from softkvm.kvm.x86.mmu.tdp_dirty_log import TdpDirtyLog
from softkvm.kvm.x86.mmu.tdp_tables import INDEX_MASK, TdpTable

if TYPE_CHECKING:
    from softkvm._softcpu import Machine
    from softkvm.kvm.memory.attributes import PrivateFrames
    from softkvm.kvm.memory.memslots import MemorySlot, Memslots

#: Results of :meth:`TdpMmu.map_gfn` (``enum`` RET_PF_* of the kernel).
RET_PF_RETRY: Final = 0
RET_PF_EMULATE: Final = 1
RET_PF_FIXED: Final = 2
RET_PF_SPURIOUS: Final = 3


class TdpMmu(TdpDirtyLog):
    """Nested page tables of one VM (one root; the guest's paging mode doesn't matter to them)."""

    __slots__ = (
        "_host",
        "_prefetch",
        "_private",
        "mapping_level",
        "max_level",
    )

    def __init__(
        self,
        machine: Machine,
        max_level: int = PG_LEVEL_1G,
        host: HostMappings | None = None,
        prefetch: int = 1,
        private: PrivateFrames | None = None,
    ) -> None:
        super().__init__(machine)
        self._host = host
        #: Frames that are mapped from their slot's guest_memfd; None: there are none.
        self._private = private
        #: How many small pages one fault maps; all of them are in one table.
        self._prefetch = 1 << min(max(prefetch, 1).bit_length(), SPTES_PER_PAGE.bit_length()) - 1
        self.max_level = max_level
        #: A policy other than "as large as possible": returns the level for a slot, a frame and the largest level.
        self.mapping_level: Callable[[MemorySlot, int, int], int] | None = None

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

        The largest leaf that may be takes the place of a table of smaller ones (``tdp_mmu_map_handle_target_level``):
        then :meth:`has_zapped_tables`, and the caller flushes.

        Raises EFAULT where the process cannot reach the host memory itself.
        """
        if write and slot.readonly:
            return RET_PF_EMULATE
        old, _ = self.get_spte(gfn)
        if old & PT_PRESENT_MASK and (not write or old & PT_WRITABLE_MASK):
            return RET_PF_SPURIOUS  # another vCPU was here first
        level = self.max_mapping_level(slot, gfn)
        if self.mapping_level is not None:
            level = max(PG_LEVEL_4K, min(level, self.mapping_level(slot, gfn, level)))
        hva, access = self._host_page(slot, gfn, level)
        while access != READ_WRITE and level > PG_LEVEL_4K:
            level -= 1
            hva, access = self._host_page(slot, gfn, level)
        if access == NO_ACCESS or (write and access != READ_WRITE):
            self._machine.fill_holes(hva)
            raise kvm_error(errno.EFAULT, f"no host memory at userspace_addr={hva:#x}")
        table = self._descend(gfn, level, log=slot.dirty_logging and slot.dirty_bitmap is not None)
        writable = access == READ_WRITE and not slot.readonly
        if slot.dirty_logging and slot.dirty_bitmap is None:
            writable = write  # the first write goes into a ring
        spte = make_spte(hva, level, writable=writable)
        index = gfn >> HPAGE_GFN_SHIFT[level] & INDEX_MASK
        is_new = index in table.children or not table.q[index] & PT_PRESENT_MASK
        if index in table.children:
            self._unlink(table, index, spte)
        else:
            self._machine.pte_store(table.address + index * 8, spte)
        if is_new:
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
        address = table.address + (first & INDEX_MASK) * 8
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
            self._descend(gfn, level).address + (gfn >> shift & INDEX_MASK) * 8,
            make_mmio_spte(gfn_round_for_level(gfn, level), slots.generation & MMIO_SPTE_GEN_MASK, access),
        )

    # --- what has no memory ---------------------------------------------------------------------

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

    # --- zapping -----------------------------------------------------------------------------------

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
