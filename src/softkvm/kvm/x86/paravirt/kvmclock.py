# SPDX-License-Identifier: Apache-2.0
"""kvmclock, wall clock and the paravirtual MSRs (KVM's Documentation/virt/kvm/x86/msr.rst).

The physical TSC is the same for every processor and the clock's, so the guest's clock is stable
(PVCLOCK_TSC_STABLE_BIT) as long as all vCPUs' counters agree: a guest may then compute the time on any of them by one's
structure, as Linux's vDSO does.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_area import GuestArea
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86 import tsc
from softkvm.kvm.x86.paravirt import async_pf, steal_time
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

NSEC_PER_SEC: Final = 1_000_000_000
_PVCLOCK: Final = struct.Struct("<IIQQIbB2x")
_U64: Final = (1 << 64) - 1
PVCLOCK_SIZE: Final = _PVCLOCK.size

Reader = Callable[["Vcpu", int, bool], "int | None"]
Writer = Callable[["Vcpu", int, int, bool], bool]


def get_time_scale(frequency: int) -> tuple[int, int]:
    """Return (shift, multiplier) so that ticks of ``frequency`` 2**-32 Hz become nanoseconds.

    ``ns = ((ticks << shift) * multiplier) >> 32``, a right shift if ``shift`` is negative. The multiplier has 32
    significant bits.
    """
    shift = 0
    numerator, denominator = NSEC_PER_SEC << 32 + tsc.RATIO_BITS, frequency
    while numerator // denominator >> 32:
        denominator <<= 1
        shift += 1
    while not numerator // denominator >> 31:
        numerator <<= 1
        shift -= 1
    return shift, numerator // denominator


# --- the clock of the VM -----------------------------------------------------------------------


def get_kvmclock_ns(vm: Vm) -> int:
    """Return the guest's nanoseconds since its boot, at this moment."""
    return _softcpu.clock_ns() + vm.kvmclock_offset


def get_clock(vm: Vm) -> abi.kvm_clock_data:
    """KVM_GET_CLOCK."""
    host_tsc, now = _softcpu.clocks()
    data = abi.kvm_clock_data()
    data.clock = (now + vm.kvmclock_offset) & _U64
    if vm.tsc.agree:
        data.flags = abi.KVM_CLOCK_TSC_STABLE | abi.KVM_CLOCK_REALTIME | abi.KVM_CLOCK_HOST_TSC
        data.realtime = time.time_ns()
        data.host_tsc = host_tsc
    return data


def set_clock(vm: Vm, data: abi.kvm_clock_data) -> None:
    """KVM_SET_CLOCK: EINVAL for flags other than KVM_CLOCK_REALTIME."""
    if data.flags & ~(abi.KVM_CLOCK_REALTIME | abi.KVM_CLOCK_TSC_STABLE | abi.KVM_CLOCK_HOST_TSC):
        raise kvm_error(errno.EINVAL, f"flags={data.flags:#x}, expected KVM_CLOCK_REALTIME or none")
    now = data.clock
    if data.flags & abi.KVM_CLOCK_REALTIME:
        now += max(time.time_ns() - data.realtime, 0)
    vm.kvmclock_offset = now - _softcpu.clock_ns()
    vm.hyperv.clock_changed()
    vm.make_all_cpus_request(KVM_REQ_CLOCK_UPDATE)


# --- the clock of a vCPU -----------------------------------------------------------------------


def update_guest_time(vcpu: Vcpu) -> None:
    """Write the vCPU's time structure, if the guest has named one; none that lies in two pages."""
    msr = vcpu.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0)
    gpa = msr & ~1
    if not msr & abi.KVM_MSR_ENABLED or (gpa & PAGE_SIZE - 1) + PVCLOCK_SIZE > PAGE_SIZE:
        return
    stopped = abi.PVCLOCK_GUEST_STOPPED if vcpu.pvclock_set_guest_stopped else 0
    if setup_guest_pvclock(vcpu, GuestArea(vcpu.vm, gpa), stopped=stopped):
        vcpu.pvclock_set_guest_stopped = False


