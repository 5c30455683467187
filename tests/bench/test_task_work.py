# SPDX-License-Identifier: Apache-2.0
"""The measurement of task work: every sample is taken, on either KVM, and nothing comes before it was called for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.machines import KVMS

from softkvm.bench import task_work
from softkvm.cli.main import main


@pytest.mark.parametrize("kind", sorted(KVMS))
def test_each_kind_of_guest_does_what_is_called_for(kind: str) -> None:
    with KVMS[kind]() as kvm:
        report = task_work.measure(kvm, 10)
    assert set(report.samples) == set(task_work.GUESTS)
    for samples in report.samples.values():
        assert len(samples) == 10
        assert samples == sorted(samples)
        assert samples[0] >= 0  # no timer is early


def test_percentiles_are_samples() -> None:
    report = task_work.Report({"loop": list(range(100))})
    assert [report.percentile("loop", percent) for percent in (0, 50, 99, 100)] == [0, 50, 99, 99]


def test_it_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KVMS["soft"]().close()  # skips where it is not built
    path = tmp_path / "work.json"
    assert main(["bench", "task-work", "--samples", "3", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(task_work.GUESTS)
    written = json.loads(path.read_text())
    assert {name: len(samples) for name, samples in written["samples"].items()} == dict.fromkeys(task_work.GUESTS, 3)
    assert set(written["ns"]["timer"]) == {"p0", "p50", "p90", "p99", "p100"}


@pytest.mark.parametrize("samples", ["0", "x", "1000001"])
def test_bad_usage_is_one_line_and_status_2(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "task-work", "--samples", samples]) == 2
    err = capsys.readouterr().err
    assert err == f"softkvm: --samples {samples}: expected a number from 1 to 1000000\n"
