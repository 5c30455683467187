# SPDX-License-Identifier: Apache-2.0
"""How many guests a host has memory for, and how long they take when it is short: with memory that comes back, and not.

::

    from softkvm.bench import overcommit

    report = overcommit.measure(softkvm.open, overcommit.Options(guests=6, modes=("off", "reporting")))
    print(report.series["reporting"].fit)

Guest after guest is started and uses most of its memory once; then it does nothing. Whoever gives nothing back has that
memory for ever; with free page reporting, with hinting behind each run, or with the hypercall for unused pages, the
next guest gets it. A guest fits if all of its run, with all guests before it, is within the budget. Modes and
experiment are those of the mail threads (docs/threads.md, rows 5, 20, 21, 24), scaled.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import softkvm
from softkvm import abi, api
from softkvm.bench.host_budget import Cgroup, SwapModel, control_group, resident, swap_size
from softkvm.bench.linux import LinuxGuest, data_file
from softkvm.bench.walkers import BenchError as BenchError
from softkvm.closing import Closing
from softkvm.vmm.console import Console, ConsoleError
from softkvm.vmm.devices.virtio_balloon import Balloon, BalloonSpec
from softkvm.vmm.errors import StateError
from softkvm.vmm.machine import MIN_MEMORY, Config, Machine
from softkvm.vmm.memory import MIB

REPORT_VERSION: Final = 1
MODES: Final = {
    "off": "Linux, gives nothing back",
    "reporting": "Linux, free page reporting",
    "hinting": "Linux, free page hinting behind each run",
    "bare": "bare metal, gives nothing back",
    "hypercall": "bare metal, a hypercall for each unused huge page",
}
DEFAULT_MODES: Final = ("off", "reporting", "hinting", "hypercall")
ENFORCE: Final = ("auto", "cgroup", "accounting")
_SAMPLE_S: Final = 0.1
_SETTLE_S: Final = 8.0
"""How long a guest may take to report what is free: Linux begins two seconds behind."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; sizes in bytes."""

    guests: int = 6
    memory: int = 256 * MIB
    #: What a guest uses in its run; 0: five eighths of its memory.
    hog: int = 0
    #: What the host has for all guests; 0: 3.2 times a guest's memory.
    budget: int = 0
    modes: tuple[str, ...] = DEFAULT_MODES
    enforce: str = "auto"
    #: Of the accounting: the swap that the host has, and bytes that go there or come back in a second.
    swap: int = 1 << 40
    swap_speed: int = 100_000_000

    @property
    def hog_bytes(self) -> int:
        """What a guest uses, in whole mebibytes."""
        return (self.hog or self.memory * 5 // 8) // MIB * MIB

    @property
    def budget_bytes(self) -> int:
        """What the host has."""
        return self.budget or self.memory * 16 // 5


def check(options: Options) -> None:
    """Raise BenchError for what no run can be."""
    for mode in options.modes:
        if mode not in MODES:
            raise BenchError(f"mode={mode}: expected {', '.join(MODES)}")
    if options.guests < 1:
        raise BenchError(f"guests={options.guests}: expected at least 1")
    if options.memory < 2 * MIN_MEMORY or options.memory > 1 << 30:
        raise BenchError(
            f"memory={options.memory >> 20} MiB: expected {2 * MIN_MEMORY >> 20} MiB to 1024 MiB for a guest"
        )
    if not 0 < options.hog_bytes < options.memory:
        raise BenchError(f"hog={options.hog_bytes >> 20} MiB: expected less than the guest's memory")
    if options.swap_speed < 1:
        raise BenchError(f"swap_speed={options.swap_speed}: expected at least 1")
    if options.enforce not in ENFORCE:
        raise BenchError(f"enforce={options.enforce}: expected {', '.join(ENFORCE)}")


@dataclass(slots=True)
class Run:
    """One guest's run."""

    guest: int
    boot_s: float
    run_s: float
    #: What all guests had of the host at most while this one was started and ran, and when it had settled.
    peak: int
    after: int
    #: Modelled, with accounting: what had to go to swap and to come back for this run, and how long that takes.
    swapped_out: int = 0
    swapped_in: int = 0
    swap_s: float = 0.0
    fits: bool = True

    @property
    def seconds(self) -> float:
        """How long the run takes, swap and all."""
        return self.run_s + self.swap_s


@dataclass(slots=True)
class Series:
    """All runs of one mode."""

    mode: str
    enforced: str
    runs: list[Run] = field(default_factory=list)
    #: Seconds from the beginning; what all guests have of the host; what of it is in memory.
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    #: Why it ended before the last guest.
    ended: str = ""

    @property
    def fit(self) -> int:
        """How many guests fit."""
        return next((run.guest - 1 for run in self.runs if not run.fits), len(self.runs))


@dataclass(slots=True)
class Report:
    """What was found."""

    options: Options
    series: dict[str, Series] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        series = {mode: {**asdict(its), "fit": its.fit} for mode, its in self.series.items()}
        options = {**asdict(self.options), "hog": self.options.hog_bytes, "budget": self.options.budget_bytes}
        return {"version": REPORT_VERSION, "options": options, "series": series}


# -- guests


class _Guest(Closing):
    """A guest that can use its memory, and give it back."""

    machine: Machine

    def use(self, size: int, look: Callable[[], object]) -> None:
        """Use so many bytes, call *look* when it has them of the host, and need them no more."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until what is free has gone back to the host."""

    def close(self) -> None:
        """End it."""
        self.machine.close()


class _Linux(_Guest):
    def __init__(self, kvm: api.Kvm, options: Options, mode: str) -> None:
        spec = BalloonSpec(reporting=mode == "reporting", hinting=mode == "hinting")
        self._guest = LinuxGuest(kvm, options.memory, devices=() if mode == "off" else (spec,))
        self.machine = self._guest.machine
        self._balloon: Balloon | None = None if mode == "off" else self.machine.devices[0]
        if mode == "reporting":
            # What Linux reports it has not got meanwhile: half of so small a guest, while a busy host has it waiting.
            self.settle()

    def use(self, size: int, look: Callable[[], object]) -> None:
        self._guest.run(f"pages hog {size // MIB}", r"^hog \d+ pages")
        look()  # what is free again goes back two seconds later, or when it is asked for

    def settle(self) -> None:
        balloon = self._balloon
        if balloon is None:
            return
        if balloon.hinting is not None:
            try:
                balloon.hinting.reclaim()
            except StateError as error:
                raise BenchError(str(error)) from None
            return
        end = time.monotonic() + _SETTLE_S
        before, since = -1, time.monotonic()
        while time.monotonic() < end and (time.monotonic() - since < 3 or not balloon.reclaimed["reported"]):
            if balloon.reclaimed["reported"] != before:
                before, since = balloon.reclaimed["reported"], time.monotonic()
            time.sleep(0.05)


class _BareMetal(_Guest):
    """``guests/allocator``: an allocator that tells of each huge page that becomes free."""

    def __init__(self, kvm: api.Kvm, options: Options, *, hints: bool) -> None:
        def offer(entries: list[abi.kvm_cpuid_entry2]) -> list[abi.kvm_cpuid_entry2]:
            for entry in entries:
                if entry.function == abi.KVM_CPUID_FEATURES:
                    entry.eax |= 1 << abi.KVM_FEATURE_UNUSED_PAGE_HINT
            return entries

        def enable(machine: Machine) -> None:
            machine.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, abi.KVM_UNUSED_PAGE_HINT_ENABLE)

        self._console = Console()
        config = Config(options.memory, cpuid=offer, devices=enable) if hints else Config(options.memory)
        try:
            self.machine = Machine(kvm, config, self._console.output)
        except OSError as error:
            raise BenchError(f"this KVM has no hypercall for unused pages: {error.strerror}") from None
        try:
            self._console.attach(self.machine)
            self.machine.load(data_file("allocator.elf"))
            self.machine.start()
            self._expect(r"allocator of \d+ huge pages")
        except BaseException:
            self.machine.close()
            raise

    def use(self, size: int, look: Callable[[], object]) -> None:
        """All of its memory: its allocator knows no part."""
        self._console.send("a")
        self._expect(r"allocated \d+")
        look()
        self._console.send("f")
        self._expect(r"freed\b.*")

    def _expect(self, pattern: str) -> None:
        try:
            self._console.expect(pattern, 120)
        except ConsoleError as error:
            raise BenchError(f"the guest: {error}") from None


