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
    assert report.reprogramming_ns is not None
    assert len(pmu.rows(report)) == len(pmu.WHAT) + 2


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
