# SPDX-License-Identifier: Apache-2.0
"""Pages and levels of page tables: the sizes that leaves come in, and frame numbers rounded to them."""

from __future__ import annotations

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = ~(PAGE_SIZE - 1)

PG_LEVEL_4K: Final = 1
PG_LEVEL_2M: Final = 2
PG_LEVEL_1G: Final = 3

#: log2 of the frames that a leaf of a level maps: the one place that says so (``KVM_HPAGE_GFN_SHIFT``).
HPAGE_GFN_SHIFT: Final = (0, 0, 9, 18, 27, 36)


def pages_per_hpage(level: int) -> int:
    """Return the number of 4 KiB pages that a leaf of ``level`` maps."""
    return 1 << HPAGE_GFN_SHIFT[level]


def hpage_gfn_mask(level: int) -> int:
    """Return the bits of a frame number that say which leaf of ``level`` it is in (``KVM_HPAGE_GFN_MASK``)."""
    return -1 << HPAGE_GFN_SHIFT[level]


def gfn_round_for_level(gfn: int, level: int) -> int:
    """Return ``gfn`` rounded down to the first frame of its leaf of ``level``."""
    return gfn & hpage_gfn_mask(level)
