# SPDX-License-Identifier: Apache-2.0
"""Raw images: a file, or a block device, whose bytes are the disk's."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from softkvm.vmm.block.hostfile import file_size, lock, punch, read_whole, unlock, write_whole, write_zeroes
from softkvm.vmm.block.image import SECTOR, Image, Views

QCOW2_MAGIC: Final = b"QFI\xfb"


class RawImage(Image):
    """The file *fd*, which is the image's from now on.

    The last sector may be there in part: the rest reads as zeroes. *guessed* says that nobody named the format. A guest
    that then writes another format's header would have its disk taken for that one the next time, with whatever host
    file it names behind it: such a write is EPERM.
    """

    def __init__(self, fd: int, name: str, *, read_only: bool, guessed: bool = False) -> None:
        self.name = name
        self.read_only = read_only
        self._fd = fd
        self._guessed = guessed
        length = file_size(fd, name)
        self.size = (length + SECTOR - 1) & -SECTOR

    def readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Read, with one call of the host's where it can be."""
        read_whole(self._fd, views, offset, short=SECTOR - 1)

    def writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write, with one call of the host's where it can be."""
        if self._guessed and offset == 0 and b"".join(Views(views).take(4)) == QCOW2_MAGIC:
            raise OSError(
                errno.EPERM, f"{os.strerror(errno.EPERM)}: a qcow2 header in an image whose format was guessed as raw"
            )
        write_whole(self._fd, views, offset)

    def flush(self) -> None:
        """fdatasync(2)."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Make a hole, where the file system has some."""
        punch(self._fd, offset, size)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Let the file system do it, or write."""
        write_zeroes(self._fd, offset, size, unmap=unmap)

    def let_go(self) -> None:
        """Give the locks back, unless the file is only read: others may do that, too."""
        if not self.read_only:
            self.flush()
            unlock(self._fd)

    def take_back(self) -> None:
        """Take the locks again."""
        if not self.read_only:
            lock(self._fd, self.name, write=True)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
