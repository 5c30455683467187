# SPDX-License-Identifier: Apache-2.0
"""``softkvm run`` as a process: statuses, messages, files, the terminal."""

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tests.support.machines import KVMS
from tests.support.stub import gdb

from softkvm.cli import panic_watch
from softkvm.cli.arguments import size as size_of
from softkvm.cli.run_image import split_modules
from softkvm.vmm.events import Event, Events
from softkvm.vmm.memory import GIB, KIB, MIB
from softkvm.vmm.outcome import End, Outcome
from softkvm.vmm.stats import ConsoleWatcher

RUN = (sys.executable, "-m", "softkvm.cli.main", "run")

POWER_OFF = bytes.fromhex("ba0406 b80034 ef f4ebfd")
RESET = bytes.fromhex("ba6400 b0fe ee f4ebfd")
PVPANIC = bytes.fromhex("ba0505 b001 ee f4ebfd")
CRASH_LOADED = bytes.fromhex("ba0505 b002 ee")
PVPANIC_SHUTDOWN = bytes.fromhex("ba0505 b004 ee f4ebfd")
DEBUG_EXIT = bytes.fromhex("baf400 b005 ee 66b805000000 66ef f4ebfd")
CHATTER = bytes.fromhex("baf803 b041 ee ebfd")  # prints A for ever
SPIN = bytes.fromhex("ebfe")
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")  # sends back what it receives, for ever


def printing(text: bytes) -> bytes:
    """Return code that prints *text* on COM1."""
    return bytes.fromhex("baf803") + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)


@pytest.fixture(params=sorted(KVMS))
def accel(request: pytest.FixtureRequest) -> str:
    KVMS[request.param]().close()  # skips where it is not there
    return {"soft": "soft", "device": "kvm"}[request.param]


def run(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def flat(tmp_path: Path, code: bytes) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(code)
    return f"flat:{path}"


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (POWER_OFF, 0, ""),
        (PVPANIC, 3, "softkvm: panic: pvpanic\n"),
        (CRASH_LOADED + POWER_OFF, 3, "softkvm: panic: pvpanic, with a crash kernel\n"),
        (CRASH_LOADED + RESET, 3, "softkvm: panic: pvpanic, with a crash kernel\n"),
        (PVPANIC_SHUTDOWN, 0, ""),
        (SPIN, 5, "softkvm: timeout: 1 s\n"),
        (RESET, 6, "softkvm: reset: keyboard controller\n"),
        (DEBUG_EXIT, 8, "softkvm: debug exit: status 11\n"),
        (printing(b"Kernel panic - not syncing: x\n") + RESET, 3, "softkvm: panic: on the console: Kernel panic"),
        (printing(b"---[ end Kernel panic\n") + SPIN, 3, "softkvm: panic: on the console"),
    ],
)
def test_status_tells_how_the_guest_ended(tmp_path: Path, accel: str, code: bytes, status: int, message: str) -> None:
    done = run("--accel", accel, "--timeout", "1" if code == SPIN else "30", "--kernel", flat(tmp_path, code))
    assert (done.returncode, done.stderr.startswith(message)) == (status, True), done.stderr
    assert done.stderr.count("\n") == (1 if status else 0)


def test_cpu_time_is_limited(tmp_path: Path, accel: str) -> None:
    stats_path = tmp_path / "stats.json"
    done = run(
        "--accel", accel, "--cpu-time-limit", "0.2", "--cpu-quota", "50%", "-c", "2", "--timeout", "60",
        "--stats", stats_path, flat(tmp_path, SPIN),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (10, "softkvm: CPU time limit: 0.2 s\n")
    stats = json.loads(stats_path.read_text())
    assert (stats["end"], stats["exit_status"]) == ("CPU time limit", 10)
    assert set(stats["vcpus"][0]["cpu_quota"]) == {"nr_periods", "nr_throttled", "throttled_ns"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--cpu-time-limit", "0", "expected a number of seconds above 0, up to 1e9"),
        ("--cpu-time-limit", "nan", "expected a number of seconds above 0, up to 1e9"),
        ("--cpu-quota", "0.5", "expected a number of percent from 1 to 100"),
        ("--cpu-quota", "101", "expected a number of percent from 1 to 100"),
        ("--cpu-quota", "%", "expected a number of percent from 1 to 100"),
    ],
)
def test_cpu_time_that_is_none_is_one_line(tmp_path: Path, option: str, value: str, expected: str) -> None:
    done = run(f"{option}={value}", flat(tmp_path, SPIN))
    assert (done.returncode, done.stderr) == (2, f"softkvm: {option} {value}: {expected}\n")


