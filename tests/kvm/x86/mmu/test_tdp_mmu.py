# SPDX-License-Identifier: Apache-2.0
"""The nested page tables as the processor would walk them: leaf sizes, zapping, splitting, dirty bits."""

from __future__ import annotations

import random

import pytest

from softkvm import _softcpu, abi
from softkvm.kvm.memory.memslots import MemorySlot
from softkvm.kvm.x86.mmu.spte import PT_DIRTY_MASK, PT_PRESENT_MASK, PT_WRITABLE_MASK, SPTE_PFN_MASK
from softkvm.kvm.x86.mmu.tdp_mmu import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_SPURIOUS, TdpMmu, TdpTable

HVA = 0x7F00_0000_0000
PAGES_2M = 512
PAGES_1G = 512 * 512


@pytest.fixture
def mmu() -> TdpMmu:
    return TdpMmu(_softcpu.Machine())


def _slot(base_gfn: int, npages: int, hva: int = HVA, flags: int = 0) -> MemorySlot:
    return MemorySlot(0, base_gfn, npages, flags, hva)


def _walk(mmu: TdpMmu, gfn: int) -> int | None:
    """Translate as the processor does (APM vol. 2, 5.3): from N_CR3 down, through memory alone."""
    tables = {table.address: table for table in mmu.root.subtables()}
    table = tables[mmu.root_address]
    for level in (4, 3, 2, 1):
        entry = table.q[gfn >> 9 * (level - 1) & 511]
        if not entry & PT_PRESENT_MASK:
            return None
        address = entry & SPTE_PFN_MASK
        if level == 1 or entry & 0x80:
            return address + ((gfn & (1 << 9 * (level - 1)) - 1) << 12)
        table = tables[address]
    return None


@pytest.mark.parametrize(
    ("base_gfn", "npages", "hva", "gfn", "level"),
    [
        (0, PAGES_1G, HVA, 5, 3),
        (0, PAGES_1G - 1, HVA, 5, 2),  # one page short of a gigabyte
        (0, PAGES_1G, HVA + 0x20_0000, 5, 2),  # congruent at 2 MiB only
        (0, PAGES_1G, HVA + 0x1000, 5, 1),
        (1, PAGES_2M, HVA + 0x1000, 5, 1),  # the leaf would begin before the slot
        (1, 2 * PAGES_2M, HVA + 0x1000, 600, 2),
        (PAGES_2M, PAGES_2M, HVA, PAGES_2M + 3, 2),
        (PAGES_2M, PAGES_2M - 1, HVA, PAGES_2M + 3, 1),
    ],
)
def test_the_leaf_is_as_large_as_alignment_and_slot_allow(
    mmu: TdpMmu, base_gfn: int, npages: int, hva: int, gfn: int, level: int
) -> None:
    slot = _slot(base_gfn, npages, hva)
    assert mmu.map_gfn(slot, gfn, write=False) == RET_PF_FIXED
    assert mmu.get_spte(gfn)[1] == level
    assert mmu.pages[level] == 1
    assert _walk(mmu, gfn) == hva + (gfn - base_gfn << 12)


