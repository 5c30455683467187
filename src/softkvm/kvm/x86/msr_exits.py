# SPDX-License-Identifier: Apache-2.0
"""MSR accesses that KVM leaves to userspace (KVM API 7.21 KVM_CAP_X86_USER_SPACE_MSR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import io, svm
from softkvm.kvm.x86.exceptions import inject_gp

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_state import VcpuState as Vcpu

# kvm_run.msr
_ERROR_Q: Final = 32 // 8  # the error and seven bytes of padding
_ERROR: Final = 32  # b
_REASON: Final = 40 // 4  # d
_INDEX: Final = 44 // 4  # d
_DATA: Final = 48 // 8  # q


def msr_failed(vcpu: Vcpu, index: int, data: int, *, write: bool) -> int:
    """An MSR access that KVM refuses: #GP, or an exit if userspace asked for them. Returns 1 or 0."""
    if not vcpu.vm.user_space_msr_mask & abi.KVM_MSR_EXIT_REASON_UNKNOWN:
        inject_gp(vcpu)
        return 1
    vcpu.run_d[io.RUN_EXIT_REASON] = abi.KVM_EXIT_X86_WRMSR if write else abi.KVM_EXIT_X86_RDMSR
    vcpu.run_q[_ERROR_Q] = 0
    vcpu.run_d[_REASON] = abi.KVM_MSR_EXIT_REASON_UNKNOWN
    vcpu.run_d[_INDEX] = index
    vcpu.run_q[_DATA] = data
    vcpu.complete_userspace_io = _complete_wrmsr if write else _complete_rdmsr
    return 0


def _complete_rdmsr(vcpu: Vcpu) -> int:
    """After KVM_EXIT_X86_RDMSR: userspace's value, or #GP."""
    if vcpu.run_b[_ERROR]:
        inject_gp(vcpu)
        return 1
    value = vcpu.run_q[_DATA]
    vcpu.gpr[0] = value & 0xFFFF_FFFF
    vcpu.gpr[2] = value >> 32
    return svm.skip_emulated_instruction(vcpu)


def _complete_wrmsr(vcpu: Vcpu) -> int:
    """After KVM_EXIT_X86_WRMSR: done, or #GP."""
    if vcpu.run_b[_ERROR]:
        inject_gp(vcpu)
        return 1
    return svm.skip_emulated_instruction(vcpu)
