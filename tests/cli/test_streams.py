# SPDX-License-Identifier: Apache-2.0
"""Descriptors whose other end does what it likes."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softkvm.cli.streams import FifoWriter, InputThread, Writer, open_writer, reading

ENDED = threading.Event()
ENDED.set()

Ends = tuple[int, Callable[[int], bytes]]


@contextlib.contextmanager
def pipe(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """A descriptor to write to, and what reads its other end."""
    if kind == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours.fileno(), theirs.recv
        return
    read, write = os.pipe() if kind != "terminal" else os.openpty()
    if kind == "handed down":  # by su: neither opened anew nor made non-blocking
        monkeypatch.setattr(os, "open", _refuse)
    yield write, lambda size: os.read(read, size)
    os.close(read)
    os.close(write)


def _refuse(*args: object) -> int:
    raise PermissionError(13, "Permission denied")


KINDS = ["pipe", "socket", "terminal", "handed down"]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_arrives_in_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bytes(range(0x20, 0x7F)) * 3000
    with pipe(kind, monkeypatch) as (fd, read), contextlib.closing(Writer(fd)) as writer:
        thread = threading.Thread(target=writer.write, args=(text,))
        thread.start()
        received = b""
        while len(received) < len(text):
            received += read(65536)
        thread.join()
    assert received == text


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_waited_for_once_it_has_ended(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(kind, monkeypatch) as (fd, _read), contextlib.closing(Writer(fd)) as writer:
        assert os.get_blocking(fd), "the descriptor is others', too"
        with pytest.raises(TimeoutError):
            writer.write(b"x" * (4 << 20), ENDED)
        assert os.get_blocking(fd)


def test_reader_that_is_gone_is_a_broken_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    with contextlib.closing(Writer(write)) as writer, pytest.raises(BrokenPipeError):
        writer.write(b"x")
    os.close(write)


def test_files_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old and long")
    open_writer(str(path)).write(b"new")
    assert path.read_bytes() == b"new"


def test_named_pipe_waits_for_its_reader_only_when_there_is_something_to_read(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = open_writer(str(path))
    assert isinstance(writer, FifoWriter)
    with pytest.raises(TimeoutError):
        writer.write(b"x", ENDED)
    thread = threading.Thread(target=writer.write, args=(b"hello",))
    thread.start()
    with path.open("rb") as reader:
        assert reader.read(5) == b"hello"
    thread.join()
    writer.close()


def test_input_is_left_where_it_is_until_there_is_room() -> None:
    read, write = os.pipe()
    os.write(write, b"first")
    room, fed = threading.Event(), threading.Event()
    data = bytearray()

    def feed(more: bytes) -> None:
        data.extend(more)
        fed.set()

    with reading(read, feed, room.wait):
        assert not fed.wait(0.3)
        os.write(write, b", second")
        room.set()
        assert fed.wait(30)
    assert data == b"first, second"
    os.close(read)
    os.close(write)


def test_close_does_not_wait_for_a_reader_that_sits_in_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has taken what poll() saw."""
    read, write = os.pipe()
    reads = threading.Event()
    real = os.read

    def slow(fd: int, size: int) -> bytes:
        reads.set()
        real(fd, size)
        return real(fd, size)

    monkeypatch.setattr(os, "read", slow)
    thread = InputThread(read, lambda data: None, lambda timeout_s: True)
    os.write(write, b"x")
    assert reads.wait(30)
    started = time.monotonic()
    thread.close()
    assert time.monotonic() - started < 20
    os.close(write)  # lets it go
