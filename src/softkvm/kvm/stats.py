# SPDX-License-Identifier: Apache-2.0
"""Counters of a VM and its vCPUs, with the names of KVM's binary statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_state import VcpuState as Vcpu
    from softkvm.kvm.vm import Vm


def vcpu_stats(vcpu: Vcpu) -> dict[str, int]:
    """Return a vCPU's counters; ``exit_<name>`` counts the exits with that code."""
    counts = dict(vcpu.exit_counts)
    result = {
        "exits": sum(counts.values()),
        "io_exits": counts.get(V.EXIT_IOIO, 0),
        "mmio_exits": vcpu.stat_mmio_exits,
        "halt_exits": vcpu.stat_halt_exits,
        "halt_wakeup": vcpu.stat_halt_wakeup,
        "halt_attempted_poll": vcpu.stat_halt_attempted_poll,
        "halt_successful_poll": vcpu.stat_halt_successful_poll,
        "halt_poll_success_ns": vcpu.stat_halt_poll_success_ns,
        "halt_poll_fail_ns": vcpu.stat_halt_poll_fail_ns,
        "halt_wait_ns": vcpu.stat_halt_wait_ns,
        "irq_exits": counts.get(V.EXIT_INTR, 0),
        "irq_injections": vcpu.stat_irq_injections,
        "nmi_injections": vcpu.stat_nmi_injections,
        "irq_window_exits": vcpu.stat_irq_window_exits,
        "nmi_window_exits": vcpu.stat_nmi_window_exits,
        "insn_emulation": vcpu.stat_insn_emulation,
        "insn_emulation_fail": vcpu.stat_insn_emulation_fail,
        "hypercalls": vcpu.stat_hypercalls,
        "pf_taken": vcpu.stat_pf_taken,
        "tlb_flush": vcpu.stat_tlb_flush,
        "req_event": vcpu.stat_req_event,
        "instructions": vcpu.cpu.instructions,
    }
    for code, count in sorted(counts.items()):
        result[f"exit_{V.EXIT_NAMES.get(code, hex(code))}"] = count
    return result


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
