# SPDX-License-Identifier: Apache-2.0
"""The process's own entries of /proc, wherever the process is: a client may have none mounted, or change its root.

A directory's descriptor leads to them after that, too. Where nothing is mounted, an instance of its own is made
(``fsmount()``), which nobody else sees and which goes with the descriptor; that takes CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from typing import Final

from softkvm import _softcpu

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

#: Numbers of system calls that all architectures have alike, and their constants (linux/mount.h).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC: Final = 1
_CMD_CREATE: Final = 6
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class NoProcError(OSError):
    """There is no /proc, and none can be mounted."""


def _call(number: int, *arguments: int | bytes | None) -> int:
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _syscall(ctypes.c_long(number), *plain)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _mount() -> int:
    """Return the directory of a new instance."""
    context = _call(_FSOPEN, b"proc", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)


def _find() -> int:
    """Return a directory that has this process's entries; raises :class:`NoProcError`."""
    with suppress(OSError):
        fd = os.open("/proc", _DIRECTORY)
        try:
            os.stat("self/fd", dir_fd=fd)
        except OSError:
            os.close(fd)
        else:
            return fd
    try:
        return _mount()
    except OSError as error:
        why = f"/proc is not mounted, and cannot be: {error.strerror}"
        raise NoProcError(errno.ENOENT, why) from None


class _Directory:
    """The descriptor, and what it is of: a client that closes all that it has not opened may have closed it."""

    def __init__(self) -> None:
        self.fd = -1
        self.identity: tuple[int, int] | None = None

    def get(self) -> int:
        if self.identity is None or self.identity != self._identity():
            self.fd = _softcpu.own_descriptor(_find())
            self.identity = self._identity()
        return self.fd

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.fstat(self.fd)
        except OSError:
            return None
        return found.st_dev, found.st_ino


_directory: Final = _Directory()


def directory() -> int:
    """Return the descriptor of a directory that is /proc's; raises :class:`NoProcError`."""
    return _directory.get()


def open_own(name: str, flags: int = os.O_RDONLY) -> int:
    """Open one of the process's own entries, by its path below ``/proc/self``; close-on-exec."""
    return os.open(f"self/{name}", flags | os.O_CLOEXEC, dir_fd=directory())


def read_own(name: str) -> bytes:
    """Return what one of the process's own entries has."""
    with open(open_own(name), "rb", buffering=0) as file:
        return file.readall()


def link_of_own(name: str) -> str:
    """Return where a link among the process's own entries leads."""
    return os.readlink(f"self/{name}", dir_fd=directory())
