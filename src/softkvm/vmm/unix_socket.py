# SPDX-License-Identifier: Apache-2.0
"""UNIX sockets with names of any length: the 108 bytes of an address hold the last name, and a descriptor's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

ADDRESS_SIZE: Final = 107
"""Bytes of ``sun_path`` (unix(7)), without a NUL behind."""


@contextlib.contextmanager
def address(path: str) -> Iterator[bytes]:
    """Yield an address of the socket *path*: itself, or one by way of its directory's descriptor.

    OSError with ENAMETOOLONG if the last name alone is too long.
    """
    name = os.fsencode(path)
    if len(name) <= ADDRESS_SIZE:
        yield name
        return
    directory, last = os.path.split(name)
    fd = os.open(directory or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = b"/proc/self/fd/%d/%s" % (fd, last)
        if len(short) > ADDRESS_SIZE:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        yield short
    finally:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """Return a socket that listens at *path*, for this user only; one that nobody listens at any more is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address(path) as short:
            _remove_dead(path, short)
            os.fchmod(listener.fileno(), 0o600)  # which is what the name in the file system gets
            listener.bind(short)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str) -> socket.socket:
    """Return a socket that is connected to *path*."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address(path) as short:
            connection.connect(short)
    except BaseException:
        connection.close()
        raise
    return connection


def _remove_dead(path: str, short: bytes) -> None:
    """Take away the socket of a process that is gone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(short)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass
    finally:
        probe.close()
