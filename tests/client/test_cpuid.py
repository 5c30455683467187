# SPDX-License-Identifier: Apache-2.0
"""CPUID that a client executes is KVM's, however the client is linked; other illegal instructions stay its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import EXEC, TIMEOUT_S, Completed

CASES = ["is_the_one_of_kvm", "illegal_instructions_are_the_clients", "instructions_that_it_names_can_be_executed"]

#: With symbols alone, with a table of unwinding, and with neither.
LINKED = {"static": ("-static",), "static-pie": ("-static-pie", "-fPIE"), "stripped": ("-static", "-s")}


@pytest.mark.parametrize("case", CASES)
def test_cpuid_of_a_dynamic_client(case: str, holds: Callable[..., None]) -> None:
    holds("cpuid", case)


@pytest.mark.parametrize("options", [(), ("--loader",)])
@pytest.mark.parametrize("case", CASES[:2])
def test_cpuid_of_a_client_that_is_a_library(
    case: str, options: tuple[str, ...], build: Callable[..., Path], client: Callable[..., Completed]
) -> None:
    library = build("cpuid", "-shared", "-fPIC", "-Dmain=client")
    done = client("library", str(library), case, options=options)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize("linked", LINKED)
@pytest.mark.parametrize("case", CASES)
def test_cpuid_of_a_static_client(case: str, linked: str, build: Callable[..., Path], tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    program = build("cpuid", *LINKED[linked])
    command = [*EXEC, "--stats", str(stats), "--", str(program), case]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert json.loads(stats.read_text())["cpuid_sites"] > 1  # the C library's own, too
