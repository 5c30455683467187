# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest
from tests.support.fake_qemu import Reply, calls, fake_qemu
from tests.support.guests import ROOT, exits_image
from tests.support.machines import open_soft

from softkvm.bench import vmexit
from softkvm.cli.bench import render
from softkvm.cli.main import main

CONFIG = """\
[vmexit_cpuid]
file = vmexit.flat
test_args = 'cpuid'

[vmexit_missing]
file = vmexit.flat
test_args = 'missing'
"""
TSC = "bench begins, 1 vcpus, tsc 2000000000 Hz\nbench ends\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite whose vmexit program is ours."""
    directory = tmp_path / "suite" / "x86"
    directory.mkdir(parents=True)
    program = ROOT / "guests" / "build" / "multiboot.elf"
    if program.exists():
        shutil.copy(program, directory / "vmexit.flat")
    (directory / "unittests.cfg").write_text(CONFIG)
    return directory.parent


@pytest.fixture
def runnable() -> None:
    """Skips where the software CPU or our guest is not built."""
    open_soft().close()
    exits_image()


def own_replies(ns: int) -> dict[str, Reply]:
    return {f"bench={name}": (0, f"bench {name} iterations 10 checksum 0 ns {ns}\n", "") for name in vmexit.OWN}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs 0: expected a number from 1 to 1000"),
        (["--runs", "x"], "--runs x: expected a number from 1 to 1000"),
        (["--timeout", "0"], "--timeout 0: expected a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout nan: expected a number of seconds above 0"),
        (["--qemu", "/nowhere/qemu"], "--qemu /nowhere/qemu: no such program"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file or directory"),
        (["/nowhere"], "/nowhere: no such directory"),
        (["--qemu", "x", "--no-qemu"], "not allowed with"),
        (["--param", "avic"], "--param avic: expected NAME=VALUE"),
        (["--param", "avic=0", "--param", "none=1"], "--param none=1: no such parameter; there are avic, "),
        (["--param", "avic=0,none=1"], "--param none=1: no such parameter; there are avic, "),
        (["--params", "avic=maybe"], "--param avic=maybe: expected Y or N"),
        (["--accel", "tcg"], "invalid choice"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    open_soft().close()
    assert main(["bench", "vmexit", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("measurement", ["vmexit", "dirty-log", "demand-paging", "task-work", "pmu"])
def test_every_measurement_takes_module_parameters(measurement: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_soft().close()
    assert main(["bench", measurement, "--param", "halt_poll_ns=x"]) == 2
    assert capsys.readouterr().err.splitlines() == ["softkvm: --param halt_poll_ns=x: expected a number"]


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_bench_needs_a_measurement(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert "MEASUREMENT" in capsys.readouterr().err


def test_suite_without_a_vmexit_entry_is_a_usage_error(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "x86" / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    assert main(["bench", "vmexit", str(suite)]) == 2
    assert "no entry of unittests.cfg runs vmexit.flat" in capsys.readouterr().err


def test_problems_stand_in_the_table_and_below_it() -> None:
    good, bad = vmexit.Figure(), vmexit.Figure()
    good.add(1234.4)
    bad.fail("failed", "aborted")
    sides = {"softkvm": {"title": "softkvm", "version": ""}, "qemu": {"title": "QEMU TCG", "version": ""}}
    kinds = [vmexit.Kind("vmcall", "hypercall", figures={"softkvm": good, "qemu": bad})]
    assert render(vmexit.Report("own guest", 1, sides, kinds)).splitlines() == [
        "exit    what it does  softkvm ns  QEMU TCG ns  ratio",
        "------  ------------  ----------  -----------  -----",
        "vmcall  hypercall          1,234       failed",
        "",
        "vmcall on QEMU TCG: failed, aborted",
    ]


@pytest.mark.guest
@pytest.mark.usefixtures("runnable")
def test_own_guest_measures_every_kind_on_softkvm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "vmexit", "--no-qemu", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == "own guest"
    assert [kind["name"] for kind in report["kinds"]] == list(vmexit.OWN)
    assert all(kind["figures"]["softkvm"]["ns"] > 0 for kind in report["kinds"])


@pytest.mark.guest
@pytest.mark.usefixtures("runnable")
def test_own_guest_beside_qemu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = fake_qemu(tmp_path, own_replies(ns=1230) | {"bench=in": (1, "", "no")})
    file = tmp_path / "report.json"
    assert main(["bench", "vmexit", "--qemu", str(program), "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["exit", "what", "it", "does", "softkvm", "ns", "QEMU", "TCG", "ns", "ratio"]
    (cpuid,) = (line for line in printed if line.startswith("cpuid "))
    assert cpuid.split()[-2] == "123"
    assert printed[-1] == "in on QEMU TCG: failed, status 1: no"
    assert json.loads(file.read_text())["sides"]["qemu"]["version"] == "QEMU emulator version 0 (a stand-in)"
    assert len(calls(program)) == len(vmexit.OWN)


@pytest.mark.guest
@pytest.mark.usefixtures("runnable")
def test_suites_entries_beside_qemu(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies: dict[str, Reply] = {
        "bench=none": (0, TSC, ""),
        "cpuid": (1, "cpuid 500\n", ""),
        "missing": (None, "", ""),
    }
    program = fake_qemu(tmp_path, replies)
    options = ["--qemu", str(program), "--runs", "2", "--timeout", "5", "--json", "-"]
    assert main(["bench", "vmexit", str(suite), *options]) == 1  # one kind has no figure on softkvm
    report = json.loads(capsys.readouterr().out)
    cpuid, missing = report["kinds"]
    assert (cpuid["name"], cpuid["entry"], cpuid["what"]) == ("cpuid", "vmexit_cpuid", "CPUID")
    assert cpuid["figures"]["qemu"]["runs_ns"] == [250.0, 250.0]
    assert len(cpuid["figures"]["softkvm"]["runs_ns"]) == 2
    assert report["sides"]["softkvm"]["tsc_hz"] == 1e9
    assert report["sides"]["qemu"]["tsc_hz"] == 2e9
    assert missing["figures"]["softkvm"]["problem"] == "no figure"
    assert missing["figures"]["qemu"]["problem"] == "timeout"


@pytest.mark.guest
@pytest.mark.usefixtures("runnable")
def test_qemu_whose_clock_cannot_be_measured_is_one_line(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = fake_qemu(tmp_path, {})
    assert main(["bench", "vmexit", str(suite), "--qemu", str(program)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the rate of its TSC cannot be measured" in line
