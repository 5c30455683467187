# SPDX-License-Identifier: Apache-2.0
"""Files of the host's that hold images: whole reads and writes, holes, and locks that QEMU's programs keep to, too."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from softkvm.vmm.block.image import ImageFileError, Views, fill_zeroes, total

_IOV_MAX: Final = 1024
_libc: Final = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 0x10
_NOT_HERE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_ZEROES: Final = memoryview(bytes(1 << 20))


def read_whole(fd: int, views: Sequence[memoryview], offset: int, *, short: int = 0) -> None:
    """Fill *views* from *offset*; EIO where the file ends before, but for *short* bytes, which are zeroes."""
    size = total(views)
    done = os.preadv(fd, views[:_IOV_MAX], offset)
    if done == size:
        return
    while done < size:
        left = Views(views)
        left.take(done)
        pieces = left.take(size)
        count = os.preadv(fd, pieces[:_IOV_MAX], offset + done)
        if not count:
            if size - done > short:
                raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: the file ends at {offset + done}")
            fill_zeroes(pieces)
            return
        done += count


def write_whole(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write all of *views* at *offset*."""
    size = total(views)
    done = os.pwritev(fd, views[:_IOV_MAX], offset)
    while done < size:
        left = Views(views)
        left.take(done)
        count = os.pwritev(fd, left.take(size)[:_IOV_MAX], offset + done)
        if not count:
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: nothing is written at {offset + done}")
        done += count


def _fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    """Whether the host's file system, or device, has done it."""
    result = _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size))
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code))


def punch(fd: int, offset: int, size: int) -> bool:
    """Make a hole, which reads as zeroes; whether there is one: else nothing has changed."""
    return size > 0 and _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)


def write_zeroes(fd: int, offset: int, size: int, *, unmap: bool) -> None:
    """Have zeroes at *offset*; with *unmap* a hole is as good."""
    if unmap and punch(fd, offset, size):
        return
    if _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, size):
        return
    while size:
        piece = min(size, len(_ZEROES))
        write_whole(fd, [_ZEROES[:piece]], offset)
        offset, size = offset + piece, size - piece


def file_size(fd: int, name: str) -> int:
    """Return the bytes of a file or of a block device; ImageFileError for what has no contents of its own."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return os.lseek(fd, 0, os.SEEK_END)
    raise ImageFileError(f"{name}: neither a file nor a block device")


# -- locks

_PERMISSIONS_AT, _DENIED_AT = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_OFD_GETLK, _OFD_SETLK = 36, 37
_NO_LOCKS: Final = (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(fd: int, name: str, *, write: bool, grow: bool = False) -> None:
    """Keep others from writing the image and, if we *write*, from using it; ImageFileError if somebody does that.

    The bytes and their meaning are those of QEMU's image locking (its block/file-posix.c): one byte for each permission
    that is used, and one for each that others are denied.
    """
    used = [_READ, *([_WRITE] if write else []), *([_RESIZE] if grow else [])]
    denied = [_WRITE, _RESIZE]
    try:
        for base, bits in ((_PERMISSIONS_AT, used), (_DENIED_AT, denied)):
            for bit in bits:
                fcntl.fcntl(fd, _OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, base + bit, 1, 0))
        taken = _anybody(fd, _DENIED_AT, used) or _anybody(fd, _PERMISSIONS_AT, denied)
    except OSError as error:
        if error.errno in _NO_LOCKS:  # a file system without: nobody else can have any
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        taken = True
    if taken:
        unlock(fd)
        raise ImageFileError(f"{name}: another process uses the image" + ("" if write else ", and writes to it"))


def unlock(fd: int) -> None:
    """Let others use the image."""
    for base in (_PERMISSIONS_AT, _DENIED_AT):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, base, _RESIZE + 1, 0))


def _anybody(fd: int, base: int, bits: Iterable[int]) -> bool:
    for bit in bits:
        answer = fcntl.fcntl(fd, _OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, base + bit, 1, 0))
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return True
    return False
