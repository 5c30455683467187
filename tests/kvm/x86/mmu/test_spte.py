# SPDX-License-Identifier: Apache-2.0
"""Entries of the nested page tables: bits of APM vol. 2, 5.3.3, and MMIO SPTEs."""

from __future__ import annotations

import pytest

from softkvm.kvm.memory import pages
from softkvm.kvm.x86.mmu import spte as s


def test_a_leaf_is_present_user_and_writable_as_asked() -> None:
    assert s.make_spte(0x7F12_3456_7000, 1, writable=True) & 0x80000000000000FF == 0x27
    assert s.make_spte(0x7F12_3456_7000, 1, writable=False) & 0xFF == 0x25
    assert s.make_spte(0x7F12_3440_0000, 2, writable=True) & 0xFF == 0xA7
    assert s.make_spte(0x7F12_3456_7000, 1, writable=True) & s.SPTE_PFN_MASK == 0x7F12_3456_7000


def test_splitting_keeps_permissions_and_addresses() -> None:
    huge = s.make_spte(0x4000_0000, 3, writable=True)
    middle = s.make_small_spte(huge, 3, 5)
    assert middle & s.SPTE_PFN_MASK == 0x4000_0000 + 5 * 0x20_0000
    assert middle & s.PT_PAGE_SIZE_MASK
    small = s.make_small_spte(middle, 2, 7)
    assert small & s.SPTE_PFN_MASK == 0x4000_0000 + 5 * 0x20_0000 + 7 * 0x1000
    assert not small & s.PT_PAGE_SIZE_MASK
    assert small & 7 == 7


@pytest.mark.parametrize("generation", [0, 1, 0xFF, 0x100, 0x2A5C3, s.MMIO_SPTE_GEN_MASK])
@pytest.mark.parametrize("gfn", [0, 0xFEE00, (1 << 36) - 1])
@pytest.mark.parametrize("access", [0, s.ACC_WRITE_MASK, s.ACC_USER_MASK | s.ACC_WRITE_MASK])
def test_an_mmio_spte_gives_back_what_it_was_made_of(generation: int, gfn: int, access: int) -> None:
    spte = s.make_mmio_spte(gfn, generation, access)
    assert s.is_mmio_spte(spte)
    assert not s.is_shadow_present_pte(spte)
    assert spte < 1 << 64
    assert s.mmio_spte_generation(spte) == generation
    assert s.mmio_spte_gfn(spte) == gfn
    assert s.mmio_spte_access(spte) == access


def test_nothing_else_is_an_mmio_spte() -> None:
    assert not s.is_mmio_spte(0)
    assert not s.is_mmio_spte(s.make_spte(0x1000, 1, writable=True))
    assert not s.is_mmio_spte(s.make_nonleaf_spte(0x7FFF_FFFF_F000))


def test_gfns_are_rounded_to_their_leaf() -> None:
    assert pages.gfn_round_for_level(0x12345, 1) == 0x12345
    assert pages.gfn_round_for_level(0x12345, 2) == 0x12200
    assert pages.gfn_round_for_level(0x7_2345, 3) == 0x4_0000


def test_one_helper_says_which_bits_of_a_gfn_are_a_leafs() -> None:
    for level, size in ((1, 1), (2, 512), (3, 512**2), (4, 512**3)):
        assert pages.pages_per_hpage(level) == size
        assert pages.hpage_gfn_mask(level) == -size
