# SPDX-License-Identifier: Apache-2.0
import os
import termios
import threading
import time
from pathlib import Path

import pytest

from softkvm.cli import CommandError
from softkvm.cli.terminal import EscapeParser, PtyConsole, console_choice, open_console, raw_terminal


class Actions:
    """Counts what the escape keys asked for."""

    def __init__(self) -> None:
        self.ends = self.helps = 0
        self.parser = EscapeParser(self.end, self.help)

    def end(self) -> None:
        self.ends += 1

    def help(self) -> None:
        self.helps += 1


class Line:
    """A serial port that remembers what it was fed; *room* is whether it takes more."""

    def __init__(self, room: bool = True) -> None:
        self.data = bytearray()
        self.fed = threading.Event()
        self.room = threading.Event()
        if room:
            self.room.set()

    @property
    def pending_input(self) -> int:
        return len(self.data)

    def feed(self, data: bytes) -> None:
        self.data += data
        self.fed.set()

    def wait_for_room(self, timeout_s: float) -> bool:
        return self.room.wait(timeout_s)


@pytest.mark.parametrize("step", [1, 100])
def test_escape_sequences_in_any_slicing(step: int) -> None:
    actions = Actions()
    typed = b"ls\x01\x01\n\x01hab\x01qc\x01x"
    sent = b"".join(actions.parser.feed(typed[at : at + step]) for at in range(0, len(typed), step))
    assert sent == b"ls\x01\nabc"
    assert (actions.ends, actions.helps) == (1, 1)


def test_terminal_is_restored_whatever_happens() -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    with pytest.raises(ZeroDivisionError), raw_terminal(slave):
        inside = termios.tcgetattr(slave)
        assert not inside[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        raise ZeroDivisionError
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_pty_passes_input_and_drops_output_that_nobody_reads(capfd: pytest.CaptureFixture[str]) -> None:
    console = PtyConsole()
    path = capfd.readouterr().err.split()[-1]
    for _ in range(100):
        console.output(b"x" * 4096)
    line = Line()
    with console.attach(line, lambda: None, threading.Event()):
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, b"hello")
        assert line.fed.wait(10)
        assert os.read(fd, 16) == b"x" * 16
        os.close(fd)
    assert line.data == b"hello"


def test_file_gets_the_output(tmp_path: Path) -> None:
    console = open_console(f"file:{tmp_path / 'log'}")
    console.output(b"boot\n")
    assert (tmp_path / "log").read_bytes() == b"boot\n"


@pytest.mark.parametrize("choice", ["", "tty", "file:", "file:/nonexistent/dir/log"])
def test_impossible_consoles_are_named(choice: str) -> None:
    with pytest.raises(CommandError, match=f"--console {choice}: "):
        open_console(console_choice(choice))


def test_attach_returns_while_nobody_types() -> None:
    started = time.monotonic()
    with open_console("none").attach(Line(), lambda: None, threading.Event()):
        pass
    assert time.monotonic() - started < 5
