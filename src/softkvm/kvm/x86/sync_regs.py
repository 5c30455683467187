# SPDX-License-Identifier: Apache-2.0
"""Registers in the run page: taken before entry and stored at exits, without requests (KVM API 5)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softkvm import abi
from softkvm.abi.x86.run_page import KVM_DIRTY_REGS_Q, KVM_VALID_REGS_Q
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86 import events, regs

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: For each bit, in the order that they are taken in: the field of ``kvm_sync_regs``, its getter and setter.
_SETS: Final[tuple[tuple[int, str, Callable[[Any], Any], Callable[[Any, Any], None]], ...]] = (
    (abi.KVM_SYNC_X86_REGS, "regs", regs.get_regs, regs.set_regs),
    (abi.KVM_SYNC_X86_SREGS, "sregs", regs.get_sregs, regs.set_sregs),
    (abi.KVM_SYNC_X86_EVENTS, "events", events.get_vcpu_events, events.set_vcpu_events),
)


def take(vcpu: Vcpu) -> None:
    """Take those registers that userspace says it has changed; EINVAL for bits that there are not, or bad values.

    What has been taken is no longer marked. Userspace may write the page meanwhile: each set is copied first.
    """
    run_q = vcpu.run_q
    for name, at in (("kvm_valid_regs", KVM_VALID_REGS_Q), ("kvm_dirty_regs", KVM_DIRTY_REGS_Q)):
        if run_q[at] & ~abi.KVM_SYNC_X86_VALID_FIELDS:
            raise kvm_error(errno.EINVAL, f"{name}={run_q[at]:#x}, expected KVM_SYNC_X86_* bits")
    dirty = run_q[KVM_DIRTY_REGS_Q]
    page = vcpu._kvm_run.s.regs
    for bit, field, _, put in _SETS:
        if dirty & bit:
            shared = getattr(page, field)
            put(vcpu, type(shared).from_buffer_copy(shared))
            dirty &= ~bit
            run_q[KVM_DIRTY_REGS_Q] = dirty


def store(vcpu: Vcpu) -> None:
    """Store those registers that userspace wants to see."""
    valid = vcpu.run_q[KVM_VALID_REGS_Q]
    page = vcpu._kvm_run.s.regs
    for bit, field, get, _ in _SETS:
        if valid & bit:
            setattr(page, field, get(vcpu))
