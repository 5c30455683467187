# SPDX-License-Identifier: Apache-2.0
"""What the host is asked about memory of ours that a guest has: to take pages back, to keep all of them in place.

Each function is one system call that does not hold the interpreter's lock: pages of gigabytes take a while.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import mmap
import os
from collections.abc import Iterable
from typing import Any, Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED: Final = 4
_MADV_REMOVE: Final = 9
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value

_libc.mmap.restype = ctypes.c_void_p


class Backing(enum.Enum):
    """What the memory is to the host; it decides how pages go back and read as zeroes afterwards."""

    #: Private, of no file: pages are dropped.
    ANONYMOUS = "anonymous"
    #: A shared mapping of a memfd: a hole is punched, for everybody who has mapped it.
    SHARED = "shared"
    #: A private mapping of a file, as a restored snapshot is. A dropped page would show the file's again, so new
    #: memory takes the page's place.
    PRIVATE_FILE = "private file"


def give_back(address: int, size: int, backing: Backing) -> bool:
    """Give whole pages back; they read as zeroes from now on. Whether the host has them: else they are zeroed only.

    OSError if neither can be.
    """
    try:
        if backing is Backing.PRIVATE_FILE:
            _replace(address, size)
        else:
            _madvise(address, size, _MADV_REMOVE if backing is Backing.SHARED else _MADV_DONTNEED)
        return True
    except OSError as error:
        # Locked memory, a file system without holes, or more mappings than the host lets a process have.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOMEM):
            raise
    ctypes.memset(address, 0, size)
    return False


def lock(address: int, size: int) -> None:
    """Populate the memory and keep it where it is (mlock); OSError as the host says."""
    _call(_libc.mlock, ctypes.c_void_p(address), ctypes.c_size_t(size))


def is_zero(address: int, size: int) -> bool:
    """Whether the memory has nothing but zeroes, at least one of them."""
    first = ctypes.c_ubyte.from_address(address).value
    return not first and not _libc.memcmp(
        ctypes.c_void_p(address), ctypes.c_void_p(address + 1), ctypes.c_size_t(size - 1)
    )


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges (start, size) in order, neighbours and what overlaps as one."""
    result: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if result and start <= result[-1][0] + result[-1][1]:
            first, length = result[-1]
            result[-1] = (first, max(length, start + size - first))
        elif size:
            result.append((start, size))
    return result


def wall(address: int, size: int) -> None:
    """Let nobody reach the memory from now on: what runs past its neighbour ends there."""
    if size:
        _call(_libc.mprotect, ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(0))


def map_file(address: int, size: int, fd: int, offset: int) -> None:
    """Map a file copy-on-write over memory of ours: what is written stays in this process. OSError as the host says."""
    _map_over(address, size, mmap.MAP_PRIVATE, fd, offset)


def _madvise(address: int, size: int, advice: int) -> None:
    _call(_libc.madvise, ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))


def _replace(address: int, size: int) -> None:
    """Map new memory over the old: at no moment is there none."""
    _map_over(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    with contextlib.suppress(OSError):  # as the rest of the memory has it; a host without huge pages has EINVAL
        _madvise(address, size, mmap.MADV_HUGEPAGE)


def _map_over(address: int, size: int, flags: int, fd: int, offset: int) -> None:
    flags |= _MAP_FIXED | _MAP_NORESERVE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    place = (ctypes.c_void_p(address), ctypes.c_size_t(size))
    result = _libc.mmap(*place, ctypes.c_int(protection), ctypes.c_int(flags), ctypes.c_int(fd), ctypes.c_long(offset))
    if result == _FAILED:
        raise _error()


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise _error()


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
