# SPDX-License-Identifier: Apache-2.0
"""A statically linked client that a dynamically linked program starts has KVM as one that ``softkvm exec`` starts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.clients import TIMEOUT_S, run_client


@pytest.mark.parametrize("way", ["execve", "execv", "execvp", "execvpe", "posix_spawn", "posix_spawnp", "vfork"])
def test_by_whatever_function_it_is_started(build: Callable[..., Path], tmp_path: Path, way: str) -> None:
    command: list[str | Path] = [build("starts"), way, build("environments", "-static"), "works"]
    done = run_client(command, tmp_path / "stats")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_script_whose_interpreter_is_a_static_client(build: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "client").symlink_to(build("environments", "-static"))
    script = tmp_path / "script"
    script.write_text(f"#! {tmp_path}/client works\n")
    script.chmod(0o755)
    done = run_client([build("starts"), "execv", script, "more"], tmp_path / "stats")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.parametrize("way", ["execvp", "execvpe", "posix_spawnp"])
def test_by_a_name_that_is_looked_for(build: Callable[..., Path], tmp_path: Path, way: str) -> None:
    client = build("environments", "-static")
    (tmp_path / "a-static-client").symlink_to(client)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "a-static-client").write_text("not executable")
    path = f"{tmp_path / 'first'}:/nonexistent:{tmp_path}:{os.environ['PATH']}"
    command: list[str | Path] = [build("starts"), way, "a-static-client", "works"]
    done = run_client(command, tmp_path / "stats", env={**os.environ, "PATH": path})
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_by_a_shell_and_by_python(build: Callable[..., Path], tmp_path: Path) -> None:
    client = build("environments", "-static")
    commands: list[list[str | Path]] = [
        ["sh", "-c", f"cd {client.parent} && ./{client.name} works; ./{client.name} works"],
        ["env", "A=b", client, "works"],
        ["python3", "-c", f"import subprocess; subprocess.run([{str(client)!r}, 'works'], check=True)"],
        ["make", "-f", "-", "all"],
    ]
    (tmp_path / "Makefile").write_text(f"all:\n\t@{client} works\n")
    commands[-1] = ["make", "-s", "-C", tmp_path, "all"]
    for command in commands:
        done = run_client(command, tmp_path / "stats")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", ""), command


def test_by_a_script(build: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#! {build('environments', '-static')}  works \n")
    script.chmod(0o755)
    for way in ("execve", "posix_spawn", "vfork"):
        done = run_client([build("starts"), way, script, "and", "more"], tmp_path / "stats")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("first", ["-static", "-static-pie"])
@pytest.mark.parametrize("way", ["execve", "posix_spawn", "vfork"])
def test_by_a_static_client(build: Callable[..., Path], tmp_path: Path, way: str, first: str) -> None:
    starts = build("starts", first, *(["-fPIE"] if first == "-static-pie" else []))
    client = build("environments", "-static")
    for command in ([client, "works"], [build("environments"), "works"], ["/bin/sh", "-c", f"{client} works"]):
        done = run_client([starts, way, *command], tmp_path / "stats")
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_static_program_that_is_no_client_runs_behind_a_static_client(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    # The filter of system calls goes with the process, and both have the same addresses.
    source = tmp_path / "hello.c"
    source.write_text('#include <stdio.h>\nint main(int c, char **v) { return c != 3 || printf("%s\\n", v[2]) < 0; }\n')
    program = tmp_path / "hello"
    subprocess.run(["cc", "-static", "-o", program, source], check=True, timeout=TIMEOUT_S)
    for command in ([program, "a", "said"], ["/bin/sh", "-c", f"{program} a said"]):
        done = run_client([build("starts", "-static"), "execve", *command], tmp_path / "stats")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "said\n"), command


def test_what_cannot_be_started_is_the_kernels_error(build: Callable[..., Path], tmp_path: Path) -> None:
    done = run_client([build("starts"), "nothing", "x"], tmp_path / "stats")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_dynamic_client_and_what_is_none_are_started_as_they_are(build: Callable[..., Path], tmp_path: Path) -> None:
    for way in ("execve", "posix_spawn", "execvp"):
        done = run_client([build("starts"), way, build("environments"), "works"], tmp_path / "stats")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
        done = run_client([build("starts"), way, "/bin/echo", "said"], tmp_path / "stats")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "said\n")
