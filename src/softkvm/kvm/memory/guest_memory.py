# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of guest-physical memory by KVM itself (``kvm_read_guest`` and friends)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from softkvm.kvm.memory import dirty_ring
from softkvm.kvm.memory.host_mappings import READ, READ_WRITE
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from softkvm._softcpu import Machine
    from softkvm.kvm.memory.host_mappings import HostMappings
    from softkvm.kvm.memory.memslots import MemorySlot, Memslots


#: What an access raises when the slot went away meanwhile, or the memory behind it.
_GONE: Final = (ValueError, OSError)


class HasMemory(dirty_ring.HasRings, Protocol):
    """What holds memory slots: the VM."""

    machine: Machine
    memslots: Memslots
    host_mappings: HostMappings
    dirty_ring_size: int


def gpa_to_hva(vm: HasMemory, gpa: int, *, write: bool = False) -> int | None:
    """Return the host virtual address of ``gpa``; None without a slot or for writes to a read-only one."""
    slot = vm.memslots.gfn_to_memslot(gpa >> PAGE_SHIFT)
    if slot is None or (write and slot.readonly) or not _reachable(vm, slot, gpa, write=write):
        return None
    return gpa + slot.hva_offset


def _reachable(vm: HasMemory, slot: MemorySlot, gpa: int, *, write: bool) -> bool:
    """Tell whether the process can reach the memory behind the page of ``gpa``."""
    wanted = READ_WRITE if write else READ
    if vm.host_mappings.awaited is not None:
        wait_for_page(vm, (gpa & -PAGE_SIZE) + slot.hva_offset)
    return vm.host_mappings.access((gpa & -PAGE_SIZE) + slot.hva_offset, PAGE_SIZE, wanted) >= wanted


def wait_for_page(vm: HasMemory, hva: int) -> None:
    """Have a page that may be long in coming come, without the interpreter's lock: who provides it may need that."""
    awaited = vm.host_mappings.awaited
    if awaited is not None and not awaited.is_there(hva, PAGE_SIZE):
        try:
            vm.machine.populate(hva)
        except _GONE:
            pass


def read_guest(vm: HasMemory, gpa: int, size: int) -> bytes | None:
    """Return ``size`` bytes at guest-physical ``gpa``; None if any of them has no memory."""
    if (gpa & (PAGE_SIZE - 1)) + size <= PAGE_SIZE:
        return _read_page(vm, gpa, size)
    parts = []
    while size:
        chunk = min(size, PAGE_SIZE - (gpa & (PAGE_SIZE - 1)))
        part = _read_page(vm, gpa, chunk)
        if part is None:
            return None
        parts.append(part)
        gpa += chunk
        size -= chunk
    return b"".join(parts)


def _read_page(vm: HasMemory, gpa: int, size: int) -> bytes | None:
    hva = gpa_to_hva(vm, gpa)
    if hva is None:
        return None
    try:
        return vm.machine.read(hva, size)
    except _GONE:
        return None


def _mark_page_dirty(vm: HasMemory, gfn: int) -> None:
    """Note a write that has been done in the log, if there is one by now: the slot may be another than was written to.

    The kernel has whoever changes a slot wait until all that used the old one are done (SRCU).
    """
    slot = vm.memslots.gfn_to_memslot(gfn)
    if slot is None:
        return
    if vm.dirty_ring_size:
        dirty_ring.mark_page_dirty(vm, slot, gfn)
    else:
        slot.mark_page_dirty(gfn)


def write_guest(vm: HasMemory, gpa: int, data: bytes) -> bool:
    """Write ``data`` at guest-physical ``gpa``, marking pages dirty; False if any byte has no memory."""
    offset = 0
    while offset < len(data):
        chunk = min(len(data) - offset, PAGE_SIZE - (gpa & (PAGE_SIZE - 1)))
        slot = vm.memslots.gfn_to_memslot(gpa >> PAGE_SHIFT)
        if slot is None or slot.readonly or not _reachable(vm, slot, gpa, write=True):
            return False
        try:
            vm.machine.write(gpa + slot.hva_offset, data[offset : offset + chunk])
        except _GONE:
            return False
        _mark_page_dirty(vm, gpa >> PAGE_SHIFT)
        gpa += chunk
        offset += chunk
    return True


def test_and_set_bit_guest(vm: HasMemory, gpa: int, bit: int) -> bool | None:
    """Atomically set a bit of the byte at ``gpa``; returns whether it was set, None without memory."""
    slot = vm.memslots.gfn_to_memslot(gpa >> PAGE_SHIFT)
    if slot is None or slot.readonly or not _reachable(vm, slot, gpa, write=True):
        return None
    hva = gpa + slot.hva_offset
    mask = 1 << (hva & 7) * 8 + bit
    try:
        was = vm.machine.pte_or(hva & ~7, mask)
        vm.machine.notify_write(hva, 1)
    except _GONE:
        return None
    _mark_page_dirty(vm, gpa >> PAGE_SHIFT)
    return bool(was & mask)


def cmpxchg_guest(vm: HasMemory, gpa: int, expected: bytes, new: bytes) -> bytes | None:
    """Atomically replace ``expected`` by ``new`` at ``gpa``; returns what was found, None without memory.

    The operand (1, 2, 4 or 8 bytes) must not cross an aligned 8-byte word.
    """
    size = len(expected)
    slot = vm.memslots.gfn_to_memslot(gpa >> PAGE_SHIFT)
    if slot is None or slot.readonly or not _reachable(vm, slot, gpa, write=True):
        return None
    word = (gpa + slot.hva_offset) & ~7
    shift = (gpa & 7) * 8
    mask = ((1 << (size * 8)) - 1) << shift
    want = int.from_bytes(expected, "little") << shift
    value = int.from_bytes(new, "little") << shift
    try:
        current = vm.machine.pte_load(word)
        while True:
            if current & mask != want:
                return ((current & mask) >> shift).to_bytes(size, "little")
            found = vm.machine.pte_compare_exchange(word, current, (current & ~mask) | value)
            if found == current:
                vm.machine.notify_write(word, 8)
                _mark_page_dirty(vm, gpa >> PAGE_SHIFT)
                return expected
            current = found
    except _GONE:
        return None
