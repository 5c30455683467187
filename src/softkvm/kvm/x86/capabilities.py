# SPDX-License-Identifier: Apache-2.0
"""The capabilities that KVM_CHECK_EXTENSION reports on x86: one table."""

from __future__ import annotations

import ctypes
from typing import Final

from softkvm import abi
from softkvm.kvm.capabilities import GENERAL_CAPABILITIES

CAPABILITIES: Final[dict[int, int]] = GENERAL_CAPABILITIES | {
    abi.KVM_CAP_HLT: 1,
    abi.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
    abi.KVM_CAP_SET_TSS_ADDR: 1,
    abi.KVM_CAP_VAPIC: 1,
    abi.KVM_CAP_EXT_CPUID: 1,
    abi.KVM_CAP_EXT_EMUL_CPUID: 1,
    abi.KVM_CAP_CLOCKSOURCE: 1,
    abi.KVM_CAP_PIT: 1,
    abi.KVM_CAP_PIT2: 1,
    abi.KVM_CAP_PIT_STATE2: 1,
    abi.KVM_CAP_REINJECT_CONTROL: 1,
    abi.KVM_CAP_NOP_IO_DELAY: 1,
    abi.KVM_CAP_USER_NMI: 1,
    abi.KVM_CAP_HYPERV: 1,
    abi.KVM_CAP_HYPERV_VAPIC: 1,
    abi.KVM_CAP_HYPERV_SPIN: 1,
    abi.KVM_CAP_HYPERV_TIME: 1,
    abi.KVM_CAP_HYPERV_SYNIC: 1,
    abi.KVM_CAP_HYPERV_SYNIC2: 1,
    abi.KVM_CAP_HYPERV_VP_INDEX: 1,
    abi.KVM_CAP_HYPERV_EVENTFD: 1,
    abi.KVM_CAP_HYPERV_TLBFLUSH: 1,
    abi.KVM_CAP_HYPERV_SEND_IPI: 1,
    abi.KVM_CAP_HYPERV_CPUID: 1,
    abi.KVM_CAP_SYS_HYPERV_CPUID: 1,
    abi.KVM_CAP_HYPERV_ENFORCE_CPUID: 1,
    abi.KVM_CAP_SET_GUEST_DEBUG: 1,
    abi.KVM_CAP_IRQ_INJECT_STATUS: 1,
    abi.KVM_CAP_IOAPIC_POLARITY_IGNORED: 1,
    abi.KVM_CAP_MCE: 32,
    abi.KVM_CAP_SET_BOOT_CPU_ID: 1,
    abi.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    abi.KVM_CAP_ADJUST_CLOCK: abi.KVM_CLOCK_TSC_STABLE | abi.KVM_CLOCK_REALTIME | abi.KVM_CLOCK_HOST_TSC,
    abi.KVM_CAP_KVMCLOCK_CTRL: 1,
    abi.KVM_CAP_VCPU_EVENTS: 1,
    abi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: 1,
    abi.KVM_CAP_EXCEPTION_PAYLOAD: 1,
    abi.KVM_CAP_INTR_SHADOW: 1,
    abi.KVM_CAP_DEBUGREGS: 1,
    abi.KVM_CAP_X86_ROBUST_SINGLESTEP: 1,
    abi.KVM_CAP_SET_GUEST_DEBUG2: (
        abi.KVM_GUESTDBG_ENABLE
        | abi.KVM_GUESTDBG_SINGLESTEP
        | abi.KVM_GUESTDBG_USE_SW_BP
        | abi.KVM_GUESTDBG_USE_HW_BP
        | abi.KVM_GUESTDBG_INJECT_DB
        | abi.KVM_GUESTDBG_INJECT_BP
        | abi.KVM_GUESTDBG_BLOCKIRQ
    ),
    abi.KVM_CAP_XSAVE: 1,
    abi.KVM_CAP_XSAVE2: ctypes.sizeof(abi.kvm_xsave),
    abi.KVM_CAP_XCRS: 1,
    abi.KVM_CAP_NESTED_STATE: ctypes.sizeof(abi.kvm_nested_state) + abi.KVM_STATE_NESTED_SVM_VMCB_SIZE,
    abi.KVM_CAP_SYS_ATTRIBUTES: 1,
    abi.KVM_CAP_VCPU_ATTRIBUTES: 1,
    abi.KVM_CAP_TSC_CONTROL: 1,
    abi.KVM_CAP_VM_TSC_CONTROL: 1,
    abi.KVM_CAP_GET_TSC_KHZ: 1,
    abi.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    abi.KVM_CAP_SPLIT_IRQCHIP: 1,
    abi.KVM_CAP_X2APIC_API: abi.KVM_X2APIC_API_USE_32BIT_IDS | abi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    abi.KVM_CAP_DISABLE_QUIRKS: 1,
    abi.KVM_CAP_DISABLE_QUIRKS2: 0xFF,  # SLOT_ZAP_ALL among them: a slot that goes takes only its own with it
    abi.KVM_CAP_X86_DISABLE_EXITS: 0xE,  # HLT, PAUSE and C-states
    abi.KVM_CAP_X86_BUS_LOCK_EXIT: abi.KVM_BUS_LOCK_DETECTION_OFF | abi.KVM_BUS_LOCK_DETECTION_EXIT,
    abi.KVM_CAP_GET_MSR_FEATURES: 1,
    abi.KVM_CAP_MSR_PLATFORM_INFO: 1,
    abi.KVM_CAP_ENABLE_CAP: 1,
    abi.KVM_CAP_X86_USER_SPACE_MSR: 1,
    abi.KVM_CAP_X86_MSR_FILTER: 1,
    abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: 1,
    abi.KVM_CAP_SYNC_REGS: abi.KVM_SYNC_X86_VALID_FIELDS,
    abi.KVM_CAP_SREGS2: 1,
    abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE: 1,
    abi.KVM_CAP_ASYNC_PF: 1,
    abi.KVM_CAP_ASYNC_PF_INT: 1,
    abi.KVM_CAP_STEAL_TIME: 1,
    abi.KVM_CAP_VM_TYPES: 1 << abi.KVM_X86_DEFAULT_VM | 1 << abi.KVM_X86_SW_PROTECTED_VM,
    abi.KVM_CAP_USER_MEMORY2: 1,
    abi.KVM_CAP_MEMORY_FAULT_INFO: 1,
    abi.KVM_CAP_MEMORY_ATTRIBUTES: abi.KVM_MEMORY_ATTRIBUTE_PRIVATE,
    abi.KVM_CAP_GUEST_MEMFD: 1,
    abi.KVM_CAP_PRE_FAULT_MEMORY: 1,
    abi.KVM_CAP_EXIT_HYPERCALL: 1 << abi.KVM_HC_MAP_GPA_RANGE,
    abi.KVM_CAP_X86_APIC_BUS_CYCLES_NS: 1,
    abi.KVM_CAP_UNUSED_PAGE_HINT: (
        abi.KVM_UNUSED_PAGE_HINT_ENABLE
        | abi.KVM_UNUSED_PAGE_HINT_DEVICE_ASSIGNED
        | abi.KVM_UNUSED_PAGE_HINT_PAGE_POISONING
    ),
    abi.KVM_CAP_X86_GUEST_MODE: 1,
    abi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: 1,
    abi.KVM_CAP_LAST_CPU: 1,
    abi.KVM_CAP_PCI_SEGMENT: 1,
}

#: What a VM has only if its memory can be private.
OF_PRIVATE_MEMORY: Final = frozenset({abi.KVM_CAP_MEMORY_ATTRIBUTES, abi.KVM_CAP_GUEST_MEMFD})


def check_extension(cap: int) -> int:
    """Return what KVM_CHECK_EXTENSION says about ``cap``; 0 for what is not there."""
    return CAPABILITIES.get(cap, 0)
