# SPDX-License-Identifier: Apache-2.0
"""The user's end of a machine's console: a raw terminal with escape keys, a pseudo-terminal, a file, nothing."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from softkvm.cli import CommandError

ESCAPE = 0x01  # Ctrl-A

HELP = """\
Ctrl-A h        this help
Ctrl-A x        end the machine
Ctrl-A Ctrl-A   send Ctrl-A to the guest
"""


class EscapeParser:
    """Takes typed bytes, returns what goes to the guest, calls back for Ctrl-A x and Ctrl-A h."""

    def __init__(self, end: Callable[[], object], help: Callable[[], object]) -> None:
        self._actions = {ord("x"): end, ord("h"): help}
        self._escaped = False

    def feed(self, data: bytes) -> bytes:
        """Return *data* without the escape sequences."""
        result = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    result.append(byte)
                continue
            self._escaped = False
            action = self._actions.get(byte)
            if action is not None:
                action()
            elif byte == ESCAPE:
                result.append(ESCAPE)
            # any other key: the sequence is swallowed
        return bytes(result)


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Put the terminal at *fd* into raw mode for the block; restore it however the block ends."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class InputThread:
    """Reads *fd* until :meth:`close` or its end, and hands the bytes on."""

    def __init__(self, fd: int, feed: Callable[[bytes], object]) -> None:
        self._fd = fd
        self._feed = feed
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._loop, name="console input", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            try:
                data = os.read(self._fd, 4096)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            self._feed(data)

    def close(self) -> None:
        """Stop reading."""
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data*, waiting for a descriptor that is full."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


class ConsoleEnd(Protocol):
    """One of the choices of ``--console``."""

    def output(self, data: bytes) -> None:
        """Show output of the guest."""

    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any]) -> contextlib.AbstractContextManager[None]:
        """Send typed bytes to *feed* while the context lasts; *end* is for the key that ends the machine."""


class NoConsole:
    """``none``: output is dropped, there is no input."""

    def output(self, data: bytes) -> None:
        """Drop it."""

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any]) -> Iterator[None]:
        """No input."""
        yield


class StdioConsole:
    """``stdio``: standard input and output; raw and with escape keys if they are a terminal."""

    def output(self, data: bytes) -> None:
        """Write it to standard output."""
        write_all(1, data)

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any]) -> Iterator[None]:
        """Read standard input."""
        if not os.isatty(0):
            reader = InputThread(0, feed)
            try:
                yield
            finally:
                reader.close()
            return
        print("softkvm: Ctrl-A x ends the machine, Ctrl-A h helps", file=sys.stderr, flush=True)
        escapes = EscapeParser(end, lambda: write_all(2, HELP.replace("\n", "\r\n").encode()))
        with raw_terminal(0):
            reader = InputThread(0, lambda data: feed(escapes.feed(data)))
            try:
                yield
            finally:
                reader.close()


class PtyConsole:
    """``pty``: a new pseudo-terminal; output that nobody reads is dropped."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        print(f"softkvm: console at {os.ttyname(self._slave)}", file=sys.stderr, flush=True)

    def output(self, data: bytes) -> None:
        """Write what fits."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._master, data)

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any]) -> Iterator[None]:
        """Read the pseudo-terminal."""
        reader = InputThread(self._master, feed)
        try:
            yield
        finally:
            reader.close()


class FileConsole(NoConsole):
    """``file:PATH``: output goes to a file."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise CommandError(f"--console file:{path}: {error.strerror}") from None

    def output(self, data: bytes) -> None:
        """Write it to the file."""
        write_all(self._file.fileno(), data)


def open_console(choice: str) -> ConsoleEnd:
    """Return the console that ``--console`` *choice* names; CommandError if there is no such choice."""
    if choice.startswith("file:") and len(choice) > len("file:"):
        return FileConsole(Path(choice.removeprefix("file:")))
    kinds: dict[str, Callable[[], ConsoleEnd]] = {
        "stdio": StdioConsole,
        "pty": PtyConsole,
        "none": NoConsole,
    }
    if choice not in kinds:
        raise CommandError(f"--console {choice}: expected stdio, pty, file:PATH or none")
    return kinds[choice]()
