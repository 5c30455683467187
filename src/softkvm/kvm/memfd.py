# SPDX-License-Identifier: Apache-2.0
"""Files in memory that userspace maps: how they are made, and whose mappings of them there are in this process."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Final

from softkvm import _softcpu
from softkvm.kvm import procfs

_MAP_FIXED: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)


def sealed_memfd(name: str, size: int) -> int:
    """Return a file in memory that can be mapped by others, and not cut off under those who have."""
    fd = _softcpu.own_descriptor(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        _softcpu.close_own_descriptor(fd)
        raise
    return fd


def map_over(
    address: int, size: int, fd: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE, offset: int = 0
) -> None:
    """Map a file, from ``offset`` on, in the place of what is mapped at ``address``."""
    if _mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) != address:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def map_file(fd: int, size: int, offset: int = 0) -> mmap.mmap:
    """Return a mapping of a file that holds no descriptor of it, as Python's own does."""
    mapping = mmap.mmap(-1, size)
    map_over(mapping_address(mapping), size, fd, offset=offset)
    return mapping


def mapping_address(mapping: mmap.mmap) -> int:
    """Return where a writable mapping is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def mappings_of(inodes: set[int], offset: int) -> Iterator[tuple[int, int]]:
    """Yield where this process has mapped the page at ``offset`` of files in memory: address and protection."""
    for line in procfs.read_own("maps").splitlines():
        # address-address permissions offset device inode path
        parts = line.split(None, 5)
        if len(parts) < 6 or int(parts[4]) not in inodes or not parts[5].startswith(b"/memfd:"):
            continue
        first, last = (int(part, 16) for part in parts[0].split(b"-"))
        address = first + offset - int(parts[2], 16)
        if first <= address < last and parts[1][3:4] == b"s":
            flags = zip(parts[1][:3], b"rwx", (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC), strict=True)
            yield address, sum(bit for have, letter, bit in flags if have == letter)
