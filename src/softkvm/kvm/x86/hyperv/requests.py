# SPDX-License-Identifier: Apache-2.0
"""What a guest of Hyper-V's has asked for by an MSR, and happens before its next instruction: timers, exits."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page
from softkvm.kvm.x86.hyperv import stimer
from softkvm.kvm.x86.requests import (
    KVM_REQ_EVENT,
    KVM_REQ_HV_CRASH,
    KVM_REQ_HV_EXIT,
    KVM_REQ_HV_RESET,
    KVM_REQ_HV_STIMER,
    KVM_REQ_NMI,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

REQUESTS: Final = KVM_REQ_HV_STIMER | KVM_REQ_HV_EXIT | KVM_REQ_HV_CRASH | KVM_REQ_HV_RESET
#: What is looked at after these, and is still to be done behind an exit.
_LATER: Final = KVM_REQ_EVENT | KVM_REQ_NMI

_EXITS: Final = (
    (KVM_REQ_HV_CRASH, abi.KVM_SYSTEM_EVENT_CRASH),
    (KVM_REQ_HV_RESET, abi.KVM_SYSTEM_EVENT_RESET),
    (KVM_REQ_HV_EXIT, None),
)


def handle(vcpu: Vcpu, requests: int) -> bool:
    """Act on the requests among *requests*, which are taken already; False to leave for userspace."""
    for request, event in _EXITS:
        if requests & request:
            if event is None:
                _exit_hyperv(vcpu)
            else:
                _exit_system_event(vcpu, event)
            vcpu.make_request(requests & (REQUESTS & ~request | _LATER))
            return False
    stimer.process(vcpu)
    return True


def _exit_system_event(vcpu: Vcpu, event: int) -> None:
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_SYSTEM_EVENT
    vcpu.run_d[x86_run_page.SYSTEM_EVENT_TYPE_D] = event
    vcpu.run_d[x86_run_page.SYSTEM_EVENT_NDATA_D] = 0


def _exit_hyperv(vcpu: Vcpu) -> None:
    assert vcpu.hyperv is not None
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_HYPERV
    vcpu.run_b[run_page.EXIT : run_page.EXIT + ctypes.sizeof(abi.kvm_hyperv_exit)] = bytes(vcpu.hyperv.exit)
