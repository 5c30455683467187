# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: help, errors, broken standard output, signals."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

import softkvm
from softkvm.cli import Command
from softkvm.cli import guest as guest_command
from softkvm.cli.main import COMMANDS, main

SOFTKVM = (sys.executable, "-m", "softkvm.cli.main")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"softkvm {softkvm.__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["--fly"], ["run", "--fly"], ["run", "--accel", "hope"], ["run", "--ker", "x"]]
)
def test_bad_usage_is_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("softkvm")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: softkvm {name}" in capsys.readouterr().out


OUTPUTS = pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["unittests", "{suite}", "--list"], ""), (["unittests", "{suite}", "--list"], "1")],
)


@OUTPUTS
def test_reader_that_is_gone_ends_a_command_without_a_word(
    tmp_path: Path, arguments: list[str], unbuffered: str
) -> None:
    process = start(tmp_path, arguments, unbuffered, subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) == 128 + signal.SIGPIPE


@OUTPUTS
def test_full_standard_output_is_one_line_and_status_1(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        process = start(tmp_path, arguments, unbuffered, full.fileno())
        _, error = process.communicate(timeout=30)
    assert error == "softkvm: standard output: No space left on device\n"
    assert process.returncode == 1


def start(tmp_path: Path, arguments: list[str], unbuffered: str, stdout: int) -> "subprocess.Popen[str]":
    (tmp_path / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    return subprocess.Popen(
        [*SOFTKVM, *(argument.format(suite=tmp_path) for argument in arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_do_no_harm(tmp_path: Path, closed: str) -> None:
    (tmp_path / "unittests.cfg").write_text("[a]\nfile = a.flat\n")
    command = f'exec "$0" -m softkvm.cli.main unittests "$1" --list {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(tmp_path)], check=False, timeout=30)
    assert done.returncode == 0


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Puts a function in the place of ``softkvm guest``."""

    def put(run: Callable[[], int]) -> None:
        def call(args: Namespace) -> int:
            return run()

        monkeypatch.setattr(guest_command, "command", Command(lambda parser: None, call))

    return put


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_command_as_an_exception_does(
    command: Callable[[Callable[[], int]], None], number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def run() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
            return 0
        finally:
            cleaned.append(True)

    command(run)
    before = signal.getsignal(number)
    assert main(["guest"]) == 128 + number
    assert cleaned == [True]
    assert capfd.readouterr().err == f"softkvm: stopped: {number.name}\n"
    assert signal.getsignal(number) is before


def test_ignored_signal_stays_ignored(command: Callable[[Callable[[], int]], None]) -> None:
    def run() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    command(run)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert main(["guest"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exception_that_nobody_expected_is_one_line_with_its_place(
    command: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise KeyError("x\ny")

    command(run)
    assert main(["guest"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("softkvm: internal error: KeyError: ")
    assert "(test_main.py:" in error
    assert error.count("\n") == 1


def test_control_characters_in_arguments_stay_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--kernel", "a\nb\x1b[2J"]) == 2
    assert capsys.readouterr().err == "softkvm: kernel a\\nb\\x1b[2J: No such file or directory\n"
    assert main(["run", "--x\ny"]) == 2
    assert capsys.readouterr().err == "softkvm: unrecognized arguments: --x\\ny\n"


def test_only_what_is_required_is_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unittests"]) == 2
    assert capsys.readouterr().err == "softkvm: expected DIR; `softkvm unittests --help` explains\n"
