# SPDX-License-Identifier: Apache-2.0
"""What commands write: lines on standard output, progress, and files that are there complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from softkvm.cli import EXIT_ERROR, CommandError
from softkvm.cli.streams import Writer

STDOUT = "-"
"""The name of standard output where a file is wanted."""


_NOW = threading.Event()
_NOW.set()


class ReaderGone(CommandError):
    """Nobody reads standard output any more (``| head``): the command ends without a word."""

    def __init__(self) -> None:
        super().__init__("", 128 + signal.SIGPIPE)


_partial: list[os.stat_result] = []
"""The file whose last line a guest left without its end."""


def left_partial_line(where: int | str) -> None:
    """Note that a guest's output to *where* does not end with a line end: the next line of ours there begins with one.

    *where* is a descriptor or a path.
    """
    with contextlib.suppress(OSError):
        _partial[:] = [os.stat(where)]


def begin_line(fd: int) -> None:
    """End the line that a guest began, if *fd* leads to the same file or terminal as its output did."""
    if not _partial or not os.path.samestat(_partial[0], os.fstat(fd)):
        return
    _partial.clear()
    with contextlib.suppress(OSError), contextlib.closing(Writer(fd)) as writer:
        writer.write(b"\n", _NOW)


def say(text: str, end: str = "\n") -> None:
    """Print *text* and *end* on standard output; CommandError if that does not take it."""
    begin_line(1)
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise stdout_error(error) from None


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Return the lines of a table for people: the first *left* columns to the left, figures to the right."""
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [text.ljust(width) for text, width in zip(row[:left], widths[:left], strict=True)]
        cells += [text.rjust(width) for text, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def say_printed(function: Callable[[], object]) -> None:
    """Call *function*, which is not ours, and say what it prints."""
    printed = io.BytesIO()
    try:
        with contextlib.redirect_stdout(
            io.TextIOWrapper(printed, "utf-8", "surrogateescape", write_through=True)
        ) as out:
            function()
    finally:
        if text := printed.getvalue().decode("utf-8", "surrogateescape"):
            say(text, end="")
        out.detach()


def warn(text: str) -> None:
    """Print *text* as one line on standard error, if anybody takes it within a second."""
    line = f"softkvm: {one_line(text)}\n"
    with contextlib.suppress(OSError):
        try:
            fd = sys.stderr.fileno()
        except io.UnsupportedOperation:  # not a file: a test's
            sys.stderr.write(line)
            return
        sys.stderr.flush()
        begin_line(fd)
        with contextlib.closing(Writer(fd)) as writer:
            writer.write(line.encode(sys.stderr.encoding, "backslashreplace"), _NOW)


def one_line(text: str) -> str:
    """Return *text* with the control characters that a file name or a guest put there written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def stdout_error(error: OSError) -> CommandError:
    """Return what *error* of a write to standard output means for the command."""
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    return CommandError(f"standard output: {error.strerror}", EXIT_ERROR)


class OutputFile:
    """The file *name* that *option* wants written when the command has done its work; ``-`` is standard output.

    Whether it can be written is found out at once, with status 2. It appears complete or not at all: until then an
    older file of that name stays. What is no ordinary file (a pipe, a device) is written to as it is.
    """

    def __init__(self, option: str, name: str) -> None:
        self.name = name
        self._what = f"{option} {name}"
        self._direct = False
        if name == STDOUT:
            return
        try:
            self._direct = _is_special(name)
            if not self._direct:
                os.unlink(self._temporary(b""))
            elif not os.access(name, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise CommandError(f"{self._what}: {error.strerror}") from None

    def write(self, contents: str | bytes) -> None:
        """Write all of it; CommandError with status 1 if the disk does not take it."""
        if self.name == STDOUT and isinstance(contents, str):
            say(contents.removesuffix("\n"))
            return
        data = _encode(contents) if isinstance(contents, str) else contents
        try:
            if self._direct:
                with open(os.open(self.name, os.O_WRONLY | os.O_APPEND), "wb") as file:
                    file.write(data)
            else:
                os.replace(self._temporary(data), self._target())
        except OSError as error:
            raise CommandError(f"{self._what}: {error.strerror}", EXIT_ERROR) from None

    def _target(self) -> Path:
        """The file itself where *name* is a symbolic link."""
        return Path(os.path.realpath(self.name))

    def _temporary(self, data: bytes) -> str:
        """Return a file with *data* in the directory of the target, with the mode that the target has or will have."""
        import tempfile  # few commands write files, and every start of a client would wait for it

        target = self._target()
        fd, path = tempfile.mkstemp(prefix=f".{target.name[:200]}.", dir=target.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                os.fchmod(fd, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return path


def _is_special(name: str) -> bool:
    """Tell whether *name* is there and no ordinary file; IsADirectoryError if it is a directory."""
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # /dev/stdout may lead to an ordinary file, which is open already and not to be replaced
    return not stat.S_ISREG(mode) or name.startswith(("/dev/", "/proc/"))


def _encode(text: str) -> bytes:
    """File names in *text* may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
