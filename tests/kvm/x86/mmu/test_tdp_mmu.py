# SPDX-License-Identifier: Apache-2.0
"""The nested page tables as the processor would walk them: leaf sizes, zapping, splitting, dirty bits."""

from __future__ import annotations

import random

import pytest

from softkvm import _softcpu, abi
from softkvm.kvm.memory.host_mappings import READ, READ_WRITE, HostMappings
from softkvm.kvm.memory.memslots import MemorySlot, Memslots
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86.mmu.spte import (
    MMIO_SPTE_GEN_LOW_SHIFT,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_WRITABLE_MASK,
    SPTE_PFN_MASK,
    is_mmio_spte,
)
from softkvm.kvm.x86.mmu.tdp_mmu import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_SPURIOUS, TdpMmu
from softkvm.kvm.x86.mmu.tdp_tables import TdpTable

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


@pytest.mark.parametrize(
    ("base_gfn", "npages", "gfn", "mapped"),
    [
        (1, 100, 40, (32, 48)),
        (1, 100, 3, (1, 16)),  # the slot begins within
        (1, 100, 98, (96, 101)),
        (500, 100, 511, (500, 512)),
        (500, 100, 512, (512, 528)),
    ],
)
def test_a_fault_maps_the_small_pages_around_it(base_gfn: int, npages: int, gfn: int, mapped: tuple[int, int]) -> None:
    mmu = TdpMmu(_softcpu.Machine(), prefetch=16)
    slot = _slot(base_gfn, npages)
    assert mmu.map_gfn(slot, gfn, write=True) == RET_PF_FIXED
    assert [n for n in range(base_gfn + npages) if _walk(mmu, n) is not None] == list(range(*mapped))
    assert all(_walk(mmu, n) == HVA + (n - base_gfn << 12) for n in range(*mapped))
    first, end = mapped
    assert mmu.pages[1] == end - first
    mmu.zap_range(gfn, gfn + 1)
    assert mmu.map_gfn(slot, gfn, write=False) == RET_PF_FIXED
    assert mmu.pages[1] == end - first  # what was there has not been counted again
    mmu.zap_range(0, base_gfn + npages)
    assert mmu.pages[1] == 0


def test_pages_with_less_access_are_not_mapped_along() -> None:
    host = HostMappings()
    host._map = [HVA, HVA + 8 * PAGE_SIZE], [HVA + 8 * PAGE_SIZE, HVA + 100 * PAGE_SIZE], [READ_WRITE, READ]
    mmu = TdpMmu(_softcpu.Machine(), host=host, prefetch=16)
    assert mmu.map_gfn(_slot(0, 100), 2, write=True) == RET_PF_FIXED
    assert mmu.pages[1] == 1


def test_frames_that_a_ring_of_dirty_pages_counts_are_mapped_one_by_one() -> None:
    mmu = TdpMmu(_softcpu.Machine(), prefetch=16)
    mmu.map_gfn(_slot(0, 100, flags=abi.KVM_MEM_LOG_DIRTY_PAGES), 7, write=False)
    assert mmu.pages[1] == 1


@pytest.mark.parametrize(
    ("number", "together"), [(-1, 1), (0, 1), (1, 1), (7, 4), (512, 512), (513, 512), (1 << 70, 512)]
)
def test_the_number_of_pages_around_is_a_power_of_two_within_a_table(number: int, together: int) -> None:
    mmu = TdpMmu(_softcpu.Machine(), prefetch=number)
    mmu.map_gfn(_slot(1, 4096, HVA + 0x1000 * 2), 1500, write=False)
    assert mmu.pages[1] == together


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


