# SPDX-License-Identifier: Apache-2.0
"""The system descriptor: ``/dev/kvm``."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any

from softkvm import abi
from softkvm.devkvm.ioctl import Descriptor, get_counted, get_cpuid, get_msrs, ioctl_pointer, ioctl_value
from softkvm.devkvm.vm import Vm


class Kvm(Descriptor):
    """:class:`softkvm.api.Kvm` on a device file."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open *path*. Raises OSError: of ``open()``; ENOTTY if it is no KVM; ENOTSUP for another API version."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            version = self.get_api_version()
        except OSError as error:
            self.close()
            raise OSError(error.errno, "not a KVM device", path) from None
        if version != abi.KVM_API_VERSION:
            self.close()
            message = f"KVM API version {version}, expected {abi.KVM_API_VERSION}"
            raise OSError(errno.ENOTSUP, message, path)

    def get_api_version(self) -> int:
        return ioctl_value(self.fd, abi.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        return ioctl_value(self.fd, abi.KVM_CHECK_EXTENSION, cap)

    def create_vm(self, type: int = 0) -> Vm:
        return Vm(ioctl_value(self.fd, abi.KVM_CREATE_VM, type), self.get_vcpu_mmap_size())

    def get_vcpu_mmap_size(self) -> int:
        return ioctl_value(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE)

    def get_supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        return get_cpuid(self.fd, abi.KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        return get_cpuid(self.fd, abi.KVM_GET_EMULATED_CPUID)

    def get_msr_index_list(self) -> list[int]:
        return self._msr_list(abi.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> list[int]:
        return self._msr_list(abi.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _msr_list(self, request: int) -> list[int]:
        table: Any = get_counted(
            lambda n: abi.flexible(abi.kvm_msr_list, ctypes.c_uint32, n, "indices")(),
            self.fd,
            request,
            "nmsrs",
        )
        return list(table.indices[: table.nmsrs])

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        return get_msrs(self.fd, indices)

    def x86_get_mce_cap_supported(self) -> int:
        supported = ctypes.c_uint64()
        ioctl_pointer(self.fd, abi.KVM_X86_GET_MCE_CAP_SUPPORTED, supported)
        return supported.value
