# SPDX-License-Identifier: Apache-2.0
"""``softkvm list``, ``stop``, ``pause``, ``resume``, ``reset``, ``console``, ``debug``, ``version``."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")  # what comes on COM1 goes out again
POWER_OFF_ON_BUTTON = bytes.fromhex("ba0006 ed a90001 74fa ba0406 b80034 ef ebfe")  # PM1_STS.PWRBTN_STS: S5
RESET_ONCE = bytes.fromhex("b80020 8ed8 fe060000 803e000002 7304 b003 e692 ebfe")
FAR_S = 60


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "softkvm"


def softkvm(*args: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, *args], capture_output=True, text=True, timeout=FAR_S, check=False, **more)  # type: ignore[call-overload,no-any-return]


def machines() -> dict[str, str]:
    """The states of machines, by name."""
    return {one["name"]: one["state"] for one in json.loads(softkvm("list", "--json").stdout)}


RunDetached = Callable[..., str]


@pytest.fixture
def detached(tmp_path: Path) -> Iterator[RunDetached]:
    """Run code in the background; what was printed is the machine's name."""
    pids: list[int] = []

    def run(code: bytes, *options: str) -> str:
        image = tmp_path / "image"
        image.write_bytes(code)
        done = softkvm("run", "--detach", "--kernel", f"flat:{image}", "--timeout", "120", *options)
        assert done.returncode == 0, done.stderr
        name = done.stdout.strip()
        pids.extend(one["pid"] for one in json.loads(softkvm("list", "--json").stdout) if one["name"] == name)
        return name

    yield run
    for pid in pids:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def test_a_machine_in_the_background_from_its_start_to_its_end(detached: RunDetached, runtime: Path) -> None:
    assert detached(POWER_OFF_ON_BUTTON, "--name", "one") == "one"
    assert machines() == {"one": "running"}
    assert softkvm("pause", "one").returncode == 0
    assert machines() == {"one": "paused"}
    assert softkvm("pause", "-n", "one").returncode == 0
    refused = softkvm("stop", "one")
    assert (refused.returncode, "resume it first" in refused.stderr) == (1, True)
    assert softkvm("resume").returncode == 0
    listed = softkvm("list").stdout.splitlines()
    assert listed[0].split() == ["NAME", "STATE", "PID", "VCPUS", "MEMORY", "UP"]
    assert listed[2].split()[:2] == ["one", "running"]
    dumped = softkvm("debug", "one")
    assert dumped.stdout.startswith("vCPU 0: real mode\n")
    assert len(json.loads(softkvm("debug", "--json").stdout)["cpus"]) == 1
    assert softkvm("debug", "--nmi", "7").stderr.endswith("vcpu: expected a number from 0 to 0\n")
    done = softkvm("stop", "one")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machines() == {}
    assert not [path.name for path in runtime.iterdir() if path.suffix != ".log"]


def test_a_guest_that_does_not_listen_is_ended(detached: RunDetached, runtime: Path) -> None:
    name = detached(ECHO)
    assert name.startswith("guest-")
    done = softkvm("stop", name, "--timeout", "0.2")
    assert done.returncode == 0
    assert "the guest has not shut down within 0.2 s: it is ended" in done.stderr
    assert machines() == {}
    deadline = time.monotonic() + FAR_S
    while (log := runtime / f"{name}.log").read_text() != "softkvm: stopped: by command\n":
        assert time.monotonic() < deadline, log.read_text()


def test_force_and_all(detached: RunDetached) -> None:
    detached(ECHO, "--name", "one")
    detached(ECHO, "--name", "two")
    ambiguous = softkvm("pause")
    assert ambiguous.returncode == 2
    assert "expected one of these processes" in ambiguous.stderr
    assert softkvm("pause", "--all").returncode == 0
    assert machines() == {"one": "paused", "two": "paused"}
    assert softkvm("stop", "--force", "one", "two").returncode == 0
    assert machines() == {}
    nobody = softkvm("stop", "--all")
    assert (nobody.returncode, nobody.stderr) == (1, "softkvm: no machine runs\n")


