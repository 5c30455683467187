# SPDX-License-Identifier: Apache-2.0
"""What page reporting costs: which guests take turns at what, and what is made of their figures."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from softkvm.bench import page_reporting
from softkvm.bench.page_reporting import BenchError, Options, Report
from softkvm.cli import bench_page_reporting
from softkvm.closing import Closing
from softkvm.vmm.memory import MIB


class FakeGuest(Closing):
    """Faults so many pages in a second as a table says."""

    made: list[FakeGuest] = []
    RATES = {"off": 1000, "kept": 990, "on": 950}

    def __init__(self, kvm: object, memory: int, vcpus: int, devices: tuple[Any, ...]) -> None:
        self.kept = ""
        self.devices = devices
        self.commands: list[str] = []
        self.executed = 0
        memory_of = SimpleNamespace(keep=lambda why: setattr(self, "kept", why))
        self.machine = SimpleNamespace(memory=memory_of, devices=[SimpleNamespace(reclaimed={"reported": 7 * MIB})])
        FakeGuest.made.append(self)

    def run(self, command: str, pattern: str = "", timeout_s: float = 0) -> re.Match[str] | None:
        self.commands.append(command)
        if not command.startswith("pages fault"):
            return None
        variant = "kept" if self.kept else "on" if self.devices else "off"
        self.executed += {"off": 100_000, "kept": 100_980, "on": 95_950}[variant]
        return re.search(pattern, f"fault {self.RATES[variant]} pages in 1000000000 ns")

    def instructions(self) -> int:
        return self.executed

    def close(self) -> None:
        pass


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(page_reporting, "LinuxGuest", FakeGuest)
    monkeypatch.setattr(FakeGuest, "made", [])

    class Kvm(Closing):
        def close(self) -> None:
            pass

    return page_reporting.measure(Kvm, Options(tasks=(1, 4), rounds=2))  # type: ignore[arg-type]


def test_three_guests_take_turns_in_every_setting(report: Report) -> None:
    off, kept, on = FakeGuest.made
    assert (len(off.devices), len(kept.devices), len(on.devices)) == (0, 1, 1)
    assert (off.kept, bool(kept.kept), on.kept) == ("", True, "")
    assert kept.devices[0].reporting
    faults = [command for command in off.commands if command.startswith("pages")]
    assert faults == ["pages fault 1 16 3"] * 2 + ["pages fault 4 16 3"] * 2 + faults[4:]
    assert len(faults) == 8
    assert off.commands == kept.commands == on.commands
    assert [command.split()[1] for command in on.commands if "hugepage" in command] == ["never", "always"]


def test_costs_are_percents_of_the_guest_without(report: Report) -> None:
    assert report.cost("off", 1, True) == 0
    assert report.cost("kept", 4, False) == pytest.approx(1.0)
    assert report.cost("on", 4, True) == pytest.approx(5.0)
    assert report.instruction_cost("kept", 1, True) == pytest.approx(2.0)  # 102 for a page against 100
    assert report.instruction_cost("on", 1, True) == pytest.approx(1.0)
    with pytest.raises(KeyError):
        report.figure("on", 2, True)
    found = report.as_dict()
    assert len(found["figures"]) == 12
    assert found["reported"] == {"kept": 7 * MIB, "on": 7 * MIB}


def test_the_table_has_a_row_for_each_setting(report: Report) -> None:
    text = bench_page_reporting.render(report)
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] in (["on"], ["off"])]
    assert [row[:7] for row in rows] == [
        [tasks, thp, "1,000", "990", "950", "+1.0", "+5.0"] for thp in ("off", "on") for tasks in ("1", "4")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(tasks=()), "tasks=: expected numbers from 1 to 16"),
        (Options(tasks=(17,)), "tasks=17: expected"),
        (Options(rounds=0), "rounds=0, seconds=3: expected at least 1"),
        (Options(memory=256 * MIB), "memory=256 MiB: expected 512 MiB or more for the tasks"),
    ],
)
def test_what_cannot_be_is_refused(options: Options, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        page_reporting.check(options)
