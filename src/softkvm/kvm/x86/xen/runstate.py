# SPDX-License-Identifier: Apache-2.0
"""Runstate: how long a vCPU was running, wanted to (was *runnable*), was blocked, or offline.

KVM knows of the first two: a vCPU runs from its first KVM_RUN on, but for the time that its thread waited for a
processor. Blocked and offline are userspace's to say. The kernel notes each preemption; here the host is asked when
KVM_RUN begins and when a halt is over.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.paravirt.kvmclock import get_kvmclock_ns
from softkvm.kvm.x86.paravirt.steal_time import run_delay_ns

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
_UPDATE_BYTE: Final = 7  # of the entry time: XEN_RUNSTATE_UPDATE is in it


def update(vcpu: Vcpu, state: int) -> None:
    """Account the time since the last change to the state until now, and be in *state* from now on."""
    xen = vcpu.xen
    if not xen.runstate_entry_time:
        xen.runstate = abi.RUNSTATE_offline  # until now
    now = get_kvmclock_ns(vcpu.vm)
    elapsed = now - xen.runstate_entry_time
    run_delay = run_delay_ns()
    if xen.runstate == abi.RUNSTATE_running:
        # Another thread that runs the vCPU now has a delay of its own.
        stolen = min(max(run_delay - xen.last_steal, 0), max(elapsed, 0))
        xen.runstate_times[abi.RUNSTATE_runnable] += stolen
        elapsed -= stolen
    xen.last_steal = run_delay
    xen.runstate_times[xen.runstate] += elapsed
    xen.runstate_times[:] = [value & _U64 for value in xen.runstate_times]
    xen.runstate = state
    xen.runstate_entry_time = now & _U64
    write(vcpu)


def write(vcpu: Vcpu) -> None:
    """Write the guest's structure, if it has named one; with the update flag set meanwhile if it wants that.

    The structure may lie anywhere, also across pages.
    """
    xen, area = vcpu.xen, vcpu.xen.runstate_area
    if area is None:
        return
    at = vcpu.vm.xen.layout.state_entry_time
    flag = abi.XEN_RUNSTATE_UPDATE if vcpu.vm.xen.runstate_update_flag else 0
    entry_time = xen.runstate_entry_time
    if flag and not area.write(at + _UPDATE_BYTE, bytes([(entry_time | flag) >> 56])):
        return
    area.write(0, struct.pack("<I", xen.runstate))
    area.write(at, struct.pack("<5Q", entry_time | flag, *xen.runstate_times))
    if flag:
        area.write(at + _UPDATE_BYTE, bytes([(entry_time & ~flag) >> 56]))
