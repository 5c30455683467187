# SPDX-License-Identifier: Apache-2.0
"""The synthetic debugger: registers by which a guest's kernel debugger exchanges packets with userspace.

The TLFS no longer describes it; its registers and their meaning are KVM's (KVM API, KVM_EXIT_HYPERV_SYNDBG).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.x86.run_page import HYPERV_SYNDBG_MSR_D, HYPERV_SYNDBG_STATUS_Q
from softkvm.kvm.x86.hyperv.vp import vp_of
from softkvm.kvm.x86.requests import KVM_REQ_HV_EXIT

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

MSRS: Final = (
    abi.HV_X64_MSR_SYNDBG_CONTROL,
    abi.HV_X64_MSR_SYNDBG_STATUS,
    abi.HV_X64_MSR_SYNDBG_SEND_BUFFER,
    abi.HV_X64_MSR_SYNDBG_RECV_BUFFER,
    abi.HV_X64_MSR_SYNDBG_PENDING_BUFFER,
    abi.HV_X64_MSR_SYNDBG_OPTIONS,
)

#: Those whose writes are for userspace.
_TOLD: Final = (abi.HV_X64_MSR_SYNDBG_CONTROL, abi.HV_X64_MSR_SYNDBG_PENDING_BUFFER)


def read(vcpu: Vcpu, index: int, host: bool) -> int | None:
    """Read a register; None stands for #GP: the guest has no debugger."""
    if not host and not vp_of(vcpu).features.has_syndbg:
        return None
    return vcpu.vm.hyperv.syndbg.get(index, 0)


def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Write a register; False stands for #GP."""
    vp = vp_of(vcpu)
    if not host and not vp.features.has_syndbg:
        return False
    registers = vcpu.vm.hyperv.syndbg
    registers[index] = data
    if not host and index in _TOLD:
        vp.exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_SYNDBG)
        vp.exit.u.syndbg = abi.kvm_hyperv_exit_syndbg(
            msr=index,
            control=registers.get(abi.HV_X64_MSR_SYNDBG_CONTROL, 0),
            send_page=registers.get(abi.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0),
            recv_page=registers.get(abi.HV_X64_MSR_SYNDBG_RECV_BUFFER, 0),
            pending_page=registers.get(abi.HV_X64_MSR_SYNDBG_PENDING_BUFFER, 0),
        )
        vcpu.complete_userspace_io = _complete
        vcpu.make_request(KVM_REQ_HV_EXIT)
    return True


def _complete(vcpu: Vcpu) -> int:
    """After the exit for the control register: userspace's status."""
    if vcpu.run_d[HYPERV_SYNDBG_MSR_D] == abi.HV_X64_MSR_SYNDBG_CONTROL:
        vcpu.vm.hyperv.syndbg[abi.HV_X64_MSR_SYNDBG_STATUS] = vcpu.run_q[HYPERV_SYNDBG_STATUS_Q]
    return 1
