# SPDX-License-Identifier: Apache-2.0
"""``softkvm snapshot`` as a process: machines go on from a directory, once and many times."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.machines import open_soft

from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.snapshot.directory import save

SNAPSHOT = (sys.executable, "-m", "softkvm.cli.main", "snapshot")

#: Real mode: sends back what it receives, and powers off for a 'q'.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee 3c71 75ef ba0406 b80034 ef f4")
#: Prints "tick\n" ten thousand times, and powers off.
TICKS = (
    bytes.fromhex("b91027")
    + b"".join(bytes.fromhex("baf803") + bytes([0xB0, byte, 0xEE]) for byte in b"tick\n")
    + bytes.fromhex("49 75df")
    + bytes.fromhex("ba0406 b80034 ef f4")
)


def snapshot_of(code: bytes, path: Path) -> Path:
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB)) as machine:
        machine.load(code, raw=True)
        save(machine, path, extra={"accel": "soft", "kernel": "flat code"})
    return path


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot_of(ECHO, tmp_path_factory.mktemp("echo") / "one")


@pytest.fixture(scope="module")
def ticks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot_of(TICKS, tmp_path_factory.mktemp("ticks") / "one")


def snapshot(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SNAPSHOT, *args], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_machine_goes_on_with_the_users_console(echo: Path) -> None:
    done = snapshot("restore", echo, stdin="hello q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello q", "")


def test_the_end_is_that_of_run(echo: Path) -> None:
    done = snapshot("restore", echo, "--timeout", "1")
    assert done.returncode == 5
    assert done.stderr == "softkvm: timeout: 1 s\n"


def test_a_signal_ends_it(echo: Path) -> None:
    with subprocess.Popen([*SNAPSHOT, "restore", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_clones_tell_their_lines_apart_and_each_ends_by_itself(ticks: Path) -> None:
    done = snapshot("restore", ticks, "--clones", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"softkvm: 3 clones of {ticks} run, after ")
    lines = done.stdout.splitlines()
    for number in (1, 2, 3):
        assert lines.count(f"{number}| tick") == 10_000


def test_clones_have_files_of_their_own(ticks: Path, tmp_path: Path) -> None:
    done = snapshot("restore", ticks, "--clones", "2", "--console", f"file:{tmp_path}/log")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.1", "log.2"]
    assert (tmp_path / "log.2").read_text() == "tick\n" * 10_000


def private_bytes(pid: int) -> int:
    """What a process has that no other shares."""
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(row[1]) << 10 for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_clones_share_what_they_do_not_write(echo: Path) -> None:
    command = [*SNAPSHOT, "restore", str(echo), "--clones", "5", "--console", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"5 clones" in process.stderr.readline()
        own = [private_bytes(child) for child in children(process.pid)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stderr.read() == b"softkvm: stopped: SIGTERM\n"
    assert len(own) == 5
    assert max(own) <= 15 * MIB, [size / MIB for size in own]


def test_a_killed_clone_takes_no_other_with_it(echo: Path) -> None:
    command = [*SNAPSHOT, "restore", str(echo), "--clones", "3", "--console", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        one, *others = children(process.pid)
        os.kill(one, signal.SIGKILL)
        time.sleep(0.2)
        assert process.poll() is None
        assert all(os.path.exists(f"/proc/{other}") for other in others)
        for other in others:
            os.kill(other, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGKILL


def test_clones_end_with_a_parent_that_is_killed(echo: Path) -> None:
    command = [*SNAPSHOT, "restore", str(echo), "--clones", "2", "--console", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        clones = [os.pidfd_open(child) for child in children(process.pid)]
        process.kill()
        for clone in clones:
            assert select.select([clone], [], [], 60)[0]
            os.close(clone)


def test_info_says_what_it_is_of(echo: Path) -> None:
    done = snapshot("info", echo, "--verify")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["machine"] == "32 MiB, 1 vCPU"
    assert rows["kernel"] == "flat code"
    assert rows["memory"].endswith(" MiB stored, checksum as it should be")
    assert json.loads(snapshot("info", echo, "--json").stdout)["machine"]["memory_size"] == 32 * MIB


@pytest.mark.parametrize(
    ("args", "status", "why"),
    [
        (["restore", "/nonexistent"], 2, "/nonexistent: it is no snapshot: there is no manifest.json"),
        (["info", "/nonexistent"], 1, "/nonexistent: it is no snapshot: there is no manifest.json"),
        (["restore", "ONE", "--clones", "0"], 2, "--clones 0: expected a number from 1 to 1000"),
        (["restore", "ONE", "--console", "virtio"], 2, "--console virtio: expected stdio, pty, file:PATH or none"),
        (["restore", "ONE", "--timeout", "soon"], 2, "--timeout soon: expected a number of seconds above 0, up to 1e9"),
        (["restore"], 2, "expected DIR; `softkvm snapshot restore --help` explains"),
        ([], 2, "expected ACTION; `softkvm snapshot --help` explains"),
    ],
)
def test_what_is_wrong_is_one_line(echo: Path, args: list[str], status: int, why: str) -> None:
    done = snapshot(*[str(echo) if arg == "ONE" else arg for arg in args])
    assert (done.returncode, done.stderr) == (status, f"softkvm: {why}\n")


def test_damaged_memory_is_told_of(echo: Path, tmp_path: Path) -> None:
    for file in echo.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "memory").open("r+b") as memory:
        memory.write(b"!")
    done = snapshot("info", tmp_path, "--verify")
    assert (done.returncode, done.stderr) == (1, f"softkvm: {tmp_path}: memory is damaged: its checksum is another\n")
