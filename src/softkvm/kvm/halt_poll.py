# SPDX-License-Identifier: Apache-2.0
"""Halt polling: how long a vCPU waits awake in HLT before its thread sleeps (Documentation/virt/kvm/halt-polling.rst).

To wake a sleeping thread costs more than most of what it then has to do. So a vCPU that halts waits for a moment in the
silicon first, without the interpreter's lock. The moment adapts: it grows while wake-ups come soon after its end, and
shrinks when they come too late for any waiting to pay.

It is off unless ``Params.halt_poll_ns`` or KVM_CAP_HALT_POLL asks for it. The kernel stops polling as soon as another
task wants the processor, which a process cannot see: with one busy process beside it on two processors, an interrupt to
a halted vCPU and one back took 250 us with polling (200 us at most) and 77 us without.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from softkvm.kvm.state import BLOCKING

if TYPE_CHECKING:
    from softkvm.kvm.params import Params
    from softkvm.kvm.state import VcpuState as Vcpu

_HOST_CPUS: Final = len(os.sched_getaffinity(0))


def interval(vcpu: Vcpu) -> int:
    """Return for how many nanoseconds *vcpu* waits awake now."""
    vcpu.halt_poll_ns = ns = min(vcpu.halt_poll_ns, _limit(vcpu))
    return ns if ns and _processor_to_spare(vcpu) else 0


def _limit(vcpu: Vcpu) -> int:
    """Return the longest wait: KVM_CAP_HALT_POLL's for this VM, or the module parameter."""
    limit = vcpu.vm.max_halt_poll_ns
    return vcpu.vm.params.halt_poll_ns if limit is None else limit


def _processor_to_spare(vcpu: Vcpu) -> bool:
    """Tell whether the host's processor that a wait keeps busy is wanted by no other vCPU of the VM."""
    busy = sum(other.mode != BLOCKING or other.halt_polling for other in vcpu.vm.vcpus if other is not vcpu)
    return busy < _HOST_CPUS > 1


def adapt(vcpu: Vcpu, halt_ns: int) -> None:
    """Grow or shrink the wait after a halt that took *halt_ns*, polling and sleep together."""
    params, limit, ns = vcpu.vm.params, _limit(vcpu), vcpu.halt_poll_ns
    if not limit:
        vcpu.halt_poll_ns = 0
    elif halt_ns <= ns:
        pass  # the wait was long enough
    elif halt_ns > limit:
        vcpu.halt_poll_ns = shrunk(params, ns)
    elif halt_ns < limit and ns < limit:
        vcpu.halt_poll_ns = min(grown(params, ns), limit)


def grown(params: Params, ns: int) -> int:
    """Return the next longer wait after *ns*."""
    return max(ns * params.halt_poll_ns_grow, params.halt_poll_ns_grow_start) if params.halt_poll_ns_grow else ns


def shrunk(params: Params, ns: int) -> int:
    """Return the next shorter wait after *ns*; below the first step of growing there is none."""
    if not params.halt_poll_ns_shrink:
        return 0
    ns //= params.halt_poll_ns_shrink
    return ns if ns >= params.halt_poll_ns_grow_start else 0
