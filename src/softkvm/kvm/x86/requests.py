# SPDX-License-Identifier: Apache-2.0
"""x86's requests to a vCPU, behind those of every architecture (:mod:`softkvm.kvm.requests`)."""

from __future__ import annotations

from typing import Final

from softkvm.kvm.requests import KVM_REQUEST_ARCH_BASE as _BASE

#: There may be an event to inject.
KVM_REQ_EVENT: Final = 1 << _BASE
#: The guest has shut down, or userspace restores a vCPU that has: KVM_EXIT_SHUTDOWN.
KVM_REQ_TRIPLE_FAULT: Final = 1 << _BASE + 1
#: The guest's clock structure has to be written.
KVM_REQ_CLOCK_UPDATE: Final = 1 << _BASE + 2
#: Time may have been stolen.
KVM_REQ_STEAL_UPDATE: Final = 1 << _BASE + 3
#: NMIs have been queued.
KVM_REQ_NMI: Final = 1 << _BASE + 4
#: The guest ended an interrupt of an IOAPIC that userspace has.
KVM_REQ_IOAPIC_EOI_EXIT: Final = 1 << _BASE + 5
#: An instruction has accessed the APIC's task priority, and userspace wants to know: KVM_EXIT_TPR_ACCESS.
KVM_REQ_REPORT_TPR_ACCESS: Final = 1 << _BASE + 6
#: Hyper-V's synthetic timers have to be looked at.
KVM_REQ_HV_STIMER: Final = 1 << _BASE + 7
#: A guest of Hyper-V's has done what userspace has to know: KVM_EXIT_HYPERV.
KVM_REQ_HV_EXIT: Final = 1 << _BASE + 8
#: It has crashed, or wants to be reset: KVM_EXIT_SYSTEM_EVENT.
KVM_REQ_HV_CRASH: Final = 1 << _BASE + 9
KVM_REQ_HV_RESET: Final = 1 << _BASE + 10
#: The vCPU is to use the VM's nested tables: once, at its first KVM_RUN.
KVM_REQ_LOAD_MMU_PGD: Final = 1 << _BASE + 11
#: A page that the guest has touched isn't there, and it can't be told: the vCPU halts until it has come.
KVM_REQ_APF_HALT: Final = 1 << _BASE + 12
#: Pages that the vCPU waited for have come.
KVM_REQ_APF_READY: Final = 1 << _BASE + 13
#: What the guest's performance counters count has changed.
KVM_REQ_PMU: Final = 1 << _BASE + 14
