# SPDX-License-Identifier: Apache-2.0
"""Request numbers of the ioctls, and the structures that belong to no other topic.

A request number holds direction, argument size, type ``0xAE`` and a number (``<asm-generic/ioctl.h>``)::

    31 30 | 29 .. 16      | 15 .. 8 | 7 .. 0
    dir   | argument size | 0xAE    | number
"""

from ctypes import Structure, c_uint64, sizeof
from typing import Annotated, Any

from softkvm.abi._layout import layout, s16, u8s, u16, u32, u64, u64s
from softkvm.abi.irq import (
    kvm_hyperv_eventfd,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_msi,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
)
from softkvm.abi.memory import (
    kvm_clear_dirty_log,
    kvm_coalesced_mmio_zone,
    kvm_dirty_log,
    kvm_memory_alias,
    kvm_memory_region,
    kvm_translation,
    kvm_userspace_memory_region,
)
from softkvm.abi.msr import kvm_msr_filter, kvm_msr_list, kvm_msrs
from softkvm.abi.nested import kvm_nested_state
from softkvm.abi.x86 import (
    kvm_clock_data,
    kvm_cpuid,
    kvm_cpuid2,
    kvm_debugregs,
    kvm_fpu,
    kvm_guest_debug,
    kvm_mp_state,
    kvm_pmu_event_filter,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_tpr_access_ctl,
    kvm_vapic_addr,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)

KVMIO = 0xAE
KVM_API_VERSION = 12


def _IO(kind: int, number: int) -> int:
    """Request without an argument structure."""
    return (kind << 8) | number


def _IOW(kind: int, number: int, argument: Any) -> int:
    """Request that the kernel reads *argument* for."""
    return (1 << 30) | (sizeof(argument) << 16) | (kind << 8) | number


def _IOR(kind: int, number: int, argument: Any) -> int:
    """Request that the kernel writes *argument* for."""
    return (2 << 30) | (sizeof(argument) << 16) | (kind << 8) | number


def _IOWR(kind: int, number: int, argument: Any) -> int:
    """Request that the kernel reads and writes *argument* for."""
    return (3 << 30) | (sizeof(argument) << 16) | (kind << 8) | number


@layout
class kvm_enable_cap(Structure):
    cap: u32
    flags: u32
    args: Annotated[u64s, 4]
    pad: Annotated[u8s, 64]


@layout
class kvm_signal_mask(Structure):
    """Header of KVM_SET_SIGNAL_MASK, followed by ``len`` bytes of signal set (8 on x86)."""

    len: u32


@layout
class kvm_one_reg(Structure):
    id: u64
    addr: u64


@layout
class kvm_reg_list(Structure):
    """Header of KVM_GET_REG_LIST, followed by ``u64 reg[n]``."""

    n: u64


@layout
class kvm_create_device(Structure):
    type: u32
    fd: u32
    flags: u32


