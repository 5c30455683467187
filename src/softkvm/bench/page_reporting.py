# SPDX-License-Identifier: Apache-2.0
"""What free page reporting costs a guest that faults pages in, and does so all the time.

::

    from softkvm.bench import page_reporting

    report = page_reporting.measure(softkvm.open, page_reporting.Options(tasks=(1, 16)))
    print(report.cost("on", 16, thp=True))

As ``page_fault1`` of will-it-scale: processes map memory, touch every page and unmap it, again and again. Three guests
do so by turns, so that what else the host does meanwhile meets all alike: one without a balloon; one that reports free
pages to a host that does not take them, as with an assigned device; one whose pages are taken. The mail threads of rows
5 and 24 (docs/threads.md) measured so.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from softkvm import api
from softkvm.bench.linux import LinuxGuest
from softkvm.bench.walkers import BenchError as BenchError
from softkvm.vmm.devices.virtio_balloon import BalloonSpec
from softkvm.vmm.memory import MIB

REPORT_VERSION: Final = 1
VARIANTS: Final = {
    "off": "no reporting",
    "kept": "reported, and the host does not take it",
    "on": "reported, and the host takes it",
}
_PAGE_FAULTS: Final = r"^fault (\d+) pages in (\d+) ns"
_THP: Final = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; sizes in bytes."""

    tasks: tuple[int, ...] = (1, 16)
    thp: tuple[bool, ...] = (False, True)
    vcpus: int = 2
    memory: int = 768 * MIB
    #: Of each task.
    task_memory: int = 16 * MIB
    #: How long a round takes: Linux reports every two seconds.
    seconds: int = 3
    rounds: int = 3


def check(options: Options) -> None:
    """Raise BenchError for what no run can be."""
    if not options.tasks or not all(1 <= tasks <= 16 for tasks in options.tasks):
        raise BenchError(f"tasks={','.join(map(str, options.tasks))}: expected numbers from 1 to 16")
    if options.rounds < 1 or options.seconds < 1:
        raise BenchError(f"rounds={options.rounds}, seconds={options.seconds}: expected at least 1")
    needed = max(options.tasks) * options.task_memory
    if needed * 2 > options.memory:
        raise BenchError(f"memory={options.memory >> 20} MiB: expected {2 * needed >> 20} MiB or more for the tasks")


@dataclass(frozen=True, slots=True)
class Figure:
    """Pages in a second, of each round."""

    variant: str
    tasks: int
    thp: bool
    rates: tuple[float, ...]
    #: Processor time of this process, nanoseconds for a page, of each round: what else the host does matters less.
    cpu_ns: tuple[float, ...]
    #: What the guest executes for a page, of each round; 0 where KVM does not count that.
    instructions: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def cpu_ns_per_page(self) -> float:
        """The median."""
        return statistics.median(self.cpu_ns)


