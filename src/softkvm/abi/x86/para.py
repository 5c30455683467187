# SPDX-License-Identifier: Apache-2.0
"""Paravirtual interface between KVM and its guests: CPUID, MSRs, hypercalls (``<asm/kvm_para.h>``)."""

from ctypes import Structure
from typing import Annotated

from softkvm.abi._layout import layout, s8, s64, u8, u8s, u32, u32s, u64

KVM_CPUID_SIGNATURE = 0x40000000
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"

KVM_CPUID_FEATURES = 0x40000001
KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_NOP_IO_DELAY = 1
KVM_FEATURE_MMU_OP = 2
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_ASYNC_PF = 4
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6
KVM_FEATURE_PV_UNHALT = 7
KVM_FEATURE_PV_TLB_FLUSH = 9
KVM_FEATURE_ASYNC_PF_VMEXIT = 10
KVM_FEATURE_PV_SEND_IPI = 11
KVM_FEATURE_POLL_CONTROL = 12
KVM_FEATURE_PV_SCHED_YIELD = 13
KVM_FEATURE_ASYNC_PF_INT = 14
KVM_FEATURE_MSI_EXT_DEST_ID = 15
KVM_FEATURE_HC_MAP_GPA_RANGE = 16
KVM_FEATURE_MIGRATION_CONTROL = 17
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24
#: softkvm's own: far from the kernel's.
KVM_FEATURE_UNUSED_PAGE_HINT = 31

KVM_HINTS_REALTIME = 0

KVM_MSR_ENABLED = 1
MSR_KVM_WALL_CLOCK = 0x11
MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MSR_KVM_ASYNC_PF_EN = 0x4B564D02
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04
MSR_KVM_POLL_CONTROL = 0x4B564D05
MSR_KVM_ASYNC_PF_INT = 0x4B564D06
MSR_KVM_ASYNC_PF_ACK = 0x4B564D07
MSR_KVM_MIGRATION_CONTROL = 0x4B564D08

KVM_VCPU_PREEMPTED = 1 << 0
KVM_VCPU_FLUSH_TLB = 1 << 1
KVM_STEAL_ALIGNMENT_BITS = 5
KVM_STEAL_VALID_BITS = (-1 << (KVM_STEAL_ALIGNMENT_BITS + 1)) & 0xFFFF_FFFF_FFFF_FFFF
KVM_STEAL_RESERVED_MASK = ((1 << KVM_STEAL_ALIGNMENT_BITS) - 1) << 1
KVM_CLOCK_PAIRING_WALLCLOCK = 0

KVM_ASYNC_PF_ENABLED = 1 << 0
KVM_ASYNC_PF_SEND_ALWAYS = 1 << 1
KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT = 1 << 2
KVM_ASYNC_PF_DELIVERY_AS_INT = 1 << 3
KVM_ASYNC_PF_VEC_MASK = 0xFF
KVM_PV_REASON_PAGE_NOT_PRESENT = 1
KVM_PV_REASON_PAGE_READY = 2
KVM_MIGRATION_READY = 1 << 0

KVM_PV_EOI_BIT = 0
KVM_PV_EOI_MASK = 1 << KVM_PV_EOI_BIT
KVM_PV_EOI_ENABLED = KVM_PV_EOI_MASK
KVM_PV_EOI_DISABLED = 0

KVM_MAP_GPA_RANGE_PAGE_SZ_4K = 0
KVM_MAP_GPA_RANGE_PAGE_SZ_2M = 1 << 0
KVM_MAP_GPA_RANGE_PAGE_SZ_1G = 1 << 1
KVM_MAP_GPA_RANGE_ENCRYPTED = 1 << 4
KVM_MAP_GPA_RANGE_DECRYPTED = 0

# hypercall numbers, and the errors a hypercall returns (negated)
KVM_HC_VAPIC_POLL_IRQ = 1
KVM_HC_MMU_OP = 2
KVM_HC_FEATURES = 3
KVM_HC_PPC_MAP_MAGIC_PAGE = 4
KVM_HC_KICK_CPU = 5
KVM_HC_MIPS_GET_CLOCK_FREQ = 6
KVM_HC_MIPS_EXIT_VM = 7
KVM_HC_MIPS_CONSOLE_OUTPUT = 8
KVM_HC_CLOCK_PAIRING = 9
KVM_HC_SEND_IPI = 10
KVM_HC_SCHED_YIELD = 11
KVM_HC_MAP_GPA_RANGE = 12
#: softkvm's own: (gpa, size) of a huge page that the guest does not use. "sk", 1.
KVM_HC_UNUSED_PAGE_HINT = 0x736B0001

KVM_EPERM = 1
KVM_E2BIG = 7
KVM_EFAULT = 14
KVM_EINVAL = 22
KVM_EOPNOTSUPP = 95
KVM_ENOSYS = 1000


@layout
class kvm_steal_time(Structure):
    """Filled at the address in MSR_KVM_STEAL_TIME; ``steal`` in nanoseconds."""

    steal: u64
    version: u32
    flags: u32
    preempted: u8
    u8_pad: Annotated[u8s, 3]
    pad: Annotated[u32s, 11]


@layout
class kvm_clock_pairing(Structure):
    sec: s64
    nsec: s64
    tsc: u64
    flags: u32
    pad: Annotated[u32s, 9]


@layout
class kvm_vcpu_pv_apf_data(Structure):
    flags: u32
    token: u32
    pad: Annotated[u8s, 56]
    enabled: u32


# <asm/pvclock-abi.h>

PVCLOCK_TSC_STABLE_BIT = 1 << 0
PVCLOCK_GUEST_STOPPED = 1 << 1


@layout
class pvclock_vcpu_time_info(Structure):
    """Filled at the address in MSR_KVM_SYSTEM_TIME(_NEW): guest time = system_time + scaled TSC delta."""

    version: u32
    pad0: u32
    tsc_timestamp: u64
    system_time: u64
    tsc_to_system_mul: u32
    tsc_shift: s8
    flags: u8
    pad: Annotated[u8s, 2]


@layout
class pvclock_wall_clock(Structure):
    """Filled at the address written to MSR_KVM_WALL_CLOCK(_NEW)."""

    version: u32
    sec: u32
    nsec: u32
