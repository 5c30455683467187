# SPDX-License-Identifier: Apache-2.0
"""What becomes of the programs' ends; nothing here is timed but the program that never ends."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from softkvm.client import launch
from softkvm.reports.result import Result, Status
from softkvm.selftests.build import programs
from softkvm.selftests.runner import Settings, run_all, run_program
from softkvm.selftests.table import Need, Skip, Table

NOTHING = Table({}, {}, {})
VMX = Table({"skips": Skip("no VMX", "kvm_cpu_has(X86_FEATURE_VMX)")}, {}, {})


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs are no KVM clients: they start as they are, wherever Python has no shared library."""
    monkeypatch.setattr(launch, "environment", lambda before, settings: dict(before))


@pytest.fixture
def run(build: Path) -> Callable[[str, Settings], Result]:
    """Run a program by its name."""
    found = {program.name: program for program in programs(build)}
    return lambda name, settings: run_program(found[name], settings)


Run = Callable[[str, Settings], Result]


def test_status_0_passes(run: Run) -> None:
    result = run("x86_64/good", Settings(table=NOTHING))
    assert (result.status, result.log, result.exit_status) == (Status.PASS, "fine\n", 0)


def test_a_failure_says_what_the_program_said_last(run: Run) -> None:
    result = run("x86_64/bad", Settings(table=NOTHING))
    assert result.line == "FAIL x86_64/bad (line 7: rc: -1 errno: 22)"
    assert run("killed", Settings(table=NOTHING)).line == "FAIL killed (ended by SIGSEGV)"


def test_a_skip_for_the_expected_reason_has_the_tables(run: Run) -> None:
    assert run("x86_64/skips", Settings(table=VMX)).line == "SKIP x86_64/skips (no VMX)"


@pytest.mark.parametrize("table", [NOTHING, Table({"skips": Skip("no SVM", "X86_FEATURE_SVM")}, {}, {})])
def test_a_skip_that_is_not_expected_or_has_another_reason_fails(run: Run, table: Table) -> None:
    result = run("x86_64/skips", Settings(table=table))
    assert result.status is Status.FAIL
    assert "kvm_cpu_has(X86_FEATURE_VMX)" in result.reason


def test_a_program_that_passes_against_the_table_is_noted(run: Run) -> None:
    result = run("x86_64/good", Settings(table=Table({"good": Skip("old news", "x")}, {}, {})))
    assert (result.status, result.notes) == (Status.PASS, ["the table expects it to skip: old news"])


def test_what_is_taken_for_granted_is_looked_for_before(run: Run) -> None:
    pytest.importorskip("softkvm._softcpu")
    there, none = Need("KVM_CAP_IRQCHIP", "a"), Need("KVM_CAP_S390_PSW", "never on x86")
    table = Table({}, {"good": there, "bad": none}, {})
    assert run("x86_64/good", Settings(table=table)).status is Status.PASS
    assert run("x86_64/bad", Settings(table=table)).line == ("SKIP x86_64/bad (KVM_CAP_S390_PSW is 0: never on x86)")


def test_what_is_not_built_is_skipped(run: Run) -> None:
    assert run("x86_64/unbuilt", Settings(table=NOTHING)).line == "SKIP x86_64/unbuilt (not built)"


def test_a_program_that_does_not_end_is_ended_with_what_it_started(run: Run) -> None:
    result = run("endless", Settings(1.0, table=NOTHING))
    assert (result.line, result.log) == ("FAIL endless (timeout; duration=1s)", "started\n")


def test_results_have_the_programs_order_and_an_interrupt_ends_what_runs(build: Path) -> None:
    found = [program for program in programs(build) if program.name in ("endless", "x86_64/bad", "x86_64/good")]
    quick = [program for program in found if program.name != "endless"]
    assert [result.name for result in run_all(quick, Settings(table=NOTHING), 2)] == ["x86_64/good", "x86_64/bad"]

    class Interrupt(BaseException):
        pass

    def interrupt(running: list[tuple[str, float]]) -> None:
        if [name for name, _ in running] == ["endless"] and "sleep" in _children():
            raise Interrupt

    with pytest.raises(Interrupt):
        run_all(found, Settings(0, table=NOTHING), 3, tick=interrupt)
    assert "sleep" not in _children()


def _children() -> str:
    """Return the commands of this process's descendants."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    family = {str(os.getpid())}
    for _ in range(4):
        family |= {pid for pid, parent, *_ in rows if parent in family}
    return "\n".join(row[2] for row in rows if row[0] in family and row[0] != str(os.getpid()) and len(row) > 2)