def test_a_slot_under_dirty_logging_gets_small_leaves(mmu: TdpMmu) -> None:
    slot = _slot(0, PAGES_1G, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    slot.dirty_bitmap = bytearray(slot.dirty_bitmap_bytes)
    mmu.map_gfn(slot, 7, write=True)
    assert mmu.get_spte(7)[1] == 1


def test_a_second_fault_on_a_mapped_page_is_spurious(mmu: TdpMmu) -> None:
    slot = _slot(0, PAGES_2M)
    assert mmu.map_gfn(slot, 3, write=True) == RET_PF_FIXED
    assert mmu.map_gfn(slot, 4, write=True) == RET_PF_SPURIOUS


def test_writes_to_readonly_slots_are_emulated(mmu: TdpMmu) -> None:
    slot = _slot(0, PAGES_2M, flags=abi.KVM_MEM_READONLY)
    assert mmu.map_gfn(slot, 3, write=True) == RET_PF_EMULATE
    assert mmu.map_gfn(slot, 3, write=False) == RET_PF_FIXED
    assert not mmu.get_spte(3)[0] & PT_WRITABLE_MASK
    assert mmu.map_gfn(slot, 3, write=True) == RET_PF_EMULATE


def test_a_leaf_goes_below_where_small_mappings_are(mmu: TdpMmu) -> None:
    mmu.set_mmio_spte(9, generation=1)
    slot = _slot(0, PAGES_2M)
    mmu.map_gfn(slot, 3, write=False)
    assert mmu.get_spte(3)[1] == 1


def test_mmio_entries_are_believed_in_their_generation_only(mmu: TdpMmu) -> None:
    mmu.set_mmio_spte(0xFEE00, generation=4)
    assert mmu.lookup_mmio(0xFEE00, 4)
    assert not mmu.lookup_mmio(0xFEE00, 5)
    assert not mmu.lookup_mmio(0xFEE01, 4)


def test_a_look_up_that_meets_a_zap_finds_nothing(mmu: TdpMmu) -> None:
    class ZappedBelow(dict[int, TdpTable]):
        """Children of the root; whoever goes down is overtaken by another thread's zap."""

        def get(self, key: int, default: TdpTable | None = None) -> TdpTable | None:  # type: ignore[override]
            child = super().get(key, default)
            mmu.root.children = dict(self)
            mmu.zap_all()
            mmu.free_zapped()
            return child

    mmu.set_mmio_spte(0xFEE00, 4)
    mmu.root.children = ZappedBelow(mmu.root.children)
    assert not mmu.lookup_mmio(0xFEE00, 4)


def test_splitting_keeps_every_translation(mmu: TdpMmu) -> None:
    slot = _slot(0, PAGES_1G)
    mmu.map_gfn(slot, 0, write=True)
    assert mmu.split_huge_pages(PAGES_2M + 7, 2 * PAGES_2M)
    assert mmu.get_spte(PAGES_2M + 9)[1] == 1
    assert mmu.get_spte(3)[1] == 2  # only what meets the range goes down to 4 KiB
    for gfn in (0, 511, 512, 700, 1023, 1024, PAGES_1G - 1):
        assert _walk(mmu, gfn) == HVA + (gfn << 12)
    assert mmu.pages[1:] == [512, 511, 0]


def test_zapping_removes_the_range_and_nothing_else(mmu: TdpMmu) -> None:
    rng = random.Random(3)
    slot = _slot(0, 4 * PAGES_2M, HVA + 0x1000)  # 4 KiB leaves
    mapped = rng.sample(range(4 * PAGES_2M), 200)
    for gfn in mapped:
        mmu.map_gfn(slot, gfn, write=True)
    assert mmu.zap_range(300, 1500)
    for gfn in mapped:
        assert (_walk(mmu, gfn) is None) == (300 <= gfn < 1500)
    assert mmu.pages[1] == sum(not 300 <= gfn < 1500 for gfn in mapped)
    assert mmu.has_zapped_tables()
    mmu.free_zapped()
    assert not mmu.zap_range(300, 1500)


def test_dirty_bits_are_collected_and_cleared(mmu: TdpMmu) -> None:
    slot = _slot(100, 1000, HVA)  # neither aligned to a table nor to a byte
    for gfn in range(100, 1100):
        mmu.map_gfn(slot, gfn, write=True)
    written = {100, 103, 511, 512, 900, 1099}
    for gfn in written:
        for table, first, count in mmu.leaf_tables(gfn, gfn + 1):
            assert count == 1
            table.q[first] |= PT_DIRTY_MASK
    bits, flush = mmu.harvest_dirty(100, 1100)
    assert flush
    assert {100 + n for n in range(1000) if bits >> n & 1} == written
    assert mmu.harvest_dirty(100, 1100) == (0, False)


def test_small_tables_are_given_up_for_large_leaves(mmu: TdpMmu) -> None:
    logged = _slot(0, 2 * PAGES_2M, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    logged.dirty_bitmap = bytearray(logged.dirty_bitmap_bytes)
    for gfn in range(0, 2 * PAGES_2M, 3):
        mmu.map_gfn(logged, gfn, write=True)
    plain = _slot(0, 2 * PAGES_2M)
    assert mmu.zap_collapsible(plain)
    mmu.free_zapped()
    assert mmu.map_gfn(plain, 5, write=True) == RET_PF_FIXED
    assert mmu.get_spte(5)[1] == 2
    assert mmu.pages[1:] == [0, 1, 0]
