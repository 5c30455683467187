# SPDX-License-Identifier: Apache-2.0
"""Machine checks by userspace: KVM_X86_SETUP_MCE and KVM_X86_SET_MCE (KVM API 4.104 to 4.106; SDM vol. 3, chapter 17).

The registers themselves are rows of :mod:`softkvm.kvm.x86.msrs`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.exceptions import queue_exception
from softkvm.kvm.x86.msr_index import (
    KVM_MAX_MCE_BANKS,
    MCG_CTL_P,
    MSR_IA32_MC0_CTL,
    MSR_IA32_MCG_CTL,
    MSR_IA32_MCG_STATUS,
)
from softkvm.kvm.x86.requests import KVM_REQ_TRIPLE_FAULT

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

MCG_SER_P: Final = 1 << 24
MCG_STATUS_MCIP: Final = 1 << 2
MCI_STATUS_VAL: Final = 1 << 63
MCI_STATUS_OVER: Final = 1 << 62
MCI_STATUS_UC: Final = 1 << 61
MCI_STATUS_PCC: Final = 1 << 57
MCI_STATUS_S: Final = 1 << 56
MCI_STATUS_AR: Final = 1 << 55
_NEEDS_ACTION: Final = MCI_STATUS_PCC | MCI_STATUS_S | MCI_STATUS_AR

#: What IA32_MCG_CAP may have besides the number of banks and of extended registers.
SUPPORTED_MCE_CAP: Final = MCG_CTL_P | MCG_SER_P
_BANKS: Final = 0xFF
_EXTENDED_REGISTERS: Final = 0xFF_0000
BANKS: Final = Size("banks in mcg_cap", KVM_MAX_MCE_BANKS, errno.EINVAL, element=32, least=1, where=__name__)

_ALL: Final = (1 << 64) - 1


def setup_mce(vcpu: Vcpu, mcg_cap: int) -> None:
    """Set IA32_MCG_CAP, and the control registers to all ones; EINVAL for what isn't supported."""
    banks = mcg_cap & _BANKS
    BANKS.check(banks)
    if mcg_cap & ~(SUPPORTED_MCE_CAP | _BANKS | _EXTENDED_REGISTERS):
        raise kvm_error(errno.EINVAL, f"mcg_cap={mcg_cap:#x}, expected known bits")
    vcpu.mcg_cap = mcg_cap
    if mcg_cap & MCG_CTL_P:
        vcpu.msr_values[MSR_IA32_MCG_CTL] = _ALL
    for bank in range(banks):
        vcpu.msr_values[MSR_IA32_MC0_CTL + 4 * bank] = _ALL


def set_mce(vcpu: Vcpu, event: abi.kvm_x86_mce) -> None:
    """Report an error in a bank; EINVAL for a bank that isn't there or no valid status.

    Corrected errors, and uncorrected ones that need no action (UCNA), are only recorded. Another one is #MC, unless the
    control registers disable it; without CR4.MCE, or during the handling of an earlier one, the guest shuts down.
    """
    if event.bank >= vcpu.mcg_cap & _BANKS or not event.status & MCI_STATUS_VAL:
        raise kvm_error(errno.EINVAL, f"bank={event.bank} status={event.status:#x}, expected a bank and a valid status")
    values = vcpu.msr_values
    control = MSR_IA32_MC0_CTL + 4 * event.bank
    known = values.get(control + 1, 0)
    overflow = MCI_STATUS_OVER if known & MCI_STATUS_VAL else 0
    if not event.status & MCI_STATUS_UC:
        if known & MCI_STATUS_VAL and known & MCI_STATUS_UC:
            values[control + 1] = known | MCI_STATUS_OVER  # what is there is worse
        else:
            _record(vcpu, control, event, overflow)
    elif not event.mcg_status and not event.status & _NEEDS_ACTION:
        _record(vcpu, control, event, 0)
    elif _reports(vcpu, control):
        if values.get(MSR_IA32_MCG_STATUS, 0) & MCG_STATUS_MCIP or not vcpu.cr4 & abi.X86_CR4_MCE:
            vcpu.make_request(KVM_REQ_TRIPLE_FAULT)
            return
        _record(vcpu, control, event, overflow)
        values[MSR_IA32_MCG_STATUS] = event.mcg_status
        queue_exception(vcpu, abi.MC_VECTOR)


def _reports(vcpu: Vcpu, control: int) -> bool:
    """Tell whether the control registers enable the errors of a bank."""
    values = vcpu.msr_values
    if vcpu.mcg_cap & MCG_CTL_P and values.get(MSR_IA32_MCG_CTL, 0) != _ALL:
        return False
    return values.get(control, 0) == _ALL


def _record(vcpu: Vcpu, control: int, event: abi.kvm_x86_mce, overflow: int) -> None:
    vcpu.msr_values[control + 1] = event.status | overflow
    vcpu.msr_values[control + 2] = event.addr
    vcpu.msr_values[control + 3] = event.misc
