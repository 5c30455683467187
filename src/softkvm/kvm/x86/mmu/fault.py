# SPDX-License-Identifier: Apache-2.0
"""What a nested page fault leads to (``kvm_mmu_page_fault``): a mapping, an MMIO entry, or emulation of the access."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.dirty_ring import mark_page_dirty
from softkvm.kvm.memory.guest_memory import wait_for_page
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE, pages_per_hpage
from softkvm.kvm.vcpu import GENERAL_REQUESTS
from softkvm.kvm.x86.mmu.paging import PFERR_PRESENT, PFERR_WRITE
from softkvm.kvm.x86.mmu.tdp_mmu import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY
from softkvm.kvm.x86.paravirt import async_pf

if TYPE_CHECKING:
    from softkvm.abi import kvm_pre_fault_memory
    from softkvm.kvm.memory.memslots import MemorySlot
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
#: The range must not wrap.
_PRE_FAULTED: Final = Size("kvm_pre_fault_memory.size", _U64, errno.EINVAL, least=1, where=__name__)
_NOT_PRIVATE: Final = "it is private, and there is no slot with a guest_memfd"


def page_fault(vcpu: Vcpu, gpa: int, error: int) -> int:
    """Map the page of ``gpa``; ``error`` is the fault's code (EXITINFO1). Returns a RET_PF_* code.

    RET_PF_EMULATE: there is no memory, or the access is a write to read-only memory. What has no memory is found again
    without a look at the slots, by its MMIO SPTE; the last such frame is noted in the vCPU's state, for the next time.

    Raises EFAULT, described in the run page, for memory that the process cannot reach, and for private frames without.
    """
    gfn = gpa >> PAGE_SHIFT
    vm = vcpu.vm
    slots = vm.memslots
    if not error & PFERR_PRESENT and vm.mmu.lookup_mmio(gfn, slots.generation):
        vcpu.mmio_gfn, vcpu.mmio_slots = gfn, slots
        return RET_PF_EMULATE
    if vm.host_mappings.slow is not None and not _is_there(vcpu, gfn):
        return RET_PF_RETRY
    with vm.mmu_lock:
        slots = vm.memslots
        slot = slots.gfn_to_memslot(gfn)
        if slot is not None:
            vcpu.stat_pf_taken += 1
            write = bool(error & PFERR_WRITE)
            result = _map(vcpu, slot, gfn, write=write)
            if write and result == RET_PF_FIXED and vm.dirty_ring_size:
                mark_page_dirty(vm, slot, gfn, vcpu)
            return result
        if vm.private_frames is not None and gfn in vm.private_frames:
            raise vcpu.memory_fault(gfn, _NOT_PRIVATE, private=True)
        if gfn == vm.apic_access_gfn:
            assert vm.avic is not None
            return vm.avic.map_access_page()
        if vm.params.enable_mmio_caching and gfn <= vm.max_gfn:
            vm.mmu.set_mmio_spte(gfn, slots)
    return RET_PF_EMULATE


def _is_there(vcpu: Vcpu, gfn: int) -> bool:
    """Tell whether a frame's page can be mapped at once; if not, see to it that it will be."""
    vm = vcpu.vm
    slot, slow = vm.memslots.gfn_to_memslot(gfn), vm.host_mappings.slow
    if slot is None or slow is None or (vm.private_frames is not None and gfn in vm.private_frames):
        return True
    hva = (gfn << PAGE_SHIFT) + slot.hva_offset
    if slow.is_there(hva, PAGE_SIZE):
        return True
    async_pf.fault_in(vcpu, gfn, hva, GENERAL_REQUESTS)
    return False


def _map(vcpu: Vcpu, slot: MemorySlot, gfn: int, *, write: bool) -> int:
    """Map a frame of a slot; EFAULT, described in the run page, for what cannot be."""
    vm = vcpu.vm
    if vm.private_frames is not None and gfn in vm.private_frames and slot.private is None:
        raise vcpu.memory_fault(gfn, _NOT_PRIVATE, private=True)
    try:
        result = vm.mmu.map_gfn(slot, gfn, write=write)
    except OSError as problem:
        if problem.errno != errno.EFAULT:  # none of the guest's: no descriptor to look at the process's mappings with
            raise
        raise vcpu.memory_fault(gfn, str(problem.strerror)) from None
    if vm.mmu.has_zapped_tables():
        vm.finish_zap()
    return result


def pre_fault_memory(vcpu: Vcpu, wanted: kvm_pre_fault_memory) -> None:
    """Map a range as reads of it would, one leaf after the other; *wanted* is what is left of it afterwards.

    EINVAL for flags, or what is no range of whole pages. An error is raised if nothing has been mapped: ENOENT without
    a slot, EFAULT without memory, EINTR after a kick.
    """
    if wanted.flags:
        raise kvm_error(errno.EINVAL, f"flags={wanted.flags:#x}, expected 0")
    gpa, size = wanted.gpa, wanted.size
    if (gpa | size) & (PAGE_SIZE - 1):
        raise kvm_error(errno.EINVAL, f"gpa={gpa:#x} size={size:#x}, expected multiples of {PAGE_SIZE}")
    _PRE_FAULTED.check(size, room=_U64 - gpa)
    while wanted.size:
        try:
            done = _pre_fault(vcpu, wanted.gpa >> PAGE_SHIFT)
        except OSError:
            if wanted.size == size:
                raise
            return
        done = min(done << PAGE_SHIFT, wanted.size)
        wanted.gpa += done
        wanted.size -= done


def _pre_fault(vcpu: Vcpu, gfn: int) -> int:
    """Map the leaf of ``gfn``; returns how many frames there are from there to the leaf's end."""
    vm = vcpu.vm
    if vcpu.cpu.take_interrupt():
        raise InterruptedError(errno.EINTR, "kicked, or a signal came")
    slot = vm.memslots.gfn_to_memslot(gfn)
    if slot is not None:
        wait_for_page(vm, (gfn << PAGE_SHIFT) + slot.hva_offset)
    with vm.mmu_lock:
        slot = vm.memslots.gfn_to_memslot(gfn)
        if slot is None:
            raise kvm_error(errno.ENOENT, f"gpa={gfn << PAGE_SHIFT:#x}: there is no memory slot")
        _map(vcpu, slot, gfn, write=False)
        size = pages_per_hpage(vm.mmu.get_spte(gfn)[1])
        return size - gfn % size
