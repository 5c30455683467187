# SPDX-License-Identifier: Apache-2.0
"""Clients that are built with sanitizers run under ``softkvm exec``, and are told of their own faults alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.client.conftest import PROGRAMS
from tests.support.clients import EXEC, TIMEOUT_S, Completed

#: What builds the client: with the sanitizer's library shared and in the program, of both compilers.
BUILDS = {
    "address, gcc": ("gcc", "-fsanitize=address"),
    "address in the program, gcc": ("gcc", "-fsanitize=address", "-static-libasan", "-rdynamic"),
    "address, clang": ("clang", "-fsanitize=address"),
    "leak, gcc": ("gcc", "-fsanitize=leak"),
    "memory, clang": ("clang", "-fsanitize=memory"),
    "thread in the program, gcc": ("gcc", "-fsanitize=thread", "-static-libtsan"),
    "thread, clang": ("clang", "-fsanitize=thread"),
    "undefined, gcc": ("gcc", "-fsanitize=undefined", "-fno-sanitize-recover"),
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the program with a sanitizer; skips where there is none."""
    directory = tmp_path_factory.mktemp("sanitized")

    def build(*command: str) -> Path:
        if not shutil.which(command[0]):
            pytest.skip(f"no {command[0]}")
        program = directory / re.sub(r"\W+", "-", " ".join(command))
        if not program.exists():
            whole = [*command, "-g", "-O1", "-pthread", "-o", str(program), str(PROGRAMS / "sanitized.c")]
            done = subprocess.run(whole, check=False, capture_output=True, timeout=TIMEOUT_S)
            if done.returncode:
                pytest.skip(f"{' '.join(command)} cannot link")
            if subprocess.run([program], check=False, capture_output=True, timeout=TIMEOUT_S).returncode:
                pytest.skip("the sanitizer does not start here")  # as where addresses are laid out as it cannot have it
        return program

    return build


def run(program: Path, case: str) -> Completed:
    # A sanitizer's options may be in the environment of the tests.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    command = [*EXEC, "--", str(program), case]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)


@pytest.mark.parametrize("name", BUILDS)
def test_a_sanitizer_finds_nothing_in_a_client_that_has_no_fault(name: str, sanitized: Callable[..., Path]) -> None:
    done = run(sanitized(*BUILDS[name]), "clean")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize("name", [name for name in BUILDS if name.startswith(("address", "leak"))])
def test_what_the_client_itself_leaks_is_found(name: str, sanitized: Callable[..., Path]) -> None:
    done = run(sanitized(*BUILDS[name]), "leak")
    assert done.returncode
    assert re.findall(r"leak of (\d+) byte", done.stderr) == ["4321"], done.stderr


def test_thread_sanitizers_shared_library_is_refused_in_a_line(sanitized: Callable[..., Path]) -> None:
    done = run(sanitized("gcc", "-fsanitize=thread"), "clean")
    assert "softkvm: ThreadSanitizer's shared library would hold signals back" in done.stderr
    assert "-static-libtsan" in done.stderr
    assert done.returncode