def test_one_name_for_two_machines(detached: RunDetached, tmp_path: Path) -> None:
    detached(ECHO, "--name", "one")
    again = softkvm("run", "--kernel", f"flat:{tmp_path / 'image'}", "--name", "one")
    assert again.returncode == 2
    assert "has a machine of this name" in again.stderr
    behind = softkvm("run", "--detach", "--kernel", f"flat:{tmp_path / 'image'}", "--name", "one")
    assert (behind.returncode, behind.stdout) == (2, "")
    assert "has a machine of this name" in behind.stderr


@pytest.mark.parametrize("where", ["", "tcp::4444", "unix:", "unix:x,wait=on", "unix:/no/such/directory/x"])
def test_places_that_qmp_cannot_have(tmp_path: Path, where: str) -> None:
    (tmp_path / "image").write_bytes(ECHO)
    done = softkvm("run", "--kernel", f"flat:{tmp_path / 'image'}", "--qmp", where, "--timeout", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"softkvm: --qmp {where}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["", "a/b", "4711", "x" * 65, "x" * 100_000])
def test_names_that_no_machine_can_have(name: str) -> None:
    done = softkvm("run", "--detach", "--name", name)
    assert done.returncode == 2
    assert done.stderr.startswith("softkvm: --name ") and done.stderr.count("\n") == 1 and len(done.stderr) < 300


@pytest.mark.parametrize("command", ["stop", "pause", "resume", "reset", "console", "debug", "balloon", "net"])
@pytest.mark.parametrize("name", ["none", "x" * 300])
def test_machines_that_are_not_there(command: str, name: str) -> None:
    done = softkvm(command, name)
    assert done.returncode == 1
    assert "no machine of this name runs" in done.stderr and len(done.stderr) < 300


def test_what_cannot_be_booted_is_said_before_the_background(tmp_path: Path) -> None:
    done = softkvm("run", "--detach", "--kernel", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"softkvm: kernel {tmp_path / 'missing'}: No such file or directory\n"


def test_the_console_of_a_running_machine(detached: RunDetached) -> None:
    detached(ECHO, "--name", "one")
    with subprocess.Popen(
        [*SOFTKVM, "console", "one"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write(b"hello")
        first.stdin.flush()
        assert first.stdout.read(5) == b"hello"
        ours, theirs = pty.openpty()
        with subprocess.Popen([*SOFTKVM, "console", "one"], stdin=theirs, stdout=theirs, stderr=theirs) as second:
            seen = b""
            while b"hello" not in seen:
                seen += os.read(ours, 100)
            assert b"Ctrl-A d leaves" in seen
            os.write(ours, b"x")
            assert first.stdout.read(1) == b"x"
            os.write(ours, b"\x01d")
            assert second.wait(FAR_S) == 0
        os.close(ours)
        os.close(theirs)
        assert machines() == {"one": "running"}
        assert softkvm("stop", "--force").returncode == 0
        assert first.wait(FAR_S) == 0


def test_a_machine_is_reset(detached: RunDetached) -> None:
    detached(RESET_ONCE, "--name", "one", "--reboot")
    deadline = time.monotonic() + FAR_S
    while json.loads(softkvm("list", "--json").stdout)[0]["boots"] != 2:
        assert time.monotonic() < deadline
    assert softkvm("reset", "one").returncode == 0
    while json.loads(softkvm("list", "--json").stdout)[0]["boots"] != 3:
        assert time.monotonic() < deadline
    assert softkvm("stop", "--force", "one").returncode == 0


def test_versions() -> None:
    found = json.loads(softkvm("version", "--json").stdout)
    assert found["kvm_api_soft"] == "12"
    assert found["control_protocol"] == 1
    assert "KVM in Python" in softkvm("version").stdout
