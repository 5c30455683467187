# SPDX-License-Identifier: Apache-2.0
"""Counters of a VM and its vCPUs that every architecture has, with the names of KVM's binary statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.kvm.state import VcpuState as Vcpu
    from softkvm.kvm.state import VmState as Vm


def vcpu_stats(vcpu: Vcpu) -> dict[str, int]:
    """Return a vCPU's counters."""
    return {
        "exits": sum(dict(vcpu.exit_counts).values()),
        "mmio_exits": vcpu.stat_mmio_exits,
        "halt_exits": vcpu.stat_halt_exits,
        "halt_wakeup": vcpu.stat_halt_wakeup,
        "halt_attempted_poll": vcpu.stat_halt_attempted_poll,
        "halt_successful_poll": vcpu.stat_halt_successful_poll,
        "halt_poll_success_ns": vcpu.stat_halt_poll_success_ns,
        "halt_poll_fail_ns": vcpu.stat_halt_poll_fail_ns,
        "halt_wait_ns": vcpu.stat_halt_wait_ns,
        "pf_taken": vcpu.stat_pf_taken,
        "tlb_flush": vcpu.stat_tlb_flush,
        "instructions": vcpu.cpu.instructions,
    }


def vm_stats(vm: Vm) -> dict[str, int]:
    """Return a VM's counters."""
    return {
        "pages_4k": vm.mmu.pages[1],
        "pages_2m": vm.mmu.pages[2],
        "pages_1g": vm.mmu.pages[3],
        "mmu_shadow_pages": vm.mmu.tables,
        "remote_tlb_flush": vm.stat_remote_tlb_flush,
        "remote_tlb_flush_requests": vm.stat_remote_tlb_flush_requests,
    }
