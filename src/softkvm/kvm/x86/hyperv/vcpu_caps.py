# SPDX-License-Identifier: Apache-2.0
"""KVM_ENABLE_CAP on a vCPU: Hyper-V's capabilities (KVM API 6.8 and 6.11)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.hyperv.vp import vp_of

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def enable_cap(vcpu: Vcpu, cap: int, value: int) -> bool:
    """Enable *cap* with its first argument; False for what is none of Hyper-V's."""
    enable = _ENABLE.get(cap)
    if enable is None:
        return False
    enable(vcpu, value)
    return True


def _synic(vcpu: Vcpu, value: int) -> None:
    _activate(vcpu, dont_zero_pages=False)


def _synic2(vcpu: Vcpu, value: int) -> None:
    if value:
        raise kvm_error(errno.EINVAL, f"args[0]={value}, expected 0")
    _activate(vcpu, dont_zero_pages=True)


def _activate(vcpu: Vcpu, *, dont_zero_pages: bool) -> None:
    if vcpu.apic is None:
        raise kvm_error(errno.EINVAL, "there is no in-kernel local APIC for the SynIC to interrupt")
    vp_of(vcpu).synic.activate(dont_zero_pages=dont_zero_pages)


def _enforce_cpuid(vcpu: Vcpu, value: int) -> None:
    if value or vcpu.hyperv is not None:
        vp_of(vcpu).enforce_cpuid = bool(value)


_ENABLE: Final[dict[int, Callable[[Vcpu, int], None]]] = {
    abi.KVM_CAP_HYPERV_SYNIC: _synic,
    abi.KVM_CAP_HYPERV_SYNIC2: _synic2,
    abi.KVM_CAP_HYPERV_ENFORCE_CPUID: _enforce_cpuid,
}
