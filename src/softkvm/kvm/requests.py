# SPDX-License-Identifier: Apache-2.0
"""Requests to a vCPU: bits of ``vcpu.requests``, handled before the next guest entry (``KVM_REQ_*``)."""

from __future__ import annotations

from typing import Final

KVM_REQ_TLB_FLUSH: Final = 1 << 0
KVM_REQ_VM_DEAD: Final = 1 << 1
KVM_REQ_UNBLOCK: Final = 1 << 2
KVM_REQ_TRIPLE_FAULT: Final = 1 << 3
KVM_REQ_EVENT: Final = 1 << 4
KVM_REQ_CLOCK_UPDATE: Final = 1 << 5
KVM_REQ_MASTERCLOCK_UPDATE: Final = 1 << 6
KVM_REQ_STEAL_UPDATE: Final = 1 << 7
KVM_REQ_NMI: Final = 1 << 8
KVM_REQ_SMI: Final = 1 << 9
KVM_REQ_MMU_SYNC: Final = 1 << 10
KVM_REQ_TLB_FLUSH_GUEST: Final = 1 << 11
#: Userspace wants KVM_RUN to end with EINTR: what a signal does to a real vCPU's thread.
KVM_REQ_SIGNAL: Final = 1 << 12
#: Code was called for on the vCPU's own thread (``vcpu.call_soon``).
KVM_REQ_TASK_WORK: Final = 1 << 13
#: The guest ended an interrupt of an IOAPIC that userspace has.
KVM_REQ_IOAPIC_EOI_EXIT: Final = 1 << 14
