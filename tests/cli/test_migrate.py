# SPDX-License-Identifier: Apache-2.0
"""``softkvm migrate``, ``snapshot save`` and ``run --incoming``: machines of other processes are saved, and move."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")  # what comes on COM1 goes out again
FAR_S = 60.0


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def softkvm(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, *args], capture_output=True, text=True, timeout=FAR_S, check=False)


class Running:
    """A process with a machine that sends back what it receives."""

    def __init__(self, *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [*SOFTKVM, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def answers(self, text: bytes) -> bool:
        """Whether its guest sends back *text*."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()
        return self.process.stdout.read(len(text)) == text

    def said(self) -> str:
        """A line that it says of itself."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode()

    def end(self) -> int:
        """End it; its status."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=FAR_S)
        return self.process.returncode


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Running]:
    image = tmp_path / "image"
    image.write_bytes(ECHO)
    running = Running("run", "--kernel", f"flat:{image}", "--mem", "32M", "--name", "web", "--timeout", "120")
    assert running.answers(b"here")
    yield running
    running.end()


@pytest.fixture
def incoming(tmp_path: Path) -> Iterator[Running]:
    running = Running("run", "--incoming", f"unix:{tmp_path}/move", "--name", "there", "--timeout", "120")
    assert running.said() == f"softkvm: waiting for a machine at unix:{tmp_path}/move\n"
    yield running
    running.end()


def test_a_machine_moves_to_the_process_that_waits(web: Running, incoming: Running, tmp_path: Path) -> None:
    moved = softkvm("migrate", "web", f"unix:{tmp_path}/move")
    assert moved.returncode == 0, moved.stderr
    assert moved.stdout.startswith("web has moved: ")
    assert "downtime" in moved.stdout
    assert web.process.wait(FAR_S) == 0
    assert web.said() == f"softkvm: migrated: to unix:{tmp_path}/move\n"
    assert incoming.answers(b"there")
    machines = {one["name"]: one["state"] for one in json.loads(softkvm("list", "--json").stdout)}
    assert machines == {"there": "running"}
    assert not (tmp_path / "move").exists()


def test_a_machine_moves_by_tcp_on_loopback(web: Running) -> None:
    target = Running("run", "--incoming", "tcp:127.0.0.1:0", "--timeout", "120")
    try:
        where = target.said().split()[-1]
        assert softkvm("migrate", "web", where).returncode == 0
        assert target.answers(b"there")
    finally:
        target.end()


def test_a_target_that_is_not_there_changes_nothing(web: Running, tmp_path: Path) -> None:
    refused = softkvm("migrate", "web", f"unix:{tmp_path}/nobody")
    assert refused.returncode == 1
    assert refused.stderr.endswith(f"unix:{tmp_path}/nobody: No such file or directory\n")
    assert web.answers(b"still here")


