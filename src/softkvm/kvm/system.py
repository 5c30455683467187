# SPDX-License-Identifier: Apache-2.0
"""The system: what an open /dev/kvm is on every architecture (KVM API, section 4: system ioctls)."""

from __future__ import annotations

from abc import abstractmethod

from softkvm import abi
from softkvm.closing import Closing
from softkvm.kvm.errors import refuse_requests
from softkvm.kvm.params import Params
from softkvm.kvm.state import VCPU_MMAP_SIZE
from softkvm.kvm.vm import Vm


class Kvm(Closing):
    """KVM in Python on the software CPU."""

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or Params()

    @abstractmethod
    def arch_check_extension(self, cap: int) -> int:
        """Return what KVM_CHECK_EXTENSION says."""

    @abstractmethod
    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM: EINVAL for a type that the architecture doesn't have."""

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return abi.KVM_API_VERSION

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return self.arch_check_extension(cap)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: the run page, the PIO page and the coalesced MMIO page."""
        return VCPU_MMAP_SIZE

    def close(self) -> None:
        """Nothing to give back: VMs live on by themselves. Requests are EBADF from now on."""
        refuse_requests(self, abi.File.SYSTEM)

    def __repr__(self) -> str:
        return "<softkvm.kvm.Kvm: on the software CPU>"
