# SPDX-License-Identifier: Apache-2.0
"""Memory slots, the dirty log and coalesced MMIO (KVM API, section 4)."""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import layout, u8, u8s, u32, u64, u64s

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64


@layout
class kvm_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64


@layout
class kvm_userspace_memory_region(Structure):
    """KVM_SET_USER_MEMORY_REGION; sizes and addresses in bytes."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@layout
class kvm_userspace_memory_region2(Structure):
    """KVM_SET_USER_MEMORY_REGION2: the same, with memory of a guest_memfd beside."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64
    guest_memfd: u32
    pad1: u32
    pad2: Annotated[u64s, 14]


@layout
class kvm_create_guest_memfd(Structure):
    """KVM_CREATE_GUEST_MEMFD; the size in bytes."""

    size: u64
    flags: u64
    reserved: Annotated[u64s, 6]


@layout
class kvm_memory_attributes(Structure):
    """KVM_SET_MEMORY_ATTRIBUTES: attributes of a range of guest-physical addresses, in bytes."""

    address: u64
    size: u64
    attributes: u64
    flags: u64


@layout
class kvm_pre_fault_memory(Structure):
    """KVM_PRE_FAULT_MEMORY: a range of guest-physical addresses, in bytes; what is left of it afterwards."""

    gpa: u64
    size: u64
    flags: u64
    padding: Annotated[u64s, 5]


@layout
class kvm_memory_alias(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    target_phys_addr: u64


@layout
class kvm_dirty_log(Structure):
    """KVM_GET_DIRTY_LOG; ``dirty_bitmap`` is the address of one bit per page of the slot."""

    slot: u32
    padding1: u32
    dirty_bitmap: u64


@layout
class kvm_clear_dirty_log(Structure):
    """KVM_CLEAR_DIRTY_LOG; bit 0 of the bitmap at ``dirty_bitmap`` is ``first_page``."""

    slot: u32
    num_pages: u32
    first_page: u64
    dirty_bitmap: u64


def dirty_bitmap_bytes(npages: int) -> int:
    """Return the size of a dirty bitmap: one bit per page, in whole 64-bit words."""
    return (npages + 63) // 64 * 8


@layout
class kvm_dirty_gfn(Structure):
    """One entry of a dirty ring (KVM_CAP_DIRTY_LOG_RING)."""

    flags: u32
    slot: u32
    offset: u64


@layout
class _pad_or_pio(Union):
    pad: u32
    pio: u32


@layout
class kvm_coalesced_mmio_zone(Structure):
    _anonymous_ = ("_u",)
    addr: u64
    size: u32
    _u: _pad_or_pio


@layout
class kvm_coalesced_mmio(Structure):
    _anonymous_ = ("_u",)
    phys_addr: u64
    len: u32
    _u: _pad_or_pio
    data: Annotated[u8s, 8]


@layout
class kvm_coalesced_mmio_ring(Structure):
    first: u32
    last: u32


@layout
class kvm_translation(Structure):
    """KVM_TRANSLATE: a guest virtual address and where it leads."""

    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: Annotated[u8s, 5]
