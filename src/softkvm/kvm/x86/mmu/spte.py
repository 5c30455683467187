# SPDX-License-Identifier: Apache-2.0
"""Entries of the nested page tables (SPTEs): bits, leaf and MMIO construction.

The nested tables are in the long-mode format of APM vol. 2, 5.3; all guest accesses are user accesses to
them (15.25.5), so every entry has U set. Bits 52 to 62 and 9 to 11 are ignored by the processor.

**MMIO SPTEs** cache "there is no memory slot here", in a table of any level. They are not-present entries, which the
processor reports as a nested page fault, and carry a tag of their own::

    63 | 62  | 61 ..... 52 | 51 ... 12 | 11 | 10 ... 3 | 2    1 | 0
    0  | tag | gen (high)  | gfn       | 0  | gen (low)| access | P = 0

``gfn`` is the first frame that the entry is for, ``access`` an explicit mask of what the guest's translation allowed,
and ``gen`` the memory slots' generation that the entry was made under: an entry of another generation says nothing.
"""

from __future__ import annotations

from typing import Final

from softkvm.kvm.memory.pages import PAGE_MASK, PAGE_SHIFT, PG_LEVEL_4K, pages_per_hpage

ROOT_LEVEL: Final = 4
SPTES_PER_PAGE: Final = 512

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_PWT_MASK: Final = 1 << 3
PT_PCD_MASK: Final = 1 << 4
PT_ACCESSED_MASK: Final = 1 << 5
PT_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7
PT_GLOBAL_MASK: Final = 1 << 8
PT64_NX_MASK: Final = 1 << 63
SPTE_PFN_MASK: Final = ((1 << 52) - 1) & PAGE_MASK

#: The memory slot allows writes (software bit; PT_WRITABLE_MASK may be off for the dirty log).
SPTE_HOST_WRITABLE: Final = 1 << 9
#: The MMU allows writes: the page is not write-protected for page tracking (software bit).
SPTE_MMU_WRITABLE: Final = 1 << 10

ACC_EXEC_MASK: Final = 1
ACC_WRITE_MASK: Final = PT_WRITABLE_MASK
ACC_USER_MASK: Final = PT_USER_MASK
ACC_ALL: Final = ACC_EXEC_MASK | ACC_WRITE_MASK | ACC_USER_MASK

SHADOW_MMIO_VALUE: Final = 1 << 62
SHADOW_MMIO_MASK: Final = SHADOW_MMIO_VALUE | PT_PRESENT_MASK
SHADOW_MMIO_ACCESS_MASK: Final = ACC_WRITE_MASK | ACC_USER_MASK

MMIO_SPTE_GEN_LOW_SHIFT: Final = 3
MMIO_SPTE_GEN_LOW_BITS: Final = 8
MMIO_SPTE_GEN_HIGH_SHIFT: Final = 52
MMIO_SPTE_GEN_HIGH_BITS: Final = 10
MMIO_SPTE_GEN_MASK: Final = (1 << (MMIO_SPTE_GEN_LOW_BITS + MMIO_SPTE_GEN_HIGH_BITS)) - 1
_GEN_LOW_MASK: Final = (1 << MMIO_SPTE_GEN_LOW_BITS) - 1
_GEN_HIGH_MASK: Final = (1 << MMIO_SPTE_GEN_HIGH_BITS) - 1

_LEAF_BITS: Final = PT_PRESENT_MASK | PT_USER_MASK | PT_ACCESSED_MASK
_LEAF_WRITABLE: Final = PT_WRITABLE_MASK | SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE
_TABLE_BITS: Final = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK


def make_spte(hva: int, level: int, *, writable: bool) -> int:
    """Return the leaf that maps the page at host virtual address ``hva`` at ``level``."""
    spte = hva | _LEAF_BITS
    if writable:
        spte |= _LEAF_WRITABLE
    if level > PG_LEVEL_4K:
        spte |= PT_PAGE_SIZE_MASK
    return spte


def make_nonleaf_spte(address: int) -> int:
    """Return the entry that points to the table at ``address``."""
    return address | _TABLE_BITS


def make_small_spte(huge_spte: int, huge_level: int, index: int) -> int:
    """Return entry ``index`` of the table that replaces ``huge_spte``, with the same permissions."""
    level = huge_level - 1
    child = huge_spte + index * (pages_per_hpage(level) << PAGE_SHIFT)
    if level == PG_LEVEL_4K:
        child &= ~PT_PAGE_SIZE_MASK
    return child


def make_mmio_spte(gfn: int, generation: int, access: int) -> int:
    """Return the MMIO SPTE for ``gfn`` under memory-slot ``generation``."""
    low = generation & _GEN_LOW_MASK
    high = (generation >> MMIO_SPTE_GEN_LOW_BITS) & _GEN_HIGH_MASK
    return (
        SHADOW_MMIO_VALUE
        | (high << MMIO_SPTE_GEN_HIGH_SHIFT)
        | (gfn << PAGE_SHIFT)
        | (low << MMIO_SPTE_GEN_LOW_SHIFT)
        | (access & SHADOW_MMIO_ACCESS_MASK)
    )


def is_mmio_spte(spte: int) -> bool:
    """Tell whether ``spte`` is an MMIO SPTE; the only place that decides it."""
    return spte & SHADOW_MMIO_MASK == SHADOW_MMIO_VALUE


def mmio_spte_generation(spte: int) -> int:
    """Return the memory-slot generation stored in an MMIO SPTE."""
    low = (spte >> MMIO_SPTE_GEN_LOW_SHIFT) & _GEN_LOW_MASK
    high = (spte >> MMIO_SPTE_GEN_HIGH_SHIFT) & _GEN_HIGH_MASK
    return high << MMIO_SPTE_GEN_LOW_BITS | low


def mmio_spte_gfn(spte: int) -> int:
    """Return the guest frame number stored in an MMIO SPTE."""
    return (spte & SPTE_PFN_MASK) >> PAGE_SHIFT


def mmio_spte_access(spte: int) -> int:
    """Return the ACC_* mask stored in an MMIO SPTE."""
    return spte & SHADOW_MMIO_ACCESS_MASK


def is_shadow_present_pte(spte: int) -> bool:
    """Tell whether the processor can use ``spte``."""
    return bool(spte & PT_PRESENT_MASK)
