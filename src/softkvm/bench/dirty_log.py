# SPDX-License-Identifier: Apache-2.0
"""What dirty logging costs: the measurement of the kernel's ``dirty_log_perf_test``, on either KVM.

::

    from softkvm.bench import dirty_log

    report = dirty_log.measure(softkvm.open(), dirty_log.Options(vcpus=2, bytes_per_vcpu=1 << 30))
    print(report.seconds["get"], report.pages_per_second["dirty"])

Each vCPU has a part of memory, or all have the same, and goes over its pages: writes a fraction of them, chosen by a
linear congruential generator, and reads the others. Timed are: the first pass, which populates memory; the request that
turns logging on; each pass under logging; KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG behind each; and the request that
turns it off.
"""

from __future__ import annotations

import errno
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from softkvm import abi, api
from softkvm.bench.walkers import BACKINGS as BACKINGS
from softkvm.bench.walkers import PAGE as PAGE
from softkvm.bench.walkers import PAGE_2M as PAGE_2M
from softkvm.bench.walkers import BenchError as BenchError
from softkvm.bench.walkers import Walk, Walkers, check_memory, map_memory

REPORT_VERSION: Final = 1
PHASES: Final = {
    "populate": "first pass over memory",
    "enable": "logging turned on",
    "dirty": "pass under logging",
    "get": "KVM_GET_DIRTY_LOG",
    "clear": "KVM_CLEAR_DIRTY_LOG",
    "disable": "logging turned off",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; sizes in bytes."""

    vcpus: int = 1
    bytes_per_vcpu: int = 256 << 20
    iterations: int = 3
    #: Percent of the pages that a pass writes.
    write_percent: int = 100
    #: All vCPUs go over the same memory.
    overlap: bool = False
    backing: str = "anonymous"
    #: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0: without it, 1, or 3 with all pages dirty at first.
    manual_protect: int = 1

    @property
    def pages(self) -> int:
        """Pages of the test's memory."""
        return self.bytes_per_vcpu // PAGE * (1 if self.overlap else self.vcpus)


@dataclass(slots=True)
class Report:
    """What was found."""

    options: Options
    #: Of each phase, the median where it was done several times.
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    #: Pages that each log had.
    dirty_pages: list[int] = field(default_factory=list)

    @property
    def pages_per_second(self) -> dict[str, float]:
        """How many of the test's pages a phase gets through in a second."""
        return {name: self.options.pages / seconds for name, seconds in self.seconds.items() if seconds}

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "version": REPORT_VERSION,
            "options": {**asdict(self.options), "pages": self.options.pages},
            "seconds": self.seconds,
            "runs": self.runs,
            "pages_per_second": self.pages_per_second,
            "dirty_pages": self.dirty_pages,
        }


def check(options: Options) -> None:
    """Raise BenchError for what no run can be."""
    if options.backing not in BACKINGS:
        raise BenchError(f"backing={options.backing}: expected {', '.join(BACKINGS)}")
    if not 0 <= options.write_percent <= 100:
        raise BenchError(f"write_percent={options.write_percent}: expected 0 to 100")
    if options.iterations < 1:
        raise BenchError(f"iterations={options.iterations}: expected at least 1")
    check_memory(options.vcpus, options.bytes_per_vcpu, options.overlap)


class _Machine(Walkers):
    """Those vCPUs, and the log of their memory."""

    def __init__(self, kvm: api.Kvm, options: Options) -> None:
        self._manual_protect = options.manual_protect
        walk = Walk(options.vcpus, options.bytes_per_vcpu, options.overlap, options.write_percent)
        super().__init__(kvm, walk, *map_memory(walk.pages * PAGE, options.backing))

    def _prepare(self) -> None:
        if self._manual_protect:
            self.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, self._manual_protect)

    def log(self, on: bool) -> None:
        """Turn dirty logging of the test's memory on or off."""
        self._set_memory(abi.KVM_MEM_LOG_DIRTY_PAGES if on else 0)

    def get(self) -> bytes:
        """Return the log."""
        return self.vm.get_dirty_log(1)

    def clear(self, log: bytes) -> None:
        """Clear what the log has."""
        self.vm.clear_dirty_log(1, 0, self.walk.pages, log)


@contextmanager
def _machine(kvm: api.Kvm, options: Options) -> Iterator[_Machine]:
    machine = _Machine(kvm, options)
    try:
        yield machine
    finally:
        machine.close()


def measure(kvm: api.Kvm, options: Options, progress: Callable[[str], None] = lambda what: None) -> Report:
    """Run the measurement once. Raises BenchError for what cannot be measured here."""
    check(options)
    if options.manual_protect and not kvm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
        raise BenchError("this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    report = Report(options, runs={name: [] for name in PHASES})

    def timed(phase: str, function: Callable[[], Any]) -> Any:
        progress(PHASES[phase])
        start = time.perf_counter()
        result = function()
        report.runs[phase].append(time.perf_counter() - start)
        return result

    try:
        with _machine(kvm, options) as machine:
            timed("populate", machine.go_over_memory)
            timed("enable", lambda: machine.log(True))
            for _ in range(options.iterations):
                timed("dirty", machine.go_over_memory)
                log = timed("get", machine.get)
                report.dirty_pages.append(int.from_bytes(log, "little").bit_count())
                if options.manual_protect:
                    timed("clear", partial(machine.clear, log))
            timed("disable", lambda: machine.log(False))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise BenchError(f"{options.pages * PAGE >> 20} MiB of memory: {error.strerror}") from None
    report.seconds = {name: statistics.median(runs) for name, runs in report.runs.items() if runs}
    return report


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """Return a table of people's: a row per phase, two columns per report: milliseconds, and pages in a second."""
    table = []
    for name, what in PHASES.items():
        row = [name, what]
        for report in reports:
            seconds, rate = report.seconds.get(name), report.pages_per_second.get(name)
            row += ["-" if seconds is None else f"{seconds * 1e3:,.2f}", "-" if rate is None else f"{rate:,.0f}"]
        table.append(row)
    return table
