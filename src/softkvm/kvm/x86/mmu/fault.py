# SPDX-License-Identifier: Apache-2.0
"""What a nested page fault leads to (``kvm_mmu_page_fault``): a mapping, an MMIO entry, or emulation of the access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm.memory.dirty_ring import mark_page_dirty
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.x86.mmu.paging import PFERR_PRESENT, PFERR_WRITE
from softkvm.kvm.x86.mmu.tdp_mmu import RET_PF_EMULATE, RET_PF_FIXED
from softkvm.kvm.x86.svm.vmcb import PFERR_GUEST_FINAL

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def page_fault(vcpu: Vcpu, gpa: int, error: int) -> int:
    """Map the page of ``gpa``; ``error`` is the fault's code (EXITINFO1). Returns a RET_PF_* code.

    RET_PF_EMULATE: there is no memory, or the access is a write to read-only memory. What has no memory is found again
    without a look at the slots: the last frame in the vCPU's state, others by their MMIO SPTE.
    """
    gfn = gpa >> PAGE_SHIFT
    vm = vcpu.vm
    slots = vm.memslots
    if gfn == vcpu.mmio_gfn and slots is vcpu.mmio_slots and error & PFERR_GUEST_FINAL:
        return RET_PF_EMULATE
    if not error & PFERR_PRESENT and vm.mmu.lookup_mmio(gfn, slots.generation):
        vcpu.mmio_gfn, vcpu.mmio_slots = gfn, slots
        return RET_PF_EMULATE
    with vm.mmu_lock:
        slots = vm.memslots
        slot = slots.gfn_to_memslot(gfn)
        if slot is not None:
            vcpu.stat_pf_taken += 1
            write = bool(error & PFERR_WRITE)
            result = vm.mmu.map_gfn(slot, gfn, write=write)
            if write and result == RET_PF_FIXED and vm.dirty_ring_size:
                mark_page_dirty(vm, slot, gfn, vcpu)
            return result
        if vm.params.enable_mmio_caching and gfn <= vm.max_gfn:
            vm.mmu.set_mmio_spte(gfn, slots)
    return RET_PF_EMULATE
