# SPDX-License-Identifier: Apache-2.0
"""How the times of kvm-unit-tests' entries are added up."""

import pytest

from benchmarks import common
from benchmarks.unittests import SideRuns, outcome_of, totals
from softkvm.unittests import Result, Status


def result(status: Status, time_s: float, reason: str = "", limit_s: float = 30) -> Result:
    return Result("x", status, reason, time_s=time_s, timeout_s=limit_s, suite_timeout_s=30)


PASSED = result(Status.PASS, 2)
FAILED = result(Status.FAIL, 1)
SKIPPED = result(Status.SKIP, 0.5)
TIMED_OUT = result(Status.FAIL, 30.2, "timeout; duration=30s")


def test_time_is_the_median_and_the_status_the_worst_of_the_runs() -> None:
    assert outcome_of([PASSED, result(Status.PASS, 5), result(Status.PASS, 3)]).seconds == 3
    assert outcome_of([PASSED, FAILED]).status == "fail"
    assert outcome_of([FAILED, TIMED_OUT]).status == "timeout"


def test_timeout_counts_as_its_limit_and_is_marked() -> None:
    outcome = outcome_of([TIMED_OUT])
    assert (outcome.seconds, outcome.mark()) == (30, "timeout, 30 s")


@pytest.mark.parametrize(("seconds", "mark"), [(29, ""), (47, "over the suite's 30 s")])
def test_pass_under_a_scaled_limit_is_marked(seconds: float, mark: str) -> None:
    assert outcome_of([result(Status.PASS, seconds, limit_s=90)]).mark() == mark


def test_totals_are_over_what_passes_here_and_over_what_passes_on_both() -> None:
    ours = {"a": PASSED, "b": PASSED, "c": PASSED, "d": FAILED, "e": PASSED}
    theirs = {"a": PASSED, "b": TIMED_OUT, "c": FAILED, "d": PASSED, "e": SKIPPED}
    sides = {
        common.SOFTKVM: SideRuns([9.0], {name: outcome_of([one]) for name, one in ours.items()}),
        common.QEMU: SideRuns([9.0], {name: outcome_of([one]) for name, one in theirs.items()}),
    }
    found = totals(sides)
    assert found["pass on softkvm"] == {
        "entries": 4,
        "seconds": {common.SOFTKVM: 8, common.QEMU: 2 + 30 + 1 + 0.5},
        "not_passing": {common.SOFTKVM: {}, common.QEMU: {"skip": 1, "fail": 1, "timeout": 1}},
    }
    assert found["pass on both"]["entries"] == 1
    assert found["pass on both"]["seconds"] == {common.SOFTKVM: 2, common.QEMU: 2}


def test_totals_of_one_side_alone() -> None:
    assert list(totals({common.SOFTKVM: SideRuns([1.0], {"a": outcome_of([PASSED])})})) == ["pass on softkvm"]
