# SPDX-License-Identifier: Apache-2.0
"""Terminals at a shared console: all see what the guest says, the guest gets what each types, none holds it up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from softkvm.control.console import TAIL, ConsoleHub

FAR_S = 30


class Line:
    """A serial port that takes everything."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.pending_input = 0

    def feed(self, data: bytes) -> None:
        self.data += data


@pytest.fixture
def hub() -> Iterator[ConsoleHub]:
    hub = ConsoleHub()
    hub.line = Line()
    yield hub
    hub.close()


def terminal(hub: ConsoleHub, *, past: bool = True) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.settimeout(FAR_S)
    hub.attach(theirs, past=past)
    return ours


def read(channel: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := channel.recv(size - len(found))):
        found += data
    return found


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + FAR_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_everybody_sees_what_the_guest_says_and_said(hub: ConsoleHub) -> None:
    hub.output(b"before ")
    one, two, three = terminal(hub), terminal(hub), terminal(hub, past=False)
    hub.output(b"after")
    assert read(one, 12) == read(two, 12) == b"before after"
    assert read(three, 5) == b"after"


def test_the_guest_gets_what_each_types(hub: ConsoleHub) -> None:
    one, two = terminal(hub), terminal(hub)
    one.sendall(b"abc")
    wait_for(lambda: bytes(hub.line.data) == b"abc")  # type: ignore[union-attr]
    two.sendall(b"def")
    wait_for(lambda: bytes(hub.line.data) == b"abcdef")  # type: ignore[union-attr]


def test_input_waits_while_the_guest_takes_none(hub: ConsoleHub) -> None:
    line = hub.line
    assert isinstance(line, Line)
    line.pending_input = 1 << 20
    one = terminal(hub)
    one.sendall(b"abc")
    hub.output(b"x")
    assert read(one, 1) == b"x"
    assert line.data == b""
    line.pending_input = 0
    wait_for(lambda: bytes(line.data) == b"abc")


def test_the_past_is_bounded(hub: ConsoleHub) -> None:
    hub.output(b"x" * 10 + b"y" * TAIL.most)
    assert read(terminal(hub), TAIL.most) == b"y" * TAIL.most


def test_who_does_not_read_loses_the_oldest_and_holds_nobody_up(hub: ConsoleHub) -> None:
    lazy, quick = terminal(hub), terminal(hub)
    for number in range(512):
        piece = number.to_bytes(4, "little") * 1024
        hub.output(piece)
        assert read(quick, 4096) == piece
    last = (511).to_bytes(4, "little") * 1024
    tail = b""
    while tail != last:
        tail = (tail + lazy.recv(1 << 16))[-4096:]


def test_who_hangs_up_is_gone_and_told_of(hub: ConsoleHub) -> None:
    ended = threading.Event()
    ours, theirs = socket.socketpair()
    hub.attach(theirs, ended.set)
    assert hub.terminals == 1
    ours.close()
    assert ended.wait(FAR_S)
    wait_for(lambda: hub.terminals == 0)
    hub.output(b"nobody")


def test_the_last_words_arrive_before_the_end(hub: ConsoleHub) -> None:
    one = terminal(hub)
    hub.output(b"z" * 100_000)
    closing = threading.Thread(target=hub.close)
    closing.start()
    assert read(one, 100_000) == b"z" * 100_000
    assert one.recv(1) == b""
    closing.join(FAR_S)


def test_a_terminal_that_takes_nothing_does_not_keep_the_machine_from_its_end(hub: ConsoleHub) -> None:
    terminal(hub)
    hub.output(b"z" * (1 << 20))
    started = time.monotonic()
    hub.close()
    assert time.monotonic() - started < FAR_S
