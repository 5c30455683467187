# SPDX-License-Identifier: Apache-2.0
"""The measurement of performance counters: the guest does what is measured."""

from __future__ import annotations

import json

import pytest

from softkvm.bench import pmu
from softkvm.bench.pmu import BenchError, Options
from softkvm.cli.main import main
from softkvm.kvm import Kvm, Params

FEW = Options(exits=50, overflows=5, period=200, runs=2)


def test_everything_is_measured_on_both_kvms() -> None:
    with Kvm() as kvm, Kvm(Params(pmu_reprogram_always=True)) as anew:
        report = pmu.measure(kvm, anew, FEW)
    assert {name: len(runs) for name, runs in report.runs.items()} == dict.fromkeys(pmu.WHAT, 2)
    assert all(report.ns[name] > 0 for name in ("exit", "exit, cycles", "exit, instructions"))
    assert report.reprogramming is not None
    assert len(pmu.rows(report)) == len(pmu.WHAT) + 2


def test_a_cost_that_the_runs_do_not_show_is_not_said_to_be_one() -> None:
    runs = {"exit": [1000.0, 1300.0, 1100.0], "exit, cycles": [1010.0, 1290.0, 1080.0]}
    runs |= {"overflow": [200.0, 210.0, 220.0], "overflow, programmed anew": [900.0, 905.0, 910.0]}
    report = pmu.Report(FEW, {**runs, "exit, instructions": [1500.0, 1500.0, 1500.0]})
    table = dict(pmu.rows(report))
    assert table["an exit (CPUID), no counter"] == "1,100 ± 75"
    assert table["a counter's part in an entry when nothing changed"] == "under 8"
    assert table["what programming a counter anew costs"] == "695 ± 2"
    found = report.as_dict()
    assert (found["entry_ns"], found["entry_spread_ns"]) == (-10, 7.5)
    assert (found["reprogramming_ns"], found["spread_ns"]["overflow"]) == (695, 5)
    assert str(pmu.Figure.of([-3.0])) == "-3 (one run)", "nothing is known of its spread"


def test_without_counters_there_is_nothing_to_measure() -> None:
    with Kvm(Params(enable_pmu=False)) as kvm, pytest.raises(BenchError, match="no performance counters"):
        pmu.measure(kvm, None, FEW)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--exits", "20", "--overflows", "3", "--period", "200", "--runs", "1"]
    assert main(["bench", "pmu", *few]) == 0
    assert "an overflow" in capsys.readouterr().out
    assert main(["bench", "pmu", *few, "--json", "-"]) == 0
    assert set(json.loads(capsys.readouterr().out)["ns"]) == set(pmu.WHAT)


@pytest.mark.parametrize("option", ["--period=99", "--exits=0", "--runs=x"])
def test_bad_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pmu", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
