# SPDX-License-Identifier: Apache-2.0
"""Clients in C whose sources are here (``programs/``), compiled once and run under ``softkvm exec``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from tests.support.clients import EXEC, TIMEOUT_S, Completed

__all__ = ["EXEC", "TIMEOUT_S"]

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a program; returns its path."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("clients")

    @cache
    def compiled(name: str, *options: str) -> Path:
        program = directory / "-".join((name, *options))
        flags = ("-O1", "-g", "-Wall", "-Wextra", "-pthread", *options)
        subprocess.run([compiler, *flags, "-o", program, PROGRAMS / f"{name}.c"], check=True, timeout=TIMEOUT_S)
        return program

    return compiled


@pytest.fixture
def client(build: Callable[..., Path]) -> Callable[..., Completed]:
    """Runs a program under ``softkvm exec``."""

    def run(
        program: str,
        *args: str,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> Completed:
        command = [*EXEC, *options, "--", str(build(program, *flags)), *args]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **(env or {})}
        )

    return run


@pytest.fixture
def holds(client: Callable[..., Completed]) -> Callable[..., None]:
    """Runs a case of a program, all of whose checks have to hold; nothing else is printed.

    That the KVM is ours is one of them (``open_kvm`` of ``client.h``): ``--stats`` would take other ways than without.
    """

    def run(program: str, case: str) -> None:
        done = client(program, case)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")

    return run


@pytest.fixture(scope="session")
def in_namespace() -> Callable[..., list[str]]:
    """Gives the command that does another with mounts of its own, which a line of shell has made."""
    unshare = ("unshare", "--map-root-user", "--mount", "--propagation", "private")
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")

    def command(mounts: str, *arguments: str) -> list[str]:
        return [*unshare, "sh", "-ec", f'{mounts}\nexec "$@"', "sh", *arguments]

    return command


@pytest.fixture
def holds_static(client: Callable[..., Completed]) -> Callable[..., None]:
    """As ``holds``, of a program that is linked statically: the loader runs it."""

    def run(program: str, case: str) -> None:
        done = client(program, case, flags=("-static",))
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")

    return run
