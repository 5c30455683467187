# SPDX-License-Identifier: Apache-2.0
"""Linux's console driver: a shell on /dev/hvc0 that knows the terminal's size, and a named port."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tests.support.guests import linux_guest

from softkvm.vmm.unix_socket import connect

pytestmark = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]

PATIENCE_S = 200.0
PROMPT = rb"root@softkvm:\S*# "


class Terminal:
    """A terminal in which a program runs."""

    def __init__(self, *command: str, size: tuple[int, int]) -> None:
        self._master, self._slave = pty.openpty()
        self._seen = b""
        self._set_size(size)
        self.process = subprocess.Popen(
            command, stdin=self._slave, stdout=self._slave, stderr=self._slave, start_new_session=True
        )

    def _set_size(self, size: tuple[int, int]) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

    def resize(self, size: tuple[int, int]) -> None:
        """What a window's user does: rows and columns are others, and the program is told."""
        self._set_size(size)
        self.process.send_signal(signal.SIGWINCH)

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        until = time.monotonic() + PATIENCE_S
        while not (match := re.search(pattern, self._seen)):
            assert time.monotonic() < until and self.process.poll() is None, self._seen
            if select.select([self._master], [], [], 1)[0]:
                self._seen += os.read(self._master, 4096)
        self._seen = self._seen[match.end() :]
        return match

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


def test_a_shell_on_the_console_device_knows_the_terminals_size(tmp_path: Path) -> None:
    linux_guest()
    path = str(tmp_path / ("d" * 60) / ("e" * 60) / "socket")
    os.makedirs(os.path.dirname(path))
    options = ("--console", "virtio", "--port", f"my port=unix:{path}", "--append", "quiet")
    terminal = Terminal(sys.executable, "-m", "softkvm.cli.main", "run", *options, size=(33, 77))
    try:
        terminal.expect(PROMPT)
        terminal.type("tty; stty size; ls /dev/virtio-ports")
        terminal.expect(rb"/dev/hvc0\r\n33 77\r\nmy port\r\n")
        terminal.resize((44, 99))
        terminal.type('while [ "$(stty size)" != "44 99" ]; do usleep 10000; done; echo as "large"')
        terminal.expect(rb"as large\r\n")
        host = connect(path)
        host.settimeout(PATIENCE_S)
        host.sendall(b"from the host\n")
        terminal.type("exec 3<> '/dev/virtio-ports/my port'; read text <&3; echo got $text; seq 20000 >&3; exec 3>&-")
        terminal.expect(rb"got from the host\r\n")
        data = b""
        while not data.endswith(b"20000\n"):
            data += host.recv(1 << 16)
        assert data == b"".join(b"%d\n" % number for number in range(1, 20001))
        host.close()
        terminal.expect(PROMPT)
        terminal.type("exit")
        until = time.monotonic() + PATIENCE_S
        while terminal.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert terminal.process.returncode == 0
        assert not os.path.exists(path)
    finally:
        terminal.close()
