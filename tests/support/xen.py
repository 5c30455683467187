# SPDX-License-Identifier: Apache-2.0
"""A small guest with Xen's interfaces on either KVM: the accesses and hypercalls of :class:`HypervGuest`, and Xen's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.support.conformance import Guest
from tests.support.hyperv import HANDLERS, HypervGuest

from softkvm import abi

HYPERCALL_MSR = 0x4000_0200
#: Behind what :class:`HypervGuest` has.
PAGE = 0x28000
SHARED_INFO, VCPU_INFO, TIME_INFO, RUNSTATE = 0x30000, 0x31000, 0x32000, 0x33000
VMMCALL = "0f01d9"
PRIO_2LEVEL = abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
ALL = (1 << 9) - 1
#: Offsets in the 64-bit guest's structures.
PENDING, MASK, PENDING_SEL = 0x800, 0xA00, 8
_ACKNOWLEDGE = bytes.fromhex("c60425") + VCPU_INFO.to_bytes(4, "little") + bytes.fromhex("00 e6ea 48cf")


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

    # --- attributes ------------------------------------------------------------------------------------

    def set_hvm(self, type: int, **fields: int) -> None:
        """KVM_XEN_HVM_SET_ATTR; the names of nested fields have ``__`` between."""
        self.guest.vm.xen_hvm_set_attr(_filled(abi.kvm_xen_hvm_attr(type=type), fields))

    def get_hvm(self, type: int) -> abi.kvm_xen_hvm_attr_u:
        """KVM_XEN_HVM_GET_ATTR."""
        attr = self.guest.vm.xen_hvm_get_attr(type)
        assert attr.type == type
        return attr.u

    def set_vcpu(self, type: int, *, vcpu: int = 0, **fields: int) -> None:
        """KVM_XEN_VCPU_SET_ATTR."""
        self.guest.vcpus[vcpu].xen_vcpu_set_attr(_filled(abi.kvm_xen_vcpu_attr(type=type), fields))

    def get_vcpu(self, type: int, *, vcpu: int = 0) -> abi.kvm_xen_vcpu_attr_u:
        """KVM_XEN_VCPU_GET_ATTR."""
        attr = self.guest.vcpus[vcpu].xen_vcpu_get_attr(type)
        assert attr.type == type
        return attr.u

    # --- events ----------------------------------------------------------------------------------------

    def share(self, *, long_mode: int = 1, vector: int = 0) -> None:
        """Have the shared page and each vCPU's ``vcpu_info``; with *vector* upcalls, which the guest acknowledges."""
        self.set_hvm(abi.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=long_mode)
        self.set_hvm(abi.KVM_XEN_ATTR_TYPE_SHARED_INFO, shared_info__gfn=SHARED_INFO >> 12)
        for number in range(len(self.guest.vcpus)):
            self.set_vcpu(abi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, vcpu=number, gpa=VCPU_INFO + 64 * number)
        if vector:
            self.handler(vector, _ACKNOWLEDGE)
            self.set_hvm(abi.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, vector=vector)

    def send(self, port: int, *, vcpu: int = 0, priority: int = PRIO_2LEVEL) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND."""
        event = abi.kvm_irq_routing_xen_evtchn(port=port, vcpu=vcpu, priority=priority)
        self.guest.vm.xen_hvm_evtchn_send(event)

    def route(self, gsi: int, port: int, *, vcpu: int = 0, priority: int = PRIO_2LEVEL) -> None:
        """KVM_SET_GSI_ROUTING of one line to an event channel."""
        entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_XEN_EVTCHN)
        target = entry.u.xen_evtchn
        target.port, target.vcpu, target.priority = port, vcpu, priority
        self.guest.vm.set_gsi_routing([entry])

    def bits(self, offset: int, size: int = 512, *, base: int = SHARED_INFO) -> list[int]:
        """The numbers of the bits that are set in a part of the shared page."""
        value = int.from_bytes(self.guest.memory[base + offset : base + offset + size], "little")
        return [bit for bit in range(8 * size) if value >> bit & 1]

    @property
    def pending(self) -> list[int]:
        """The ports that are pending, as a 64-bit guest sees them."""
        return self.bits(PENDING)

    def info(self, vcpu: int = 0) -> tuple[int, list[int]]:
        """``evtchn_upcall_pending``, and the words of ``evtchn_pending_sel``."""
        at = VCPU_INFO + 64 * vcpu
        return self.guest.memory[at], self.bits(PENDING_SEL, 8, base=at)

    def clear(self) -> None:
        """Have nothing be pending or masked."""
        for offset in (PENDING, MASK):
            self.guest.write(SHARED_INFO + offset, bytes(512))
        for vcpu in range(len(self.guest.vcpus)):
            self.guest.write(VCPU_INFO + 64 * vcpu, bytes(16))

    def acknowledges(self, regs: abi.kvm_regs, vector: int) -> bool:
        """Tell whether the guest stands in its upcall's handler."""
        return HANDLERS + 16 * vector < regs.rip < HANDLERS + 16 * vector + 16


def _filled(attr: Any, fields: Mapping[str, int]) -> Any:
    for name, value in fields.items():
        *path, last = name.split("__")
        at = attr.u
        for part in path:
            at = getattr(at, part)
        setattr(at, last, value)
    return attr
