# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers (KVM API 4.3, 4.18, 4.19, 4.97 KVM_X86_SET_MSR_FILTER)."""

from collections.abc import Iterable, Mapping
from ctypes import Array, Structure
from typing import Annotated, NamedTuple

from softkvm.abi._layout import layout, u32, u64
from softkvm.abi.arguments import Unread

KVM_MSR_FILTER_MAX_BITMAP_SIZE = 0x600
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_MAX_RANGES = 16
KVM_MSR_FILTER_DEFAULT_ALLOW = 0
KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2


@layout
class kvm_msr_entry(Structure):
    index: u32
    reserved: u32
    data: u64


@layout
class kvm_msrs(Structure):
    """Header of KVM_GET_MSRS/KVM_SET_MSRS; see :func:`softkvm.abi.flexible`."""

    nmsrs: u32
    pad: u32


@layout
class kvm_msr_list(Structure):
    """Header of KVM_GET_MSR_INDEX_LIST, followed by ``u32 indices[]``."""

    nmsrs: u32


@layout
class kvm_msr_filter_range(Structure):
    """``bitmap`` is an address: one bit per MSR from ``base``, set = allowed."""

    flags: u32
    nmsrs: u32
    base: u32
    bitmap: u64


@layout
class kvm_msr_filter(Structure):
    flags: u32
    ranges: Annotated[Array[kvm_msr_filter_range], kvm_msr_filter_range, KVM_MSR_FILTER_MAX_RANGES]


class MsrFilterRange(NamedTuple):
    """A :class:`kvm_msr_filter_range` with its bitmap: bit 0 is MSR ``base``, in whole 64-bit words."""

    flags: int
    base: int
    nmsrs: int
    bitmap: bytes | Unread


#: What KVM_SET_MSRS takes: values by index, or (index, value) pairs, where an index may occur twice.
MsrValues = Mapping[int, int] | Iterable[tuple[int, int]]


def msr_pairs(values: MsrValues) -> list[tuple[int, int]]:
    """Return the (index, value) pairs of KVM_SET_MSRS, in the order in which they are written."""
    return list(values.items() if isinstance(values, Mapping) else values)


def msr_bitmap_bytes(nmsrs: int) -> int:
    """Return the size of a bitmap of MSRs: one bit each, in whole 64-bit words."""
    return (nmsrs + 63) // 64 * 8