@dataclass(slots=True)
class Report:
    """What was found."""

    options: Options
    figures: list[Figure] = field(default_factory=list)
    #: Bytes that the guests have reported and the host has taken.
    reported: dict[str, int] = field(default_factory=dict)

    def figure(self, variant: str, tasks: int, thp: bool) -> Figure:
        """Return a figure; KeyError if it was not measured."""
        for found in self.figures:
            if (found.variant, found.tasks, found.thp) == (variant, tasks, thp):
                return found
        raise KeyError((variant, tasks, thp))

    def cost(self, variant: str, tasks: int, thp: bool) -> float:
        """Return how many percent fewer pages a second that is than without reporting: the median of the rounds'.

        The guests take turns in each round, so a round's rates go together.
        """
        base, figure = self.figure("off", tasks, thp), self.figure(variant, tasks, thp)
        return statistics.median(
            100 * (1 - rate / reference) for rate, reference in zip(figure.rates, base.rates, strict=True)
        )

    def cpu_cost(self, variant: str, tasks: int, thp: bool) -> float:
        """Return how many percent more processor time of the host's a page takes than without reporting."""
        base, figure = self.figure("off", tasks, thp), self.figure(variant, tasks, thp)
        return statistics.median(100 * (ns / less - 1) for ns, less in zip(figure.cpu_ns, base.cpu_ns, strict=True))

    def instruction_cost(self, variant: str, tasks: int, thp: bool) -> float:
        """Return how many percent more instructions a page takes: the guest's own part of the cost, on any host."""
        base, figure = self.figure("off", tasks, thp), self.figure(variant, tasks, thp)
        pairs = zip(figure.instructions, base.instructions, strict=True)
        return statistics.median(100 * (count / less - 1) if less else 0.0 for count, less in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        figures = []
        for figure in self.figures:
            place = figure.variant, figure.tasks, figure.thp
            medians = {"rate": figure.rate, "cpu_ns_per_page": figure.cpu_ns_per_page}
            costs = {"cost_percent": self.cost(*place), "cpu_cost_percent": self.cpu_cost(*place)}
            costs["instruction_cost_percent"] = self.instruction_cost(*place)
            figures.append({**asdict(figure), **medians, **costs})
        return {
            "version": REPORT_VERSION,
            "options": asdict(self.options),
            "figures": figures,
            "reported": self.reported,
        }


def measure(
    open_kvm: Callable[[], api.Kvm], options: Options, progress: Callable[[str], None] = lambda what: None
) -> Report:
    """Run the measurement. BenchError for what cannot be measured here."""
    check(options)
    report = Report(options)
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(open_kvm())
        guests = {}
        for variant in VARIANTS:
            progress(f"the guest starts: {VARIANTS[variant]}")
            devices = () if variant == "off" else (BalloonSpec(reporting=True),)
            guests[variant] = stack.enter_context(LinuxGuest(kvm, options.memory, options.vcpus, devices))
        guests["kept"].machine.memory.keep("as with an assigned device")
        for thp in options.thp:
            for guest in guests.values():
                guest.run(f"echo {'always' if thp else 'never'} > {_THP}")
            for tasks in options.tasks:
                found: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in VARIANTS}
                for number in range(options.rounds):
                    for variant, guest in guests.items():
                        progress(
                            f"{tasks} task{'s' * (tasks > 1)}, huge pages {'on' if thp else 'off'}: "
                            f"{VARIANTS[variant]} ({number + 1}/{options.rounds})"
                        )
                        found[variant].append(_faults(guest, tasks, options))
                for variant, rounds in found.items():
                    report.figures.append(Figure(variant, tasks, thp, *zip(*rounds, strict=True)))
        report.reported = {
            variant: guest.machine.devices[0].reclaimed["reported"]
            for variant, guest in guests.items()
            if variant != "off"
        }
    return report


def _faults(guest: LinuxGuest, tasks: int, options: Options) -> tuple[float, float, float]:
    """Return how many pages a second the guest gets through; of one page, processor time of ours, and instructions."""
    command = f"pages fault {tasks} {options.task_memory // MIB} {options.seconds}"
    before, executed = time.process_time_ns(), guest.instructions()
    found = guest.run(command, _PAGE_FAULTS, 60 + 20 * options.seconds)
    used, executed = time.process_time_ns() - before, guest.instructions() - executed
    pages = int(found[1])
    return pages * 1e9 / int(found[2]), used / pages, executed / pages


def rows(report: Report) -> Iterator[list[str]]:
    """Yield a row for each number of tasks, with and without huge pages."""
    for thp in report.options.thp:
        for tasks in report.options.tasks:
            row = [str(tasks), "on" if thp else "off"]
            row += [f"{report.figure(variant, tasks, thp).rate:,.0f}" for variant in VARIANTS]
            row += [f"{report.cost(variant, tasks, thp):+.1f}" for variant in ("kept", "on")]
            row += [f"{report.cpu_cost(variant, tasks, thp):+.1f}" for variant in ("kept", "on")]
            yield [*row, *(f"{report.instruction_cost(variant, tasks, thp):+.1f}" for variant in ("kept", "on"))]
