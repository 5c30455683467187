# SPDX-License-Identifier: Apache-2.0
"""Steal time: how long a vCPU wanted to run but its thread had no processor (``struct kvm_steal_time``, msr.rst)."""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm._softcpu import clock_ns
from softkvm.kvm import procfs
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.x86.requests import KVM_REQ_STEAL_UPDATE

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_STEAL: Final = struct.Struct("<QI")
_U64: Final = (1 << 64) - 1
#: The host's scheduler is asked no more often than this: it takes two microseconds, as long as an exit does. So a guest
#: is told at the next KVM_RUN of every delay that was longer; the kernel tells it at each, of none as well.
_INTERVAL_NS: Final = 100_000


class _SchedStat:
    """A thread's own /proc/…/schedstat, open for as long as the thread lives."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        try:
            self.fd = procfs.open_own(f"task/{threading.get_native_id()}/schedstat")
        except OSError:  # no /proc, or a kernel without these statistics
            self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_thread: Final = threading.local()


def run_delay_ns() -> int:
    """Return how long the calling thread has waited for a processor, as the host's scheduler counts it."""
    stat: _SchedStat | None = getattr(_thread, "stat", None)
    if stat is None or stat.pid != os.getpid():  # another process since a fork
        stat = _thread.stat = _SchedStat()
    try:
        return int(os.pread(stat.fd, 64, 0).split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def check(vcpu: Vcpu) -> None:
    """Ask for an update when the vCPU's thread has waited: KVM_RUN was called, or a halt is over."""
    if vcpu.steal_enabled:
        now = clock_ns()
        if now - vcpu.steal_checked_ns >= _INTERVAL_NS:
            vcpu.steal_checked_ns = now
            if run_delay_ns() != vcpu.last_steal:
                vcpu.make_request(KVM_REQ_STEAL_UPDATE)


def account(vcpu: Vcpu) -> None:
    """Look from now on, or no longer, how long the vCPU's thread waits: Xen's runstate is made of that, too.

    The guest and KVM_XEN_HVM_CONFIG may change that at the same time: what is found later is what stays.
    """
    with vcpu.request_lock:
        enabled = vcpu.msr_values.get(abi.MSR_KVM_STEAL_TIME, 0) & abi.KVM_MSR_ENABLED
        vcpu.steal_enabled = bool(enabled or vcpu.vm.xen.config.msr)
        vcpu.run_begins = vcpu.steal_enabled or vcpu.apic is None or vcpu.pic_in_userspace


def set_msr(vcpu: Vcpu, value: int, *, host: bool) -> None:
    """MSR_KVM_STEAL_TIME was written: if its enable bit is set, count from here on."""
    vcpu.msr_values[abi.MSR_KVM_STEAL_TIME] = value
    account(vcpu)
    if not value & abi.KVM_MSR_ENABLED:
        return
    if not host:  # on the vCPU's thread, whose delay it is
        vcpu.last_steal = run_delay_ns()
    vcpu.make_request(KVM_REQ_STEAL_UPDATE)


def record(vcpu: Vcpu) -> None:
    """Add the time that the vCPU wanted to run but couldn't (``record_steal_time``)."""
    msr = vcpu.msr_values.get(abi.MSR_KVM_STEAL_TIME, 0)
    if not msr & abi.KVM_MSR_ENABLED:
        return
    gpa = msr & abi.KVM_STEAL_VALID_BITS
    vm = vcpu.vm
    data = read_guest(vm, gpa, _STEAL.size)
    if data is None:
        return
    steal, version = _STEAL.unpack(data)
    run_delay = run_delay_ns()
    # Another thread that runs the vCPU now has a delay of its own: time stolen never goes backwards.
    steal = (steal + max(run_delay - vcpu.last_steal, 0)) & _U64
    vcpu.last_steal = run_delay
    version += 1 if version & 1 else 0
    write_guest(vm, gpa + 8, struct.pack("<I", version + 1 & 0xFFFF_FFFF))
    write_guest(vm, gpa, struct.pack("<Q", steal))
    write_guest(vm, gpa + 8, struct.pack("<I", version + 2 & 0xFFFF_FFFF))
