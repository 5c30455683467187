# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.support.guests import ROOT
from tests.support.machines import open_soft
from tests.unittests.conftest import CONFIG

from softkvm.cli.main import main
from softkvm.unittests.runner import DEVICES


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of our own entries; without the program if that is not built."""
    directory = tmp_path / "suite" / "x86"
    directory.mkdir(parents=True)
    program = ROOT / "guests" / "build" / "multiboot.elf"
    if program.exists():
        shutil.copy(program, directory / "probe.flat")
    (directory / "unittests.cfg").write_text(CONFIG)
    return directory.parent


@pytest.fixture
def runnable(suite: Path) -> Path:
    open_soft().close()
    if not (suite / "x86" / "probe.flat").exists():
        pytest.skip("guests/build/multiboot.elf is not built: make guests")
    return suite


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_list(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(suite), "--list", "--group", "quick"]) == 0
    assert [line.split() for line in lines(capsys)] == [
        ["pass", "probe.flat", "groups:", "quick", "good"],
        ["fail", "probe.flat", "groups:", "quick"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["--group", "nothing"],
        ["-j", "0"],
        ["-j", "x"],
        ["--timeout", "soon"],
        ["--timeout", "-1"],
        ["--timeout", "nan"],
        ["--timeout-scale", "0"],
        ["--timeout-scale", "x"],
        ["--param", "x"],
        ["--env", "=x"],
        ["--html", "/nowhere/x.html"],
        ["--html", ""],
        ["--html", "x", "--json", "x"],
        ["--timeout", "1e10"],
        ["--timeout-scale", "1e300"],
        ["--param", "colour=Y"],
        ["--param", "ignore_msrs=perhaps"],
        ["--param", "min_timer_period_us=few"],
        ["--accel", "tcg"],
    ],
)
def test_usage_errors_have_status_2(suite: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(suite), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_directory_without_a_build_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(tmp_path)]) == 2
    assert "expected a build of kvm-unit-tests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no test"),
        (b"no section\n", "has no test"),
        (b"[a]\nfile =\n", "has no file"),
        (b"\xff", "is no text"),
    ],
)
def test_damaged_configuration_is_a_usage_error(
    suite: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a run of no test, which nothing fails."""
    (suite / "x86" / "unittests.cfg").write_bytes(content)
    assert main(["unittests", str(suite)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"softkvm: {suite}/x86/unittests.cfg: ")
    assert message in line


def test_file_in_the_place_of_the_build_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["unittests", str(tmp_path / "file")]) == 2
    assert "expected a build of kvm-unit-tests" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["unittests", "{suite}"], ["bench", "vmexit", "--no-qemu"]])
def test_device_that_is_missing_is_one_line_and_status_1(
    suite: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DEVICES, "kvm", "/nowhere/kvm")
    assert main([*(text.format(suite=suite) for text in command), "--accel", "kvm"]) == 1
    assert capsys.readouterr().err == "softkvm: --accel kvm: /nowhere/kvm: No such file or directory\n"


def test_options_may_stand_before_names(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(suite), "--list", "pass", "--all", "fail"]) == 0
    assert [line.split()[0] for line in lines(capsys)] == ["pass", "fail"]


@pytest.mark.guest
def test_report_on_standard_output_stands_there_alone(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(runnable), "pass", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"PASS": 1, "FAIL": 0, "SKIP": 0}


