# SPDX-License-Identifier: Apache-2.0
"""System calls of Linux's that Python's ``os`` does not have.

Sources: openat2(2), getdents64(2), utimensat(2), renameat2(2), fallocate(2); ``include/uapi/linux/openat2.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

_BENEATH: Final = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS

RENAME_NOREPLACE: Final = 1 << 0
RENAME_EXCHANGE: Final = 1 << 1

UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4

_SYS_OPENAT2: Final = 437  # of every architecture
_SYS_GETDENTS64: Final = {"x86_64": 217, "aarch64": 61}
_SYS_RENAMEAT2: Final = {"x86_64": 316, "aarch64": 276}

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

PATH_PIECE: Final = 4000
"""Bytes of a path that one system call is given: PATH_MAX, 4096, less its NUL and some room."""


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def _number(numbers: dict[str, int]) -> int:
    try:
        return numbers[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def openat2(directory: int, path: bytes, flags: int, resolve: int) -> int:
    """Open *path*, relative to *directory*, resolved as the RESOLVE flags say; ENOSYS before Linux 5.6."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    return _checked(_syscall(_SYS_OPENAT2, directory, path, ctypes.byref(how), ctypes.sizeof(how)))


class _Beneath:
    """Opens paths beneath a directory, by openat2 where the kernel has it (and no filter refuses it)."""

    def __init__(self) -> None:
        self.has_openat2 = True

    def __call__(self, directory: int, names: Sequence[bytes], flags: int) -> int:
        """Open the file that *names* lead to from *directory*, each a name of one component; no link is followed.

        However long the path is: it is resolved in pieces, each from the directory that the piece before led to.
        ELOOP for a symbolic link on the way, ENOTDIR for another file.
        """
        at = directory
        try:
            pieces = list(_pieces(names) if self.has_openat2 else ((name,) for name in names))
            for index, piece in enumerate(pieces):
                last = index == len(pieces) - 1
                how = flags if last else os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
                following = self._open(at, piece, how)
                if at != directory:
                    os.close(at)
                at = following
            return at if at != directory else os.open(b".", flags, dir_fd=directory)
        except BaseException:
            if at != directory:
                os.close(at)
            raise

    def _open(self, directory: int, piece: Sequence[bytes], flags: int) -> int:
        if self.has_openat2:
            try:
                return openat2(directory, b"/".join(piece), flags, _BENEATH)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
                self.has_openat2 = False
        return self(directory, piece, flags) if len(piece) > 1 else os.open(piece[0], flags, dir_fd=directory)


def _pieces(names: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Split a path so that each piece is short enough for a system call."""
    piece: list[bytes] = []
    length = 0
    for name in names:
        if piece and length + len(name) + 1 > PATH_PIECE:
            yield piece
            piece, length = [], 0
        piece.append(name)
        length += len(name) + 1
    if piece:
        yield piece


open_beneath = _Beneath()


class DirectoryEntry(NamedTuple):
    """An entry of a directory: number of its inode, where the next one begins, DT_ type, name."""

    inode: int
    offset: int
    type: int
    name: bytes


_DIRENT = struct.Struct("=QqHB")  # struct linux_dirent64, up to the name
GETDENTS_SIZE: Final = 32768


def getdents64(fd: int) -> list[DirectoryEntry]:
    """Return the next entries of the open directory *fd*, ``.`` and ``..`` among them; none at its end."""
    buffer = ctypes.create_string_buffer(GETDENTS_SIZE)
    length = _checked(_syscall(_number(_SYS_GETDENTS64), fd, buffer, GETDENTS_SIZE))
    data = buffer.raw[:length]
    entries = []
    at = 0
    while at < length:
        inode, offset, record, kind = _DIRENT.unpack_from(data, at)
        start = at + _DIRENT.size
        entries.append(DirectoryEntry(inode, offset, kind, data[start : data.index(b"\0", start)]))
        at += record
    return entries


def utimensat(directory: int, path: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set the times of *path*, each seconds and nanoseconds, or nanoseconds that are UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _checked(_libc.utimensat(directory, path, times, 0))


def renameat2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """Rename with RENAME_NOREPLACE or RENAME_EXCHANGE."""
    _checked(_syscall(_number(_SYS_RENAMEAT2), old_directory, old, new_directory, new, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch or zero a range of a file (FALLOC_FL_ flags)."""
    function: Callable[..., Any] = _libc.fallocate
    _checked(function(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def syncfs(fd: int) -> None:
    """Have the file system of *fd* keep what was written."""
    _checked(_libc.syncfs(fd))
