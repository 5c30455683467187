# SPDX-License-Identifier: Apache-2.0
"""What an exit costs: figures from both sources, and what is said where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.machines import open_soft

from softkvm.bench import vmexit
from softkvm.bench.sides import GuestFailure, GuestTimeout, SoftkvmSide
from softkvm.unittests import Entry, Result, Status, SuiteError

CONFIG = """\
[vmexit_cpuid]
file = vmexit.flat
test_args = 'cpuid'
groups = vmexit

[other]
file = other.flat

[vmexit_ipi]
file = vmexit.flat
smp = 2
test_args = 'ipi'

[vmexit_two]
file = vmexit.flat
test_args = 'mov_dr vmcall'
"""
CHATTER = "enabling apic\npaging enabled\ncr0 = 80010011\n"


class FakeSide:
    """Says what it is told to; ``calls`` are what it was asked for."""

    def __init__(
        self,
        name: str = "softkvm",
        guest: Callable[[str], str] | None = None,
        results: dict[str, list[Result]] | None = None,
        tsc_hz: float = 2e9,
    ) -> None:
        self.name = name
        self.title = name
        self.version = "0"
        self.calls: list[tuple[str, object]] = []
        self._guest = guest
        self._results = results or {}
        self._tsc_hz = tsc_hz

    def guest(self, command_line: str, vcpus: int, timeout_s: float) -> str:
        self.calls.append((command_line, vcpus))
        assert self._guest is not None
        return self._guest(command_line.split()[0].removeprefix("bench="))

    def run_entries(
        self,
        directory: Path,
        entries: list[Entry],
        jobs: int,
        timeout_s: float | None = None,
        tick: Callable[[list[tuple[str, float]]], None] = lambda running: None,
    ) -> list[Result]:
        self.calls += [(entry.name, jobs) for entry in entries]
        return [self._results[entry.name].pop(0) for entry in entries]

    def tsc_hz(self) -> float:
        return self._tsc_hz


def line(name: str, ns: int = 40_000, iterations: int = 20) -> str:
    return f"bench begins, 1 vcpus, tsc 1 Hz\nbench {name} iterations {iterations} checksum 1f ns {ns}\nbench ends\n"


def passed(name: str, text: str) -> Result:
    return Result(name, Status.PASS, log=CHATTER + text, exit_status=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    x86 = tmp_path / "x86"
    x86.mkdir()
    (x86 / "unittests.cfg").write_text(CONFIG)
    return tmp_path


# -- our own guest


def test_own_guest_figures_are_ns_of_one_round() -> None:
    side = FakeSide(guest=line)
    report = vmexit.own_guest([side])
    assert [kind.name for kind in report.kinds] == list(vmexit.OWN)
    assert all(kind.figures["softkvm"].ns == 2000 for kind in report.kinds)
    assert ("bench=ipi-pingpong", 2) in side.calls
    assert ("bench=cpuid", 1) in side.calls


def test_figure_is_the_median_of_the_runs() -> None:
    costs = iter(cost for cost in (20_000, 60_000, 30_000) for _ in vmexit.OWN)
    report = vmexit.own_guest([FakeSide(guest=lambda name: line(name, next(costs)))], runs=3)
    assert report.kinds[0].figures["softkvm"].runs_ns == [1000, 3000, 1500]
    assert report.kinds[0].figures["softkvm"].ns == 1500


def test_sides_take_turns_and_the_ratio_is_ours_over_theirs() -> None:
    ours, theirs = FakeSide(guest=line), FakeSide("qemu", lambda name: line(name, 10_000))
    report = vmexit.own_guest([ours, theirs], runs=2)
    assert report.kinds[0].ratio("softkvm", "qemu") == 4
    assert len(ours.calls) == len(theirs.calls) == 2 * len(vmexit.OWN)


def test_kind_that_fails_hangs_or_says_nothing_is_named_and_costs_no_other() -> None:
    def guest(name: str) -> str:
        if name == "in":
            raise GuestTimeout
        if name == "out":
            raise GuestFailure("triple fault")
        return "" if name == "mmio" else line(name)

    side = FakeSide(guest=guest)
    report = vmexit.own_guest([side], runs=2, timeout_s=7)
    problems = {kind.name: (figure.problem, figure.detail) for kind in report.kinds for figure in kind.figures.values()}
    assert problems["in"] == ("timeout", "7 s")
    assert problems["out"] == ("failed", "triple fault")
    assert problems["mmio"] == ("no figure", "")
    assert problems["lapic"] == ("", "")
    assert [call for call in side.calls if call[0] == "bench=in"] == [("bench=in", 1)]  # not twice the timeout


# -- kvm-unit-tests


def test_suites_ticks_become_ns_by_each_sides_rate(directory: Path) -> None:
    results = {
        "vmexit_cpuid": "cpuid 4000\n",
        "vmexit_ipi": "ipi 9000\n  ipi ipi 7000\n",
        "vmexit_two": "mov_dr 10\nvmcall 20\n",
    }
    sides = [
        FakeSide(name, results={entry: [passed(entry, text)] for entry, text in results.items()}, tsc_hz=hz)
        for name, hz in (("softkvm", 1e9), ("qemu", 4e9))
    ]
    report = vmexit.suite(directory, sides)
    figures = {kind.name: [figure.ns for figure in kind.figures.values()] for kind in report.kinds}
    assert figures == {
        "cpuid": [4000, 1000],
        "ipi": [9000, 2250],
        "ipi ipi": [7000, 1750],
        "mov_dr": [10, 2.5],
        "vmcall": [20, 5],
    }
    assert report.sides["qemu"]["tsc_hz"] == 4e9
    assert {kind.entry for kind in report.kinds} == {"vmexit_cpuid", "vmexit_ipi", "vmexit_two"}


def test_lines_of_other_things_are_no_figures(directory: Path) -> None:
    results = {
        "vmexit_cpuid": [passed("vmexit_cpuid", "iobar 4096\ncpuid 1\n")],
        "vmexit_ipi": [passed("vmexit_ipi", "")],
        "vmexit_two": [passed("vmexit_two", "mov_dr (skipped)\nvmcall 5\n")],
    }
    report = vmexit.suite(directory, [FakeSide(results=results)])
    found = {kind.name: (kind.figures["softkvm"].ns, kind.figures["softkvm"].problem) for kind in report.kinds}
    assert found == {"cpuid": (0.5, ""), "ipi": (None, "no figure"), "mov_dr": (None, "skipped"), "vmcall": (2.5, "")}


def test_argument_that_stands_for_several_kinds_has_a_row_for_each(directory: Path) -> None:
    (directory / "x86" / "unittests.cfg").write_text("[pci]\nfile = vmexit.flat\ntest_args = 'pci-mem pci-io'\n")
    text = "mmio-no-eventfd:pci-mem 10\nmmio-wildcard-eventfd:pci-mem 4\n"
    report = vmexit.suite(directory, [FakeSide(results={"pci": [passed("pci", text)]})])
    assert [(kind.name, kind.what, kind.figures["softkvm"].ns) for kind in report.kinds] == [
        ("mmio-no-eventfd:pci-mem", "store to a device of the machine monitor", 5),
        ("mmio-wildcard-eventfd:pci-mem", "store that signals an eventfd", 2),
        ("pci-io", "", None),
    ]


def test_entry_that_does_not_pass_is_failed_skipped_or_timed_out_and_not_run_again(directory: Path) -> None:
    results = {
        "vmexit_cpuid": [Result("vmexit_cpuid", Status.FAIL, "timeout; duration=90s")],
        "vmexit_ipi": [Result("vmexit_ipi", Status.SKIP, "needs more")],
        "vmexit_two": [Result("vmexit_two", Status.FAIL, "aborted", log="mov_dr 5\n")],
    }
    side = FakeSide(results=results)
    report = vmexit.suite(directory, [side], runs=2)
    assert {kind.name: kind.figures["softkvm"].problem for kind in report.kinds} == {
        "cpuid": "timeout",
        "ipi": "skipped",
        "mov_dr": "failed",
        "vmcall": "failed",
    }
    assert len(side.calls) == 3


def test_directory_without_such_entries_is_an_error(directory: Path) -> None:
    (directory / "x86" / "unittests.cfg").write_text("[other]\nfile = other.flat\n")
    with pytest.raises(SuiteError, match=r"no entry of unittests\.cfg runs vmexit"):
        vmexit.suite(directory, [FakeSide()])


def test_module_parameters_are_those_of_the_kvm_that_is_measured() -> None:
    open_soft().close()
    side = SoftkvmSide("soft", {"avic": "0", "halt_poll_ns": "7"})
    assert side.title == "softkvm avic=0 halt_poll_ns=7"
    with side.open() as kvm, open_soft() as other:
        params = kvm.params  # type: ignore[attr-defined]
        assert (params.avic, params.halt_poll_ns) == (False, 7)
        assert other.params.halt_poll_ns == 0  # type: ignore[attr-defined]
    with pytest.raises(SuiteError, match="no such parameter"):
        SoftkvmSide("soft", {"nothing": "0"})
