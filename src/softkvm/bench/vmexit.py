# SPDX-License-Identifier: Apache-2.0
"""What an exit costs: nanoseconds for each kind, softkvm and QEMU's TCG side by side.

::

    from softkvm.bench import vmexit
    from softkvm.bench.sides import QemuSide, SoftkvmSide

    report = vmexit.own_guest([SoftkvmSide(), QemuSide()])
    report = vmexit.suite(Path("kvm-unit-tests"), [SoftkvmSide()])
    print(report.kinds[0].name, report.kinds[0].figures["softkvm"].ns)

Two sources: our own guest, which times itself; and the entries of kvm-unit-tests that run its ``vmexit`` program, which
prints a line ``NAME TICKS`` of its time-stamp counter for each kind, turned into nanoseconds by the counter's rate.
TCG has no exits: its figures are the work itself, in one process.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import softkvm
from softkvm.bench.sides import GuestFailure, GuestTimeout, Side
from softkvm.reports.result import Result, Status
from softkvm.unittests import config
from softkvm.unittests.config import Entry, SuiteError
from softkvm.unittests.runner import arguments_of

REPORT_VERSION = 1
TIMEOUT_S = 60.0
"""For one kind of our own guest."""
PROGRAM = "vmexit"
"""The suite's program, without its suffix."""

FAILED, TIMEOUT, SKIPPED, MISSING = "failed", "timeout", "skipped", "no figure"


@dataclass(frozen=True, slots=True)
class OwnKind:
    """A kernel of our guest."""

    what: str
    vcpus: int = 1


OWN: dict[str, OwnKind] = {
    "cpuid": OwnKind("CPUID; KVM answers"),
    "in": OwnKind("IN, serial scratch register; the device answers"),
    "out": OwnKind("OUT, serial scratch register"),
    "mmio": OwnKind("read of memory space where nothing is"),
    "lapic": OwnKind("local APIC register read"),
    "hlt-ipi": OwnKind("IPI to itself, HLT, wake"),
    "hlt-timer": OwnKind("HLT: how late a timer's interrupt wakes"),
    "ipi-pingpong": OwnKind("IPI to a halted vCPU, and one back", vcpus=2),
}
"""Our guest's kernels (``guests/bench/exits.c``)."""

SUITE: dict[str, str] = {
    "cpuid": "CPUID",
    "vmcall": "hypercall",
    "mov_from_cr8": "read of the task priority, CR8",
    "mov_to_cr8": "write of the task priority, CR8",
    "mov_dr": "write of a debug register",
    "inl_from_pmtimer": "IN from the ACPI timer",
    "inl_from_qemu": "IN from a device of the machine monitor",
    "inl_from_kernel": "IN from a device in KVM",
    "outl_to_kernel": "OUT to a device in KVM",
    "ipi": "IPI to another vCPU that spins",
    "ipi_halt": "IPI to another vCPU that halts",
    "ple_round_robin": "spinning with PAUSE until each vCPU had its turn",
    "tscdeadline": "TSC-deadline timer set, waited for",
    "tscdeadline_immed": "TSC-deadline timer set to a time that has passed",
    "toggle_cr0_wp": "CR0.WP off and on",
    "toggle_cr4_pge": "CR4.PGE off and on: a flush of the TLB",
    "mmio-no-eventfd": "store to a device of the machine monitor",
    "mmio-wildcard-eventfd": "store that signals an eventfd",
    "mmio-datamatch-eventfd": "store of the value that signals an eventfd",
    "portio-no-eventfd": "OUT to a device of the machine monitor",
    "portio-wildcard-eventfd": "OUT that signals an eventfd",
    "portio-datamatch-eventfd": "OUT of the value that signals an eventfd",
}
"""What the suite's kinds do. Source: their names, and kvm-unit-tests' ``x86/vmexit.c``."""

