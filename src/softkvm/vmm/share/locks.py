# SPDX-License-Identifier: Apache-2.0
"""Record locks of a guest's processes on files of a share.

Each owner in the guest gets an open file description of its own for a file, whose locks (F_OFD_SETLK) are its own:
they merge and split as its, and exclude other owners and the host's processes alike. It ends when the owner unlocks all
of the file or the guest has closed the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final, NamedTuple

from softkvm.abi.sizes import Size
from softkvm.vmm.share.files import OFFSET_MAX, OpenFile
from softkvm.vmm.share.tree import Node, Tree

HOLDERS: Final = Size("owners of a share's locks", 1024, errno.ENOLCK, giver="guest", effect="ENOLCK", where=__name__)

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux

Owner = tuple[object, ...]
"""What the protocol names the owner of a lock by."""


class Range(NamedTuple):
    """A lock: F_RDLCK, F_WRLCK or F_UNLCK; first byte; number of bytes, 0 for all behind it; who has it."""

    kind: int
    start: int
    length: int
    pid: int = 0


class Locks:
    """The locks of a share's guest."""

    def __init__(self, tree: Tree, *, read_only: bool) -> None:
        self._tree = tree
        self._read_only = read_only
        self._holders: dict[Node, dict[Owner, int]] = {}
        self._count = 0

    def set(self, file: OpenFile, owner: Owner, wanted: Range) -> bool:
        """Set a lock, or take it away; False if somebody else's is in the way."""
        if wanted.kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        lock = self._flock(wanted)
        holders = self._holders.setdefault(file.node, {})
        fd = holders.get(owner)
        try:
            if fd is None:
                if wanted.kind == fcntl.F_UNLCK:
                    return True
                HOLDERS.check(self._count + 1)
                fd = holders[owner] = self._open(file)
                self._count += 1
            try:
                fcntl.fcntl(fd, F_OFD_SETLK, lock)
            except OSError as failure:
                if failure.errno in (errno.EAGAIN, errno.EACCES):
                    return False
                raise
            if wanted.kind == fcntl.F_UNLCK and wanted.start == 0 and wanted.length == 0:
                self._drop(holders, owner)
            return True
        finally:
            if not holders:
                del self._holders[file.node]

    def get(self, file: OpenFile, owner: Owner, wanted: Range) -> Range:
        """Return a lock that is in the way of *wanted*, or that with kind F_UNLCK."""
        lock = self._flock(wanted)
        fd = self._holders.get(file.node, {}).get(owner)
        own = self._open(file) if fd is None else -1
        try:
            answer = fcntl.fcntl(own if fd is None else fd, F_OFD_GETLK, lock)
        finally:
            if own >= 0:
                os.close(own)
        kind, _, start, length, pid = _FLOCK.unpack(answer)
        return wanted._replace(kind=fcntl.F_UNLCK) if kind == fcntl.F_UNLCK else Range(kind, start, length, pid)

    def closed(self, node: Node) -> None:
        """An open file of *node* has been closed: with the last one all locks go."""
        if not node.files and node in self._holders:
            holders = self._holders.pop(node)
            for owner in list(holders):
                self._drop(holders, owner)

    def close(self) -> None:
        """Give back all."""
        for node in list(self._holders):
            holders = self._holders.pop(node)
            for owner in list(holders):
                self._drop(holders, owner)

    def _drop(self, holders: dict[Owner, int], owner: Owner) -> None:
        os.close(holders.pop(owner))
        self._count -= 1

    def _open(self, file: OpenFile) -> int:
        """Open the file once more, to read and to write if that is allowed: the owner may ask for either later."""
        own = file.flags & os.O_ACCMODE
        for mode in (own if self._read_only else os.O_RDWR, own):
            try:
                return os.open(str(file.fd), mode | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._tree.proc)
            except OSError as failure:
                if failure.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ETXTBSY, errno.EISDIR):
                    raise
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    @staticmethod
    def _flock(wanted: Range) -> bytes:
        if wanted.start > OFFSET_MAX or wanted.length > OFFSET_MAX or wanted.start + wanted.length - 1 > OFFSET_MAX:
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        return _FLOCK.pack(wanted.kind, os.SEEK_SET, wanted.start, wanted.length, 0)
