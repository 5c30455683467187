# SPDX-License-Identifier: Apache-2.0
"""Binary statistics of KVM_GET_STATS_FD (KVM API 4.133)."""

from ctypes import Structure

from softkvm.abi._layout import layout, s16, u16, u32


@layout
class kvm_stats_header(Structure):
    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@layout
class kvm_stats_desc(Structure):
    """Descriptor of one statistic, followed by its name (``kvm_stats_header.name_size`` bytes)."""

    flags: u32
    exponent: s16
    size: u16
    offset: u32
    bucket_size: u32


KVM_STATS_TYPE_SHIFT = 0
KVM_STATS_TYPE_MASK = 0xF
KVM_STATS_TYPE_CUMULATIVE = 0x0
KVM_STATS_TYPE_INSTANT = 0x1
KVM_STATS_TYPE_PEAK = 0x2
KVM_STATS_TYPE_LINEAR_HIST = 0x3
KVM_STATS_TYPE_LOG_HIST = 0x4
KVM_STATS_UNIT_SHIFT = 4
KVM_STATS_UNIT_MASK = 0xF0
KVM_STATS_UNIT_NONE = 0x00
KVM_STATS_UNIT_BYTES = 0x10
KVM_STATS_UNIT_SECONDS = 0x20
KVM_STATS_UNIT_CYCLES = 0x30
KVM_STATS_UNIT_BOOLEAN = 0x40
KVM_STATS_BASE_SHIFT = 8
KVM_STATS_BASE_MASK = 0xF00
KVM_STATS_BASE_POW10 = 0x000
KVM_STATS_BASE_POW2 = 0x100
