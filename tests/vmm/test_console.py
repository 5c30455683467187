# SPDX-License-Identifier: Apache-2.0
import threading
import time
from typing import Any

import pytest

from softkvm.vmm.console import Console, ConsoleEnded, ConsoleError, ConsoleTimeout


class FakeMachine:
    """What a console sees of a machine."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.outcome = "power-off"
        self.board = self  # all in one: machine, board and serial port
        self.serial = self
        self.typed = b""
        self.flushes: list[bytes] = []
        self.console: Console | None = None

    def feed(self, data: bytes) -> None:
        self.typed += data

    def flush(self) -> None:
        while self.flushes and self.console is not None:
            self.console.output(self.flushes.pop())


@pytest.fixture
def parts() -> tuple[Console, Any]:
    console, machine = Console(), FakeMachine()
    machine.console = console
    console.attach(machine)  # type: ignore[arg-type]
    return console, machine


def test_expect_consumes_up_to_the_match(parts: tuple[Console, Any]) -> None:
    console, _ = parts
    console.output(b"login: \xff\xe2\x82\xac one two")
    assert console.expect(r"o(\w+)", 1)[1] == "gin"
    assert console.expect("\u20ac one", 1)
    assert console.expect(r"\S+", 1)[0] == "two"
    assert "login: " in console.text


def test_expect_waits_for_output_from_another_thread(parts: tuple[Console, Any]) -> None:
    console, _ = parts
    threading.Timer(0.05, console.output, (b"# ",)).start()
    assert console.expect("# ", 5)


def test_timeout_shows_the_end_of_the_output(parts: tuple[Console, Any]) -> None:
    console, _ = parts
    console.output(b"Kernel panic")
    with pytest.raises(ConsoleTimeout, match=r"timeout after 0.05 s while expecting '# '.*\n.*Kernel panic"):
        console.expect("# ", 0.05)


def test_end_of_the_machine_ends_the_wait_after_its_last_output(parts: tuple[Console, Any]) -> None:
    console, machine = parts
    machine.flushes.append(b"last words")
    machine.ended.set()
    assert console.expect("last words", 5)
    started = time.monotonic()
    with pytest.raises(ConsoleEnded, match="power-off"):
        console.expect("more", 30)
    assert time.monotonic() - started < 5


def test_send_types_at_the_machine(parts: tuple[Console, Any]) -> None:
    console, machine = parts
    console.send("uname\n")
    assert machine.typed == b"uname\n"
    with pytest.raises(ConsoleError):
        Console().send("x")


def test_mirror_gets_everything() -> None:
    seen: list[bytes] = []
    console = Console(seen.append)
    console.output(b"abc")
    assert seen == [b"abc"]