def test_a_large_leaf_takes_the_place_of_small_ones_whose_table_goes_behind_the_flush(mmu: TdpMmu) -> None:
    """As ``tdp_mmu_map_handle_target_level`` does, with what was dirty in it reported."""
    logged = _slot(0, 2 * PAGES_2M, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    logged.dirty_bitmap = bytearray(logged.dirty_bitmap_bytes)
    for gfn in (9, 40, PAGES_2M):
        mmu.map_gfn(logged, gfn, write=True)
    assert (mmu.pages, mmu.tables) == ([0, 3, 0, 0], 5)
    (table, first, _) = next(mmu.leaf_tables(40, 41))
    table.q[first] |= PT_DIRTY_MASK
    plain = _slot(0, 2 * PAGES_2M)
    assert mmu.map_gfn(plain, 9, write=False) == RET_PF_SPURIOUS
    assert mmu.map_gfn(plain, 3, write=False) == RET_PF_FIXED
    assert mmu.get_spte(3)[1] == mmu.get_spte(40)[1] == 2
    assert _walk(mmu, 40) == HVA + (40 << 12)
    assert (mmu.pages, mmu.tables) == ([0, 1, 1, 0], 4)
    assert mmu.has_zapped_tables()
    assert [tuple(noted) for noted in mmu.tlbs_dirty.take()] == [(0, PAGES_2M)]
    dirty: list[tuple[int, int]] = []
    mmu.free_zapped(lambda gfn, count: dirty.append((gfn, count)))
    assert dirty == [(40, 1)]
    assert not mmu.has_zapped_tables()


def test_one_leaf_of_a_gigabyte_takes_the_place_of_all_below(mmu: TdpMmu) -> None:
    slot = _slot(0, PAGES_1G)
    mmu.mapping_level = lambda slot, gfn, largest: 1 if gfn & 1 else 2
    for gfn in (1, 2 * PAGES_2M, 7 * PAGES_2M + 1):
        mmu.map_gfn(slot, gfn, write=True)
    assert mmu.pages == [0, 2, 1, 0]
    mmu.mapping_level = None
    mmu.map_gfn(slot, 3 * PAGES_2M, write=True)
    assert (mmu.pages, mmu.tables) == ([0, 0, 0, 1], 2)
    mmu.free_zapped()
    assert _walk(mmu, 7 * PAGES_2M + 1) == HVA + (7 * PAGES_2M + 1 << 12)


def test_a_leaf_is_as_large_as_the_hosts_memory_lets_it_be(mmu: TdpMmu) -> None:
    class Partly(HostMappings):
        """All but the last page of the gigabyte."""

        def access(self, hva: int, size: int, wanted: int = READ_WRITE) -> int:
            return READ_WRITE if hva + size <= HVA + (PAGES_1G - 1 << 12) else READ

    mmu = TdpMmu(_softcpu.Machine(), host=Partly())
    mmu.map_gfn(_slot(0, PAGES_1G), 0, write=True)
    assert mmu.get_spte(0)[1] == 2, "not a gigabyte, and not a page for that"


def test_mmio_entries_are_believed_in_their_generation_only(mmu: TdpMmu) -> None:
    mmu.set_mmio_spte(0xFEE00, Memslots(4))
    assert mmu.lookup_mmio(0xFEE00, 4)
    assert not mmu.lookup_mmio(0xFEE00, 5)
    mmu.set_mmio_spte(0xFEE00, Memslots(5))
    assert mmu.lookup_mmio(0xFEE00, 5)


def _memslots(*slots: MemorySlot) -> Memslots:
    result = Memslots()
    for slot in slots:
        result = result.replaced(None, slot)
    return result


@pytest.mark.parametrize(
    ("gfn", "level", "last"),
    [
        (2, 1, 2),  # a slot is in the same 2 MiB: in the page after it, even
        (PAGES_2M - 1, 1, PAGES_2M - 1),
        (PAGES_2M, 2, 2 * PAGES_2M - 1),
        (PAGES_1G - 1, 2, PAGES_1G - 1),
        (PAGES_1G + 12345, 3, 2 * PAGES_1G - 1),
        (512 * PAGES_1G, 4, (1 << 28) - 1),
        ((1 << 36) - 1, 4, (1 << 36) - 1),
    ],
)
def test_an_mmio_entry_is_for_the_largest_range_without_a_slot(mmu: TdpMmu, gfn: int, level: int, last: int) -> None:
    slots = _memslots(_slot(1, 1), _slot(3, 1, HVA + 0x10_0000))
    mmu.set_mmio_spte(gfn, slots)
    assert mmu.get_spte(gfn)[1] == level
    assert mmu.lookup_mmio(last, slots.generation)
    assert not mmu.lookup_mmio(1, slots.generation)
    assert not mmu.lookup_mmio(last + 1 & (1 << 36) - 1, slots.generation)
    assert mmu.tables == 5 - level


def test_looking_at_all_of_an_empty_address_space_makes_no_tables(mmu: TdpMmu) -> None:
    slots = _memslots(_slot(0, 256), _slot(0xFFF00, 256, HVA + 0x100_0000))
    faults = 0
    for gfn in range(256, 1 << 36, 97 * PAGES_2M + 1):
        if slots.gfn_to_memslot(gfn) is None and not mmu.lookup_mmio(gfn, slots.generation):
            mmu.set_mmio_spte(gfn, slots)
            faults += 1
    assert mmu.tables <= 1 + 3 * 2  # no more than the slots' own may need
    # An entry for each of the root, and for the ones of two tables on the way to each slot at most.
    assert faults <= 512 + 2 * 2 * 512


def test_no_table_is_left_where_a_slot_has_been(mmu: TdpMmu) -> None:
    """A device's memory that moves from address to address, which a guest reads around."""
    slots = _memslots(_slot(0, 256))
    for n in range(1, 60):
        bar = MemorySlot(1, n * (PAGES_1G + PAGES_2M) + 16, 16, 0, HVA + 0x100_0000)
        slots = slots.replaced(None, bar)
        mmu.zap_range(bar.base_gfn, bar.end_gfn)
        mmu.map_gfn(bar, bar.base_gfn, write=True)
        mmu.set_mmio_spte(bar.end_gfn, slots)
        mmu.set_mmio_spte(bar.base_gfn - 1, slots)
        assert mmu.tables == 4
        slots = slots.replaced(bar, None)
        assert mmu.zap_range(bar.base_gfn, bar.end_gfn)
        mmu.free_zapped()
        assert (mmu.tables, mmu.pages) == (1, [0, 0, 0, 0])


def _check(mmu: TdpMmu, slots: Memslots) -> None:
    """Every table but the root meets a slot; every count is what the tables' memory says."""
    leaves = [0, 0, 0, 0]
    tables = list(mmu.root.subtables())
    for table in tables:
        end = table.gfn + (1 << 9 * table.level)
        assert table is mmu.root or next(slots.meeting(table.gfn, end), None) is not None
        present = [entry for entry in table.q.tolist() if entry & PT_PRESENT_MASK]
        own = [entry for entry in present if table.level == 1 or entry & PT_PAGE_SIZE_MASK]
        assert (len(own), len(present) - len(own)) == (table.leaves, len(table.children))
        if own:
            leaves[table.level] += len(own)
        for index, entry in enumerate(table.q.tolist()):
            if is_mmio_spte(entry) and mmu.mmio_generation_matches(entry, slots.generation):
                first = table.gfn + (index << 9 * (table.level - 1))
                assert next(slots.meeting(first, first + (1 << 9 * (table.level - 1))), None) is None
    assert (mmu.pages, mmu.tables) == (leaves, len(tables))


def test_whatever_comes_and_goes_every_table_has_a_slot() -> None:
    rng = random.Random(11)
    mmu = TdpMmu(_softcpu.Machine())
    slots = Memslots()
    places = [0, PAGES_2M, 3 * PAGES_1G, 3 * PAGES_1G + 5 * PAGES_2M, 600 * PAGES_1G, 700 * PAGES_1G]
    for step in range(1500):
        which = rng.randrange(len(places))
        old = slots.by_id(which)
        action = rng.choice(("slot", "map", "map", "mmio", "mmio", "split", "zap"))
        base = places[which] + rng.randrange(64)
        if action == "slot":
            size = rng.choice((1, 7, 64, PAGES_2M - 64))
            new = MemorySlot(which, base, size, 0, HVA + (which << 30) + (base << 12)) if old is None else None
            changed = old or new
            assert changed is not None
            slots = slots.replaced(old, new)
            mmu.zap_range(changed.base_gfn, changed.end_gfn)
        elif action == "map" and old is not None:
            mmu.map_gfn(old, rng.randrange(old.base_gfn, old.end_gfn), write=True)
        elif action == "mmio":
            gfn = rng.choice((base, base + PAGES_2M * rng.randrange(400), rng.randrange(1 << 36)))
            if slots.gfn_to_memslot(gfn) is None:
                mmu.set_mmio_spte(gfn, slots)
                assert mmu.lookup_mmio(gfn, slots.generation)
        elif action == "split" and old is not None:
            mmu.protect_huge_pages(base, base + 512)
            logged = MemorySlot(which, old.base_gfn, old.npages, abi.KVM_MEM_LOG_DIRTY_PAGES, old.userspace_addr)
            mmu.map_gfn(logged, rng.randrange(old.base_gfn, old.end_gfn), write=True)
        elif action == "zap":
            mmu.zap_range(base, base + rng.choice((1, 600, PAGES_1G)))
        if rng.random() < 0.3:
            mmu.free_zapped()
        if step % 10 == 0:
            _check(mmu, slots)
    for slot in list(slots):
        slots = slots.replaced(slot, None)
        mmu.zap_range(slot.base_gfn, slot.end_gfn)
    assert (mmu.tables, mmu.pages) == (1, [0, 0, 0, 0])


def test_the_generation_of_an_mmio_entry_is_not_taken_for_a_dirty_bit(mmu: TdpMmu) -> None:
    generation = (PT_DIRTY_MASK | PT_PAGE_SIZE_MASK) >> MMIO_SPTE_GEN_LOW_SHIFT
    slots = Memslots(generation - 1).replaced(None, _slot(4, 1))
    mmu.map_gfn(next(iter(slots)), 4, write=True)
    mmu.set_mmio_spte(5, slots)
    mmu.set_mmio_spte(PAGES_2M, slots)
    mmu.zap_all()
    dirty: list[tuple[int, int]] = []
    mmu.free_zapped(lambda gfn, count: dirty.append((gfn, count)))
    assert dirty == []


def test_a_look_up_that_meets_a_zap_finds_nothing(mmu: TdpMmu) -> None:
    class ZappedBelow(dict[int, TdpTable]):
        """Children of the root; whoever goes down is overtaken by another thread's zap."""

        def get(self, key: int, default: TdpTable | None = None) -> TdpTable | None:  # type: ignore[override]
            child = super().get(key, default)
            mmu.root.children = dict(self)
            mmu.zap_all()
            mmu.free_zapped()
            return child

    mmu.set_mmio_spte(0xFEE00, _memslots(_slot(0xFEE01, 1)))
    mmu.root.children = ZappedBelow(mmu.root.children)
    assert not mmu.lookup_mmio(0xFEE00, 1)


def _logged(npages: int) -> MemorySlot:
    slot = _slot(0, npages, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    slot.dirty_bitmap = bytearray(slot.dirty_bitmap_bytes)
    return slot


def test_splitting_keeps_every_translation(mmu: TdpMmu) -> None:
    mmu.map_gfn(_slot(0, PAGES_1G), 0, write=True)
    assert mmu.protect_huge_pages(PAGES_2M + 7, 2 * PAGES_2M)
    assert mmu.map_gfn(_logged(PAGES_1G), PAGES_2M + 7, write=True) == RET_PF_FIXED
    assert mmu.get_spte(PAGES_2M + 9)[1] == 1
    assert mmu.get_spte(3)[1] == 2  # only what meets the range goes down to 4 KiB
    for gfn in (0, 511, 512, 700, 1023, 1024, PAGES_1G - 1):
        assert _walk(mmu, gfn) == HVA + (gfn << 12)
    assert mmu.pages[1:] == [512, 511, 0]


def test_logging_protects_large_leaves_until_they_are_split(mmu: TdpMmu) -> None:
    mmu.map_gfn(_slot(0, 4 * PAGES_2M), 0, write=True)
    mmu.map_gfn(_slot(0, 4 * PAGES_2M), PAGES_2M, write=True)
    mmu.root.children[0].children[0].q[0] |= PT_DIRTY_MASK  # before the log began
    assert mmu.protect_huge_pages(0, 4 * PAGES_2M)
    assert not mmu.protect_huge_pages(0, 4 * PAGES_2M)
    for gfn in (3, PAGES_2M + 3):
        assert mmu.get_spte(gfn)[0] & (PT_WRITABLE_MASK | PT_DIRTY_MASK) == 0
        assert _walk(mmu, gfn) == HVA + (gfn << 12), "reads go on"
    slot = _logged(4 * PAGES_2M)
    assert mmu.map_gfn(slot, 3, write=False) == RET_PF_SPURIOUS
    assert mmu.map_gfn(slot, 3, write=True) == RET_PF_FIXED
    for gfn in (0, 3, 511):  # one fault for all
        spte, level = mmu.get_spte(gfn)
        assert (level, spte & (PT_WRITABLE_MASK | PT_DIRTY_MASK)) == (1, PT_WRITABLE_MASK)
    assert mmu.get_spte(PAGES_2M)[1] == 2
    assert mmu.harvest_dirty(0, 4 * PAGES_2M) == (0, False)


def test_for_rings_the_pages_of_a_split_leaf_stay_protected(mmu: TdpMmu) -> None:
    mmu.map_gfn(_slot(0, PAGES_2M), 0, write=True)
    mmu.protect_huge_pages(0, PAGES_2M)
    assert mmu.map_gfn(_slot(0, PAGES_2M, flags=abi.KVM_MEM_LOG_DIRTY_PAGES), 3, write=True) == RET_PF_FIXED
    assert mmu.get_spte(3)[0] & PT_WRITABLE_MASK
    assert not mmu.get_spte(4)[0] & PT_WRITABLE_MASK


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
    assert mmu.collapse(plain, 0, 1) == (PAGES_2M, True)
    assert mmu.get_spte(PAGES_2M)[1] == 1
    assert mmu.collapse(plain, PAGES_2M, 2) == (2 * PAGES_2M, True)
    assert mmu.collapse(plain, 0, 2) == (2 * PAGES_2M, False)
    mmu.free_zapped()
    assert mmu.map_gfn(plain, 5, write=True) == RET_PF_FIXED
    assert mmu.get_spte(5)[1] == 2
    assert mmu.pages[1:] == [0, 1, 0]


@pytest.mark.parametrize("start", [0, 1, 8, 64, 100, 511])
@pytest.mark.parametrize("end", [1024, 1029, 1536, 2048])
def test_dirty_bits_are_collected_wherever_a_slot_begins_and_their_frames_are_to_be_flushed(
    mmu: TdpMmu, start: int, end: int
) -> None:
    rng = random.Random(start + end)
    slot = _slot(0, 4 * PAGES_2M, HVA + 0x1000)  # 4 KiB leaves
    dirty = {gfn for first in rng.sample(range(2048), 12) for gfn in range(first, min(first + rng.randrange(90), 2048))}
    for gfn in dirty:
        mmu.map_gfn(slot, gfn, write=True)
        for table, first, _ in mmu.leaf_tables(gfn, gfn + 1):
            table.q[first] |= PT_DIRTY_MASK
    bits, flush = mmu.harvest_dirty(start, end)
    expected = {gfn for gfn in dirty if start <= gfn < end}
    assert {start + n for n in range(2048) if bits >> n & 1} == expected
    assert flush == bool(expected)
    noted = {gfn for first, pages in mmu.tlbs_dirty.take() for gfn in range(first, first + pages)}
    assert noted >= expected
    for gfn in noted - expected:
        neighbours = {other for other in expected if other >> 9 == gfn >> 9}
        assert neighbours and min(neighbours) < gfn < max(neighbours), "only between dirty ones of the same table"