PARTS = {"ipi": "of it, sending the interrupt", "eoi": "of it, the end-of-interrupt"}
"""Lines ``ipi NAME TICKS`` and ``eoi NAME TICKS`` below a kind's own."""


@dataclass(slots=True)
class Figure:
    """One kind on one side."""

    ns: float | None = None
    """The median of the runs, where all gave one."""
    runs_ns: list[float] = field(default_factory=list)
    problem: str = ""
    """``failed``, ``timeout``, ``skipped`` or ``no figure`` where there is none."""
    detail: str = ""
    """What more there is to say about the problem."""

    def add(self, ns: float) -> None:
        """Take the figure of one run."""
        self.runs_ns.append(ns)
        if not self.problem:
            self.ns = statistics.median(self.runs_ns)

    def fail(self, problem: str, detail: str = "") -> None:
        """One run gave none."""
        self.ns, self.problem, self.detail = None, problem, detail


@dataclass(slots=True)
class Kind:
    """A kind of exit. *entry* is the suite's, where it comes from there."""

    name: str
    what: str
    entry: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)
    """By the side's name."""

    def ratio(self, side: str, other: str) -> float | None:
        """How many times *other*'s time *side* takes."""
        ours, theirs = (self.figures.get(name, Figure()).ns for name in (side, other))
        return ours / theirs if ours is not None and theirs else None


@dataclass(slots=True)
class Report:
    """Everything measured."""

    source: str
    """``own guest``, or the suite's directory."""
    runs: int
    sides: dict[str, dict[str, Any]]
    """By name: ``title``, ``version``, and ``tsc_hz`` where ticks had to be turned into time."""
    kinds: list[Kind] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {"version": REPORT_VERSION, "softkvm": softkvm.__version__, **asdict(self)}


Progress = Callable[[int, int, str], None]
"""Called with the measurements done, their number, and what runs now."""


def _quiet(done: int, total: int, what: str) -> None:
    pass


