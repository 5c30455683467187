# SPDX-License-Identifier: Apache-2.0
"""MSR accesses by the guest: the filter, and what is left to userspace (KVM API 7.21 KVM_CAP_X86_USER_SPACE_MSR)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page
from softkvm.kvm.x86 import msrs
from softkvm.kvm.x86.exceptions import inject_gp

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

    Skip = Callable[[Vcpu], int]


def read_msr(vcpu: Vcpu, index: int) -> int | None:
    """RDMSR by the guest: the value, None if it is refused."""
    if vcpu.msr_filter is not None and not vcpu.msr_filter.allows(index, abi.KVM_MSR_FILTER_READ):
        return None
    return msrs.get_msr(vcpu, index, host=False)


def write_msr(vcpu: Vcpu, index: int, data: int) -> bool:
    """WRMSR by the guest; False if it is refused."""
    if vcpu.msr_filter is not None and not vcpu.msr_filter.allows(index, abi.KVM_MSR_FILTER_WRITE):
        return False
    return msrs.set_msr(vcpu, index, data, host=False)


def exit_msr(vcpu: Vcpu, index: int, data: int, skip: Skip, *, write: bool) -> bool:
    """Describe a refused access to userspace; False if it didn't ask for such exits: then it is #GP.

    ``skip`` goes past the instruction when userspace has answered.
    """
    reason = _reason(vcpu, index, write=write)
    if not vcpu.vm.user_space_msr_mask & reason:
        return False
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_X86_WRMSR if write else abi.KVM_EXIT_X86_RDMSR
    vcpu.run_q[x86_run_page.MSR_ERROR_Q] = 0
    vcpu.run_d[x86_run_page.MSR_REASON_D] = reason
    vcpu.run_d[x86_run_page.MSR_INDEX_D] = index
    vcpu.run_q[x86_run_page.MSR_DATA_Q] = data
    vcpu.complete_userspace_io = partial(_complete_wrmsr if write else _complete_rdmsr, skip=skip)
    return True


def _reason(vcpu: Vcpu, index: int, *, write: bool) -> int:
    """Return why an access was refused, as a KVM_MSR_EXIT_REASON_* bit."""
    access = abi.KVM_MSR_FILTER_WRITE if write else abi.KVM_MSR_FILTER_READ
    if vcpu.msr_filter is not None and not vcpu.msr_filter.allows(index, access):
        return abi.KVM_MSR_EXIT_REASON_FILTER
    known = msrs.is_known(vcpu, index) or (write and index == vcpu.vm.xen.config.msr)
    return abi.KVM_MSR_EXIT_REASON_INVAL if known else abi.KVM_MSR_EXIT_REASON_UNKNOWN


def _complete_rdmsr(vcpu: Vcpu, skip: Skip) -> int:
    """After KVM_EXIT_X86_RDMSR: userspace's value, or #GP."""
    if vcpu.run_b[x86_run_page.MSR_ERROR_B]:
        inject_gp(vcpu)
        return 1
    value = vcpu.run_q[x86_run_page.MSR_DATA_Q]
    vcpu.gpr[0] = value & 0xFFFF_FFFF
    vcpu.gpr[2] = value >> 32
    return skip(vcpu)


def _complete_wrmsr(vcpu: Vcpu, skip: Skip) -> int:
    """After KVM_EXIT_X86_WRMSR: done, or #GP."""
    if vcpu.run_b[x86_run_page.MSR_ERROR_B]:
        inject_gp(vcpu)
        return 1
    return skip(vcpu)
