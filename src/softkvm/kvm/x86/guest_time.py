# SPDX-License-Identifier: Apache-2.0
"""What a guest is told of time, whichever interfaces it has: its clocks, and how long a vCPU waited for a processor.

KVM's own clock, Xen's and Hyper-V's reference time are written together (``kvm_guest_time_update``). Waiting is KVM's
steal time (``record_steal_time``) or, in its place, Xen's runstate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.x86.hyperv import clock as hyperv_clock
from softkvm.kvm.x86.paravirt import kvmclock, steal_time
from softkvm.kvm.x86.requests import KVM_REQ_EVENT, KVM_REQ_STEAL_UPDATE
from softkvm.kvm.x86.xen import clock as xen_clock
from softkvm.kvm.x86.xen import evtchn, runstate

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def update_clocks(vcpu: Vcpu) -> None:
    """Write the guest's clock structures, and the page of Hyper-V's reference time, if it has them."""
    kvmclock.update_guest_time(vcpu)
    xen_clock.update(vcpu)
    if vcpu.vm.hyperv.tsc_page_outdated:
        hyperv_clock.update_tsc_page(vcpu)


def check_waiting(vcpu: Vcpu) -> None:
    """KVM_RUN has begun, or a halt is over: steal time or Xen's runstate may have to be told.

    And a guest of Xen's may have what its memory says, which anybody has written.
    """
    if vcpu.vm.xen.config.msr:
        vcpu.make_request(KVM_REQ_STEAL_UPDATE | KVM_REQ_EVENT)
    else:
        steal_time.check(vcpu)


def record_waiting(vcpu: Vcpu) -> None:
    """Write steal time, or Xen's runstate in its place."""
    if vcpu.vm.xen.config.msr:
        runstate.update(vcpu, abi.RUNSTATE_running)
        evtchn.inject_pending_events(vcpu)
    else:
        steal_time.record(vcpu)
