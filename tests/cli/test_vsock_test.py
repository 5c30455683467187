# SPDX-License-Identifier: Apache-2.0
"""``softkvm vsock-test``: what it lists, how cases are named, what it refuses, its table."""

from __future__ import annotations

import pytest

from softkvm.cli.main import main
from softkvm.cli.vsock_test import _suite, _table
from softkvm.reports import formats
from softkvm.reports.result import Result, Status
from softkvm.vsocktest.cases import CASES


def test_it_lists_the_cases_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vsock-test", "--list"]) == 0
    assert capsys.readouterr().out == "".join(f"{number}\t{case.name}\n" for number, case in enumerate(CASES))


def test_cases_are_picked_and_skipped_by_number_or_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["vsock-test", "--list", "--pick", "3", "--pick", CASES[7].name, "--pick", "5", "--skip", "3"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"5\t{CASES[5].name}\n7\t{CASES[7].name}\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--pick", "42"], "--pick 42: expected a case's name, or its number from 0 to 41"),
        (["--skip", "SOCK"], "--skip SOCK: expected a case's name"),
        (["--port", "0"], "--port 0: expected a number from 1 to 65535"),
        (["--kernels", "/nowhere"], "--kernels /nowhere: expected a file"),
        (["--mode", "both"], "--mode: invalid choice"),
    ],
)
def test_what_it_cannot_do_is_one_line(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vsock-test", *arguments]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


def test_the_table_has_a_line_for_each_case_and_a_column_for_each_way() -> None:
    results = [
        Result("guest as client: one", Status.PASS, time_s=0.5),
        Result("guest as client: two", Status.FAIL),
        Result("guest as server: two", Status.SKIP),
    ]
    assert _table(results).splitlines() == [
        "     guest as client  guest as server",
        "one  PASS 0.50 s      -",
        "two  FAIL             SKIP",
    ]
    assert "softkvm vsock-test` runs the suite of the kernel's" in formats.markdown(results, _suite("soft"))
