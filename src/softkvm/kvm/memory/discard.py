# SPDX-License-Identifier: Apache-2.0
"""Giving memory that a guest does not need back to the host.

Its frames read as zeroes from then on, and get memory again when the guest touches them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.host_mappings import Backing
from softkvm.kvm.memory.pages import PAGE_SHIFT

if TYPE_CHECKING:
    from softkvm.kvm.memory.memslots import MemorySlot
    from softkvm.kvm.vm import Vm

#: What the host says of memory that it does not give back: locked, or of a file system that knows no holes.
_KEPT: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def discard(vm: Vm, gpa: int, size: int) -> None:
    """Give the memory behind [gpa, gpa + size) back, multiples of a page.

    No processor uses what was there when this returns: the mapping goes first, under ``mmu_lock``, which whoever would
    map it anew waits for. A log of dirty pages has all of them. EFAULT without one writable slot that has them all,
    EOPNOTSUPP for memory that the host doesn't give back, or that would not be zeroes then: private frames
    (guest_memfd), private mappings of files, locked memory; and for a slot whose dirty pages go into rings, which have
    no room for so many at once.
    """
    start, end = gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT
    with vm.mmu_lock:
        slot = vm.memslots.gfn_to_memslot(start)
        if slot is None or slot.readonly or end > slot.end_gfn:
            raise kvm_error(errno.EFAULT, f"gpa={gpa:#x} size={size:#x}: no writable slot has that")
        private = vm.private_frames
        if private is not None and (start in private or not private.are_alike(start, end)):
            raise kvm_error(errno.EOPNOTSUPP, f"gpa={gpa:#x} size={size:#x}: its memory is private")
        if vm.dirty_ring_size and slot.dirty_logging:
            raise kvm_error(errno.EOPNOTSUPP, "a ring of dirty pages has no room for a huge page's")
        hva = gpa + slot.hva_offset
        backing = vm.host_mappings.backing(hva, size)
        if backing is Backing.NONE:
            raise kvm_error(errno.EFAULT, f"hva={hva:#x} size={size:#x}: there is no memory")
        if backing is Backing.OTHER:
            raise kvm_error(errno.EOPNOTSUPP, f"hva={hva:#x} size={size:#x}: neither anonymous nor shared memory")
        if vm.mmu.zap_range(start, end):
            vm.finish_zap()
        try:
            vm.machine.discard(hva, size, backing is Backing.SHARED)
        except OSError as error:
            if error.errno in _KEPT:
                raise kvm_error(errno.EOPNOTSUPP, f"hva={hva:#x} size={size:#x}: the host keeps it") from None
            raise
        finally:
            _mark_dirty(slot, start, end)  # also where the host has kept some of it only


def _mark_dirty(slot: MemorySlot, start: int, end: int) -> None:
    """What was given back is another content, which a migration has to have."""
    if slot.dirty_bitmap is not None:
        for gfn in range(start, end):
            slot.mark_page_dirty(gfn)
