# SPDX-License-Identifier: Apache-2.0
"""Starts QEMU under ``softkvm exec`` and drives it by its serial line and its monitor (QMP)."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.guests import linux_guest, missing

from softkvm import qemu

EXEC = (sys.executable, "-m", "softkvm.cli.main", "exec")
#: Longer than a whole boot takes on a host that is busy.
TIMEOUT_S = 300
PROMPT = rb"root@softkvm:\S*# "
_CURSOR_MOVED = rb"(?:\x1b\[[0-9;]*H)*"


def command(*options: str) -> list[str]:
    """A command line of QEMU's with ``-accel kvm``, without its default devices; skips where it is not installed."""
    program = qemu.find()
    if program is None:
        missing(f"{qemu.PROGRAM} is not installed")
    return [*EXEC, "--", str(program), "-accel", "kvm", "-nodefaults", "-no-user-config", "-display", "none", *options]


def default_guest(line: str = "", initrd: Path | None = None, kernel: Path | None = None) -> list[str]:
    """Options that boot the default guest; *initrd* and *kernel* in place of its own."""
    guest = linux_guest()
    files = ["-kernel", str(kernel or guest.kernel), "-initrd", str(initrd or guest.initrd)]
    return [*files, "-append", f"console=ttyS0 quiet {line}"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run QEMU to its end; its serial line is the standard output."""
    return subprocess.run(
        command("-serial", "stdio", "-no-reboot", *options),
        check=False, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


class Machine:
    """A QEMU whose serial line and monitor are sockets in a directory."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], stack: ExitStack) -> None:
        self.process = process
        self.seen = b""
        self.serial = stack.enter_context(self.connect(directory / "serial"))
        monitor = stack.enter_context(self.connect(directory / "monitor"))
        self._monitor = stack.enter_context(monitor.makefile("rw"))
        self._monitor.readline()
        self._events: list[str] = []
        self.do("qmp_capabilities")

    def connect(self, path: Path) -> socket.socket:
        """Connect to a socket that QEMU listens at, or is going to."""
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
                assert "return" in answer, (command, answer)
                return answer["return"]
            self._events.append(answer["event"])

    def human(self, line: str) -> str:
        """Do a command of the human monitor's; what it answers."""
        return str(self.do("human-monitor-command", **{"command-line": line}))

    def wait_for_event(self, name: str) -> None:
        """Wait for an event that the monitor tells of."""
        while name not in self._events:
            self._events.append(json.loads(self._monitor.readline()).get("event", ""))
        self._events.remove(name)

    def type(self, line: str) -> None:
        """Type a line on the serial line."""
        self.serial.sendall(line.encode() + b"\r")

    def type_to_firmware(self, line: str) -> None:
        """Type a line at a prompt of firmware, key by key: it keeps but few that it has not taken yet."""
        for key in line.encode():
            self.serial.sendall(bytes([key]))
            self.expect(re.escape(bytes([key])) + _CURSOR_MOVED)
        self.serial.sendall(b"\r")

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read the serial line until it has a pattern; what follows it is for the next one."""
        while not (match := re.search(pattern, self.seen)):
            try:
                part = self.serial.recv(4096)
            except TimeoutError:
                part = b""
            assert part, (pattern, self.seen)
            self.seen += part
        self.seen = self.seen[match.end() :]
        return match

    def shell(self, line: str) -> str:
        """Have the guest's shell, which is at its prompt, do a line; what that prints, without the echo of the line."""
        self.type(f'echo "<"begin; {line}; echo "<"end')
        return self.expect(rb"(?s)<begin\r\n(.*?)<end\r\n.*?" + PROMPT)[1].decode().replace("\r\n", "\n")

    def migrate(self, state: Path) -> None:
        """Migrate the machine to a file; it has to complete."""
        self.do("migrate", uri=f"exec:cat > {state}")
        wait_for(lambda: self.do("query-migrate")["status"] in ("completed", "failed"))
        assert self.do("query-migrate")["status"] == "completed"

    def quit(self) -> None:
        """End QEMU by its monitor; it has to end well."""
        self.do("quit")
        assert self.process.wait(TIMEOUT_S) == 0


@contextmanager
def machine(directory: Path, *options: str, stderr: int | None = None) -> Iterator[Machine]:
    """Start QEMU with sockets in *directory*."""
    directory.mkdir(exist_ok=True)
    sockets = ["-serial", f"unix:{directory}/serial,server,nowait", "-qmp", f"unix:{directory}/monitor,server,nowait"]
    process = subprocess.Popen(command(*sockets, *options), stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        with ExitStack() as stack:
            yield Machine(directory, process, stack)
    finally:
        process.kill()
        process.wait()
