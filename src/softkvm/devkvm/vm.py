# SPDX-License-Identifier: Apache-2.0
"""A VM descriptor."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, cast

from softkvm import abi, api
from softkvm.abi import checks
from softkvm.devkvm.ioctl import Descriptor, add_requests, call
from softkvm.devkvm.stats import read_stats
from softkvm.devkvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer


class Vm(Descriptor):
    """:class:`softkvm.api.Vm` on a descriptor of KVM_CREATE_VM."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        self._slot_size: dict[int, int] = {}
        self._held: dict[int, memoryview] = {}

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION; the slot holds *memory*."""
        self._set_region(abi.KVM_SET_USER_MEMORY_REGION, region, memory)

    def set_user_memory_region2(self, region: abi.kvm_userspace_memory_region2, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION2; the slot holds *memory*."""
        self._set_region(abi.KVM_SET_USER_MEMORY_REGION2, region, memory)

    def _set_region(
        self,
        request: abi.Request,
        region: abi.kvm_userspace_memory_region | abi.kvm_userspace_memory_region2,
        memory: Buffer | None,
    ) -> None:
        held = None if memory is None else checks.memory("memory", memory)
        try:
            call(self.fd, request, region)
        except OSError:
            if held is not None:
                held.release()
            raise
        self._slot_size[region.slot] = region.memory_size
        if not region.memory_size:
            self._held.pop(region.slot, None)
        elif held is not None:
            self._held[region.slot] = held

    def host_unmapped_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing: the kernel's MMU notifier has told KVM."""

    def create_vcpu(self, id: int) -> api.Vcpu:
        """KVM_CREATE_VCPU."""
        return cast("api.Vcpu", Vcpu(call(self.fd, abi.KVM_CREATE_VCPU, id), self._vcpu_mmap_size))

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG; the descriptor's own books tell the slot's size."""
        size = abi.dirty_bitmap_bytes(self._slot_size.get(slot, 0) // 4096)
        bitmap = (ctypes.c_uint8 * max(size, 8))()
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        call(self.fd, abi.KVM_GET_DIRTY_LOG, log)
        return bytes(bitmap)

    def stats(self) -> dict[str, int]:
        """KVM_GET_STATS_FD: the kernel's counters for this VM, by the kernel's names."""
        return read_stats(self.fd)

    def close(self) -> None:
        """Close the descriptor; memory is let go."""
        super().close()
        getattr(self, "_held", {}).clear()


add_requests(Vm, abi.File.VM, api.Vm)