def _describe(sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    return {side.name: {"title": side.title, "version": side.version} for side in sides}


# -- our own guest

_LINE = re.compile(r"^bench (\S+) iterations (\d+) checksum [0-9a-f]+ ns (\d+)\s*$", re.MULTILINE)


def own_guest(
    sides: Sequence[Side],
    runs: int = 1,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = _quiet,
    iterations: int | None = None,
) -> Report:
    """Measure with our guest, every kind in a machine of its own; *iterations* instead of the guest's own numbers.

    Raises SideError if a side cannot be measured at all.
    """
    kinds = [Kind(name, own.what, figures={side.name: Figure() for side in sides}) for name, own in OWN.items()]
    total = runs * len(kinds) * len(sides)
    steps = [(kind, side) for _ in range(runs) for kind in kinds for side in sides]
    for done, (kind, side) in enumerate(steps):
        figure = kind.figures[side.name]
        if figure.problem == TIMEOUT:
            continue
        progress(done, total, f"{kind.name} on {side.title}")
        command_line = f"bench={kind.name}" + ("" if iterations is None else f" iterations={iterations}")
        try:
            text = side.guest(command_line, OWN[kind.name].vcpus, timeout_s)
        except GuestTimeout:
            figure.fail(TIMEOUT, f"{timeout_s:g} s")
            continue
        except GuestFailure as error:
            figure.fail(FAILED, str(error))
            continue
        found = {name: int(ns) / int(count) for name, count, ns in _LINE.findall(text) if int(count)}
        if kind.name in found:
            figure.add(found[kind.name])
        else:
            figure.fail(MISSING)
    return Report("own guest", runs, _describe(sides), kinds)


# -- kvm-unit-tests

_TICKS = re.compile(rf"^(?P<part>  (?:{'|'.join(PARTS)}) )?(?P<name>\S+) (?P<ticks>\d+)$")
_SKIPPED = re.compile(r"^(?P<name>\S+) \(skipped\)$")


def entries_of(directory: Path) -> list[Entry]:
    """Return the entries of the build in *directory* that run the vmexit program. SuiteError if there are none."""
    found = [entry for entry in config.read(directory) if Path(entry.file).stem == PROGRAM]
    if not found:
        raise SuiteError(f"{directory}: no entry of {config.CONFIG} runs {PROGRAM}.flat")
    return found


def suite(
    directory: Path,
    sides: Sequence[Side],
    runs: int = 1,
    timeout_s: float | None = None,
    progress: Progress = _quiet,
) -> Report:
    """Measure with the vmexit entries of the build of kvm-unit-tests in *directory*, one at a time.

    Raises SuiteError if there is no build or no such entry, SideError if a side cannot be measured at all.
    """
    entries = entries_of(directory)
    rates = {side.name: side.tsc_hz() for side in sides}
    described = {name: {**facts, "tsc_hz": rates[name]} for name, facts in _describe(sides).items()}
    kinds: dict[tuple[str, str], Kind] = {}
    total = runs * len(entries) * len(sides)
    steps = [(entry, side) for _ in range(runs) for entry in entries for side in sides]
    for done, (entry, side) in enumerate(steps):
        if any(kind.figures[side.name].problem for key, kind in kinds.items() if key[0] == entry.name):
            continue  # it will not do better the next time
        progress(done, total, f"{entry.name} on {side.title}")
        (result,) = side.run_entries(directory, [entry], 1, timeout_s)
        for name, outcome in _figures_of(entry, result).items():
            kind = kinds.setdefault((entry.name, name), _suite_kind(name, entry, sides))
            if isinstance(outcome, int):
                kind.figures[side.name].add(outcome * 1e9 / rates[side.name])
            else:
                kind.figures[side.name].fail(*outcome)
    return Report(str(directory), runs, described, _in_order(kinds, entries))


def _suite_kind(name: str, entry: Entry, sides: Sequence[Side]) -> Kind:
    part, _, whole = name.rpartition(" ")
    what = SUITE.get(whole.partition(":")[0], "")
    if part:
        what = PARTS[part]
    return Kind(name, what, entry.name, {side.name: Figure() for side in sides})


def _in_order(kinds: dict[tuple[str, str], Kind], entries: Sequence[Entry]) -> list[Kind]:
    """Return the kinds in the configuration's order; the parts of one (``ipi``, ``eoi``) behind it."""
    order = {entry.name: index for index, entry in enumerate(entries)}
    return sorted(kinds.values(), key=lambda kind: order[kind.entry])


def _figures_of(entry: Entry, result: Result) -> dict[str, int | tuple[str, str]]:
    """Return ticks, or a problem and its detail, for every kind that *entry* asks for or printed."""
    wanted = arguments_of(entry)[0].split()
    found: dict[str, int | tuple[str, str]] = {}
    for line in result.log.splitlines():
        ticks, skipped = _TICKS.match(line), _SKIPPED.match(line)
        name = ticks["name"] if ticks else skipped["name"] if skipped else ""
        if not name or (wanted and _asked_for(name) not in wanted):
            continue
        if ticks:
            found[(ticks["part"] or "").lstrip() + name] = int(ticks["ticks"])
        else:
            found[name] = (SKIPPED, "the program skipped it")
    if result.status is not Status.PASS:
        return {name: _problem(result) for name in wanted or [entry.name]}
    given = {_asked_for(name.rpartition(" ")[2]) for name in found}
    return found | {name: (MISSING, "") for name in wanted if name not in given}


def _asked_for(name: str) -> str:
    """Return the argument that *name* answers: ``pci-mem`` for ``mmio-no-eventfd:pci-mem``."""
    return name.rpartition(":")[2]


def _problem(result: Result) -> tuple[str, str]:
    if result.status is Status.SKIP:
        return SKIPPED, result.why()
    return TIMEOUT if result.reason.startswith("timeout") else FAILED, result.why()
