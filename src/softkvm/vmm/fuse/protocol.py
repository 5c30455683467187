# SPDX-License-Identifier: Apache-2.0
"""FUSE on the wire, as virtio-fs has it: operations, flags, structures.

A request is ``fuse_in_header`` and what its operation says, a reply ``fuse_out_header`` and more, in the guest's byte
order, which is little endian here; names end with a NUL. Source: Linux, ``include/uapi/linux/fuse.h`` (version 7.36).
"""

from __future__ import annotations

import errno
import os
import struct
from enum import IntEnum
from typing import Final

MAJOR: Final = 7
MINOR: Final = 36
MINOR_LEAST: Final = 27
"""Linux 5.4, the first with virtio-fs, has 31."""

ROOT_ID: Final = 1

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error, unique

ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_OUT: Final = struct.Struct("<QQQQII")  # nodeid, generation, entry_valid, attr_valid, both's nanoseconds
ATTR_OUT: Final = struct.Struct("<QII")  # attr_valid, nanoseconds, dummy
OPEN_OUT: Final = struct.Struct("<QIi")  # fh, open_flags, padding
WRITE_OUT: Final = struct.Struct("<II")  # size, padding
STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")
XATTR_OUT: Final = struct.Struct("<II")  # size, padding
LSEEK_OUT: Final = struct.Struct("<Q")
DIRENT: Final = struct.Struct("<QQII")  # ino, off, namelen, type

INIT_IN: Final = struct.Struct("<IIII")  # major, minor, max_readahead, flags
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
GETATTR_IN: Final = struct.Struct("<IIQ")  # flags, dummy, fh
SETATTR_IN: Final = struct.Struct("<IIQQQQQQIIIIIIII")
MKNOD_IN: Final = struct.Struct("<IIII")  # mode, rdev, umask, padding
MKDIR_IN: Final = struct.Struct("<II")  # mode, umask
RENAME_IN: Final = struct.Struct("<Q")  # newdir
RENAME2_IN: Final = struct.Struct("<QII")  # newdir, flags, padding
LINK_IN: Final = struct.Struct("<Q")  # oldnodeid
OPEN_IN: Final = struct.Struct("<II")  # flags, open_flags
CREATE_IN: Final = struct.Struct("<IIII")  # flags, mode, umask, open_flags
DATA_IN: Final = struct.Struct("<QQIIQII")  # fh, offset, size, flags, lock_owner, the file's flags, padding
RELEASE_IN: Final = struct.Struct("<QIIQ")  # fh, flags, release_flags, lock_owner
FSYNC_IN: Final = struct.Struct("<QII")  # fh, flags, padding
SETXATTR_IN: Final = struct.Struct("<II")  # size, flags
GETXATTR_IN: Final = struct.Struct("<II")  # size, padding
FORGET_IN: Final = struct.Struct("<Q")  # nlookup
BATCH_FORGET_IN: Final = struct.Struct("<II")  # count, dummy
FORGET_ONE: Final = struct.Struct("<QQ")  # nodeid, nlookup
FALLOCATE_IN: Final = struct.Struct("<QQQII")  # fh, offset, length, mode, padding
LSEEK_IN: Final = struct.Struct("<QQII")  # fh, offset, whence, padding
COPY_IN: Final = struct.Struct("<QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags

IO_HEADER: Final = IN_HEADER.size + DATA_IN.size
"""Bytes before the data of a write."""


class Op(IntEnum):
    """Operations."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50


#: Requests that have no reply.
SILENT: Final = frozenset((Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT))

ASYNC_READ: Final = 1 << 0
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22

WANTED: Final = (
    ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
)
"""What we do of what a guest may offer. Not FUSE_POSIX_LOCKS: record locks are among the guest's processes."""

GETATTR_FH: Final = 1 << 0

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8

WRITE_CACHE: Final = 1 << 0
"""A page that was written before: its offset counts, whatever file it is written through."""

FSYNC_FDATASYNC: Final = 1 << 0


class Request:
    """A request behind its header, taken from the front. Each taker raises EINVAL if it is not there whole."""

    __slots__ = ("_at", "_data", "gid", "node", "uid")

    def __init__(self, data: bytes) -> None:
        _, _, _, self.node, self.uid, self.gid, *_ = IN_HEADER.unpack_from(data)
        self._data = data
        self._at = IN_HEADER.size

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        """Take numbers."""
        try:
            values = layout.unpack_from(self._data, self._at)
        except struct.error:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        self._at += layout.size
        return values

    def string(self) -> bytes:
        """Take a name."""
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        text = self._data[self._at : end]
        self._at = end + 1
        return text

    def data(self, size: int) -> bytes:
        """Take bytes."""
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at += size
        return found
