# SPDX-License-Identifier: Apache-2.0
"""Flushes of other processors' TLBs (``kvm_make_vcpus_request_mask`` with KVM_REQ_TLB_FLUSH)."""

from __future__ import annotations

import time
from collections.abc import Iterable

from softkvm.kvm.requests import KVM_REQ_TLB_FLUSH
from softkvm.kvm.state import IN_GUEST_MODE, VcpuState


def flush_tlbs(vcpus: Iterable[VcpuState]) -> bool:
    """Make sure that none of these uses a translation made before; returns when that is so: whether any was waited for.

    A vCPU outside of guest mode flushes before its next entry; one inside is kicked and waited for.
    """
    waiting = []
    for vcpu in vcpus:
        seen = vcpu.stat_tlb_flush  # before the request: one that is answered at once must not be waited for
        vcpu.make_request(KVM_REQ_TLB_FLUSH)
        if vcpu.mode == IN_GUEST_MODE:
            vcpu.cpu.kick()
            waiting.append((vcpu, seen))
    for vcpu, seen in waiting:
        # A vCPU that left guest mode meanwhile has flushed, or will before it enters again.
        while vcpu.mode == IN_GUEST_MODE and vcpu.stat_tlb_flush == seen:
            time.sleep(0)
    return bool(waiting)
