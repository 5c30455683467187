# SPDX-License-Identifier: Apache-2.0
"""What a guest's performance counters cost: an exit while they count, and an overflow.

::

    from softkvm.bench import pmu

    report = pmu.measure(softkvm.open(), None, pmu.Options())
    print(report.ns["overflow"], report.entry)

A guest executes CPUID: without counters, with one that counts cycles, and with one that counts instructions, as KVM has
to count those that it carries out itself. Then its counter overflows each so many instructions: the handler of its NMI
sets it back. On a second KVM, which programs counters anew at each overflow as kernels did before, it does so again.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from softkvm import abi, api

REPORT_VERSION: Final = 1

#: AMD's first counter: what it counts, and the count; of 48 bits.
PERF_CTL0: Final = 0xC001_0200
PERF_CTR0: Final = 0xC001_0201
_TOP: Final = 1 << 48
_OS, _INT, _EN = 1 << 17, 1 << 20, 1 << 22
_CYCLES, _INSTRUCTIONS = 0x76, 0xC0

_MEMORY: Final = 64 << 10
_CODE, _HANDLER, _STACK = 0x1000, 0x2000, 0x8000
_NMI_VECTOR: Final = 2
#: The guest says here that it has done its rounds.
PORT: Final = 0x10

# Local APIC (SDM vol. 3, table 11-1).
_SPIV, _LVTPC, _DELIVER_NMI = 0xF0, 0x340, 0x400

#: Real mode. again: cpuid; dec esi; jnz again; out 0x10, al.
_EXITS: Final = bytes.fromhex("0fa2 664e 75fa e610")
#: again: dec esi; jnz again; out 0x10, al.
_LOOP: Final = bytes.fromhex("664e 75fc e610")
#: Between two overflows, at the least: what the handler itself executes is less.
PERIOD_MIN: Final = 100

WHAT: Final = {
    "exit": "an exit (CPUID), no counter",
    "exit, cycles": "the same while a counter counts cycles",
    "exit, instructions": "the same while a counter counts instructions",
    "overflow": "an overflow: interrupt, the counter set back, return",
    "overflow, programmed anew": "the same, the counter programmed anew each time",
}


class BenchError(Exception):
    """What was asked for cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    exits: int = 20_000
    overflows: int = 5_000
    #: Instructions from one overflow to the next.
    period: int = 2_000
    runs: int = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """A time in nanoseconds: the median of some runs, and their spread: half of their interquartile range.

    One run has none.
    """

    ns: float
    spread_ns: float | None

    @classmethod
    def of(cls, runs: Sequence[float]) -> Figure:
        """Return what runs have been."""
        if len(runs) < 2:
            return cls(runs[0], None)
        first, median, third = statistics.quantiles(runs, n=4, method="inclusive")
        return cls(median, (third - first) / 2)

    def __str__(self) -> str:
        """Return it for people: what is not more than the spread is only known to be less than something."""
        if self.spread_ns is None:
            return f"{self.ns:,.0f} (one run)"
        if self.ns > self.spread_ns:
            return f"{self.ns:,.0f} ± {self.spread_ns:,.0f}"
        return f"under {max(self.ns, 0) + self.spread_ns:,.0f}"