def _start(kvm: api.Kvm, options: Options, mode: str) -> _Guest:
    if mode in ("bare", "hypercall"):
        return _BareMetal(kvm, options, hints=mode == "hypercall")
    return _Linux(kvm, options, mode)


# -- the host


class _Watch:
    """Looks again and again at what the guests have of the host; a model of swap goes along."""

    def __init__(self, series: Series, model: SwapModel | None) -> None:
        self._series = series
        self._model = model
        self._ranges: list[list[tuple[int, int]]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._start = time.perf_counter()
        self.peak = 0
        self.in_memory = 0
        self._thread = threading.Thread(target=self._main, name="overcommit watch", daemon=True)
        self._thread.start()

    def add(self, machine: Machine) -> None:
        """Look at *machine*, too."""
        with self._lock:
            self._ranges.append([(ram.hva, ram.hva + ram.end - ram.start) for ram in machine.memory.ranges])

    def look(self) -> int:
        """Look now; return what all have."""
        with self._lock:
            held = resident(self._ranges)
            total = in_memory = sum(held)
            if self._model is not None:
                in_memory = self._model.look(held)
            self.peak = max(self.peak, total)
            self._series.samples.append((time.perf_counter() - self._start, total, in_memory))
            return total

    def begin(self, guest: int, touches: int) -> None:
        """*guest* runs now."""
        with self._lock:
            if self._model is not None:
                self._model.begin(guest, touches)

    def new_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.look()

    def _main(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.look()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()


def run_series(
    open_kvm: Callable[[], api.Kvm],
    options: Options,
    mode: str,
    progress: Callable[[str], None] = lambda what: None,
    *,
    cgroup: Cgroup | None = None,
    tell: Callable[[Series], None] = lambda series: None,
    start: Callable[[api.Kvm, Options, str], _Guest] = _start,
) -> Series:
    """Measure one mode, in this process; *tell* is called behind each run. BenchError for what cannot be measured."""
    model = None if cgroup is not None else SwapModel(options.budget_bytes, options.swap)
    series = Series(mode, "accounting" if cgroup is None else "cgroup")
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(open_kvm())
        watch = stack.enter_context(contextlib.closing(_Watch(series, model)))
        if cgroup is not None:
            cgroup.limit(cgroup.usage() + options.budget_bytes)
        for index in range(options.guests):
            watch.new_peak()
            before = (model.out, model.back) if model is not None else (0, 0)
            progress(f"{mode}: guest {index + 1} of {options.guests} starts")
            began = time.perf_counter()
            guest = stack.enter_context(start(kvm, options, mode))
            boot_s = time.perf_counter() - began
            watch.add(guest.machine)
            watch.begin(index, options.hog_bytes)
            progress(f"{mode}: guest {index + 1} of {options.guests} uses its memory")
            began = time.perf_counter()
            guest.use(options.hog_bytes, watch.look)
            run_s = time.perf_counter() - began
            peak = watch.peak
            progress(f"{mode}: guest {index + 1} of {options.guests} is done")
            guest.settle()
            run = Run(index + 1, boot_s, run_s, peak, watch.look(), fits=peak <= options.budget_bytes)
            if model is not None:
                run.swapped_out, run.swapped_in = model.out - before[0], model.back - before[1]
                run.swap_s = (run.swapped_out + run.swapped_in) / options.swap_speed
            else:
                run.fits = True  # it lives
            series.runs.append(run)
            tell(series)
            if model is not None and model.full:
                run.fits = False
                series.ended = "host and swap are full: it would kill a guest"
                tell(series)
                break
    return series


def measure(
    accel: str,
    open_kvm: Callable[[], api.Kvm],
    options: Options,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Run the measurement. With control groups, each mode has a process of its own, in which *accel* is opened."""
    check(options)
    report = Report(options)
    for mode in options.modes:
        if options.enforce == "accounting" or (options.enforce == "auto" and not swap_size()):
            series = run_series(open_kvm, options, mode, progress)
        else:
            found = _in_cgroup(accel, options, mode, progress)
            if found is None and options.enforce == "cgroup":
                raise BenchError("this process may not make a control group that limits memory")
            series = found or run_series(open_kvm, options, mode, progress)
        report.series[mode] = series
    return report


# -- a process in a control group


def _in_cgroup(accel: str, options: Options, mode: str, progress: Callable[[str], None]) -> Series | None:
    """Measure one mode in a process that the host limits; None if there can be no such group."""
    with control_group() as group:
        if group is None:
            return None
        where = [str(group.directory), group.limit_file, group.usage_file]
        request = {"accel": accel, "mode": mode, "options": asdict(options), "group": where}
        command = [sys.executable, "-m", "softkvm.bench.overcommit", json.dumps(request)]
        series = Series(mode, "cgroup")
        problem = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                kind, said = json.loads(line)
                if kind == "progress":
                    progress(said)
                elif kind == "series":
                    series = _series(said)
                else:
                    problem = said
        if problem:
            raise BenchError(problem)
        if process.returncode == -signal.SIGKILL:
            series.ended = f"the host killed guest {len(series.runs) + 1}: it had no more memory"
        elif process.returncode:
            raise BenchError(f"the process in the control group ended with status {process.returncode}")
        return series


def _series(said: dict[str, Any]) -> Series:
    runs = [Run(**run) for run in said.pop("runs")]
    samples = [(seconds, total, in_memory) for seconds, total, in_memory in said.pop("samples")]
    return Series(runs=runs, samples=samples, **said)


def _child(text: str) -> int:
    """Measure what *text* says, in its control group; say how it goes, line by line."""
    from pathlib import Path

    request = json.loads(text)
    options = Options(**{**request["options"], "modes": tuple(request["options"]["modes"])})
    directory, limit_file, usage_file = request["group"]
    group = Cgroup(Path(directory), limit_file, usage_file)

    def say(kind: str, what: Any) -> None:
        print(json.dumps([kind, what]), flush=True)

    def open_kvm() -> api.Kvm:
        return softkvm.open("/dev/kvm") if request["accel"] == "kvm" else softkvm.open()

    group.enter()
    try:
        run_series(
            open_kvm,
            options,
            request["mode"],
            lambda what: say("progress", what),
            cgroup=group,
            tell=lambda series: say("series", asdict(series)),
        )
    except (BenchError, OSError) as error:
        say("problem", str(error))
    return 0


# -- tables


def rows(report: Report) -> Iterator[list[str]]:
    """Yield a row per run, for people."""
    for mode, series in report.series.items():
        for run in series.runs:
            yield [
                mode,
                str(run.guest),
                f"{run.boot_s:.1f}",
                f"{run.run_s:.2f}",
                f"{run.swap_s:.2f}" if series.enforced == "accounting" else "-",
                f"{run.seconds:.2f}",
                f"{run.peak >> 20:,}",
                f"{run.after >> 20:,}",
                "yes" if run.fits else "no",
            ]


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
