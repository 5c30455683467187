# SPDX-License-Identifier: Apache-2.0
"""A small guest with Xen's interfaces on either KVM: the accesses and hypercalls of :class:`HypervGuest`, and Xen's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.support.conformance import Guest
from tests.support.hyperv import HypervGuest

from softkvm import abi

HYPERCALL_MSR = 0x4000_0200
#: Behind what :class:`HypervGuest` has.
PAGE = 0x28000
VMMCALL = "0f01d9"


class XenGuest(HypervGuest):
    """A VM with in-kernel chips whose hypercalls are Xen's, if *flags* say so.

    *needs* are KVM_XEN_HVM_CONFIG_* flags that the capability has to have.
    """

    def __init__(
        self,
        make: Callable[..., Guest],
        *,
        needs: int = abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
        flags: int = abi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
        leaves: Mapping[int, Mapping[str, int]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(make, synic=False, leaves=leaves, **options)
        if needs & ~self.guest.vm.check_extension(abi.KVM_CAP_XEN_HVM):
            pytest.skip("this KVM hasn't all of Xen's interfaces")
        self.config(flags=flags)

    def config(self, *, msr: int = HYPERCALL_MSR, **fields: int) -> None:
        """KVM_XEN_HVM_CONFIG."""
        self.guest.vm.xen_hvm_config(abi.kvm_xen_hvm_config(msr=msr, **fields))

    def call(self, number: int, *params: int, instruction: str = VMMCALL, vcpu: int = 0) -> int:
        """A hypercall in 64-bit mode that KVM carries out; the result, signed. Raises ``Left`` for userspace's."""
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        registers = {name: value & (1 << 64) - 1 for name, value in zip(names, params, strict=False)}
        rax = int(self.execute(instruction, vcpu=vcpu, rax=number, **registers).rax)
        return rax - (rax >> 63 << 64)
