# SPDX-License-Identifier: Apache-2.0
"""Statistics of a VM and its vCPUs that every architecture has, with the names of KVM's binary statistics.

One table for each says what there is: ``stats()`` and KVM_GET_STATS_FD (:mod:`.stats_file`) both go by it. What this
KVM doesn't do (shadow paging, for one) has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from softkvm import abi
from softkvm.kvm.state import BLOCKING, HALT_POLL_HIST_COUNT

if TYPE_CHECKING:
    from softkvm.kvm.state import VcpuState as Vcpu
    from softkvm.kvm.state import VmState as Vm


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic: how a descriptor describes it (``struct kvm_stats_desc``), and where its value comes from."""

    name: str
    #: The value of an object; a sequence of ``size`` numbers if that is not 1.
    read: Callable[[Any], Any]
    kind: int = abi.KVM_STATS_TYPE_CUMULATIVE
    unit: int = abi.KVM_STATS_UNIT_NONE
    exponent: int = 0
    size: int = 1

    def values(self, owner: object) -> list[int]:
        """Return what there is, in a list."""
        value = self.read(owner)
        return [value] if self.size == 1 else list(value)


def counter(name: str, read: Callable[[Any], int] | None = None) -> Statistic:
    """Return what counts events: the object's ``stat_<name>`` unless ``read`` is given."""
    return Statistic(name, read or attrgetter(f"stat_{name}"))


def instant(name: str, read: Callable[[Any], int]) -> Statistic:
    """Return a number that rises and falls."""
    return Statistic(name, read, abi.KVM_STATS_TYPE_INSTANT)


def time_ns(name: str) -> Statistic:
    """Return a sum of nanoseconds."""
    return Statistic(name, attrgetter(f"stat_{name}"), unit=abi.KVM_STATS_UNIT_SECONDS, exponent=-9)


def log_hist_ns(name: str) -> Statistic:
    """Return a histogram of times: bucket 0 counts 0 ns, bucket n 2**(n-1) to 2**n - 1, the last all above, too."""
    read = attrgetter(f"stat_{name}")
    kind, unit = abi.KVM_STATS_TYPE_LOG_HIST, abi.KVM_STATS_UNIT_SECONDS
    return Statistic(name, read, kind, unit, -9, HALT_POLL_HIST_COUNT)


def _pages(level: int) -> Callable[[Vm], int]:
    return lambda vm: vm.mmu.pages[level]


def _is_blocking(vcpu: Vcpu) -> int:
    return int(vcpu.mode == BLOCKING)


VCPU_STATS: Final[tuple[Statistic, ...]] = (
    counter("halt_successful_poll"),
    counter("halt_attempted_poll"),
    counter("halt_wakeup"),
    time_ns("halt_poll_success_ns"),
    time_ns("halt_poll_fail_ns"),
    time_ns("halt_wait_ns"),
    log_hist_ns("halt_poll_success_hist"),
    log_hist_ns("halt_poll_fail_hist"),
    log_hist_ns("halt_wait_hist"),
    Statistic("blocking", _is_blocking, abi.KVM_STATS_TYPE_INSTANT, abi.KVM_STATS_UNIT_BOOLEAN),
    counter("exits", lambda vcpu: sum(dict(vcpu.exit_counts).values())),
    counter("mmio_exits"),
    counter("signal_exits"),
    counter("halt_exits"),
    counter("pf_taken"),
    counter("tlb_flush"),
    counter("instructions", lambda vcpu: vcpu.cpu.instructions),
)

VM_STATS: Final[tuple[Statistic, ...]] = (
    counter("remote_tlb_flush"),
    counter("remote_tlb_flush_requests"),
    counter("remote_tlb_flush_skipped"),
    counter("remote_tlb_flush_ranged"),
    counter("remote_tlb_flush_full"),
    counter("remote_tlb_flush_failed"),
    instant("pages_4k", _pages(1)),
    instant("pages_2m", _pages(2)),
    instant("pages_1g", _pages(3)),
    instant("mmu_shadow_pages", lambda vm: vm.mmu.tables),
)


def scalars(table: Iterable[Statistic], owner: object) -> dict[str, int]:
    """Return the values of an object's statistics by name; histograms are left out."""
    return {statistic.name: statistic.read(owner) for statistic in table if statistic.size == 1}


def exits_by_reason(vcpu: Vcpu, names: Mapping[int, str]) -> dict[str, int]:
    """Return how often each reason for an exit has come, as ``exit_<name>``."""
    counts = sorted(dict(vcpu.exit_counts).items())
    return {f"exit_{names.get(code, hex(code))}": count for code, count in counts}
