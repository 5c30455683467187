# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's interfaces of one vCPU, a *virtual processor* (``struct kvm_vcpu_hv``), from the moment it has any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.x86.hyperv.cpuid import Features, has_hyperv
from softkvm.kvm.x86.hyperv.stimer import Stimer
from softkvm.kvm.x86.hyperv.synic import Synic

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


class VirtualProcessor:
    """One vCPU's."""

    def __init__(self, vcpu: Vcpu) -> None:
        #: How guests number it: at first as KVM has, in the order of creation.
        self.index = vcpu_index(vcpu)
        self.features = Features()
        #: Only what the guest's CPUID has is there for it (KVM_CAP_HYPERV_ENFORCE_CPUID).
        self.enforce_cpuid = False
        self.assist_page = 0
        self.runtime_offset = 0
        self.synic = Synic(vcpu)
        self.synic.on_ack = self._slot_acked
        self.stimers = tuple(Stimer(vcpu, index) for index in range(abi.HV_SYNIC_STIMER_COUNT))
        #: Bitmap of the timers that have to be looked at; under the vCPU's ``request_lock``.
        self.stimers_pending = 0
        #: What KVM_REQ_HV_EXIT tells userspace.
        self.exit = abi.kvm_hyperv_exit()

    def _slot_acked(self, sint: int) -> None:
        """A message slot may be free: timers whose messages wait for it try again."""
        for timer in self.stimers:
            waits = timer.message_pending and timer.config & abi.HV_STIMER_ENABLE
            if waits and not timer.config & abi.HV_STIMER_DIRECT_MODE and timer.sint == sint:
                timer.mark_pending()


def vcpu_index(vcpu: Vcpu) -> int:
    """Return a vCPU's place in the order of creation."""
    return next((at for at, other in enumerate(vcpu.vm.vcpus) if other is vcpu), len(vcpu.vm.vcpus))


def vp_of(vcpu: Vcpu) -> VirtualProcessor:
    """Return the vCPU's virtual processor, which comes into being with the first use of it."""
    if vcpu.hyperv is None:
        vcpu.hyperv = VirtualProcessor(vcpu)
    return vcpu.hyperv


def cpuid_changed(vcpu: Vcpu) -> None:
    """The vCPU has a CPUID table: Hyper-V's interface is in it or not."""
    vcpu.hyperv_enabled = has_hyperv(vcpu.cpuid)
    if vcpu.hyperv_enabled or vcpu.hyperv is not None:
        vp_of(vcpu).features = Features.of(vcpu.cpuid)
    hide_invariant_tsc(vcpu)


def hide_invariant_tsc(vcpu: Vcpu) -> None:
    """CPUID hides the invariant TSC while the guest, which may ask for it, has not (TSC_INVARIANT_CONTROL)."""
    vp = vcpu.hyperv
    may_ask = vp is not None and bool(vp.features.features_eax & abi.HV_ACCESS_TSC_INVARIANT)
    vcpu.cpuid.hide_invariant_tsc(may_ask and not vcpu.vm.hyperv.invtsc_control & abi.HV_EXPOSE_INVARIANT_TSC)
