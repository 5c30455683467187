# SPDX-License-Identifier: Apache-2.0
"""Reading and writing descriptors whose other end may sleep for ever, or take everything at once.

A machine has to end when its user or its guest wants it to, whatever the processes do that its console leads to:
nothing here waits in ``read`` or ``write``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

GRACE_S = 1.0
"""How long output may wait for somebody to read it once the machine has ended."""

PIECE = 4096
"""Bytes of one read."""

_POLL_S = 0.1
_SMALL = 512  # _POSIX_PIPE_BUF: what a pipe takes whole once it is writable


class Writer:
    """Writes to descriptor *fd*, and never waits where it cannot be told to stop.

    The descriptor stays as it is: O_NONBLOCK on it would be set for all other processes that share it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._send: Callable[[memoryview], int] = self._write
        self._resources = contextlib.ExitStack()
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            import socket  # seldom needed, and every start of a client would wait for it

            sock = self._resources.enter_context(socket.socket(fileno=os.dup(fd)))
            self._send = lambda data: sock.send(data, socket.MSG_DONTWAIT)
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                self._resources.callback(os.close, self._fd)
            except OSError:  # another user's terminal or pipe, handed down by su; no /proc
                self._send = self._write_a_little

    def _write(self, data: memoryview) -> int:
        return os.write(self._fd, data)

    def _write_a_little(self, data: memoryview) -> int:
        """On a descriptor that blocks: only what it takes at once."""
        if not self._writable(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._fd, data[:_SMALL])

    def _writable(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(timeout_s * 1000))

    def write(self, data: bytes, ended: threading.Event | None = None) -> None:
        """Write all of *data*, waiting for a descriptor that is full; TimeoutError some time after *ended* is set."""
        view = memoryview(data)
        waited_s = 0.0
        while view:
            try:
                view = view[self._send(view) :]
                waited_s = 0.0
            except BlockingIOError:
                ready = self._writable(_POLL_S)
                if not ready and ended is not None and ended.is_set():
                    waited_s += _POLL_S
                    if waited_s > GRACE_S:
                        raise TimeoutError(errno.ETIMEDOUT, "nobody takes the output") from None

    def close(self) -> None:
        """Give back what was opened for writing; *fd* itself stays open."""
        self._resources.close()


class FifoWriter(Writer):
    """Writes to the named pipe *path*. Whether somebody has opened it to read is not waited for until there is data."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._send = self._write
        self._resources = contextlib.ExitStack()
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _write(self, data: memoryview) -> int:
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._resources.callback(os.close, self._fd)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                raise BlockingIOError(errno.EAGAIN, "nobody reads") from None
        return super()._write(data)

    def _writable(self, timeout_s: float) -> bool:
        if self._fd >= 0:
            return super()._writable(timeout_s)
        time.sleep(timeout_s)
        return False


def open_writer(path: str) -> Writer:
    """Return a writer to the file *path*, which is made anew if it is an ordinary one; OSError if that cannot be."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISFIFO(os.stat(path).st_mode):
            return FifoWriter(path)
    return Writer(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC, 0o666))


class InputLine(Protocol):
    """Where input goes: a serial port."""

    @property
    def pending_input(self) -> int:
        """Bytes that wait to be taken."""

    def feed(self, data: bytes) -> None:
        """Take *data*, without waiting."""

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until not much is waiting to be taken; False if that takes longer."""


class InputThread:
    """Reads *fd* until :meth:`close` or its end, and hands the bytes on, not before *has_room* says that they fit."""

    def __init__(self, fd: int, feed: Callable[[bytes], object], has_room: Callable[[float], bool]) -> None:
        self._fd = fd
        self._feed = feed
        self._has_room = has_room
        self._closing = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._loop, name="console input", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        poll = select.poll()
        for fd in (self._fd, self._wake_read):
            poll.register(fd, select.POLLIN)
        while not self._closing.is_set():
            if not self._has_room(_POLL_S):
                continue
            ready = dict(poll.poll())
            if self._fd not in ready:
                continue
            try:
                data = os.read(self._fd, PIECE)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            self._feed(data)

    def close(self) -> None:
        """Stop reading."""
        self._closing.set()
        os.write(self._wake_write, b"x")
        # It is in read() after all if another process took what there was: it stays there, nothing waits for it.
        self._thread.join(GRACE_S)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)


@contextlib.contextmanager
def reading(fd: int, feed: Callable[[bytes], object], has_room: Callable[[float], bool]) -> Iterator[None]:
    """Hand what comes from *fd* to *feed* while the block lasts and *has_room*."""
    reader = InputThread(fd, feed, has_room)
    try:
        yield
    finally:
        reader.close()