def setup_guest_pvclock(
    vcpu: Vcpu, area: GuestArea, offset: int = 0, *, stopped: int = 0, stable: int = abi.PVCLOCK_TSC_STABLE_BIT
) -> bool:
    """Write a time structure of the vCPU's, with an odd version while it changes; False without memory.

    *stopped* and *stable* are bits for its flags: the first comes to what they are, the other if the TSC is.
    """
    vm = vcpu.vm
    old = area.read(offset, PVCLOCK_SIZE)
    if old is None:
        return False
    version, _, _, _, _, _, old_flags = _PVCLOCK.unpack(old)
    version = (version + (1 if version & 1 else 0)) & 0xFFFF_FFFF
    shift, multiplier = get_time_scale(tsc.frequency(vcpu))
    host_tsc, now = _softcpu.clocks()
    flags = old_flags & abi.PVCLOCK_GUEST_STOPPED | stopped
    if vm.tsc.agree:
        flags |= stable
    body = _PVCLOCK.pack(
        version + 1 & 0xFFFF_FFFF,
        0,
        tsc.guest_tsc_at(vcpu, host_tsc),
        (now + vm.kvmclock_offset) & _U64,
        multiplier,
        shift,
        flags,
    )
    area.write(offset, body[:4])
    area.write(offset + 4, body[4:])
    return area.write(offset, struct.pack("<I", version + 2 & 0xFFFF_FFFF))


def get_wall_clock_epoch(vm: Vm) -> int:
    """Return the wall-clock time of the guest's boot, in nanoseconds."""
    return time.time_ns() - get_kvmclock_ns(vm)


def write_wall_clock(vcpu: Vcpu, gpa: int) -> None:
    """Write the wall-clock time of the guest's boot at ``gpa``; 0 is no address: userspace's reset writes it."""
    if not gpa:
        return
    vm = vcpu.vm
    old = read_guest(vm, gpa, 4)
    if old is None:
        return
    version = int.from_bytes(old, "little")
    version += 1 if version & 1 else 0
    write_guest(vm, gpa, struct.pack("<I", version + 1 & 0xFFFF_FFFF))
    seconds, nanoseconds = divmod(get_wall_clock_epoch(vm), NSEC_PER_SEC)
    write_guest(vm, gpa + 4, struct.pack("<II", seconds & 0xFFFF_FFFF, nanoseconds))
    write_guest(vm, gpa, struct.pack("<I", version + 2 & 0xFFFF_FFFF))


def kvmclock_ctrl(vcpu: Vcpu) -> None:
    """KVM_KVMCLOCK_CTRL: tell the guest's soft-lockup detector that it was stopped; EINVAL without a clock."""
    if not vcpu.msr_values.get(abi.MSR_KVM_SYSTEM_TIME_NEW, 0) & abi.KVM_MSR_ENABLED:
        raise kvm_error(errno.EINVAL, "the guest has not enabled kvmclock")
    vcpu.pvclock_set_guest_stopped = True
    vcpu.make_request(KVM_REQ_CLOCK_UPDATE)


# --- reset -------------------------------------------------------------------------------------

_RESET_MSRS: Final = (
    abi.MSR_KVM_SYSTEM_TIME_NEW,
    abi.MSR_KVM_STEAL_TIME,
    abi.MSR_KVM_ASYNC_PF_EN,
    abi.MSR_KVM_ASYNC_PF_INT,
    abi.MSR_KVM_PV_EOI_EN,
)


def reset(vcpu: Vcpu) -> None:
    """RESET or INIT: nothing may be written to what the next guest uses for something else."""
    for msr in _RESET_MSRS:
        vcpu.msr_values.pop(msr, None)
    steal_time.account(vcpu)
    async_pf.reset(vcpu)
    if vcpu.pv_eoi is not None:
        vcpu.pv_eoi.reset()


# --- the MSRs ----------------------------------------------------------------------------------


def _feature_denied(vcpu: Vcpu, feature: int, host: bool) -> bool:
    """Tell whether KVM_CAP_ENFORCE_PV_FEATURE_CPUID forbids the guest the access; userspace saves and restores all."""
    return not host and vcpu.pv_cpuid_enforce and not vcpu.cpuid.kvm_features >> feature & 1


def _reader(feature: int, alias: int | None = None, default: int = 0) -> Reader:
    def read(vcpu: Vcpu, index: int, host: bool) -> int | None:
        if _feature_denied(vcpu, feature, host):
            return None
        return vcpu.msr_values.get(index if alias is None else alias, default)

    return read


def _write_wall_clock(feature: int) -> Writer:
    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if _feature_denied(vcpu, feature, host):
            return False
        vcpu.vm.wall_clock_msr = data
        write_wall_clock(vcpu, data)
        return True

    return write


def _read_wall_clock(feature: int) -> Reader:
    def read(vcpu: Vcpu, index: int, host: bool) -> int | None:
        return None if _feature_denied(vcpu, feature, host) else vcpu.vm.wall_clock_msr

    return read