@pytest.mark.guest
def test_report_that_cannot_be_written_does_not_cost_the_others(
    runnable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page"
    assert main(["unittests", str(runnable), "pass", "--junit", "/dev/full", "--html", str(page)]) == 1
    assert capsys.readouterr().err == "softkvm: --junit /dev/full: No space left on device\n"
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.guest
def test_configuration_and_images_that_are_wrong_are_named(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x86 = runnable / "x86"
    (x86 / "empty.flat").touch()
    (x86 / "unittests.cfg").write_text(
        "[empty]\nfile = empty.flat\n[late]\nfile = probe.flat\ntimeout = soon\n"
        "[past]\nfile = probe.flat\ntimeout = -5\n[none]\nfile = probe.flat\nsmp = 0\n"
        "[tiny]\nfile = probe.flat\nqemu_params = -m 1\n"
    )
    assert main(["unittests", str(runnable)]) == 1
    assert [line.split("; ")[0] for line in lines(capsys)[:-1]] == [
        "FAIL empty (empty.flat: kernel is empty)",
        "FAIL late ([late] timeout = soon: expected seconds)",
        "FAIL past ([past] timeout = -5: expected seconds)",
        "FAIL none (0 vCPUs: expected 1 to 16)",
        "FAIL tiny (memory of 1 MiB: expected 32 MiB to 1 TiB)",
    ]


@pytest.mark.guest
def test_limit_of_0_is_none(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runnable / "x86" / "unittests.cfg").write_text("[free]\nfile = probe.flat\ntest_args = pass\ntimeout = 0\n")
    assert main(["unittests", str(runnable)]) == 0
    assert lines(capsys) == ["PASS free (2 tests, 1 skipped)", "1 PASS, 0 FAIL, 0 SKIP"]


@pytest.mark.guest
def test_results_are_printed_written_and_in_the_status(
    runnable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("junit", "json", "html", "markdown")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    status = main(["unittests", str(runnable), "pass", "fail", "old", "-j", "2", *options])
    assert status == 1
    printed = lines(capsys)
    assert sorted(printed[:-1]) == [
        "FAIL fail (2 tests, 1 unexpected failures)",
        "PASS pass (2 tests, 1 skipped)",
        "SKIP old (needs i386 build)",
    ]
    assert printed[-1] == "1 PASS, 1 FAIL, 1 SKIP"
    assert [item["name"] for item in json.loads(files["json"].read_text())["results"]] == ["pass", "fail", "old"]
    assert ElementTree.parse(files["junit"]).getroot()[0].get("failures") == "1"
    assert files["html"].read_text().startswith("<!doctype html>")
    assert "| fail | FAIL |" in files["markdown"].read_text()


@pytest.mark.guest
def test_status_is_0_when_nothing_failed(runnable: Path) -> None:
    assert main(["unittests", str(runnable), "pass", "skip", "old"]) == 0


@pytest.mark.guest
def test_verbose_shows_the_log_and_what_was_ignored(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(runnable), "arguments", "-v"]) == 0
    printed = lines(capsys)
    assert "  | arguments: one  two 'three'" in printed
    assert "  ignored: -overcommit cpu-pm=on" in printed


@pytest.mark.guest
def test_hang_shows_where(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests", str(runnable), "hang", "--timeout", "1"]) == 1
    printed = lines(capsys)
    assert printed[0].startswith("FAIL hang (timeout; duration=1s; vCPU 0 at 0x4")
    assert "hang_here" in printed[1]


@pytest.mark.guest
def test_pass_beyond_the_suites_limit_is_said(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runnable / "x86" / "unittests.cfg").write_text("[slow]\nfile = probe.flat\ntest_args = pass\ntimeout = 0.0001\n")
    assert main(["unittests", str(runnable), "--timeout-scale", "1000000"]) == 0
    assert lines(capsys) == [
        "PASS slow (2 tests, 1 skipped)",
        "  took 0 s, the suite's limit is 0.0001 s",
        "1 PASS, 0 FAIL, 0 SKIP; 1 took longer than the suite's own limit",
    ]


@pytest.mark.guest
def test_entries_for_manual_runs_wait_for_all(runnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runnable / "x86" / "unittests.cfg").write_text(
        "[manual]\nfile = probe.flat\ntest_args = pass\ngroups = nodefault\n"
    )
    assert main(["unittests", str(runnable)]) == 0
    assert lines(capsys)[0] == "SKIP manual (test marked as manual run only)"
    assert main(["unittests", str(runnable), "--all"]) == 0
    assert lines(capsys)[0] == "PASS manual (2 tests, 1 skipped)"