@dataclass(slots=True)
class Report:
    """What was found: nanoseconds of each thing, in all runs."""

    options: Options
    runs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ns(self) -> dict[str, float]:
        """Medians."""
        return {name: figure.ns for name, figure in self.figures.items()}

    @property
    def figures(self) -> dict[str, Figure]:
        """Medians and spreads."""
        return {name: Figure.of(runs) for name, runs in self.runs.items()}

    @property
    def entry(self) -> Figure:
        """What a counter that counts, and of which nothing changes, adds to an entry."""
        return self._difference("exit, cycles", "exit")

    @property
    def reprogramming(self) -> Figure | None:
        """What is saved at each overflow."""
        if "overflow, programmed anew" not in self.runs:
            return None
        return self._difference("overflow, programmed anew", "overflow")

    def _difference(self, more: str, less: str) -> Figure:
        """Return what one costs more than another, run by run: those of a run were measured one after the other."""
        return Figure.of([a - b for a, b in zip(self.runs[more], self.runs[less], strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        reprogramming = self.reprogramming
        return {
            "version": REPORT_VERSION,
            "options": asdict(self.options),
            "ns": self.ns,
            "runs": self.runs,
            "spread_ns": {name: figure.spread_ns for name, figure in self.figures.items()},
            "entry_ns": self.entry.ns,
            "entry_spread_ns": self.entry.spread_ns,
            "reprogramming_ns": None if reprogramming is None else reprogramming.ns,
            "reprogramming_spread_ns": None if reprogramming is None else reprogramming.spread_ns,
        }


def measure(
    kvm: api.Kvm, anew: api.Kvm | None, options: Options, progress: Callable[[str], None] = lambda what: None
) -> Report:
    """Run the measurement; *anew* is the KVM that programs counters anew. BenchError where there are no counters."""
    report = Report(options, runs={name: [] for name in WHAT})
    for _ in range(options.runs):
        for name, event in (("exit", 0), ("exit, cycles", _CYCLES), ("exit, instructions", _INSTRUCTIONS)):
            progress(WHAT[name])
            report.runs[name].append(_exits(kvm, options, event))
        for name, opened in (("overflow", kvm), ("overflow, programmed anew", anew)):
            if opened is not None:
                progress(WHAT[name])
                report.runs[name].append(_overflows(opened, options))
    report.runs = {name: runs for name, runs in report.runs.items() if runs}
    return report


def _exits(kvm: api.Kvm, options: Options, event: int) -> float:
    """Nanoseconds that an exit takes while ``event`` is counted, 0: nothing."""
    with closing(_Guest(kvm)) as guest:
        if event:
            guest.count(event | _OS | _EN, 0)
        return guest.run(_EXITS, options.exits) / options.exits


def _overflows(kvm: api.Kvm, options: Options) -> float:
    """Nanoseconds that an overflow takes, beside the instructions between two of them."""
    rounds = options.overflows * options.period // 2
    with closing(_Guest(kvm)) as guest:
        guest.count(_INSTRUCTIONS | _OS | _EN, 0)
        plain = guest.run(_LOOP, rounds)
        guest.count(_INSTRUCTIONS | _OS | _EN | _INT, _TOP - options.period)
        guest.handler(options.period)
        counted = guest.run(_LOOP, rounds)
        overflows = guest.overflows()
    if not overflows:
        raise BenchError("the counter does not overflow")
    return (counted - plain) / overflows


class _Guest:
    """A guest in real mode with a local APIC."""

    def __init__(self, kvm: api.Kvm) -> None:
        self._vm = kvm.create_vm()
        self._memory = mmap.mmap(-1, _MEMORY)
        self._vm.create_irqchip()
        self._vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                memory_size=_MEMORY, userspace_addr=ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            )
        )
        self._vcpu = self._vm.create_vcpu(0)
        self._vcpu.set_cpuid2(kvm.get_supported_cpuid())
        sregs = self._vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self._vcpu.set_sregs(sregs)
        lapic = self._vcpu.get_lapic()
        for offset, value in ((_SPIV, 0x1FF), (_LVTPC, _DELIVER_NMI)):
            lapic.regs[offset : offset + 4] = list(struct.pack("<I", value))
        self._vcpu.set_lapic(lapic)

    def close(self) -> None:
        """End it."""
        self._vm.close()

    def count(self, select: int, count: int) -> None:
        """Program the counter."""
        if self._vcpu.set_msrs([(PERF_CTL0, 0), (PERF_CTR0, count), (PERF_CTL0, select)]) != 3:
            raise BenchError("this KVM has no performance counters of AMD's")

    def handler(self, period: int) -> None:
        """Have the handler of NMIs count them in EDI, and set the counter back."""
        self._memory[4 * _NMI_VECTOR : 4 * _NMI_VECTOR + 4] = struct.pack("<HH", _HANDLER, 0)
        code = bytes.fromhex("6647 66b9") + struct.pack("<I", PERF_CTR0)
        code += (
            bytes.fromhex("66b8") + struct.pack("<I", -period & 0xFFFF_FFFF) + bytes.fromhex("66ba ffff0000 0f30 cf")
        )
        self._memory[_HANDLER : _HANDLER + len(code)] = code

    def run(self, code: bytes, rounds: int) -> int:
        """Execute code with so many rounds in ESI; returns nanoseconds."""
        self._memory[_CODE : _CODE + len(code)] = code
        regs = self._vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags, regs.rsi, regs.rdi = _CODE, _STACK, 2, rounds, 0
        self._vcpu.set_regs(regs)
        start = time.perf_counter_ns()
        self._vcpu.run()
        elapsed = time.perf_counter_ns() - start
        if self._vcpu.kvm_run.exit_reason != abi.KVM_EXIT_IO:
            raise BenchError(f"the guest ended with exit reason {self._vcpu.kvm_run.exit_reason}")
        return elapsed

    def overflows(self) -> int:
        """Return how many the guest has had."""
        return self._vcpu.get_regs().rdi & 0xFFFF_FFFF


def rows(report: Report) -> list[list[str]]:
    """Return a table of people's: what, and nanoseconds. A cost that the runs don't show is below their spread."""
    table = [[WHAT[name], str(figure)] for name, figure in report.figures.items()]
    table.append(["a counter's part in an entry when nothing changed", str(report.entry)])
    saved = report.reprogramming
    if saved is not None:
        table.append(["what programming a counter anew costs", str(saved)])
    return table
