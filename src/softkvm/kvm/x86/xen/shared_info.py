# SPDX-License-Identifier: Apache-2.0
"""The page that a guest shares with Xen, and the wall clock in it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from softkvm.kvm.memory.guest_area import GuestArea
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VmState as Vm

_U32 = (1 << 32) - 1


def set_shared_info(vm: Vm, area: GuestArea | None) -> None:
    """Have the page at *area*, or none. EINVAL for one that is not aligned, EFAULT without memory."""
    if area is not None:
        area.check(PAGE_SIZE)
    vm.xen.shared_info = area
    write_wall_clock(vm)


def set_long_mode(vm: Vm, long_mode: bool) -> bool:
    """Have the guest's structures be those of a 64-bit guest, or not; False if the page is not there any more."""
    vm.xen.long_mode = long_mode
    return write_wall_clock(vm)


def write_wall_clock(vm: Vm) -> bool:
    """Write the time of the guest's boot, with an odd version meanwhile; False if the page is not there."""
    area, layout = vm.xen.shared_info, vm.xen.layout
    if area is None:
        return True
    at = layout.wall_clock
    old = area.read(at, 4)
    if old is None:
        return False
    version = (int.from_bytes(old, "little") + 1 | 1) & _U32
    seconds, nanoseconds = divmod(max(kvmclock.get_wall_clock_epoch(vm), 0), kvmclock.NSEC_PER_SEC)
    area.write(at, struct.pack("<I", version))
    area.write(at + 4, struct.pack("<II", seconds & _U32, nanoseconds))
    area.write(layout.wall_clock_sec_hi, struct.pack("<I", seconds >> 32 & _U32))
    written = area.write(at, struct.pack("<I", version + 1 & _U32))
    vm.make_all_cpus_request(KVM_REQ_CLOCK_UPDATE)
    return written
