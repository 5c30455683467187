# SPDX-License-Identifier: Apache-2.0
"""Host's ends of a console device's ports: a UNIX socket, a pseudo-terminal, a file, standard input and output.

Nothing here waits: a descriptor that is full is waited for by the device's worker, and the guest with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tty
from typing import Final

from softkvm.vmm.devices.virtio_console import Port
from softkvm.vmm.errors import ConfigError, complain
from softkvm.vmm.unix_socket import listen
from softkvm.vmm.virtio.worker import HANG_UP, READ, WRITE

_PIECE: Final = 4096


class _Streams:
    """An end with a descriptor to read and one to write, -1 for none."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer
        self._port: Port | None = None
        self._waits_for: dict[int, int] = {}  # events by descriptor

    def start(self, port: Port) -> None:
        """Begin to read."""
        self._port = port
        self._update()

    def _update(self, *, blocked: bool = False) -> None:
        """Wait for what can be done: for input only if the guest has room for it."""
        port = self._port
        if port is None or port.device is None:
            return
        wanted: dict[int, int] = {}
        if self._reader >= 0 and port.room >= _PIECE:
            wanted[self._reader] = READ
        if self._writer >= 0 and blocked:
            wanted[self._writer] = wanted.get(self._writer, 0) | WRITE
        worker = port.device.worker
        for fd in list(self._waits_for):
            if self._waits_for[fd] != wanted.get(fd):
                worker.remove(fd)
                del self._waits_for[fd]
        for fd, events in wanted.items():
            if fd not in self._waits_for:
                try:
                    worker.add(fd, events, self._happened)
                except PermissionError:  # an ordinary file: never waited for
                    port.device.call(self._happened, events)
                    continue
                self._waits_for[fd] = events

    def _happened(self, events: int) -> None:
        port = self._port
        if port is None:
            return
        blocked = False
        if events & (READ | HANG_UP) and self._reader >= 0 and port.room >= _PIECE:
            self._read(port)
        if events & (WRITE | HANG_UP):
            port.go_on()
            blocked = self._blocked
        self._update(blocked=blocked)

    _blocked = False

    def _read(self, port: Port) -> None:
        try:
            data = os.read(self._reader, _PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            port.feed(data)
        else:
            self._ended()

    def _ended(self) -> None:
        """The other side has closed: there is no input any more."""
        self._reader = -1

    def send(self, data: bytes) -> int:
        """Write what the descriptor takes."""
        if self._writer < 0:
            return len(data)
        self._blocked = False
        try:
            return os.write(self._writer, data)
        except (BlockingIOError, InterruptedError):
            self._blocked = True
            self._update(blocked=True)
            return 0
        except OSError as error:
            self._failed(error)
            return len(data)

    def _failed(self, error: OSError) -> None:
        """What is written goes nowhere any more."""
        name = self._port.name if self._port is not None else ""
        complain(f"port {name}: {error.strerror}")
        self._writer = -1

    def room(self) -> None:
        """Input may go on."""
        self._update(blocked=self._blocked)

    def _stop(self) -> None:
        """Wait for nothing any more."""
        port = self._port
        if port is not None and port.device is not None:
            for fd in self._waits_for:
                port.device.worker.remove(fd)
        self._waits_for.clear()
        self._reader = self._writer = -1
        self._blocked = False

    def close(self) -> None:
        """Give the descriptors back."""
        self._stop()


class StdioEnd(_Streams):
    """Standard input and output; both are opened anew, so that the process's stay as they are."""

    def __init__(self) -> None:
        self._opened = [_reopened(0, os.O_RDONLY), _reopened(1, os.O_WRONLY)]
        super().__init__(*self._opened)

    def close(self) -> None:
        """Close what was opened."""
        super().close()
        for fd in self._opened:
            if fd > 2:
                os.close(fd)


def _reopened(fd: int, mode: int) -> int:
    """Return a descriptor of the same file that doesn't block, or *fd* where that cannot be."""
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # a socket, or another user's
        return fd


class FileEnd(_Streams):
    """A file, which gets the output."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise ConfigError(f"file:{path}: {error.strerror}") from None
        super().__init__(-1, self._file)

    def close(self) -> None:
        """Close the file."""
        super().close()
        os.close(self._file)


class PtyEnd(_Streams):
    """A new pseudo-terminal, whose name is said; or the link *path* to it is made."""

    def __init__(self, name: str) -> None:
        try:
            self._master, self._slave = os.openpty()
        except OSError as error:
            raise ConfigError(f"pty: {error.strerror}") from None
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)
        complain(f"port {name} at {self.path}")
        super().__init__(self._master, self._master)

    def close(self) -> None:
        """Close both sides."""
        super().close()
        os.close(self._master)
        os.close(self._slave)


class UnixEnd(_Streams):
    """A UNIX socket at *path* that one client at a time connects to; the guest is told of its coming and going."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._listener = listen(path)
        except OSError as error:
            raise ConfigError(f"unix:{path}: {error.strerror}") from None
        self._made = os.lstat(path).st_ino
        self._client: socket.socket | None = None
        super().__init__(-1, -1)

    def start(self, port: Port) -> None:
        """Listen."""
        self._port = port
        port.host_open = False
        if port.device is not None:
            port.device.worker.add(self._listener, READ, self._connected)

    def _connected(self, events: int) -> None:
        port = self._port
        if self._client is not None or port is None or port.device is None:
            return
        try:
            self._client, _ = self._listener.accept()
        except OSError:
            return
        port.device.worker.remove(self._listener)  # who comes next waits until this one has gone
        self._client.setblocking(False)
        self._reader = self._writer = self._client.fileno()
        port.set_host_open(True)
        self._update()

    def _ended(self) -> None:
        self._disconnected()

    def _failed(self, error: OSError) -> None:
        self._disconnected()

    def _disconnected(self) -> None:
        client, self._client = self._client, None
        self._stop()
        if client is not None:
            client.close()
        port = self._port
        if port is not None and port.device is not None:
            port.device.call(self._wait_for_client)  # not from within a buffer that is being sent

    def _wait_for_client(self) -> None:
        port = self._port
        if port is not None and port.device is not None:
            port.set_host_open(False)
            port.device.worker.add(self._listener, READ, self._connected)

    def close(self) -> None:
        """Close the socket and take its name away, if it is still ours."""
        super().close()
        if self._client is not None:
            self._client.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            found = os.lstat(self._path)
            if stat.S_ISSOCK(found.st_mode) and found.st_ino == self._made:
                os.unlink(self._path)