def _write_system_time(feature: int) -> Writer:
    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if _feature_denied(vcpu, feature, host):
            return False
        if vcpu.vcpu_id == 0 and not host:
            boot_vcpu_runs_old_kvmclock = index == abi.MSR_KVM_SYSTEM_TIME
            vcpu.vm.boot_vcpu_runs_old_kvmclock = boot_vcpu_runs_old_kvmclock
        vcpu.msr_values[abi.MSR_KVM_SYSTEM_TIME_NEW] = data
        vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
        return True

    return write


#: What MSR_KVM_ASYNC_PF_EN may ask for only with a feature of its own.
_ASYNC_PF_DELIVERY: Final = (
    (abi.KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT, abi.KVM_FEATURE_ASYNC_PF_VMEXIT),
    (abi.KVM_ASYNC_PF_DELIVERY_AS_INT, abi.KVM_FEATURE_ASYNC_PF_INT),
)


def _write_async_pf_en(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_ASYNC_PF, host):
        return False
    for delivery, feature in _ASYNC_PF_DELIVERY:
        if data & delivery and _feature_denied(vcpu, feature, host):
            return False
    return async_pf.set_enabled(vcpu, data)


def _write_async_pf_int(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_ASYNC_PF_INT, host) or data >> 8 or vcpu.apic is None:
        return False
    vcpu.msr_values[index] = data
    return True


def _read_async_pf_ack(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return None if _feature_denied(vcpu, abi.KVM_FEATURE_ASYNC_PF_INT, host) else 0


def _write_async_pf_ack(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_ASYNC_PF_INT, host):
        return False
    async_pf.acknowledge(vcpu, data)
    return True


def _write_steal_time(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_STEAL_TIME, host) or data & abi.KVM_STEAL_RESERVED_MASK:
        return False
    steal_time.set_msr(vcpu, data, host=host)
    return True


def _write_pv_eoi(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_PV_EOI, host):
        return False
    if vcpu.pv_eoi is None:  # the local APIC is userspace's: no EOI of it can be saved
        vcpu.msr_values[index] = data
        return True
    return vcpu.pv_eoi.set_msr(data)


def _read_pv_eoi(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if _feature_denied(vcpu, abi.KVM_FEATURE_PV_EOI, host):
        return None
    return vcpu.pv_eoi.msr if vcpu.pv_eoi is not None else vcpu.msr_values.get(index, 0)


def _write_poll_control(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if _feature_denied(vcpu, abi.KVM_FEATURE_POLL_CONTROL, host) or data & ~1:
        return False
    vcpu.msr_values[index] = data
    return True


#: Reader and writer of every paravirtual MSR.
MSRS: Final[dict[int, tuple[Reader, Writer]]] = {
    abi.MSR_KVM_WALL_CLOCK: (
        _read_wall_clock(abi.KVM_FEATURE_CLOCKSOURCE),
        _write_wall_clock(abi.KVM_FEATURE_CLOCKSOURCE),
    ),
    abi.MSR_KVM_WALL_CLOCK_NEW: (
        _read_wall_clock(abi.KVM_FEATURE_CLOCKSOURCE2),
        _write_wall_clock(abi.KVM_FEATURE_CLOCKSOURCE2),
    ),
    abi.MSR_KVM_SYSTEM_TIME: (
        _reader(abi.KVM_FEATURE_CLOCKSOURCE, abi.MSR_KVM_SYSTEM_TIME_NEW),
        _write_system_time(abi.KVM_FEATURE_CLOCKSOURCE),
    ),
    abi.MSR_KVM_SYSTEM_TIME_NEW: (
        _reader(abi.KVM_FEATURE_CLOCKSOURCE2),
        _write_system_time(abi.KVM_FEATURE_CLOCKSOURCE2),
    ),
    abi.MSR_KVM_ASYNC_PF_EN: (_reader(abi.KVM_FEATURE_ASYNC_PF), _write_async_pf_en),
    abi.MSR_KVM_ASYNC_PF_INT: (_reader(abi.KVM_FEATURE_ASYNC_PF_INT), _write_async_pf_int),
    abi.MSR_KVM_ASYNC_PF_ACK: (_read_async_pf_ack, _write_async_pf_ack),
    abi.MSR_KVM_STEAL_TIME: (_reader(abi.KVM_FEATURE_STEAL_TIME), _write_steal_time),
    abi.MSR_KVM_PV_EOI_EN: (_read_pv_eoi, _write_pv_eoi),
    abi.MSR_KVM_POLL_CONTROL: (_reader(abi.KVM_FEATURE_POLL_CONTROL, default=1), _write_poll_control),
}
