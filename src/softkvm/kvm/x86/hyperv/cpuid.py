# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's CPUID leaves: what KVM has of them (KVM_GET_SUPPORTED_HV_CPUID), and what one vCPU's say (TLFS, 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.capabilities import KVM_MAX_VCPUS

if TYPE_CHECKING:
    from softkvm.kvm.x86.cpuid import CpuidTable

#: What Hyper-V of Windows Server 2016 says: its build; how often to try a lock; its logical processors.
_BUILD: Final = 0x3839
_VERSION: Final = 0x000A_0000
_SPINLOCK_RETRIES: Final = 0xFFF
_LOGICAL_PROCESSORS: Final = 64

_FEATURES_EAX: Final = (
    abi.HV_MSR_VP_RUNTIME_AVAILABLE
    | abi.HV_MSR_TIME_REF_COUNT_AVAILABLE
    | abi.HV_MSR_SYNIC_AVAILABLE
    | abi.HV_MSR_SYNTIMER_AVAILABLE
    | abi.HV_MSR_APIC_ACCESS_AVAILABLE
    | abi.HV_MSR_HYPERCALL_AVAILABLE
    | abi.HV_MSR_VP_INDEX_AVAILABLE
    | abi.HV_MSR_RESET_AVAILABLE
    | abi.HV_MSR_REFERENCE_TSC_AVAILABLE
    | abi.HV_ACCESS_FREQUENCY_MSRS
    | abi.HV_ACCESS_REENLIGHTENMENT
    | abi.HV_ACCESS_TSC_INVARIANT
)
_FEATURES_EBX: Final = (
    abi.HV_POST_MESSAGES | abi.HV_SIGNAL_EVENTS | abi.HV_DEBUGGING | abi.HV_ENABLE_EXTENDED_HYPERCALLS
)
_FEATURES_EDX: Final = (
    abi.HV_X64_GUEST_DEBUGGING_AVAILABLE
    | abi.HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE
    | abi.HV_FEATURE_FREQUENCY_MSRS_AVAILABLE
    | abi.HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE
    | abi.HV_FEATURE_DEBUG_MSRS_AVAILABLE
    | abi.HV_FEATURE_EXT_GVA_RANGES_FLUSH
)
_ENLIGHTENMENTS: Final = (
    abi.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED
    | abi.HV_X64_APIC_ACCESS_RECOMMENDED
    | abi.HV_X64_RELAXED_TIMING_RECOMMENDED
    | abi.HV_DEPRECATING_AEOI_RECOMMENDED
    | abi.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED
)


@cache
def _smt_possible() -> bool:
    """Tell whether the host's processors may run two threads each (``cpu_smt_possible``)."""
    try:
        control = Path("/sys/devices/system/cpu/smt/control").read_text().strip()
    except OSError:
        return True
    return control not in ("forceoff", "notsupported")


def get_supported_hv_cpuid(*, lapic_in_kernel: bool) -> list[abi.kvm_cpuid_entry2]:
    """Return the leaves. Timers' direct mode and IPIs by hypercall need the local APIC in KVM."""
    name = [int.from_bytes(abi.KVM_HYPERV_VENDOR[at : at + 4], "little") for at in (0, 4, 8)]
    direct_mode = abi.HV_STIMER_DIRECT_MODE_AVAILABLE if lapic_in_kernel else 0
    cluster_ipi = abi.HV_X64_CLUSTER_IPI_RECOMMENDED if lapic_in_kernel else 0
    core_sharing = 0 if _smt_possible() else abi.HV_X64_NO_NONARCH_CORESHARING
    leaves: dict[int, tuple[int, ...]] = {
        abi.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS: (abi.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES, *name),
        abi.HYPERV_CPUID_INTERFACE: (abi.HYPERV_CPUID_SIGNATURE_EAX,),
        abi.HYPERV_CPUID_VERSION: (_BUILD, _VERSION),
        abi.HYPERV_CPUID_FEATURES: (_FEATURES_EAX, _FEATURES_EBX, 0, _FEATURES_EDX | direct_mode),
        abi.HYPERV_CPUID_ENLIGHTMENT_INFO: (_ENLIGHTENMENTS | cluster_ipi | core_sharing, _SPINLOCK_RETRIES),
        abi.HYPERV_CPUID_IMPLEMENT_LIMITS: (KVM_MAX_VCPUS, _LOGICAL_PROCESSORS),
        abi.HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS: (0, *name),
        abi.HYPERV_CPUID_SYNDBG_INTERFACE: (abi.HYPERV_VS_INTERFACE_EAX_SIGNATURE,),
        abi.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES: (abi.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING,),
        # Said of every vCPU, as the kernel does; a guest looks at it once it has SVM. No direct flush until it has.
        abi.HYPERV_CPUID_NESTED_FEATURES: (abi.HV_X64_NESTED_MSR_BITMAP, abi.HV_X64_NESTED_EVMCS1_PERF_GLOBAL_CTRL),
    }
    return [
        abi.kvm_cpuid_entry2(function=function, **dict(zip(("eax", "ebx", "ecx", "edx"), leaf, strict=False)))
        for function, leaf in leaves.items()
    ]


def has_hyperv(table: CpuidTable) -> bool:
    """Tell whether a vCPU's CPUID has Hyper-V's interface: "Hv#1" in leaf 0x40000001."""
    return table.first(abi.HYPERV_CPUID_INTERFACE)[0] == abi.HYPERV_CPUID_SIGNATURE_EAX


@dataclass(frozen=True, slots=True)
class Features:
    """What a vCPU's leaves say of the guest's privileges; KVM_CAP_HYPERV_ENFORCE_CPUID has KVM look at them."""

    features_eax: int = 0
    features_ebx: int = 0
    features_edx: int = 0
    enlightenments_eax: int = 0
    enlightenments_ebx: int = 0
    syndbg_cap_eax: int = 0

    @classmethod
    def of(cls, table: CpuidTable) -> Features:
        """Return a vCPU's; none without the interface."""
        if not has_hyperv(table):
            return cls()
        eax, ebx, _, edx = table.first(abi.HYPERV_CPUID_FEATURES)
        recommendations = table.first(abi.HYPERV_CPUID_ENLIGHTMENT_INFO)
        debugging = table.first(abi.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES)
        return cls(eax, ebx, edx, recommendations[0], recommendations[1], debugging[0])

    @property
    def has_syndbg(self) -> bool:
        """Whether there is the synthetic debugger."""
        return bool(self.syndbg_cap_eax & abi.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING)
