# SPDX-License-Identifier: Apache-2.0
"""docs/scripting.md does what it says. The examples for pytest run in test_pytest_plugin.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.examples import examples
from tests.support.guests import linux_guest

import softkvm
import softkvm.machine
from softkvm.machine import Machine
from softkvm.script.shell import Shell

pytestmark = pytest.mark.guest

BLOCKS = [(line, text) for line, text in examples("scripting.md") if "def test_" not in text]


@pytest.fixture(scope="module")
def machine(softkvm_snapshots: Callable[[dict[str, Any]], Path]) -> Iterator[Machine]:
    linux_guest()
    with Machine.restored(softkvm_snapshots({"vcpus": 2})) as machine:
        machine.start()
        Shell(machine.console).run("true", 60, b"")  # threads that input starts are there before the first test
        yield machine


@pytest.mark.parametrize(("line", "text"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_the_example_runs(machine: Machine, line: int, text: str) -> None:
    code = compile("\n" * (line - 1) + text, "docs/scripting.md", "exec")
    exec(code, {"softkvm": softkvm, "machine": machine})
    machine.detach()
    assert machine.run("echo well").output == "well\n"
