# SPDX-License-Identifier: Apache-2.0
"""Entries of our own run on both KVMs."""

from pathlib import Path

import pytest
from tests.support.machines import open_device, open_soft

import softkvm.unittests
from softkvm.unittests import Result, Settings, Status, SuiteError

pytestmark = pytest.mark.guest


@pytest.fixture(params=["soft", "kvm"])
def accel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    (open_soft if name == "soft" else open_device)().close()
    return name


def run(suite: Path, name: str, accel: str = "soft", **settings: object) -> Result:
    return softkvm.unittests.run(suite, name, Settings(accel=accel, **settings))  # type: ignore[arg-type]


def test_pass_with_its_summary_and_checks(suite: Path, accel: str) -> None:
    result = run(suite, "pass", accel)
    assert result.line == "PASS pass (2 tests, 1 skipped)"
    assert [(s.status, s.name) for s in result.subtests] == [("PASS", "the first check"), ("SKIP", "the second check")]
    assert result.exit_status == 1
    assert result.exits["KVM_EXIT_IO"] >= len(result.log)
    assert not result.ignored
    assert not result.places


def test_fail_names_the_check(suite: Path, accel: str) -> None:
    result = run(suite, "fail", accel)
    assert result.line == "FAIL fail (2 tests, 1 unexpected failures)"
    assert result.why() == "the second check <&>"


def test_skip_and_abort(suite: Path, accel: str) -> None:
    assert run(suite, "skip", accel).line == "SKIP skip (1 tests, 1 skipped)"
    assert run(suite, "abort", accel).line == "FAIL abort (aborted)"


def test_hang_tells_where_and_the_last_exits(suite: Path, accel: str) -> None:
    result = run(suite, "hang", accel, timeout_scale=1)
    assert result.status is Status.FAIL
    assert result.reason.startswith("timeout; duration=2s; vCPU 0 at 0x4")
    assert result.places[0].symbol.startswith("hang_here")
    assert result.places[0].last_exits[-1] == "IO out 0x3f8/1"
    assert result.log.endswith("about to hang\n")


def test_scaled_limit_is_named_where_it_passes(suite: Path) -> None:
    result = run(suite, "hang", timeout_scale=0.5)
    assert result.reason.startswith("timeout; duration=1s, 0.5 times the suite's; vCPU 0 at")
    assert (result.timeout_s, result.suite_timeout_s) == (1, 2)


def test_triple_fault_is_a_failure_with_its_place(suite: Path) -> None:
    result = run(suite, "crash")
    assert result.status is Status.FAIL
    assert result.reason.startswith("triple fault")
    assert result.places


def test_processors_are_counted_by_fw_cfg_and_started(suite: Path, accel: str) -> None:
    result = run(suite, "smp", accel)
    assert result.log == "processors up: 3\n"
    assert result.status is Status.PASS
    assert result.vcpus == 3


def test_platform_has_what_test_programs_expect(suite: Path, accel: str) -> None:
    result = run(suite, "platform", accel)
    assert [s.name for s in result.subtests if s.status != "PASS"] == []
    assert result.status is Status.PASS
    assert result.summary == "14 tests"


def test_sleep_ends_at_the_waking_vector_in_real_mode(suite: Path, accel: str) -> None:
    result = run(suite, "sleep", accel)
    assert (result.status, result.log) == (Status.PASS, "sleeping\n")
    assert result.time_s < 10


def test_real_mode_finds_vectors_and_a_running_timer(suite: Path, accel: str) -> None:
    assert run(suite, "real", accel, timeout_s=10).line == "PASS real"


def test_arguments_are_one_string_and_ignored_options_are_named(suite: Path) -> None:
    result = run(suite, "arguments")
    assert result.log == "arguments: one  two 'three'\n"
    assert result.ignored == [
        "-overcommit cpu-pm=on",
        "-cpu +vmx (this KVM has not got it)",
    ]


def test_environment_is_a_module(suite: Path) -> None:
    result = run(suite, "environment", environment={"NR_CPUS": "2", "X": "y"})
    assert (result.status, result.log) == (Status.PASS, "NR_CPUS=2\nX=y\n")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("needs", "SKIP needs (needs -machine q35, -machine kernel-irqchip=split, -device edu)"),
        ("old", "SKIP old (needs i386 build)"),
        ("tcg", "SKIP tcg (tcg only)"),
        ("intel", "SKIP intel (needs an Intel processor (ept=Y))"),
        ("missing", "SKIP missing (nowhere.flat is not built)"),
    ],
)
def test_entries_that_cannot_run_are_skipped_with_the_reason(suite: Path, name: str, line: str) -> None:
    assert run(suite, name).line == line


def test_entry_for_manual_runs_runs_when_it_is_named(suite: Path) -> None:
    assert run(suite, "manual").status is Status.PASS


def test_parameters_of_the_software_kvm(suite: Path) -> None:
    assert run(suite, "pass", params={"ignore_msrs": "Y"}).notes == ["ignore_msrs=Y"]
    with pytest.raises(SuiteError, match=r"colour=Y: no such parameter; there are .*ignore_msrs"):
        run(suite, "pass", params={"colour": "Y"})


def test_unknown_name_is_an_error(suite: Path) -> None:
    with pytest.raises(SuiteError, match="no test named nothing"):
        run(suite, "nothing")


def test_result_survives_being_written_down(suite: Path) -> None:
    result = run(suite, "hang", timeout_s=1)
    assert Result.from_dict(result.as_dict()) == result