def test_devices_of_the_host_are_not_assigned(tmp_path: Path) -> None:
    done = run("--assign", "0000:01:00.0", flat(tmp_path, SPIN))
    assert done.returncode == 2
    assert done.stderr.startswith("softkvm: --assign 0000:01:00.0: there is no device assignment (VFIO): ")
    assert done.stderr.count("\n") == 1


def test_pinned_memory_is_locked_while_the_guest_runs(tmp_path: Path, accel: str) -> None:
    command = [*RUN, "--accel", accel, "--pin-memory", "--mem", "64M", flat(tmp_path, printing(b"x") + SPIN)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
    locked = re.search(r"VmLck:\s*(\d+) kB", status)
    assert locked is not None
    assert int(locked[1]) >= 64 * KIB
    assert process.returncode == 128 + signal.SIGTERM


def test_memory_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    """The limit is for users without privileges, so the process has given up its own."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096)); import ctypes; "
    code += "ctypes.CDLL(None).prctl(24, 14, 0, 0, 0); "  # CAP_IPC_LOCK leaves the bounding set
    code += "import os; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, *RUN[1:], "--pin-memory", "--mem", "64M", flat(tmp_path, POWER_OFF)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"softkvm: the host does not lock 64 MiB of memory: .+ \(ulimit -l is 4 KiB\)\n", done.stderr
    ), done.stderr


def test_console_output_is_standard_output_and_stats_are_complete(tmp_path: Path, accel: str) -> None:
    stats_path = tmp_path / "stats.json"
    code = printing(b"Linux version 6.1 (x)\nRun /init as init process\n") + POWER_OFF
    done = run(
        "--accel", accel, "--kernel", flat(tmp_path, code), "--stats", stats_path, "--timeout", "30", "--mem", "64"
    )  # fmt: skip
    assert done.stdout == "Linux version 6.1 (x)\nRun /init as init process\n"
    stats = json.loads(stats_path.read_text())
    assert list(stats["milestones"]) == ["console", "kernel", "init"]
    assert 0 < stats["milestones"]["console"]["at_ns"] <= stats["milestones"]["init"]["at_ns"]
    assert stats["end"] == "power-off"
    assert stats["exit_status"] == 0
    assert stats["memory_bytes"] == 64 * MIB
    assert stats["exits"]["KVM_EXIT_IO"]["count"] == 48 + 1
    assert stats["wall_ns"] > 0
    assert stats["cpu_ns"] > 0
    if accel == "soft":
        # The silicon counts what retires: KVM carries out the OUT of each byte, only its MOV retires.
        assert stats["instructions"] >= 48
    assert sorted(os.listdir(tmp_path)) == ["guest.bin", "stats.json"]


def test_kernel_may_stand_alone_and_options_have_kvmtools_letters(tmp_path: Path) -> None:
    stats_path = tmp_path / "stats.json"
    kernel = flat(tmp_path, POWER_OFF)
    assert run("-m", "64", kernel, "-c", "2", "--stats", stats_path).returncode == 0
    stats = json.loads(stats_path.read_text())
    assert (stats["memory_bytes"], stats["vcpu_count"]) == (64 * MIB, 2)
    assert run("-k", kernel).returncode == 0
    both = run("-k", kernel, kernel)
    assert both.returncode == 2
    assert "is there, too" in both.stderr


@pytest.mark.parametrize(("cpu", "leaves"), [("kvm", b"KVMK"), ("hv", b"Micr")])
def test_whose_guest_it_is(tmp_path: Path, cpu: str, leaves: bytes) -> None:
    """mov eax, 0x40000000; cpuid; then EBX to the console, a byte at a time."""
    code = bytes.fromhex("66b800000040 0fa2 baf803" + 4 * "88d8 ee 66c1eb08")
    done = run("--accel", "soft", "--cpu", cpu, "--timeout", "30", "--kernel", flat(tmp_path, code + POWER_OFF))
    assert (done.returncode, done.stdout.strip().encode()) == (0, leaves), done.stderr


@pytest.mark.parametrize(("pmu", "counters"), [("1", "6"), ("0", "0")])
def test_module_parameters_are_the_machines(tmp_path: Path, pmu: str, counters: str) -> None:
    """mov eax, 0x80000022; cpuid: EBX has the number of core counters (APM vol. 3, appendix E.4.22)."""
    code = bytes.fromhex("66b822000080 0fa2 80e30f 80c330 baf803 88d8 ee")
    done = run("--accel", "soft", "--param", f"avic=0,enable_pmu={pmu}", "--kernel", flat(tmp_path, code + POWER_OFF))
    assert (done.returncode, done.stdout.strip()) == (0, counters), done.stderr


@pytest.mark.parametrize("text", ["nope=1", "avic", "avic=perhaps"])
def test_a_parameter_that_is_none_is_a_usage_error(tmp_path: Path, accel: str, text: str) -> None:
    done = run("--accel", accel, "--param", text, "--kernel", flat(tmp_path, POWER_OFF))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"--param {text}: " in done.stderr


def test_console_to_a_file(tmp_path: Path, accel: str) -> None:
    log = tmp_path / "log"
    done = run("--accel", accel, "--console", f"file:{log}", "--kernel", flat(tmp_path, printing(b"hi") + POWER_OFF))
    assert (done.returncode, done.stdout, log.read_text()) == (0, "", "hi")


def test_piped_input_reaches_the_guest(tmp_path: Path, accel: str) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "softkvm.cli.main",
            "run",
            "--timeout",
            "60",
            "--accel",
            accel,
            "--kernel",
            flat(tmp_path, ECHO),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\x01xyz")  # escapes are for terminals
    process.stdin.close()
    assert process.stdout.read(4) == b"\x01xyz"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()


@pytest.mark.parametrize("where", ["stdout", "file"])
def test_console_that_is_full_ends_the_machine(tmp_path: Path, where: str) -> None:
    kernel = flat(tmp_path, printing(b"x") + SPIN)
    console = {"stdout": "stdio", "file": "file:/dev/full"}[where]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*RUN, "--timeout", "30", "--kernel", kernel, "--console", console],
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    name = {"stdout": "standard output", "file": "--console file:/dev/full"}[where]
    assert done.stderr.decode() == f"softkvm: {name}: No space left on device\n"
    assert done.returncode == 1


def test_lost_last_words_are_no_success(tmp_path: Path) -> None:
    done = run("--console", "file:/dev/full", "--kernel", flat(tmp_path, printing(b"x") + POWER_OFF))
    assert done.returncode == 1
    assert done.stderr == "softkvm: --console file:/dev/full: No space left on device\n"


@pytest.mark.parametrize("together", ["pipe", "file", "file opened twice", "terminal", "stderr as a file"])
@pytest.mark.parametrize("ended", [b"$ ", b"$ \r\n", b""])
def test_closing_line_begins_a_line_where_the_guest_writes_too(tmp_path: Path, together: str, ended: bytes) -> None:
    kernel = flat(tmp_path, printing(ended) + RESET)
    log, again, master = tmp_path / "log", -1, -1
    if together in ("pipe", "stderr as a file"):
        master, sink = os.pipe()
    elif together == "terminal":
        master, sink = os.openpty()
    else:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        again = os.open(log, os.O_WRONLY | os.O_APPEND)
    console = "file:/dev/stderr" if together == "stderr as a file" else "stdio"
    done = subprocess.run(
        [*RUN, "--timeout", "30", "--console", console, "--kernel", kernel],
        stdin=subprocess.DEVNULL, stdout=sink, stderr=again if together == "file opened twice" else sink, timeout=60,
    )  # fmt: skip
    text = log.read_bytes() if master < 0 else os.read(master, 4096)
    for fd in (sink, again, master):
        if fd >= 0:
            os.close(fd)
    assert done.returncode == 6
    begun = {b"$ ": b"$ \n", b"$ \r\n": b"$ \r\n", b"": b""}[ended]
    expected = begun + b"softkvm: reset: keyboard controller\n"
    assert text.replace(b"\r", b"") == expected.replace(b"\r", b"")  # a terminal adds its own


def test_output_of_a_guest_alone_gets_no_line_end(tmp_path: Path) -> None:
    done = run("--timeout", "30", "--kernel", flat(tmp_path, printing(b"$ ") + RESET))
    assert (done.stdout, done.stderr) == ("$ ", "softkvm: reset: keyboard controller\n")
    off = subprocess.run(
        [*RUN, "--timeout", "30", "--kernel", flat(tmp_path, printing(b"$ ") + POWER_OFF)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert off.stdout == "$ "


def test_statistics_on_standard_output_begin_a_line(tmp_path: Path) -> None:
    done = run("--timeout", "30", "--stats", "-", "--kernel", flat(tmp_path, printing(b"$ ") + POWER_OFF))
    assert done.stdout.startswith("$ \n{\n")
    assert json.loads(done.stdout.removeprefix("$ \n"))["end"] == "power-off"


def test_reader_of_the_console_that_is_gone_ends_the_machine(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    process = subprocess.Popen(
        [*RUN, "--timeout", "30", "--stats", str(stats), "--kernel", flat(tmp_path, CHATTER)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(2) == b"AA"
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == b"softkvm: stopped: nobody reads the console\n"
    assert json.loads(stats.read_text())["exit_status"] == 128 + signal.SIGPIPE


def test_reader_of_the_console_that_sleeps_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*RUN, "--timeout", "1", "--kernel", flat(tmp_path, CHATTER)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.wait(30) == 5  # nobody read a byte


#: What a second of time may end: on a busy host it is over before the guest runs.
TIMEOUTS = {"softkvm: timeout: 1 s\n", "softkvm: timeout: loading took longer than 1 s\n"}


@pytest.mark.parametrize("reader", ["sleeps", "never comes"])
def test_reader_of_a_named_pipe_does_not_hold_up_the_end(tmp_path: Path, reader: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if reader == "sleeps" else -1
    done = run("--timeout", "1", "--console", f"file:{fifo}", "--kernel", flat(tmp_path, CHATTER))
    assert done.returncode == 5
    assert done.stderr in TIMEOUTS
    if fd >= 0:
        os.close(fd)


def test_reader_of_a_named_pipe_may_come_late(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kernel = flat(tmp_path, printing(b"hello") + SPIN)
    with subprocess.Popen(
        [*RUN, "--timeout", "60", "--console", f"file:{fifo}", "--kernel", kernel],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        with fifo.open("rb") as file:
            assert file.read(5) == b"hello"
        process.terminate()


def test_end_is_not_held_up_by_one_sleeping_reader_of_everything(tmp_path: Path) -> None:
    """``softkvm run 2>&1 | …``: the message at the end meets a pipe that is full."""
    with subprocess.Popen(
        [*RUN, "--timeout", "1", "--kernel", flat(tmp_path, CHATTER)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.wait(30) == 5


def test_input_that_the_guest_does_not_read_stays_where_it_is(tmp_path: Path) -> None:
    """Neither memory nor the end is its business."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen(
        [*RUN, "--timeout", "3", "--kernel", flat(tmp_path, printing(b"up") + SPIN)],
        stdin=read, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        os.close(read)
        taken = full = 0
        while full < 20:  # a second in which it takes nothing more
            try:
                taken += os.write(write, b"y\n" * 2048)
                full = 0
            except BlockingIOError:
                full += 1
                time.sleep(0.05)
        assert taken < 1 << 20
        assert process.wait(30) == 5
    os.close(write)


def test_ignored_signal_does_not_end_the_machine(tmp_path: Path) -> None:
    """As under nohup."""
    with subprocess.Popen(
        ["nohup", *RUN, "--timeout", "3", "--kernel", flat(tmp_path, printing(b"up") + SPIN)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(2)
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 5


BAD_INPUT = [
    (["--kernel", "{missing}"], "kernel {missing}: No such file or directory"),
    (["--kernel", "{dir}"], "kernel {dir}: Is a directory"),
    (["--kernel", "{text}"], "{text}: kernel has an unknown format"),
    (["--kernel", "{empty}"], "{empty}: kernel is empty"),
    (["--kernel", "{text}", "--initrd", "{missing}"], "initrd {missing}: No such file or directory"),
    (["--initrd", "{text}"], "--initrd needs --kernel"),
    (["--kernel", "{text}", "--mem", "16M"], "memory of 16 MiB: expected 32 MiB to"),
    (["--kernel", "{text}", "--mem", "lots"], "--mem lots: expected a size such as 256M or 2G"),
    (["--kernel", "{text}", "--mem", "256B"], "--mem 256B: expected a size such as 256M or 2G"),
    (["--kernel", "{text}", "--mem", "65537K"], "--mem 65537K: expected a size such as 256M or 2G, a multiple of 4K"),
    (["--kernel", "{text}", "--mem", "-1"], "--mem -1: expected a size such as 256M or 2G"),
    (["--kernel", "{text}", "--mem", "99999999G"], "memory of"),
    (["--kernel", "{text}", "--vcpus", "17"], "--vcpus 17: expected a number from 1 to 16"),
    (["--kernel", "{text}", "--vcpus", "two"], "--vcpus two: expected a number from 1 to 16"),
    (["--kernel", "{text}", "--vcpus", "0"], "--vcpus 0: expected a number from 1 to 16"),
    (["--kernel", "{text}", "--timeout", "soon"], "--timeout soon: expected a number of seconds above 0"),
    (["--kernel", "{text}", "--timeout", "nan"], "--timeout nan: expected"),
    (["--kernel", "{text}", "--console", "tv"], "--console tv: expected stdio, pty, file:PATH or none"),
    (["--kernel", "{text}", "--stats", "{missing}/s"], "--stats {missing}/s: No such file or directory"),
    (["--kernel", "{text}", "--stats", "{dir}"], "--stats {dir}: Is a directory"),
    (["--kernel", "{text}", "--stats", ""], "softkvm: --stats: expected a file name"),
    (["--kernel", ""], "softkvm: --kernel: expected a file name"),
    (["--kernel", "flat:"], "--kernel flat:FILE lacks the file"),
    (["--kernel", "/dev/zero"], "kernel /dev/zero: is a device, expected a file"),
    (["--kernel", "{text}", "--initrd", "/dev/zero"], "initrd /dev/zero: is a device, expected a file"),
    (["--kernel", "flat:{empty}"], "{empty}: flat image has 0 bytes"),
    (["--kernel", "flat:{text}", "--initrd", "{text}"], "--kernel flat:FILE takes neither"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, accel: str, arguments: list[str], message: str) -> None:
    names = {name: str(tmp_path / name) for name in ("missing", "dir", "text", "empty")}
    (tmp_path / "dir").mkdir()
    (tmp_path / "text").write_text("I am no kernel\n")
    (tmp_path / "empty").write_bytes(b"")
    done = run("--accel", accel, *(argument.format(**names) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert message.format(**names) in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["dir", "empty", "text"], "something was left behind"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 * MIB),
        ("256", 256 * MIB),
        ("2G", 2 * GIB),
        ("65536k", 65536 * KIB),
        ("1gb", GIB),
        ("32MiB", 32 * MIB),
        ("1t", 1024 * GIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of("--mem", text) == size


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("vmlinuz", ["vmlinuz"]),
        ("vmlinuz root=/dev/sda,initrd.img", ["vmlinuz root=/dev/sda", "initrd.img"]),
        ("a x=1,,2, b", ["a x=1,2", "b"]),
        ("a,,,b", ["a,", "b"]),
    ],
)
def test_modules_are_split_as_qemu_splits_them(text: str, modules: list[str]) -> None:
    assert split_modules(text) == modules


def test_loading_counts_for_the_timeout(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = run("--kernel", tmp_path / "fifo", "--timeout", "0.2")
    assert (done.returncode, done.stderr) == (5, "softkvm: timeout: loading took longer than 0.2 s\n")


class Ended:
    """Takes the place of a machine that somebody ends."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.events = Events()

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def test_kernel_that_panicked_does_not_begin_anew() -> None:
    watcher, machine = ConsoleWatcher(), Ended()
    watch = panic_watch.PanicWatch(watcher, crash_kernel=False)
    watch.attach(machine)  # type: ignore[arg-type]
    machine.events.tell(Event.RESET, by="test")
    assert machine.outcomes == []
    watcher(b"Kernel panic - not syncing: test\r\n")
    machine.events.tell(Event.RESET, by="test")
    assert [outcome.end for outcome in machine.outcomes] == [End.PANIC]


@pytest.mark.parametrize("crash_kernel", [False, True])
def test_kernel_that_goes_on_after_a_panic_is_ended_unless_it_is_a_crash_kernel(
    monkeypatch: pytest.MonkeyPatch, crash_kernel: bool
) -> None:
    monkeypatch.setattr(panic_watch, "PANIC_GRACE_S", 0.01)
    watcher, machine = ConsoleWatcher(), Ended()
    watch = panic_watch.PanicWatch(watcher, crash_kernel=crash_kernel)
    watch.attach(machine)  # type: ignore[arg-type]
    for line in (b"Kernel panic - not syncing: x\n", b"[    0.000000] Linux version 6.1\n"):
        watcher(line)
        watch.output(line)
    time.sleep(0.2)
    assert [outcome.end for outcome in machine.outcomes] == ([] if crash_kernel else [End.PANIC])
    assert watch.judge(Outcome(End.RESET)).end is End.PANIC
    assert watch.judge(Outcome(End.POWER_OFF)).end is (End.PANIC if crash_kernel else End.POWER_OFF)
    assert watch.judge(Outcome(End.TIMEOUT)).end is End.TIMEOUT


class Terminal:
    """``softkvm run`` on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, controlling: bool = False) -> None:
        self.master, slave = os.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [*RUN, "--timeout", "60", *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if controlling else None,
        )  # fmt: skip
        self.seen = b""

    def expect(self, text: bytes, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                self.seen += os.read(self.master, 4096)
            assert time.monotonic() < deadline, self.seen
        self.seen = self.seen.split(text, 1)[1]

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def finish(self) -> int:
        """Wait for the process; the terminal must be as it was."""
        status = self.process.wait(30)
        restored = termios.tcgetattr(self.slave) == self.before
        os.close(self.master)
        os.close(self.slave)
        assert restored, "the terminal was left in raw mode"
        return status


def test_escape_keys_on_a_terminal(tmp_path: Path, accel: str) -> None:
    terminal = Terminal("--accel", accel, "--kernel", flat(tmp_path, printing(b"ready") + ECHO))
    terminal.expect(b"ready")
    terminal.type(b"\x03a\x01\x01b")  # Ctrl-C goes to the guest
    terminal.expect(b"\x03a\x01b")
    terminal.type(b"\x01h")
    terminal.expect(b"Ctrl-A x        end the machine\r\n")
    terminal.type(b"\x01x")
    assert terminal.finish() == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_terminal_is_restored_after_a_signal(tmp_path: Path, accel: str, number: int) -> None:
    terminal = Terminal("--accel", accel, "--kernel", flat(tmp_path, printing(b"ready") + SPIN))
    terminal.expect(b"ready")
    terminal.process.send_signal(number)
    assert terminal.finish() == 128 + number


def test_terminal_that_hangs_up_ends_the_machine(tmp_path: Path) -> None:
    terminal = Terminal("--kernel", flat(tmp_path, printing(b"ready") + SPIN), controlling=True)
    terminal.expect(b"ready")
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(30) == 128 + signal.SIGHUP


def test_message_at_the_end_begins_a_line(tmp_path: Path) -> None:
    terminal = Terminal("--kernel", flat(tmp_path, printing(b"prompt# ") + SPIN))
    terminal.expect(b"prompt# ")
    terminal.type(b"\x01x")
    terminal.expect(b"\r\nsoftkvm: stopped: from the console\r\n")
    assert terminal.finish() == 7


def test_terminal_is_restored_after_bad_input(tmp_path: Path) -> None:
    assert Terminal("--kernel", str(tmp_path / "missing")).finish() == 2


@pytest.mark.parametrize("where", ["1234", "tcp:0.0.0.0:1", "tcp::99999"])
def test_a_place_for_gdb_that_is_none_is_one_line(tmp_path: Path, where: str) -> None:
    done = run("--kernel", flat(tmp_path, b"\xf4"), "--gdb", where)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and where in done.stderr


def test_gdb_has_the_guest_wait_and_ends_it(tmp_path: Path) -> None:
    where = tmp_path / "gdb"
    command = [*RUN, "--kernel", flat(tmp_path, SPIN), "--gdb", f"unix:{where},wait"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"softkvm: gdb: target remote {where}, which the guest waits for\n"
        told = gdb(f"target remote {where}", "print $cs", "print/x $rip", "kill")
        assert process.wait(30) == 7
    assert "$1 = 4096" in told
    assert not where.exists()
