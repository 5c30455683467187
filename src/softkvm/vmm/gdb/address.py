# SPDX-License-Identifier: Apache-2.0
"""Where gdb connects to: this machine only."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import Final

from softkvm.vmm.errors import ConfigError

EXPECTED: Final = "expected tcp::PORT, tcp:127.0.0.1:PORT, tcp:[::1]:PORT or unix:PATH, and ,wait behind it if wanted"
_LOOPBACK: Final = {"": "127.0.0.1", "localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "[::1]": "::1"}
_PATH_BYTES: Final = 107  # unix(7): sun_path, with its end


@dataclass(frozen=True, slots=True)
class GdbSpec:
    """A socket to listen on, and whether the guest waits for gdb."""

    host: str
    """An address of the loopback interface; empty for a UNIX socket."""
    port: int
    """0: any that is free."""
    path: str
    wait: bool

    def listen(self) -> socket.socket:
        """Return the listening socket; OSError if the address cannot be had. A UNIX socket is the user's alone."""
        family = socket.AF_UNIX if self.path else socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if self.path:
                self._take_over()
                before = os.umask(0o177)
                try:
                    listener.bind(self.path)
                finally:
                    os.umask(before)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self.host, self.port))
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        return listener

    def _take_over(self) -> None:
        """Remove a socket that nobody listens on any more; EADDRINUSE for everything else at that place."""
        try:
            kind = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISSOCK(kind):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(self.path)
                except ConnectionRefusedError:
                    os.unlink(self.path)
                    return
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), self.path)

    def remove(self) -> None:
        """Remove what :meth:`listen` has made in the file system."""
        if self.path:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    @staticmethod
    def target(listener: socket.socket) -> str:
        """Return what gdb's ``target remote`` takes for a listening socket."""
        name = listener.getsockname()
        if isinstance(name, str):
            return name
        return f"[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def parse(text: str) -> GdbSpec:
    """Return the place that *text* names; ConfigError for what is none of this machine's."""
    where, comma, option = text.rpartition(",")
    if not comma or option != "wait":
        where, option = text, ""
    kind, colon, rest = where.partition(":")
    wait = option == "wait"
    if kind == "unix" and rest:
        if len(os.fsencode(rest)) > _PATH_BYTES or "\0" in rest:
            raise ConfigError(f"{text}: expected a path of at most {_PATH_BYTES} bytes")
        return GdbSpec("", 0, os.path.abspath(rest), wait)
    host, colon, port = rest.rpartition(":")
    if kind != "tcp" or not colon or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"{text}: {EXPECTED}")
    if host not in _LOOPBACK:
        raise ConfigError(f"{text}: gdb may do anything to the guest, so only the loopback interface is there for it")
    return GdbSpec(_LOOPBACK[host], int(port), "", wait)
