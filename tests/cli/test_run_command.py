# SPDX-License-Identifier: Apache-2.0
"""``softkvm run -- COMMAND``: a command in the default guest, whose exit status, output and signals are ours."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.guests import linux_guest

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")
BOOT_S = 240

guest = [pytest.mark.guest, pytest.mark.network, pytest.mark.timeout(600)]


def softkvm(*args: str | Path, input: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SOFTKVM, *args],
        capture_output=True,
        text=True,
        timeout=BOOT_S,
        check=False,
        input=input,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--"], "expected a command behind --"),
        (["--", ""], "expected a command behind --"),
        (["--quiet"], "--quiet needs a command: softkvm run … -- COMMAND"),
        (["--env", "A=b"], "--env needs a command"),
        (["--cwd", "/"], "--cwd needs a command"),
        (["--file", "x"], "--file needs a command"),
        (["--file", "/no/such/file", "--", "true"], "--file /no/such/file: No such file or directory"),
        (["--env", "=b", "--", "true"], "--env =b: expected NAME or NAME=VALUE"),
        (["--initrd", "x", "--", "true"], "--initrd is there, too"),
        (["--kernel", "flat:x", "--", "true"], "flat:FILE is none"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str) -> None:
    done = softkvm("run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


class TestInTheGuest:
    """A boot each."""

    pytestmark = guest

    def test_streams_status_environment_files_and_shares(self, tmp_path: Path) -> None:
        linux_guest()
        (tmp_path / "tool.sh").write_text("#!/bin/sh\necho tool $1\n")
        (tmp_path / "tool.sh").chmod(0o755)
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "in").write_text("from the host\n")
        script = (
            'cat; echo err >&2; pwd; echo "$A$B"; /root/tool.sh x; cat /mnt/shared/in; echo y > /mnt/shared/out; exit 5'
        )
        options: list[str | Path] = [
            "--quiet",
            "--cwd",
            "/tmp",
            "--env",
            "A=1 2",
            "--env",
            "B",
            "--file",
            tmp_path / "tool.sh",
        ]
        done = softkvm(
            "run", *options, "--share", tmp_path / "shared", "--", "sh", "-c", script, input="in\n" * 10_000, B="3"
        )
        assert done.stderr == "err\n"
        assert done.stdout == "in\n" * 10_000 + "/tmp\n1 23\ntool x\nfrom the host\n"
        assert done.returncode == 5
        assert (tmp_path / "shared" / "out").read_text() == "y\n"

    def test_a_command_that_is_not_there_and_the_console_on_standard_error(self) -> None:
        linux_guest()
        done = softkvm("run", "--", "no-such-command", "--quiet")
        assert (done.returncode, done.stdout) == (127, "")
        assert "softkvm: no-such-command: No such file or directory\n" in done.stderr
        assert "Linux version" in done.stderr

    def test_a_guest_that_goes_away_is_told_of(self) -> None:
        linux_guest()
        done = softkvm("run", "-q", "--", "poweroff", "-f")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "softkvm: the guest switched itself off before the command had ended\n"
        done = softkvm("run", "-q", "--timeout", "20", "--", "sleep", "1000")
        assert (done.returncode, done.stderr) == (5, "softkvm: timeout: 20 s\n")

    def test_signals_are_the_commands(self) -> None:
        linux_guest()
        script = "trap 'echo caught; exit 9' TERM; echo ready; sleep 1000 & wait"
        with subprocess.Popen([*SOFTKVM, "run", "-q", "--", "sh", "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == b"caught\n"
            assert process.wait(BOOT_S) == 9

    def test_a_terminal(self) -> None:
        linux_guest()
        ours, theirs = pty.openpty()
        script = "stty size; echo $TERM; tty; read line; echo got $line; sleep 1000"
        arguments = [*SOFTKVM, "run", "--", "sh", "-c", script]
        environment = {**os.environ, "TERM": "vt220", "COLUMNS": "", "LINES": ""}
        subprocess.run(["stty", "rows", "31", "columns", "99"], stdin=theirs, check=True)
        with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
            seen = b""

            def expect(text: bytes) -> None:
                nonlocal seen
                deadline = time.monotonic() + BOOT_S
                while text not in seen:
                    assert time.monotonic() < deadline
                    seen += os.read(ours, 1000)

            expect(b"31 99\r\nvt220\r\n/dev/pts/0\r\n")
            os.write(ours, b"hello\r")
            expect(b"got hello\r\n")
            os.write(ours, b"\x03")
            assert process.wait(BOOT_S) == 128 + signal.SIGINT
        os.close(ours)
        os.close(theirs)
