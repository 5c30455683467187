# SPDX-License-Identifier: Apache-2.0
"""HLT (``kvm_emulate_halt``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.abi import run_page

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def halt(vcpu: Vcpu) -> int:
    """HLT has been executed: block, or leave for userspace if the chips are there. Returns 1 or 0."""
    vcpu.stat_halt_exits += 1
    if vcpu.apic is not None:
        vcpu.mp_state = abi.KVM_MP_STATE_HALTED
        return 1
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_HLT
    return 0
