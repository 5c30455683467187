# SPDX-License-Identifier: Apache-2.0
"""The dirty log of a memory slot (KVM API, KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG).

Pages that the guest wrote are found by the dirty bits that the processor sets in the nested leaves, collected
512 at a time; pages that KVM itself wrote are in the slot's bitmap already. Only large leaves are write-protected,
until the first write splits them: a guest under logging takes one fault for each. What small leaves logging leaves
behind, :mod:`.collapse` gives up.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.memslots import KVM_ADDRESS_SPACE_NUM, KVM_MEM_MAX_NR_PAGES, SLOTS

if TYPE_CHECKING:
    from softkvm.abi.arguments import Unread
    from softkvm.kvm.memory.memslots import DirtyReport, MemorySlot
    from softkvm.kvm.vm import Vm

#: Pages whose dirty bits are collected under one hold of ``mmu_lock``.
_BATCH_PAGES: Final = 1 << 18
#: Of a slot; a bit each.
_CLEARED: Final = Size("kvm_clear_dirty_log.num_pages", KVM_MEM_MAX_NR_PAGES, errno.EINVAL, where=__name__)


def _check_slot_id(slot_id: int) -> None:
    """EINVAL for a number that no slot has."""
    if slot_id >> 16 >= KVM_ADDRESS_SPACE_NUM:
        raise kvm_error(
            errno.EINVAL, f"slot={slot_id:#x}: address space {slot_id >> 16}, expected below {KVM_ADDRESS_SPACE_NUM}"
        )
    SLOTS.index(slot_id & 0xFFFF, called="slot")


def _check_no_rings(vm: Vm) -> None:
    """ENXIO if dirty pages go into rings."""
    if vm.dirty_ring_size:
        raise kvm_error(errno.ENXIO, "KVM_CAP_DIRTY_LOG_RING is enabled: there are no bitmaps")


def _logged_slot(vm: Vm, slot_id: int) -> MemorySlot:
    """Return the slot: ENXIO with rings, EINVAL for a number that no slot has, ENOENT if it is not being logged."""
    _check_no_rings(vm)
    _check_slot_id(slot_id)
    slot = vm.memslots.by_id(slot_id & 0xFFFF)
    if slot is None or slot.dirty_bitmap is None:
        raise kvm_error(errno.ENOENT, f"slot={slot_id} is not being logged")
    return slot


def sync_dirty_log(vm: Vm, slot: MemorySlot, first_page: int = 0, num_pages: int | None = None) -> None:
    """Move the processor's dirty bits of some pages, by default all, into the slot's bitmap.

    Translations of those that were dirty are flushed, all others stay. ``first_page`` is a multiple of 64.
    """
    flush = False
    end = slot.npages if num_pages is None else first_page + num_pages
    for first in range(first_page, end, _BATCH_PAGES):
        count = min(_BATCH_PAGES, end - first)
        start = slot.base_gfn + first
        with vm.mmu_lock:
            dirty, flushable = vm.mmu.harvest_dirty(start, start + count)
        if dirty:
            slot.exchange_dirty_bits(first, 0, add=dirty, count=count)
        flush |= flushable
    if flush:
        vm.flush_dirty_tlbs()


def get_dirty_log(vm: Vm, slot_id: int) -> DirtyReport:
    """Return the slot's dirty bitmap, LSB first, in whole 64-bit words, and clear it.

    It comes once more unless the report is marked as delivered.
    With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 the bits stay until KVM_CLEAR_DIRTY_LOG.
    """
    with vm.slots_lock:
        slot = _logged_slot(vm, slot_id)
        sync_dirty_log(vm, slot)
        keep = bool(vm.manual_dirty_log_protect & abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        return slot.report_dirty_pages(keep=keep)


def clear_dirty_log(vm: Vm, slot_id: int, first_page: int, num_pages: int, bitmap: bytes | Unread) -> None:
    """Clear the dirty bits that ``bitmap`` names, bit 0 being ``first_page``.

    EINVAL unless ``first_page`` is a multiple of 64 and ``num_pages`` one too or up to the slot's end; EFAULT if
    ``bitmap`` is shorter than the range.
    """
    with vm.slots_lock:
        _check_no_rings(vm)
        _check_slot_id(slot_id)
        if first_page & 63:
            raise kvm_error(errno.EINVAL, f"first_page={first_page}, expected a multiple of 64")
        slot = _logged_slot(vm, slot_id)
        left = slot.npages - first_page
        if left < 0:
            raise kvm_error(errno.EINVAL, f"first_page={first_page}, expected at most {slot.npages}")
        if _CLEARED.check(num_pages, room=left, called="num_pages") < left and num_pages & 63:
            raise kvm_error(
                errno.EINVAL, f"num_pages={num_pages}, expected a multiple of 64 inside the slot, or up to its end"
            )
        if len(bitmap) < abi.dirty_bitmap_bytes(num_pages):
            raise kvm_error(
                errno.EFAULT, f"bitmap of {len(bitmap)} bytes, expected {abi.dirty_bitmap_bytes(num_pages)}"
            )
        if not num_pages:
            return
        # Bits set by the processor since the last log would be reported twice if they stayed behind.
        sync_dirty_log(vm, slot, first_page, num_pages)
        given = bytes(bitmap)[: abi.dirty_bitmap_bytes(num_pages)]
        clear = int.from_bytes(given, "little") & ((1 << num_pages) - 1)
        slot.exchange_dirty_bits(first_page, clear, count=num_pages)


def start_logging(vm: Vm, slot: MemorySlot) -> None:
    """Prepare a slot whose KVM_MEM_LOG_DIRTY_PAGES has just been set: leaves with dirty clear, or protected."""
    with vm.mmu_lock:
        flush = vm.mmu.protect_huge_pages(slot.base_gfn, slot.end_gfn)
        if vm.dirty_ring_size:
            flush |= vm.mmu.write_protect(slot.base_gfn, slot.end_gfn)
        else:
            flush |= vm.mmu.clear_dirty(slot.base_gfn, slot.end_gfn)
        if flush:
            vm.flush_dirty_tlbs()
