# SPDX-License-Identifier: Apache-2.0
"""A VM descriptor."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softkvm import abi
from softkvm.devkvm.ioctl import Descriptor, enable_cap, get, ioctl_pointer, ioctl_value
from softkvm.devkvm.vcpu import Vcpu

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Vm(Descriptor):
    """:class:`softkvm.api.Vm` on a descriptor of KVM_CREATE_VM."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        self._slot_size: dict[int, int] = {}
        self._held: dict[int, memoryview] = {}

    def check_extension(self, cap: int) -> int:
        return ioctl_value(self.fd, abi.KVM_CHECK_EXTENSION, cap)

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: Buffer | None = None) -> None:
        held = memoryview(memory) if memory is not None else None
        try:
            ioctl_pointer(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)
        except OSError:
            if held is not None:
                held.release()
            raise
        self._slot_size[region.slot] = region.memory_size
        if not region.memory_size:
            self._held.pop(region.slot, None)
        elif held is not None:
            self._held[region.slot] = held

    def create_vcpu(self, id: int) -> Vcpu:
        return Vcpu(ioctl_value(self.fd, abi.KVM_CREATE_VCPU, id), self._vcpu_mmap_size)

    def create_irqchip(self) -> None:
        ioctl_value(self.fd, abi.KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        ioctl_pointer(self.fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=flags))

    def irq_line(self, irq: int, level: int) -> None:
        ioctl_pointer(self.fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(irq=irq, level=level))

    def irq_line_status(self, irq: int, level: int) -> int:
        line = abi.kvm_irq_level(irq=irq, level=level)
        ioctl_pointer(self.fd, abi.KVM_IRQ_LINE_STATUS, line)
        return int(line.status)

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        chip = abi.kvm_irqchip(chip_id=chip_id)
        ioctl_pointer(self.fd, abi.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_IRQCHIP, chip)

    def get_pit2(self) -> abi.kvm_pit_state2:
        return get(self.fd, abi.KVM_GET_PIT2, abi.kvm_pit_state2)

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_PIT2, state)

    def set_gsi_routing(self, entries: Sequence[abi.kvm_irq_routing_entry]) -> None:
        count = len(entries)
        table: Any = abi.flexible(abi.kvm_irq_routing, abi.kvm_irq_routing_entry, count)(nr=count)
        table.entries[:] = entries
        ioctl_pointer(self.fd, abi.KVM_SET_GSI_ROUTING, table)

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        return ioctl_pointer(self.fd, abi.KVM_SIGNAL_MSI, msi)

    def set_tss_addr(self, address: int) -> None:
        ioctl_value(self.fd, abi.KVM_SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(address))

    def set_boot_cpu_id(self, id: int) -> None:
        ioctl_value(self.fd, abi.KVM_SET_BOOT_CPU_ID, id)

    def get_clock(self) -> abi.kvm_clock_data:
        return get(self.fd, abi.KVM_GET_CLOCK, abi.kvm_clock_data)

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        ioctl_pointer(self.fd, abi.KVM_SET_CLOCK, clock)

    def get_dirty_log(self, slot: int) -> bytes:
        size = abi.dirty_bitmap_bytes(self._slot_size.get(slot, 0) // 4096)
        bitmap = (ctypes.c_uint8 * max(size, 8))()
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        ioctl_pointer(self.fd, abi.KVM_GET_DIRTY_LOG, log)
        return bytes(bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        if len(bitmap) < abi.dirty_bitmap_bytes(num_pages):
            expected = abi.dirty_bitmap_bytes(num_pages)
            raise OSError(errno.EFAULT, f"bitmap of {len(bitmap)} bytes, expected {expected}")
        bits = ctypes.create_string_buffer(bitmap, max(len(bitmap), 1))
        log = abi.kvm_clear_dirty_log(
            slot=slot, num_pages=num_pages, first_page=first_page, dirty_bitmap=ctypes.addressof(bits)
        )
        ioctl_pointer(self.fd, abi.KVM_CLEAR_DIRTY_LOG, log)

    def close(self) -> None:
        super().close()
        getattr(self, "_held", {}).clear()

    def enable_cap(self, cap: int, *args: int) -> None:
        enable_cap(self.fd, cap, args)

    def x86_set_msr_filter(self, flags: int, ranges: Sequence[abi.MsrFilterRange]) -> None:
        if len(ranges) > abi.KVM_MSR_FILTER_MAX_RANGES:
            raise OSError(errno.EINVAL, f"{len(ranges)} ranges, expected at most {abi.KVM_MSR_FILTER_MAX_RANGES}")
        msr_filter = abi.kvm_msr_filter(flags=flags)
        bitmaps = []  # kept until the request has read them
        for part, entry in zip(ranges, msr_filter.ranges, strict=False):
            size = abi.msr_bitmap_bytes(part.nmsrs)
            if len(part.bitmap) < min(size, abi.KVM_MSR_FILTER_MAX_BITMAP_SIZE):
                raise OSError(errno.EFAULT, f"bitmap of {len(part.bitmap)} bytes, expected {size}")
            bitmaps.append(ctypes.create_string_buffer(part.bitmap, max(len(part.bitmap), 1)))
            entry.flags, entry.base, entry.nmsrs = part.flags, part.base, part.nmsrs
            entry.bitmap = ctypes.addressof(bitmaps[-1])
        ioctl_pointer(self.fd, abi.KVM_X86_SET_MSR_FILTER, msr_filter)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        ioctl_pointer(self.fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd))

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        event = abi.kvm_ioeventfd(datamatch=datamatch or 0, addr=addr, len=len, fd=fd, flags=flags)
        ioctl_pointer(self.fd, abi.KVM_IOEVENTFD, event)

    def reinject_control(self, pit_reinject: int) -> None:
        control = abi.kvm_reinject_control(pit_reinject=pit_reinject)
        ioctl_pointer(self.fd, abi.KVM_REINJECT_CONTROL, control)
