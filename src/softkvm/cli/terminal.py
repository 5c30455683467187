# SPDX-License-Identifier: Apache-2.0
"""The user's end of a machine's console: a raw terminal with escape keys, a pseudo-terminal, a file, nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import warn

ESCAPE = 0x01  # Ctrl-A

HELP = """\
Ctrl-A h        this help
Ctrl-A x        end the machine
Ctrl-A Ctrl-A   send Ctrl-A to the guest
"""

GRACE_S = 1.0
"""How long output may wait for somebody to read it once the machine has ended."""


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
        with contextlib.suppress(termios.error):  # a terminal that hung up is past restoring
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


@contextlib.contextmanager
def reading(fd: int, feed: Callable[[bytes], object]) -> Iterator[None]:
    """Hand what comes from *fd* to *feed* while the block lasts."""
    reader = InputThread(fd, feed)
    try:
        yield
    finally:
        reader.close()


def write_all(fd: int, data: bytes, ended: threading.Event | None = None) -> None:
    """Write all of *data*, waiting for a descriptor that is full; TimeoutError some time after *ended* is set."""
    view = memoryview(data)
    waited_s = 0.0
    while view:
        try:
            view = view[os.write(fd, view) :]
            waited_s = 0.0
        except BlockingIOError:
            _, ready, _ = select.select([], [fd], [], 0.1)
            if not ready and ended is not None and ended.is_set():
                waited_s += 0.1
                if waited_s > GRACE_S:
                    raise TimeoutError(errno.ETIMEDOUT, "nobody takes the output") from None


def without_blocking(fd: int) -> int:
    """Return a descriptor for the pipe or terminal *fd* that is never waited for; *fd* itself if it is anything else.

    It is opened anew: O_NONBLOCK on *fd* would be set for all other processes that share it.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


class ConsoleEnd(Protocol):
    """One of the choices of ``--console``."""

    def output(self, data: bytes) -> None:
        """Show output of the guest."""

    def attach(
        self, feed: Callable[[bytes], Any], end: Callable[[], Any], ended: threading.Event
    ) -> contextlib.AbstractContextManager[None]:
        """Send typed bytes to *feed* while the context lasts.

        *end* is for the key that ends the machine; *ended* is set when it has ended.
        """


class NoConsole:
    """``none``: output is dropped, there is no input."""

    def output(self, data: bytes) -> None:
        """Drop it."""

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """No input."""
        yield


class StdioConsole:
    """``stdio``: standard input and output; raw and with escape keys if they are a terminal."""

    def __init__(self) -> None:
        self._fd = without_blocking(1)
        self._ended: threading.Event | None = None
        self._last = b"\n"

    def output(self, data: bytes) -> None:
        """Write it to standard output."""
        self._last = data[-1:]
        write_all(self._fd, data, self._ended)

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """Read standard input; leave the terminal's cursor at the beginning of a line."""
        self._ended = ended
        try:
            with self._keys(feed, end) if os.isatty(0) else reading(0, feed):
                yield
        finally:
            if self._last != b"\n" and os.isatty(1):
                with contextlib.suppress(OSError):
                    write_all(self._fd, b"\n", ended)

    @contextlib.contextmanager
    def _keys(self, feed: Callable[[bytes], Any], end: Callable[[], Any]) -> Iterator[None]:
        warn("Ctrl-A x ends the machine, Ctrl-A h helps")
        escapes = EscapeParser(end, lambda: write_all(2, HELP.replace("\n", "\r\n").encode()))
        with raw_terminal(0), reading(0, lambda data: feed(escapes.feed(data))):
            yield


class PtyConsole:
    """``pty``: a new pseudo-terminal; output that nobody reads is dropped."""

    def __init__(self) -> None:
        try:
            self._master, self._slave = os.openpty()
        except OSError as error:
            raise CommandError(f"--console pty: {error.strerror}", EXIT_ERROR) from None
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        warn(f"console at {os.ttyname(self._slave)}")

    def output(self, data: bytes) -> None:
        """Write what fits."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._master, data)

    @contextlib.contextmanager
    def attach(self, feed: Callable[[bytes], Any], end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """Read the pseudo-terminal."""
        with reading(self._master, feed):
            yield


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


_KINDS: dict[str, Callable[[], ConsoleEnd]] = {"stdio": StdioConsole, "pty": PtyConsole, "none": NoConsole}
_FILE = "file:"


def console_choice(text: str) -> str:
    """Type of the argument of ``--console``; CommandError if it names none."""
    if text in _KINDS or (text.startswith(_FILE) and text != _FILE):
        return text
    raise CommandError(f"--console {text}: expected stdio, pty, file:PATH or none")


def open_console(choice: str) -> ConsoleEnd:
    """Return the console that *choice* names; CommandError if it cannot be had."""
    if choice.startswith(_FILE):
        return FileConsole(Path(choice.removeprefix(_FILE)))
    return _KINDS[choice]()
