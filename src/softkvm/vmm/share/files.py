# SPDX-License-Identifier: Apache-2.0
"""Open files of a share. Data moves straight between them and guest memory; directories are read from a cookie on."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import Final

from softkvm.vmm.share.syscalls import DirectoryEntry, getdents64
from softkvm.vmm.share.tree import Node

OFFSET_MAX: Final = (1 << 63) - 1
_SEGMENTS: Final = 1024  # UIO_MAXIOV


def checked_offset(offset: int) -> int:
    """Return *offset* if a file can have it; EINVAL otherwise."""
    if offset > OFFSET_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return offset


class OpenFile:
    """A file that the guest has open: *fd* of *node*, opened with *flags* (the host's)."""

    __slots__ = ("_at", "_entries", "fd", "flags", "node")

    def __init__(self, fd: int, flags: int, node: Node) -> None:
        self.fd = fd
        self.flags = flags
        self.node = node
        self._entries: list[DirectoryEntry] = []  # read from a directory and not handed out yet
        self._at = 0  # where the first of them begins
        node.files.append(self)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.node.kind == stat.S_IFDIR

    def read(self, into: Sequence[memoryview], offset: int) -> int:
        """Read at *offset* into the memory *into*; return how many bytes came, 0 at the file's end."""
        return os.preadv(self.fd, into[:_SEGMENTS], checked_offset(offset))

    def write(self, data: Sequence[memoryview], offset: int) -> int:
        """Write *data* at *offset*; return how many bytes were taken."""
        return os.pwritev(self.fd, data[:_SEGMENTS], checked_offset(offset))

    def append(self, data: Sequence[memoryview]) -> int:
        """Write *data* behind the file's end, wherever that is by now."""
        return os.pwritev(self.fd, data[:_SEGMENTS], 0, os.RWF_APPEND)

    def entries(self, offset: int) -> list[DirectoryEntry]:
        """Return the next entries of a directory from the cookie *offset* on, at least one unless it ends there.

        ENOTDIR if it is none, EINVAL for what is no cookie.
        """
        if not self.is_directory:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if self._entries and offset == self._at != 0:  # whoever begins anew, sees what there is now
            return self._entries
        for index, entry in enumerate(self._entries[:-1]):
            if entry.offset == offset:
                del self._entries[: index + 1]
                self._at = offset
                return self._entries
        os.lseek(self.fd, checked_offset(offset), os.SEEK_SET)
        self._entries = getdents64(self.fd)
        self._at = offset
        return self._entries

    def close(self) -> None:
        """Close it; OSError if what was written could not be kept."""
        self.node.files.remove(self)
        os.close(self.fd)
