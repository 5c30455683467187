# SPDX-License-Identifier: Apache-2.0
"""docs/memory.md does what it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.examples import examples
from tests.support.guests import linux_guest

import softkvm
import softkvm.machine
from softkvm.machine import Machine

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

BLOCKS = examples("memory.md")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    linux_guest()
    with softkvm.Machine(memory=256, devices=["balloon reporting,hinting"]) as machine:
        machine.boot()
        machine.run("true")
        yield machine


@pytest.mark.parametrize(("line", "text"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_the_example_runs(machine: Machine, line: int, text: str) -> None:
    code = compile("\n" * (line - 1) + text, "docs/memory.md", "exec")
    exec(code, {"softkvm": softkvm, "machine": machine})
    assert machine.run("echo well").output == "well\n"
