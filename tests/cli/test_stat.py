# SPDX-License-Identifier: Apache-2.0
"""``softkvm stat`` and ``softkvm trace record --pid``: running machines of `run` and of clients are looked at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guests import demo_image

from softkvm.cli.stat import Sample, _show
from softkvm.live.asker import Process

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")

#: A client with a guest that halts for ever, and a vCPU thread that it runs on.
CLIENT = """
import ctypes, fcntl, mmap, os, struct, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
memory = mmap.mmap(-1, 1 << 20)
memory[0x1000:0x1004] = bytes.fromhex("0fa2ebfc")    # cpuid; jmp
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(vm, 0x4020AE46, struct.pack("IIQQQ", 0, 0, 0, 1 << 20, address))
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
sregs = bytearray(312)
fcntl.ioctl(vcpu, 0x8138AE83, sregs)
sregs[0:8] = bytes(8)                                # CS.base
sregs[12:14] = bytes(2)                              # CS.selector
fcntl.ioctl(vcpu, 0x4138AE84, bytes(sregs))
fcntl.ioctl(vcpu, 0x4090AE82, struct.pack("18Q", *[0] * 16, 0x1000, 2))
fcntl.ioctl(vcpu, 0xAE80, 0)
"""


def softkvm(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SOFTKVM, *args], capture_output=True, text=True, timeout=120, check=False)


def until_there(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process listens; its number."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        done = softkvm("stat", "--list", "--json")
        for one in json.loads(done.stdout):
            if one["pid"] == process.pid:
                return process.pid
        time.sleep(0.1)
    raise AssertionError("it does not listen")


def until_traced(machine: int) -> None:
    """Wait until a process has the file that another records into, and the answer is on its way."""
    directory = Path(f"/proc/{machine}/fd")

    def file_of_another(path: Path) -> bool:
        with contextlib.suppress(OSError):  # closed meanwhile
            name = os.readlink(path)
            return name.endswith(" (deleted)") and not name.startswith(("/memfd:", "/dev/"))
        return False

    end = time.monotonic() + 60
    while not any(file_of_another(path) for path in directory.iterdir()):
        assert time.monotonic() < end, "nobody records"
        time.sleep(0.05)
    time.sleep(0.5)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["run", "exec"])
def machine(request: pytest.FixtureRequest, runtime: Path) -> Iterator[int]:
    """A machine that runs; the number of its process."""
    if request.param == "run":
        command = ["run", str(demo_image()), "--console", "none", "--timeout", "100"]
    else:
        command = ["exec", "--", sys.executable, "-c", CLIENT]
    process = subprocess.Popen([*SOFTKVM, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield until_there(process)
    finally:
        process.kill()
        process.wait()


def test_counters_of_a_running_machine(machine: int) -> None:
    done = softkvm("stat", str(machine), "--once", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["pid"] == machine and answer["counters"]["exits"] > 0
    later = json.loads(softkvm("stat", "--once", "--json").stdout)  # the only one there is
    assert later["counters"]["exits"] >= answer["counters"]["exits"]
    table = softkvm("stat", str(machine), "--once").stdout
    assert f"{machine}: vCPUs 0:" in table and "\nexits " in table and "\nexit_" in table
    done = softkvm("stat", str(machine), "--vcpu", "7", "--once")
    assert (done.returncode, done.stderr) == (2, "softkvm: --vcpu 7: the machine has no such vCPU\n")


def test_it_goes_on_until_the_machine_ends(machine: int) -> None:
    command = [*SOFTKVM, "stat", str(machine), "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        for line in watching.stdout:
            if line.startswith("exits ") and len(line.split()) == 3:  # the second table: it has rates
                break
        os.kill(machine, signal.SIGKILL)
        watching.communicate(timeout=60)
    assert watching.returncode == 0


@pytest.mark.parametrize("end", ["duration", "signal"])
def test_a_running_machine_is_traced(machine: int, end: str, tmp_path: Path) -> None:
    path = tmp_path / "t.dat"
    command = [*SOFTKVM, "trace", "record", "--pid", str(machine), "-o", str(path), "-e", "kvm_e*"]
    command += ["--duration", "1" if end == "duration" else "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recording:
        if end == "signal":
            until_traced(machine)
            recording.send_signal(signal.SIGINT)
        _, errors = recording.communicate(timeout=100)
    assert recording.returncode == 0, errors
    assert errors.startswith(f"softkvm: {path}: ") and " events, " in errors and "`softkvm trace report " in errors
    report = softkvm("trace", "report", path).stdout
    assert "kvm_entry: " in report and "kvm_exit: " in report
    assert softkvm("stat", str(machine), "--once").returncode == 0  # it is there still


def test_that_a_machine_has_ended_while_it_was_traced_is_told(machine: int, tmp_path: Path) -> None:
    path = tmp_path / "t.dat"
    command = [*SOFTKVM, "trace", "record", "--pid", str(machine), "-o", str(path), "--duration", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recording:
        until_traced(machine)
        os.kill(machine, signal.SIGKILL)
        _, errors = recording.communicate(timeout=100)
    assert recording.returncode == 0, errors
    ended, what = errors.splitlines()
    assert f" {machine} has ended meanwhile: its last events are missing" in ended
    assert what.startswith(f"softkvm: {path}: ")


def test_a_table_that_is_cut_says_so() -> None:
    counters = {f"exit_{n}": n for n in range(1, 40)} | {"exits": 780}
    now = Sample(1.0, counters, [], {})
    lines = _show(Process(17, "softkvm", ""), now, None, 24).split("\n")
    assert len(lines) == 23 and max(map(len, lines)) <= 80
    whole = _show(Process(17, "softkvm", ""), now, None, None).split("\n")
    assert lines[:-1] == whole[:22]
    assert lines[-1].startswith(f"({len(whole) - 22} more rows: ")
    assert _show(Process(17, "softkvm", ""), now, None, len(whole) + 1).split("\n") == whole


def test_no_machine_is_one_line(runtime: Path) -> None:
    for args in (("stat",), ("trace", "record", "--pid", "nobody")):
        done = softkvm(*args)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1 and "runs" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("stat", "--interval", "0"), "--interval 0: expected a number of seconds"),
        (("stat", "--vcpu", "x"), "--vcpu x: expected a number"),
        (("trace", "record", "--pid", "1", "--", "run"), "--pid is for a machine that runs"),
        (("trace", "record", "--duration", "1", "--", "run"), "--duration needs --pid"),
    ],
)
def test_bad_usage_is_one_line(args: tuple[str, ...], words: str) -> None:
    done = softkvm(*args)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr and done.stderr.count("\n") == 1
