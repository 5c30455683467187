# SPDX-License-Identifier: Apache-2.0
"""``softkvm exec``'s own words: what it refuses, and that it says nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXEC = (sys.executable, "-m", "softkvm.cli.main", "exec")
OPENS = (sys.executable, "-c", "import os; os.open('/dev/kvm', os.O_RDWR)")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDEVMODE"}
    return subprocess.run([*EXEC, *args], check=False, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ((), 2, "expected CMD, the client to run"),
        (("--",), 2, "expected CMD, the client to run"),
        (("--param", "nrips", "--", "true"), 2, "--param nrips: expected NAME=VALUE"),
        (("--param", "nrips=2", "--", "true"), 2, "nrips=2: expected Y or N"),
        (("--params", "avic=0,halt_poll_ns=x", "--", "true"), 2, "halt_poll_ns=x: expected a number"),
        (("--param", "avic=0", "--params", "nope=1", "--", "true"), 2, "nope=1: no such parameter"),
        (("--plugin", "/nowhere.py", "--", "true"), 2, "--plugin /nowhere.py: No such file or directory"),
        (("--trace", "/nowhere/trace", "--", "true"), 2, "--trace /nowhere/trace: No such file or directory"),
        (("--trace", "-", "--", "true"), 2, "--trace -: expected a file: the standard output is the client's"),
        (
            ("--trace", "/dev/null", "--stats", "/dev/null", "--", "true"),
            2,
            "expected another file than that of --trace",
        ),
        (("--", "/nowhere/client"), 127, "/nowhere/client: No such file or directory"),
        (("--", "/etc/passwd"), 126, "/etc/passwd: Permission denied"),
    ],
)
def test_bad_usage_is_one_line(args: tuple[str, ...], status: int, words: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("softkvm: ") and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15)])
def test_status_and_signal_are_the_clients_and_nothing_is_printed(script: str, status: int) -> None:
    done = run("--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_plugin_that_fails_is_one_line_and_open_fails(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def softkvm_plugin(policy):\n    raise RuntimeError('boom')\n")
    done = run("--plugin", str(plugin), "--", *OPENS)
    lines = done.stderr.splitlines()
    assert lines[0] == f"softkvm: {plugin}: softkvm_plugin: RuntimeError: boom (plugin.py:2)"
    assert "OSError: [Errno 5]" in lines[-1]


def test_a_plugin_has_the_last_word(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "def softkvm_plugin(policy):\n"
        "    seen = []\n"
        "    policy.vm_created.append(seen.append)\n"
        "    policy.at_end += [lambda: 1 / 0, lambda: print(len(seen), 'VMs')]\n"
    )
    program = "import fcntl, os; [fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE01, 0)]; os._exit(3)"
    done = run("--plugin", str(plugin), "--", sys.executable, "-c", program)
    assert (done.returncode, done.stdout) == (3, "1 VMs\n")
    assert done.stderr == "softkvm: at_end: ZeroDivisionError: division by zero (plugin.py:4)\n"


@pytest.mark.parametrize("option", ["--trace", "--stats", "--trace-kvm"])
def test_a_file_that_cannot_be_written_is_one_line_and_changes_nothing(option: str) -> None:
    program = "import fcntl, os; print(fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE00, 0))"
    done = run(option, "/dev/full", "--", sys.executable, "-c", program)
    assert (done.returncode, done.stdout) == (0, "12\n")
    assert done.stderr == f"softkvm: {option} /dev/full: No space left on device\n"


def test_a_program_beside_us_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hello-beside").touch()
    monkeypatch.chdir(tmp_path)
    assert run("--", "hello-beside").stderr == (
        "softkvm: hello-beside: No such file or directory in PATH; ./hello-beside is\n"
    )


def test_an_exception_of_ours_in_a_request_is_one_line_and_eio(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def softkvm_plugin(policy):\n    policy.vm_created.append(lambda vm: 1 / 0)\n")
    program = "import fcntl, os; fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE01, 0)"
    done = run("--plugin", str(plugin), "--", sys.executable, "-c", program)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("softkvm: ") and "division by zero" in lines[0]
    assert "OSError: [Errno 5]" in lines[-1]
