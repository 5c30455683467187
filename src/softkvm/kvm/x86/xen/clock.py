# SPDX-License-Identifier: Apache-2.0
"""A guest's clock where Xen has it: in ``vcpu_info``, in an area of its own, and its scale in CPUID."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import tsc
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.xen.layout import VCPU_INFO_TIME

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: Offset of the leaf that tells about time.
_TIME_LEAF: Final = 3


def update(vcpu: Vcpu) -> None:
    """Write the vCPU's time structures (KVM_REQ_CLOCK_UPDATE)."""
    xen = vcpu.xen
    unstable = vcpu.vm.xen.config.flags & abi.KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE
    stable = 0 if unstable else abi.PVCLOCK_TSC_STABLE_BIT
    if xen.vcpu_info is not None:
        kvmclock.setup_guest_pvclock(vcpu, xen.vcpu_info, VCPU_INFO_TIME, stable=stable)
    if xen.time_info is not None:
        kvmclock.setup_guest_pvclock(vcpu, xen.time_info, stable=stable)
    update_tsc_info(vcpu)


def update_tsc_info(vcpu: Vcpu) -> None:
    """Bring Xen's leaf of time up to date, if the guest has it: the clock's multiplier and shift, the TSC's kHz."""
    base = vcpu.cpuid.xen_base
    if not base or vcpu.cpuid.first(base)[0] < base + _TIME_LEAF:
        return
    shift, multiplier = kvmclock.get_time_scale(tsc.frequency(vcpu))
    vcpu.cpuid.set_xen_time(base + _TIME_LEAF, multiplier, shift & 0xFFFF_FFFF, vcpu.tsc_khz)