def wait_for_name(name: str) -> None:
    """A restored machine listens behind its first output only."""
    end = time.monotonic() + FAR_S
    while name not in (one["name"] for one in json.loads(softkvm("list", "--json").stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_running_machine_is_saved_and_goes_on(web: Running, tmp_path: Path) -> None:
    saved = softkvm("snapshot", "save", "web", tmp_path / "one", "--watch")
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout.startswith(f"web is saved to {tmp_path}/one: ")
    assert web.answers(b"here")
    changes = softkvm("snapshot", "save", "web", tmp_path / "two", "--base", tmp_path / "one", "--end")
    assert changes.returncode == 0, changes.stderr
    assert web.process.wait(FAR_S) == 7
    again = softkvm("snapshot", "save", "web", tmp_path / "one")
    assert again.returncode == 1
    restored = Running("snapshot", "restore", tmp_path / "two", "--name", "again", "--timeout", "120")
    try:
        assert restored.answers(b"again")
        wait_for_name("again")
        taken = softkvm("snapshot", "save", "again", tmp_path / "one")
        assert (taken.returncode, taken.stderr.partition(": ")[2].partition(": ")[2]) == (
            1,
            f"{tmp_path}/one: it exists, expected a name for a new directory\n",
        )
        assert restored.answers(b"still")
    finally:
        restored.end()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("migrate", "web"), "expected WHERE, or --cancel"),
        (("migrate", "web", "unix:/x", "--cancel"), "expected WHERE, or --cancel"),
        (("migrate", "web", "unix:/x", "--downtime", "no"), "--downtime no: expected a number of seconds above 0"),
        (("run", "--incoming", "fd:3"), "--incoming: fd:3: expected unix:PATH or tcp:127.0.0.1:PORT"),
        (("run", "--incoming", "unix:/x", "--kernel", "k"), "--incoming: the machine comes as it is; --kernel is"),
        (("run", "--incoming", "unix:/x", "--rng"), "--incoming: the machine comes as it is; --rng is there, too"),
    ],
)
def test_what_is_wrong_is_one_line(args: tuple[str, ...], why: str) -> None:
    done = softkvm(*args)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(f"softkvm: {why}")
    assert done.stderr.count("\n") == 1


def test_cancelling_what_does_not_move_is_refused(web: Running) -> None:
    refused = softkvm("migrate", "web", "--cancel")
    assert refused.returncode == 1
    assert refused.stderr.endswith("the machine does not move\n")


# -- processes that are killed

SIDE = """
import os, random, sys, time
import softkvm
from softkvm.vmm.errors import MigrationError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.migration.source import Migration
from softkvm.vmm.migration.stream import Listener, connect
from softkvm.vmm.migration.target import listen_for

COUNT = bytes.fromhex("31c0 8ed8 ff060090 ebfa")  # counts the word at 0x9000 up
side, where = sys.argv[1:]

def alive(machine):
    before = machine.memory.read(0x9000, 2)
    deadline = time.monotonic() + 20
    while machine.memory.read(0x9000, 2) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    return machine.memory.read(0x9000, 2) != before and not machine.ended.is_set()

kvm = softkvm.open()
if side == "target":
    with Listener(where) as listener:
        print("ready", flush=True)
        channel = listener.accept()
    try:
        machine = listen_for(channel, kvm)
    except MigrationError:
        print("refused", flush=True)
        os._exit(0)
    machine.start()
    print("alive" if alive(machine) else "dead", flush=True)
else:
    machine = Machine(kvm, Config(256 << 20))
    machine.load(COUNT, raw=True)
    machine.memory.view[64 << 20 : 192 << 20] = random.Random(1).randbytes(1 << 20) * 128
    machine.start()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        Migration(machine, connect(where)).run()
        print("moved", flush=True)
    except MigrationError:
        print("alive" if alive(machine) else "dead", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("killed", ["source", "target"])
def test_whichever_side_is_killed_there_is_one_machine(killed: str, seed: int, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/move"
    sides = {}
    for side in ("target", "source"):
        sides[side] = subprocess.Popen(
            [sys.executable, "-c", SIDE, side, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stdout = sides[side].stdout
        assert stdout is not None
        assert stdout.readline() == "ready\n"
    source_input = sides["source"].stdin
    assert source_input is not None
    source_input.write("go\n")
    source_input.flush()
    time.sleep(random.Random(seed).choice((0.02, 0.15, 0.4)) * random.Random(seed + 9).uniform(0.3, 1.5))
    sides[killed].send_signal(signal.SIGKILL)
    said = {}
    for side, process in sides.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            said[side] = process.communicate(timeout=FAR_S)[0].strip()
        process.kill()
        process.wait()
    if killed == "target":
        assert said["source"] in ("alive", "moved")
        if said["source"] == "alive":
            assert said["target"] == ""  # it has not said that it runs
    else:
        assert said["target"] in ("alive", "refused")
        if said["source"] == "moved":
            assert said["target"] == "alive"