@layout
class kvm_device_attr(Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64


KVM_CREATE_DEVICE_TEST = 1
KVM_DEV_TYPE_FSL_MPIC_20 = 1
KVM_DEV_TYPE_FSL_MPIC_42 = 2
KVM_DEV_TYPE_XICS = 3
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_TYPE_ARM_VGIC_V2 = 5
KVM_DEV_TYPE_FLIC = 6
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_TYPE_ARM_VGIC_ITS = 8
KVM_DEV_TYPE_XIVE = 9
KVM_DEV_TYPE_ARM_PV_TIME = 10


# --- binary statistics of KVM_GET_STATS_FD ------------------------------------------------------------


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

# --- requests on /dev/kvm -------------------------------------------------------------------------

KVM_GET_API_VERSION = _IO(KVMIO, 0x00)
KVM_CREATE_VM = _IO(KVMIO, 0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(KVMIO, 0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _IO(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(KVMIO, 0x05, kvm_cpuid2)
KVM_GET_EMULATED_CPUID = _IOWR(KVMIO, 0x09, kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = _IOWR(KVMIO, 0x0A, kvm_msr_list)
KVM_X86_GET_MCE_CAP_SUPPORTED = _IOR(KVMIO, 0x9D, c_uint64)

# --- requests on a VM -----------------------------------------------------------------------------

KVM_SET_MEMORY_REGION = _IOW(KVMIO, 0x40, kvm_memory_region)
KVM_CREATE_VCPU = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = _IOW(KVMIO, 0x42, kvm_dirty_log)
KVM_SET_MEMORY_ALIAS = _IOW(KVMIO, 0x43, kvm_memory_alias)
KVM_SET_NR_MMU_PAGES = _IO(KVMIO, 0x44)
KVM_GET_NR_MMU_PAGES = _IO(KVMIO, 0x45)
KVM_SET_USER_MEMORY_REGION = _IOW(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(KVMIO, 0x48, c_uint64)
KVM_CREATE_IRQCHIP = _IO(KVMIO, 0x60)
KVM_IRQ_LINE = _IOW(KVMIO, 0x61, kvm_irq_level)
KVM_GET_IRQCHIP = _IOWR(KVMIO, 0x62, kvm_irqchip)
KVM_SET_IRQCHIP = _IOR(KVMIO, 0x63, kvm_irqchip)
KVM_CREATE_PIT = _IO(KVMIO, 0x64)
KVM_GET_PIT = _IOWR(KVMIO, 0x65, kvm_pit_state)
KVM_SET_PIT = _IOR(KVMIO, 0x66, kvm_pit_state)
KVM_IRQ_LINE_STATUS = _IOWR(KVMIO, 0x67, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO = _IOW(KVMIO, 0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = _IOW(KVMIO, 0x68, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING = _IOW(KVMIO, 0x6A, kvm_irq_routing)
KVM_REINJECT_CONTROL = _IO(KVMIO, 0x71)
KVM_IRQFD = _IOW(KVMIO, 0x76, kvm_irqfd)
KVM_CREATE_PIT2 = _IOW(KVMIO, 0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = _IO(KVMIO, 0x78)
KVM_IOEVENTFD = _IOW(KVMIO, 0x79, kvm_ioeventfd)
KVM_SET_CLOCK = _IOW(KVMIO, 0x7B, kvm_clock_data)
KVM_GET_CLOCK = _IOR(KVMIO, 0x7C, kvm_clock_data)
KVM_GET_PIT2 = _IOR(KVMIO, 0x9F, kvm_pit_state2)
KVM_SET_PIT2 = _IOW(KVMIO, 0xA0, kvm_pit_state2)
KVM_SIGNAL_MSI = _IOW(KVMIO, 0xA5, kvm_msi)
KVM_SET_PMU_EVENT_FILTER = _IOW(KVMIO, 0xB2, kvm_pmu_event_filter)
KVM_CREATE_DEVICE = _IOWR(KVMIO, 0xE0, kvm_create_device)
KVM_HYPERV_EVENTFD = _IOW(KVMIO, 0xBD, kvm_hyperv_eventfd)
KVM_CLEAR_DIRTY_LOG = _IOWR(KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_X86_SET_MSR_FILTER = _IOW(KVMIO, 0xC6, kvm_msr_filter)
KVM_RESET_DIRTY_RINGS = _IO(KVMIO, 0xC7)

# --- requests on a device of KVM_CREATE_DEVICE ----------------------------------------------------

KVM_SET_DEVICE_ATTR = _IOW(KVMIO, 0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = _IOW(KVMIO, 0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = _IOW(KVMIO, 0xE3, kvm_device_attr)

# --- requests on a vCPU; some of them (statistics, TSC frequency, attributes, capabilities) also on a VM

KVM_SET_TSC_KHZ = _IO(KVMIO, 0xA2)
KVM_GET_TSC_KHZ = _IO(KVMIO, 0xA3)
KVM_RUN = _IO(KVMIO, 0x80)
KVM_GET_REGS = _IOR(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = _IOW(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = _IOR(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(KVMIO, 0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(KVMIO, 0x85, kvm_translation)
KVM_INTERRUPT = _IOW(KVMIO, 0x86, kvm_interrupt)
KVM_GET_MSRS = _IOWR(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(KVMIO, 0x89, kvm_msrs)
KVM_SET_CPUID = _IOW(KVMIO, 0x8A, kvm_cpuid)
KVM_SET_SIGNAL_MASK = _IOW(KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_FPU = _IOR(KVMIO, 0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(KVMIO, 0x8D, kvm_fpu)
KVM_GET_LAPIC = _IOR(KVMIO, 0x8E, kvm_lapic_state)
KVM_SET_LAPIC = _IOW(KVMIO, 0x8F, kvm_lapic_state)
KVM_SET_CPUID2 = _IOW(KVMIO, 0x90, kvm_cpuid2)
KVM_GET_CPUID2 = _IOWR(KVMIO, 0x91, kvm_cpuid2)
KVM_TPR_ACCESS_REPORTING = _IOWR(KVMIO, 0x92, kvm_tpr_access_ctl)
KVM_SET_VAPIC_ADDR = _IOW(KVMIO, 0x93, kvm_vapic_addr)
KVM_GET_MP_STATE = _IOR(KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = _IOW(KVMIO, 0x99, kvm_mp_state)
KVM_NMI = _IO(KVMIO, 0x9A)
KVM_SET_GUEST_DEBUG = _IOW(KVMIO, 0x9B, kvm_guest_debug)
KVM_X86_SETUP_MCE = _IOW(KVMIO, 0x9C, c_uint64)
KVM_X86_SET_MCE = _IOW(KVMIO, 0x9E, kvm_x86_mce)
KVM_GET_VCPU_EVENTS = _IOR(KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _IOW(KVMIO, 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = _IOR(KVMIO, 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = _IOW(KVMIO, 0xA2, kvm_debugregs)
KVM_ENABLE_CAP = _IOW(KVMIO, 0xA3, kvm_enable_cap)
KVM_GET_XSAVE = _IOR(KVMIO, 0xA4, kvm_xsave)
KVM_SET_XSAVE = _IOW(KVMIO, 0xA5, kvm_xsave)
KVM_GET_XCRS = _IOR(KVMIO, 0xA6, kvm_xcrs)
KVM_SET_XCRS = _IOW(KVMIO, 0xA7, kvm_xcrs)
KVM_GET_ONE_REG = _IOW(KVMIO, 0xAB, kvm_one_reg)
KVM_SET_ONE_REG = _IOW(KVMIO, 0xAC, kvm_one_reg)
KVM_KVMCLOCK_CTRL = _IO(KVMIO, 0xAD)
KVM_GET_REG_LIST = _IOWR(KVMIO, 0xB0, kvm_reg_list)
KVM_SMI = _IO(KVMIO, 0xB7)
KVM_GET_NESTED_STATE = _IOWR(KVMIO, 0xBE, kvm_nested_state)
KVM_SET_NESTED_STATE = _IOW(KVMIO, 0xBF, kvm_nested_state)
KVM_GET_SUPPORTED_HV_CPUID = _IOWR(KVMIO, 0xC1, kvm_cpuid2)
KVM_GET_SREGS2 = _IOR(KVMIO, 0xCC, kvm_sregs2)
KVM_SET_SREGS2 = _IOW(KVMIO, 0xCD, kvm_sregs2)
KVM_GET_STATS_FD = _IO(KVMIO, 0xCE)
KVM_GET_XSAVE2 = _IOR(KVMIO, 0xCF, kvm_xsave)
