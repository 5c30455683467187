# SPDX-License-Identifier: Apache-2.0
"""9P2000.L on the wire: types of messages, flags, structures.

A message is ``size[4] type[1] tag[2]`` and what its type says, all little endian; a string is ``length[2]`` and so many
bytes, of which none ends it. Sources: Plan 9's intro(5) and the pages behind it; the 9P2000.L extensions as documented
with the diod server (protocol.md) and in Linux, ``include/net/9p/9p.h``.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import Final

VERSION: Final = b"9P2000.L"
UNKNOWN: Final = b"unknown"

NOTAG: Final = 0xFFFF
NOFID: Final = 0xFFFFFFFF
NONUNAME: Final = 0xFFFFFFFF

HEADER: Final = struct.Struct("<IBH")  # size, type, tag
COUNT: Final = struct.Struct("<I")
STRING: Final = struct.Struct("<H")
QID: Final = struct.Struct("<BIQ")  # type, version, path
ATTRIBUTES: Final = struct.Struct("<Q13sIIIQQQQQQQQQQQQQQQ")
STATFS: Final = struct.Struct("<IIQQQQQQI")
ENTRY: Final = struct.Struct("<13sQBH")  # qid, offset, type, length of the name
LOCK_STATUS: Final = struct.Struct("<B")
LOCK: Final = struct.Struct("<BQQI")  # type, start, length, proc_id

IO_HEADER: Final = 24
"""Bytes that clients reckon a message has besides its data (IOHDRSZ)."""

READ_HEADER: Final = HEADER.size + COUNT.size
WRITE_HEADER: Final = HEADER.size + 16

QT_DIR: Final = 0x80
QT_SYMLINK: Final = 0x02
QT_FILE: Final = 0x00

FS_MAGIC: Final = 0x01021997
"""V9FS_MAGIC: what statfs says the file system is."""

MAX_WALK: Final = 16
"""MAXWELEM: names of one walk."""


class T(IntEnum):
    """Requests. The reply to each has the next number; an error is :data:`RLERROR`."""

    STATFS = 8
    LOPEN = 12
    LCREATE = 14
    SYMLINK = 16
    MKNOD = 18
    RENAME = 20
    READLINK = 22
    GETATTR = 24
    SETATTR = 26
    XATTRWALK = 30
    XATTRCREATE = 32
    READDIR = 40
    FSYNC = 50
    LOCK = 52
    GETLOCK = 54
    LINK = 70
    MKDIR = 72
    RENAMEAT = 74
    UNLINKAT = 76
    VERSION = 100
    AUTH = 102
    ATTACH = 104
    FLUSH = 108
    WALK = 110
    READ = 116
    WRITE = 118
    CLUNK = 120
    REMOVE = 122


RLERROR: Final = 7

GETATTR_BASIC: Final = 0x7FF
"""Attributes that there always are: all but the time of birth, generation and data version."""

SETATTR_MODE: Final = 1 << 0
SETATTR_UID: Final = 1 << 1
SETATTR_GID: Final = 1 << 2
SETATTR_SIZE: Final = 1 << 3
SETATTR_ATIME: Final = 1 << 4
SETATTR_MTIME: Final = 1 << 5
SETATTR_CTIME: Final = 1 << 6
SETATTR_ATIME_SET: Final = 1 << 7
SETATTR_MTIME_SET: Final = 1 << 8

AT_REMOVEDIR: Final = 0x200

LOCK_TYPES: Final = (0, 1, 2)
"""P9_LOCK_TYPE_RDLCK, WRLCK, UNLCK: the numbers of fcntl's."""
LOCK_SUCCESS: Final = 0
LOCK_BLOCKED: Final = 1
LOCK_ERROR: Final = 2

# P9_DOTL_ flags of open, which are those of Linux's generic ABI whatever the guest is.
_OPEN_FLAGS: Final = (
    (0o1, os.O_WRONLY),
    (0o2, os.O_RDWR),
    (0o200, os.O_EXCL),
    (0o1000, os.O_TRUNC),
    (0o4000, os.O_NONBLOCK),
    (0o10000, os.O_DSYNC),
    (0o200000, os.O_DIRECTORY),
    (0o4000000, os.O_SYNC & ~os.O_DSYNC),
)
_APPEND: Final = 0o2000


def host_flags(flags: int) -> int:
    """Return the host's flags for those of a guest's open.

    O_APPEND is for files that are only written: a client that caches writes opens them for both, and later writes pages
    at their own offsets.
    """
    found = 0
    for theirs, ours in _OPEN_FLAGS:
        if flags & theirs:
            found |= ours
    if flags & _APPEND and flags & 0o3 == 0o1:
        found |= os.O_APPEND
    return found


class BadMessage(Exception):
    """A message that is none: too short, too long, cut, or with more than belongs to it."""


class Body:
    """What follows a message's header, taken from the front. Each taker raises BadMessage if it is not there whole."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = HEADER.size

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        """Take numbers."""
        try:
            values = layout.unpack_from(self._data, self._at)
        except struct.error:
            raise BadMessage("a message ends within a number") from None
        self._at += layout.size
        return values

    def string(self) -> bytes:
        """Take a string, of whatever bytes."""
        (length,) = self.take(STRING)
        end = self._at + length
        if end > len(self._data):
            raise BadMessage(f"a string of {length} bytes is longer than its message")
        text = self._data[self._at : end]
        self._at = end
        return text

    def end(self) -> None:
        """There must be nothing more."""
        if self._at != len(self._data):
            raise BadMessage(f"{len(self._data) - self._at} bytes behind a message's end")


def string(text: bytes) -> bytes:
    """Return *text* as a string of the protocol."""
    return STRING.pack(len(text)) + text
