# SPDX-License-Identifier: Apache-2.0
"""The system: what an open /dev/kvm is (KVM API, section 4: system ioctls)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from softkvm import abi
from softkvm.kvm.capabilities import check_extension
from softkvm.kvm.errors import kvm_error, refuse_requests
from softkvm.kvm.params import Params
from softkvm.kvm.vcpu_state import VCPU_MMAP_SIZE
from softkvm.kvm.vm import Vm
from softkvm.kvm.x86 import cpuid, mce, msrs


class Kvm:
    """KVM in Python on the software CPU (implements :class:`softkvm.api.Kvm`)."""

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or Params()

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return abi.KVM_API_VERSION

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return check_extension(cap)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM: EINVAL for a type other than the default."""
        if type:
            raise kvm_error(errno.EINVAL, f"type={type}, expected 0")
        return Vm(self.params)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: the run page, the PIO page and the coalesced MMIO page."""
        return VCPU_MMAP_SIZE

    def get_supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        return cpuid.get_supported_cpuid()

    def get_emulated_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID."""
        return cpuid.get_emulated_cpuid()

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST."""
        return msrs.msr_index_list()

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""
        return list(msrs.FEATURE_MSRS)

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        return mce.SUPPORTED_MCE_CAP

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS on the system: feature MSRs, up to the first that isn't one."""
        if len(indices) >= 256:
            raise kvm_error(errno.E2BIG, f"nmsrs={len(indices)}, expected fewer than 256")
        values = []
        for index in indices:
            value = msrs.FEATURE_MSRS.get(index)
            if value is None:
                break
            values.append(value)
        return values

    def close(self) -> None:
        """Nothing to give back: VMs live on by themselves. Requests are EBADF from now on."""
        refuse_requests(self, abi.File.SYSTEM)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
