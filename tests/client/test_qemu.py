# SPDX-License-Identifier: Apache-2.0
"""QEMU, unmodified, boots the default guest with ``-accel kvm`` under ``softkvm exec``."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.client.conftest import EXEC
from tests.support.guests import linux_guest, missing

from softkvm import qemu

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

TIMEOUT_S = 300
COMMANDS = "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


class Machine:
    """A QEMU whose serial line and monitor (QMP) are sockets."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], stack: ExitStack) -> None:
        self.process = process
        self.serial = stack.enter_context(self._connect(directory / "serial"))
        monitor = stack.enter_context(self._connect(directory / "monitor"))
        self._monitor = stack.enter_context(monitor.makefile("rw"))
        self._monitor.readline()
        self.do("qmp_capabilities")

    def _connect(self, path: Path) -> socket.socket:
        end = time.monotonic() + TIMEOUT_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
                connection.settimeout(TIMEOUT_S)
                return connection
            except OSError:
                connection.close()
                assert self.process.poll() is None, self.process.returncode
                assert time.monotonic() < end
                time.sleep(0.05)

    def do(self, command: str, **arguments: Any) -> Any:
        """Do a command of the monitor's."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "event" not in answer:
                return answer["return"]

    def type(self, line: str) -> None:
        """Type a line at the guest's shell."""
        self.serial.sendall(line.encode() + b"\n")

    def expect(self, pattern: bytes) -> None:
        """Read the serial line until it has a pattern."""
        seen = b""
        while not re.search(pattern, seen):
            part = self.serial.recv(4096)
            assert part, seen
            seen += part


@contextmanager
def machine(directory: Path, *options: str) -> Iterator[Machine]:
    """Start QEMU with the default guest and two vCPUs."""
    directory.mkdir()
    program, guest = qemu.find(), linux_guest()
    if program is None:
        missing("qemu-system-x86_64 is not installed")
    process = subprocess.Popen(
        [
            *EXEC, "--", str(program), "-accel", "kvm", "-M", "q35", "-m", "128", "-smp", "2", "-nodefaults",
            "-display", "none", "-serial", f"unix:{directory}/serial,server,nowait",
            "-qmp", f"unix:{directory}/monitor,server,nowait", *options,
            "-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", "console=ttyS0 quiet",
        ],
    )  # fmt: skip
    try:
        with ExitStack() as stack:
            yield Machine(directory, process, stack)
    finally:
        process.kill()
        process.wait()


def boot(*options: str) -> list[str]:
    """Boot the default guest in QEMU; returns the lines of its console."""
    program = qemu.find()
    if program is None:
        missing("qemu-system-x86_64 is not installed")
    guest = linux_guest()
    done = subprocess.run(
        [
            *EXEC, "--", str(program), "-accel", "kvm", "-m", "256", "-nodefaults", "-no-user-config", "-nographic",
            "-serial", "stdio", "-no-reboot", *options,
            "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
            "-append", f'console=ttyS0 quiet softkvm.run="{COMMANDS}"',
        ],
        check=False, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "vcpus"),
    [
        ("-M pc", 1),
        ("-M q35 -smp 2", 2),
        ("-M microvm", 1),
        ("-M q35,kernel-irqchip=split -smp 2", 2),
        ("-M pc,kernel-irqchip=off", 1),
        ("-M q35 -cpu host -smp 4", 4),
        ("-M pc -cpu max", 1),
    ],
)
def test_qemu_boots_linux(options: str, vcpus: int) -> None:
    lines = boot(*options.split())
    assert str(vcpus) in lines
    assert "softkvm: run ended with status 0" in lines
    assert not any("panic" in line or "BUG" in line for line in lines)


def test_a_machine_is_migrated_to_a_file_and_back(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with machine(tmp_path / "one") as before:
        before.expect(rb"# ")
        before.type("x=4711; echo up $((x + 1))")
        before.expect(rb"up 4712")
        before.do("migrate", uri=f"exec:cat > {state}")
        while (status := before.do("query-migrate")["status"]) not in ("completed", "failed"):
            time.sleep(0.1)
        assert status == "completed"
        before.do("quit")
        assert before.process.wait(TIMEOUT_S) == 0
    with machine(tmp_path / "two", "-incoming", f"exec:cat {state}") as after:
        while after.do("query-status")["status"] != "running":
            time.sleep(0.1)
        after.type("echo still $((x + 2))")
        after.expect(rb"still 4713")
        after.do("quit")
        assert after.process.wait(TIMEOUT_S) == 0
