# SPDX-License-Identifier: Apache-2.0
"""The system on x86: what its processors and KVM can do (KVM API, section 4: system ioctls)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from softkvm import abi
from softkvm.abi.x86 import request_sizes as sizes
from softkvm.kvm import system
from softkvm.kvm.errors import enomem, kvm_error
from softkvm.kvm.params import Params
from softkvm.kvm.x86 import cpuid, mce, msrs
from softkvm.kvm.x86.capabilities import CAPABILITIES, check_extension
from softkvm.kvm.x86.hyperv.cpuid import get_supported_hv_cpuid
from softkvm.kvm.x86.vm import Vm


class Kvm(system.Kvm):
    """KVM in Python on the software CPU (implements :class:`softkvm.api.Kvm`)."""

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        #: Functions from what KVM_GET_SUPPORTED_CPUID would be to what it is, and ones that see each new VM (plugins).
        self.cpuid_changes: list[Callable[[list[abi.kvm_cpuid_entry2]], list[abi.kvm_cpuid_entry2]]] = []
        self.vm_created: list[Callable[[Vm], object]] = []

    def arch_check_extension(self, cap: int) -> int:
        """The table of :mod:`.capabilities`; nothing to disable without ``enable_pmu``."""
        return 0 if cap == abi.KVM_CAP_PMU_CAPABILITY and not self.params.enable_pmu else check_extension(cap)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM: EINVAL for a type that KVM_CAP_VM_TYPES doesn't have."""
        if type >= 64 or not CAPABILITIES[abi.KVM_CAP_VM_TYPES] >> type & 1:
            raise kvm_error(errno.EINVAL, f"type={type}, expected KVM_X86_DEFAULT_VM or KVM_X86_SW_PROTECTED_VM")
        with enomem():
            vm = Vm(self.params, type)
        for created in self.vm_created:
            created(vm)
        return vm

    def get_supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        entries = cpuid.get_supported_cpuid(enable_pmu=self.params.enable_pmu)
        for change in self.cpuid_changes:
            entries = change(entries)
        return entries

    def get_emulated_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID."""
        return cpuid.get_emulated_cpuid()

    def get_supported_hv_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID on the system: of a vCPU with a local APIC in KVM."""
        return get_supported_hv_cpuid(lapic_in_kernel=True)

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST."""
        return msrs.msr_index_list(enable_pmu=self.params.enable_pmu)

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""
        return list(msrs.FEATURE_MSRS)

    def has_device_attr(self, group: int, attr: int) -> None:
        """KVM_HAS_DEVICE_ATTR: KVM_X86_XCOMP_GUEST_SUPP is all there is."""
        if (group, attr) != (0, abi.KVM_X86_XCOMP_GUEST_SUPP):
            raise kvm_error(errno.ENXIO, f"group={group} attr={attr}, expected KVM_X86_XCOMP_GUEST_SUPP")

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR: KVM_X86_XCOMP_GUEST_SUPP, the XSAVE components that guests may have."""
        self.has_device_attr(group, attr)
        return cpuid.supported_xcr0()

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        return mce.SUPPORTED_MCE_CAP

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS on the system: feature MSRs, up to the first that isn't one."""
        sizes.NMSRS.check(len(indices))
        values = []
        for index in indices:
            value = msrs.FEATURE_MSRS.get(index, 0 if self.params.ignore_msrs else None)
            if value is None:
                break
            values.append(value)
        return values


abi.check_requests(Kvm, abi.requests_of(abi.File.SYSTEM))
