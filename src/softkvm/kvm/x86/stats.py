# SPDX-License-Identifier: Apache-2.0
"""Counters of an x86 vCPU, with the names of KVM's binary statistics, and its exits by reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import stats
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def vcpu_stats(vcpu: Vcpu) -> dict[str, int]:
    """Return a vCPU's counters; ``exit_<name>`` counts the exits with that code."""
    counts = dict(vcpu.exit_counts)
    result = stats.vcpu_stats(vcpu) | {
        "io_exits": counts.get(V.EXIT_IOIO, 0),
        "irq_exits": counts.get(V.EXIT_INTR, 0),
        "irq_injections": vcpu.stat_irq_injections,
        "nmi_injections": vcpu.stat_nmi_injections,
        "irq_window_exits": vcpu.stat_irq_window_exits,
        "nmi_window_exits": vcpu.stat_nmi_window_exits,
        "insn_emulation": vcpu.stat_insn_emulation,
        "insn_emulation_fail": vcpu.stat_insn_emulation_fail,
        "hypercalls": vcpu.stat_hypercalls,
        "req_event": vcpu.stat_req_event,
    }
    for code, count in sorted(counts.items()):
        result[f"exit_{V.EXIT_NAMES.get(code, hex(code))}"] = count
    return result
