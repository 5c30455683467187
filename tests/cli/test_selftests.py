# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from tests.selftests.conftest import MAKEFILE, PROGRAMS

from softkvm.cli.main import main
from softkvm.client import launch


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of programs of ours, which are no KVM clients."""
    monkeypatch.setattr(launch, "environment", lambda before, settings: dict(before))
    (tmp_path / "kvm" / "x86_64").mkdir(parents=True)
    (tmp_path / "kvm" / "Makefile").write_text(MAKEFILE)
    for name, script in PROGRAMS.items():
        path = tmp_path / "kvm" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return tmp_path / "kvm"


def test_list_tells_what_is_not_built(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftests", str(build), "--list", "good", "x86_64/unbuilt"]) == 0
    assert capsys.readouterr().out.splitlines() == ["x86_64/good", "x86_64/unbuilt  (not built)"]


def test_lines_and_reports_say_the_same(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tap, report = tmp_path / "r.tap", tmp_path / "r.json"
    status = main(["selftests", str(build), "good", "bad", "--tap", str(tap), "--json", str(report)])
    assert status == 1
    assert capsys.readouterr().out.splitlines() == [
        "PASS x86_64/good",
        "FAIL x86_64/bad (line 7: rc: -1 errno: 22)",
        "1 PASS, 1 FAIL, 0 SKIP",
    ]
    assert tap.read_text().splitlines()[:4] == ["TAP version 13", "1..2", "ok 1 x86_64/good", "not ok 2 x86_64/bad"]
    assert json.loads(report.read_text())["suite"] == "kvm-selftests"


def test_a_report_on_standard_output_takes_the_lines_place(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftests", str(build), "good", "--tap", "-"]) == 0
    assert capsys.readouterr().out == "TAP version 13\n1..1\nok 1 x86_64/good\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["-j", "0"],
        ["--timeout", "-1"],
        ["--param", "colour=1"],
        ["--params", "colour=1"],
        ["--tap", "x", "--html", "x"],
    ],
)
def test_usage_errors_have_status_2(build: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftests", str(build), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_directory_without_a_build_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftests", str(tmp_path)]) == 2
    assert "expected tools/testing/selftests/kvm" in capsys.readouterr().err
