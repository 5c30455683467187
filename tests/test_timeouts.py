# SPDX-License-Identifier: Apache-2.0
"""The time limit of tests holds for those, too, that take the signal it comes by."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TAKEN = {"SIGALRM", "ITIMER_REAL", "alarm"}
MARK = "OWN_ALARM"

STUCK = """
import signal
import time
from tests.support.timeouts import OWN_ALARM

{mark}
def test_stuck() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    time.sleep({sleep_s})
"""


def taking(module: ast.Module) -> Iterator[str]:
    """Yield the functions of *module* that name pytest-timeout's signal or timer and have no mark."""
    for statement in module.body:
        if isinstance(statement, ast.Assign) and MARK in ast.unparse(statement.value):
            return  # pytestmark
    for statement in module.body:
        marks = [ast.unparse(mark) for mark in getattr(statement, "decorator_list", [])]
        named = {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
        if named & TAKEN and MARK not in marks:
            yield getattr(statement, "name", ast.unparse(statement))


def test_tests_that_take_the_alarm_say_so() -> None:
    found = {path.name: list(taking(ast.parse(path.read_text()))) for path in TESTS.rglob("*.py")}
    assert not {name: functions for name, functions in found.items() if functions}


def test_what_takes_the_alarm_is_found() -> None:
    assert list(taking(ast.parse(STUCK.format(mark="", sleep_s=0)))) == ["test_stuck"]
    assert list(taking(ast.parse(STUCK.format(mark="@OWN_ALARM", sleep_s=0)))) == []


def test_time_limit_holds_for_a_test_that_takes_the_alarm(tmp_path: Path) -> None:
    test = tmp_path / "test_stuck.py"
    test.write_text(STUCK.format(mark="@OWN_ALARM", sleep_s=600))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "3", "--rootdir", tmp_path, test],
        capture_output=True, text=True, timeout=250, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout" in done.stdout + done.stderr
