# SPDX-License-Identifier: Apache-2.0
"""A writer of cpio archives in the "newc" format, the one the Linux kernel unpacks as an initramfs.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Archives are reproducible: owner root, time
zero, inode numbers by position.
"""

import os
import stat
from typing import BinaryIO, Final

from softkvm.abi.sizes import Size

_MAGIC: Final = "070701"
_TRAILER: Final = "TRAILER!!!"
_BLOCK: Final = 512
_CONTENTS: Final = Size(
    "bytes of a file in an initial RAM disk", 0xFFFFFFFF, ValueError, effect="ValueError", where=__name__
)


class CpioWriter:
    """Writes entries to a binary file object; ``close()`` writes the trailer and leaves the file open.

    Paths are relative, with ``/`` between parts. Raises ValueError for a path that is absolute, empty or contains
    ``..`` or a NUL, and for contents of 4 GiB or more.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._position = 0
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory; parents come before what they hold."""
        self._entry(_checked(path), stat.S_IFDIR | mode, links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(_checked(path), stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        if not target or "\0" in target:
            raise ValueError(f"symbolic link {path!r}: target {target!r} is not a path")
        self._entry(_checked(path), stat.S_IFLNK | 0o777, os.fsencode(target))

    def device(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device node; ``kind`` is ``"c"`` or ``"b"``."""
        kinds = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}
        if kind not in kinds:
            raise ValueError(f"device {path!r}: kind {kind!r} is neither 'c' nor 'b'")
        self._entry(_checked(path), kinds[kind] | mode, device=(major, minor))

    def close(self) -> None:
        """Write the trailer and fill the last block."""
        self._entry(_TRAILER, 0, inode=0)
        self._write(bytes(-self._position % _BLOCK))

    def _entry(
        self,
        path: str,
        mode: int,
        data: bytes = b"",
        *,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
        inode: int | None = None,
    ) -> None:
        name = os.fsencode(path) + b"\0"
        _CONTENTS.check(len(data), called=f"bytes of {path!r}")
        if inode is None:
            self._inode += 1
            inode = self._inode
        # inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        self._write(_MAGIC.encode() + b"".join(b"%08X" % field for field in fields) + name)
        self._pad()
        self._write(data)
        self._pad()

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._position += len(data)

    def _pad(self) -> None:
        self._write(bytes(-self._position % 4))


def _checked(path: str) -> str:
    if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"archive path {path!r} is not a relative path without '..'")
    return path
