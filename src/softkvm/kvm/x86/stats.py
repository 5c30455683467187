# SPDX-License-Identifier: Apache-2.0
"""Statistics of an x86 vCPU, with the names of KVM's binary statistics, and its exits by reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.kvm import stats
from softkvm.kvm.stats import Statistic, counter
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def _exits(code: int) -> Callable[[Vcpu], int]:
    return lambda vcpu: vcpu.exit_counts.get(code, 0)


VCPU_STATS: Final[tuple[Statistic, ...]] = (
    *stats.VCPU_STATS,
    counter("io_exits", _exits(V.EXIT_IOIO)),
    counter("irq_exits", _exits(V.EXIT_INTR)),
    counter("irq_window_exits"),
    counter("nmi_window_exits"),
    counter("insn_emulation"),
    counter("insn_emulation_fail"),
    counter("hypercalls"),
    counter("irq_injections"),
    counter("nmi_injections"),
    counter("req_event"),
    counter("async_pf_not_present"),
    counter("async_pf_ready"),
)


def vcpu_stats(vcpu: Vcpu) -> dict[str, int]:
    """Return a vCPU's counters; ``exit_<name>`` counts the exits with that code."""
    return stats.scalars(VCPU_STATS, vcpu) | stats.exits_by_reason(vcpu, V.EXIT_NAMES)
