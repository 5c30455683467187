# SPDX-License-Identifier: Apache-2.0
"""docs/memory.md does what it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from tests.support.examples import ROOT, examples
from tests.support.guests import linux_guest

import softkvm
import softkvm.machine
from softkvm.cli.main import main
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


RUNS = re.findall(r"^softkvm run (.+?)(?:  +#.*)?$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("arguments", RUNS)
def test_the_machine_of_the_example_can_be_built(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", *shlex.split(arguments)]) == 0
    assert "balloon" in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(RUNS) >= 3
    assert len(BLOCKS) >= 2
