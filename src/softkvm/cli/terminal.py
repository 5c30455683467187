# SPDX-License-Identifier: Apache-2.0
"""The user's end of a machine's console: a raw terminal with escape keys, a pseudo-terminal, a file, nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.output import begin_line, left_partial_line, warn
from softkvm.cli.streams import InputLine, Writer, open_writer, reading

ESCAPE = 0x01  # Ctrl-A

HELP = """\
Ctrl-A h        this help
Ctrl-A x        end the machine
Ctrl-A Ctrl-A   send Ctrl-A to the guest
"""

TYPE_AHEAD = 65536
"""Bytes that may be typed before the guest reads them. The keys are read on, for Ctrl-A x, and dropped."""


class EscapeParser:
    """Takes typed bytes, returns what goes to the guest, calls back for Ctrl-A x and Ctrl-A h, and *more* keys."""

    def __init__(
        self,
        end: Callable[[], object],
        help: Callable[[], object],
        more: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        self._actions = {ord(key): action for key, action in {**(more or {}), "x": end, "h": help}.items()}
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


def terminal_kind() -> str | None:
    """Return what the terminal of the console is, as ``TERM:ROWSxCOLUMNS``; None if there is none."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    columns, rows = shutil.get_terminal_size()
    term = os.environ.get("TERM", "")
    if not re.fullmatch(r"[\w.+-]+", term, re.ASCII):  # no word of a kernel command line
        term = "vt100"
    return f"{term}:{rows}x{columns}"


class ConsoleEnd(Protocol):
    """One of the choices of ``--console``."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def output(self, data: bytes) -> None:
        """Show output of the guest."""

    def attach(
        self, line: InputLine, end: Callable[[], Any], ended: threading.Event
    ) -> contextlib.AbstractContextManager[None]:
        """Send typed bytes to *line* while the context lasts.

        *end* is for the key that ends the machine; *ended* is set when it has ended.
        """


class NoConsole:
    """``none``: output is dropped, there is no input."""

    name = "--console none"

    def output(self, data: bytes) -> None:
        """Drop it."""

    @contextlib.contextmanager
    def attach(self, line: InputLine, end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """No input."""
        yield


class _StandardConsole:
    """Output to a descriptor that the process was started with."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._writer = Writer(fd)
        self._ended: threading.Event | None = None
        self._last = b"\n"

    def output(self, data: bytes) -> None:
        """Write it."""
        self._last = data[-1:]
        self._writer.write(data, self._ended)

    def _left(self) -> bool:
        """Tell, and note for what is printed next, whether the output ends in the middle of a line."""
        partial = self._last != b"\n"
        if partial:
            left_partial_line(self._fd)
        return partial


class StdioConsole(_StandardConsole):
    """``stdio``: standard input and output; raw and with escape keys if they are a terminal."""

    name = "standard output"

    def __init__(self) -> None:
        super().__init__(1)

    @contextlib.contextmanager
    def attach(self, line: InputLine, end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """Read standard input; leave a terminal's cursor at the beginning of a line."""
        self._ended = ended
        try:
            with self._keys(line, end) if os.isatty(0) else reading(0, line.feed, line.wait_for_room):
                yield
        finally:
            if self._left() and os.isatty(1):
                begin_line(1)

    @contextlib.contextmanager
    def _keys(self, line: InputLine, end: Callable[[], Any]) -> Iterator[None]:
        warn("Ctrl-A x ends the machine, Ctrl-A h helps")
        errors = Writer(2)
        escapes = EscapeParser(end, lambda: errors.write(HELP.replace("\n", "\r\n").encode()))

        def typed(data: bytes) -> None:
            data = escapes.feed(data)
            if line.pending_input < TYPE_AHEAD:
                line.feed(data)

        with raw_terminal(0), reading(0, typed, lambda timeout_s: True):
            yield


class PtyConsole:
    """``pty``: a new pseudo-terminal; output that nobody reads is dropped."""

    name = "--console pty"

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
    def attach(self, line: InputLine, end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """Read the pseudo-terminal."""
        with reading(self._master, line.feed, line.wait_for_room):
            yield


class FileConsole:
    """``file:PATH``: output goes to a file, there is no input."""

    def __init__(self, path: str) -> None:
        self.name = f"--console file:{path}"
        try:
            self._writer = open_writer(path)
        except OSError as error:
            raise CommandError(f"{self.name}: {error.strerror}") from None
        self._path = path
        self._ended: threading.Event | None = None
        self._last = b"\n"

    def output(self, data: bytes) -> None:
        """Write it to the file."""
        self._last = data[-1:]
        self._writer.write(data, self._ended)

    @contextlib.contextmanager
    def attach(self, line: InputLine, end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """No input."""
        self._ended = ended
        try:
            yield
        finally:
            if self._last != b"\n":
                left_partial_line(self._path)


STDIO, NONE, STDERR = "stdio", "none", "stderr"
VIRTIO = "virtio"
_KINDS: dict[str, Callable[[], ConsoleEnd]] = {STDIO: StdioConsole, "pty": PtyConsole, NONE: NoConsole}
_FILE = "file:"


class StderrConsole(_StandardConsole):
    """Output goes to standard error, as far as somebody takes it; for a run whose standard output is another's."""

    name = "standard error"

    def __init__(self) -> None:
        super().__init__(2)

    @contextlib.contextmanager
    def attach(self, line: InputLine, end: Callable[[], Any], ended: threading.Event) -> Iterator[None]:
        """No input."""
        self._ended = ended
        try:
            yield
        finally:
            self._left()


def console_choice(text: str) -> str:
    """Type of the argument of ``--console``; CommandError if it names none."""
    kind, comma, end = text.partition(",")
    where = end if kind == VIRTIO and comma else STDIO if text == VIRTIO else text
    if where in _KINDS or (where.startswith(_FILE) and where != _FILE):
        return text
    raise CommandError(f"--console {text}: expected stdio, pty, file:PATH or none, or virtio or virtio,WHERE")


def open_console(choice: str) -> ConsoleEnd:
    """Return the console that *choice* names; CommandError if it cannot be had."""
    if choice.startswith(_FILE):
        return FileConsole(choice.removeprefix(_FILE))
    return StderrConsole() if choice == STDERR else _KINDS[choice]()
