# SPDX-License-Identifier: Apache-2.0
"""HVCALL_SEND_IPI and HVCALL_SEND_IPI_EX: a fixed interrupt to many virtual processors (TLFS, 10.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.hyperv.call import Call
from softkvm.kvm.x86.hyperv.vp_set import VpSet
from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_FIXED

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U32: Final = (1 << 32) - 1
_INVALID: Final = abi.HV_STATUS_INVALID_HYPERCALL_INPUT


def send_ipi(vcpu: Vcpu, call: Call) -> int:
    """Either of the two calls: the vector, then a mask of 64 processors or a set of them."""
    if vcpu.apic is None:
        return _INVALID
    extended = call.code == abi.HVCALL_SEND_IPI_EX
    words = call.words(vcpu, 0, 3 if extended else 2)
    if words is None or (call.fast and not extended and words[0] >> 32):
        return _INVALID
    vector = words[0] & _U32
    targets: Sequence[Vcpu]
    if not extended:
        targets = VpSet({0: words[1]}).members(vcpu.vm)
    else:
        kind, valid_banks = words[1:]
        if call.var_count != valid_banks.bit_count():
            return _INVALID
        if kind == abi.HV_GENERIC_SET_ALL:
            targets = vcpu.vm.vcpus
        else:
            if not valid_banks:
                return abi.HV_STATUS_SUCCESS
            named = VpSet.read(vcpu, call, 3, valid_banks)
            if named is None:
                return _INVALID
            targets = named.members(vcpu.vm)
    if not abi.HV_IPI_LOW_VECTOR <= vector <= abi.HV_IPI_HIGH_VECTOR:
        return _INVALID
    for target in targets:
        if target.apic is not None:  # one whose APIC is disabled doesn't get it
            target.apic.accept_irq(APIC_DM_FIXED, vector, sender=vcpu)  # type: ignore[arg-type]
    return abi.HV_STATUS_SUCCESS
