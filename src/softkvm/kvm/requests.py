# SPDX-License-Identifier: Apache-2.0
"""Requests to a vCPU: bits of ``vcpu.requests``, handled before the next guest entry (``KVM_REQ_*``).

An architecture's own begin at ``KVM_REQUEST_ARCH_BASE``.
"""

from __future__ import annotations

from typing import Final

#: Translations may have changed: the TLB is flushed.
KVM_REQ_TLB_FLUSH: Final = 1 << 0
#: The VM can't go on: every KVM_RUN is EIO from now on.
KVM_REQ_VM_DEAD: Final = 1 << 1
#: The vCPU's thread has found itself interrupted, by a kick of userspace's or a signal: KVM_RUN ends with EINTR.
KVM_REQ_SIGNAL: Final = 1 << 2
#: Code was called for on the vCPU's own thread (``vcpu.call_soon``).
KVM_REQ_TASK_WORK: Final = 1 << 3
#: The vCPU's ring of dirty pages is nearly full: KVM_RUN ends until userspace has had it reset.
KVM_REQ_DIRTY_RING_SOFT_FULL: Final = 1 << 4

KVM_REQUEST_ARCH_BASE: Final = 8
