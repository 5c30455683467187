# SPDX-License-Identifier: Apache-2.0
"""x86's requests to a vCPU, behind those of every architecture (:mod:`softkvm.kvm.requests`)."""

from __future__ import annotations

from typing import Final

from softkvm.kvm.requests import KVM_REQUEST_ARCH_BASE as _BASE

KVM_REQ_EVENT: Final = 1 << _BASE
KVM_REQ_TRIPLE_FAULT: Final = 1 << _BASE + 1
KVM_REQ_CLOCK_UPDATE: Final = 1 << _BASE + 2
KVM_REQ_STEAL_UPDATE: Final = 1 << _BASE + 3
KVM_REQ_NMI: Final = 1 << _BASE + 4
KVM_REQ_TLB_FLUSH_GUEST: Final = 1 << _BASE + 5
#: The guest ended an interrupt of an IOAPIC that userspace has.
KVM_REQ_IOAPIC_EOI_EXIT: Final = 1 << _BASE + 6
