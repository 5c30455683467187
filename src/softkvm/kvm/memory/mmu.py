# SPDX-License-Identifier: Apache-2.0
"""What memory slots and the dirty log ask of an architecture's second-level tables (``kvm_arch_*`` of memory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from softkvm.kvm.memory.memslots import MemorySlot
    from softkvm.kvm.tlb import TlbsDirty


class Mmu(Protocol):
    """The tables that translate guest-physical addresses; all calls with the VM's ``mmu_lock`` held."""

    #: Frames whose translations may be in TLBs although their entries have changed: what "to flush" means below.
    tlbs_dirty: TlbsDirty
    #: Leaves by level, and tables.
    pages: list[int]
    tables: int

    def zap_range(self, start: int, end: int) -> bool:
        """Forget the mappings of frames [start, end); True if a TLB may hold one."""

    def zap_all(self) -> bool:
        """Forget every mapping; True if a TLB may hold one."""

    def has_zapped_tables(self) -> bool:
        """Tell whether tables wait for :meth:`free_zapped`."""

    def free_zapped(self, mark_dirty: Callable[[int, int], None] | None = None) -> None:
        """Free the tables of what was forgotten, after the TLBs; dirty leaves are reported as (gfn, count)."""

    def protect_huge_pages(self, start: int, end: int) -> bool:
        """Let writes to large leaves fault, which splits them for the dirty log; True if a TLB may hold one."""

    def clear_dirty(self, start: int, end: int) -> bool:
        """Clear the dirty bits of frames; True if a TLB may hold a dirty one."""

    def write_protect(self, start: int, end: int) -> bool:
        """Let writes to frames fault, for rings of dirty pages; True if a TLB may hold a writable one."""

    def harvest_dirty(self, start: int, end: int) -> tuple[int, bool]:
        """Return and clear the dirty bits of frames, bit 0 being ``start``, and whether TLBs have to be flushed."""

    def collapse(self, slot: MemorySlot, start: int, most: int) -> tuple[int, bool]:
        """Forget small leaves that large ones may replace, ``most`` tables; where to go on, and whether to flush."""
