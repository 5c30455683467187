# SPDX-License-Identifier: Apache-2.0
"""Files to boot: their size is known before any of their contents is read, and reading can run out of time.

A regular file is read where a loader asks for a part of it, straight into guest memory if that is where it goes. What
has no size (a pipe, a file below /proc) is read at once, up to the limit that the caller gives.
"""

from __future__ import annotations

import os
import select
import stat
import time
import zlib

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.vmm.errors import ImageError, LoadTimeout
from softkvm.vmm.memory import MAX_SIZE, MIB

Source = bytes | bytearray | memoryview | os.PathLike[str]
"""What an image can be made of: its contents, or the path of a file that holds them."""

_CHUNK = 4 * MIB  # read, cleared or expanded between two looks at the clock
GZIP_MAGIC = b"\x1f\x8b"
#: No more than the machine has memory, in either.
_READ = Size("bytes of a pipe that is booted", MAX_SIZE, None, giver="file", effect="ImageError", where=__name__)
_EXPANDED = Size(
    "bytes of a compressed kernel, expanded", MAX_SIZE, None, giver="file", effect="ImageError", where=__name__
)


class Deadline:
    """A point in time that ends *timeout_s* seconds from now; None: never."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float | None:
        """Seconds that are left, 0 when none are."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise LoadTimeout if the time is over."""
        if self.remaining_s == 0:
            raise LoadTimeout(f"loading took longer than {self.timeout_s:g} s")


class Image(Closing):
    """*size* bytes called *name* in messages (``kernel``, ``initrd``)."""

    def __init__(self, name: str, contents: bytes | bytearray | memoryview, fd: int = -1, size: int = 0) -> None:
        self.name = name
        self._contents = memoryview(contents)
        self._fd = fd
        self.size = size if fd >= 0 else len(self._contents)

    @classmethod
    def of(cls, source: Source | Image, name: str, limit: int, deadline: Deadline | None = None) -> Image:
        """Return *source* as an image; TypeError if it is nothing that can be one."""
        if isinstance(source, Image):
            return source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls(name, source)
        if isinstance(source, os.PathLike):
            return cls.open(source, name, limit, deadline)
        raise TypeError(f"{name} is of type {type(source).__name__}: expected bytes or a pathlib.Path")

    @classmethod
    def open(cls, path: os.PathLike[str], name: str, limit: int, deadline: Deadline | None = None) -> Image:
        """Open the file at *path*; of one without a size at most *limit* bytes are read, until *deadline*.

        Raises ImageError if that fails, or if it is a device or has more.
        """
        try:
            # a pipe that nobody writes to must not hold us up here
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise _unreadable(name, path, error) from None
        try:
            status = os.fstat(fd)
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                raise ImageError(f"{name} {os.fspath(path)}: is a device, expected a file")
            if stat.S_ISREG(status.st_mode) and status.st_size:
                result = cls(name, b"", fd, status.st_size)
                fd = -1
                return result
            return cls(name, _read_all(fd, limit, f"{name} {os.fspath(path)}", deadline or Deadline()))
        except OSError as error:
            raise _unreadable(name, path, error) from None
        finally:
            if fd >= 0:
                os.close(fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return the *size* bytes at *offset*, fewer where the image ends."""
        size = max(0, min(size, self.size - offset))
        if self._fd < 0:
            return bytes(self._contents[offset : offset + size])
        data = bytearray(size)
        self._copy(memoryview(data), offset)
        return bytes(data)

    def copy_to(self, target: memoryview, offset: int, deadline: Deadline | None = None) -> None:
        """Fill *target* with what lies at *offset*. Raises ImageError if the image ends before, LoadTimeout."""
        for at in range(0, len(target), _CHUNK):
            if deadline is not None:
                deadline.check()
            self._copy(target[at : at + _CHUNK], offset + at)

    def _copy(self, target: memoryview, offset: int) -> None:
        if offset + len(target) > self.size:
            raise ImageError(f"{self.name} is truncated: {self.size} bytes, expected {offset + len(target)}")
        if self._fd < 0:
            target[:] = self._contents[offset : offset + len(target)]
            return
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise ImageError(f"{self.name}: {error.strerror} while it is read at byte {offset + done}") from None
            if not count:
                raise ImageError(f"{self.name} shrank to {offset + done} bytes while it was read")
            done += count

    def expanded(self, limit: int, deadline: Deadline | None = None) -> Image:
        """Return what a gzip-compressed image holds, any other one as it is.

        Raises ImageError if it is damaged or holds more than *limit* bytes. Source: RFC 1952.
        """
        if self.read(0, 2) != GZIP_MAGIC:
            return self
        result = bytearray()
        try:
            for at in range(0, self.size, _CHUNK):
                if at == 0:
                    member = zlib.decompressobj(zlib.MAX_WBITS | 16)
                data = self.read(at, _CHUNK)
                while data and not member.eof:
                    if deadline is not None:
                        deadline.check()
                    result += member.decompress(data, min(_CHUNK, limit + 1 - len(result)))
                    if not _EXPANDED.allows(len(result), room=limit):
                        raise ImageError(f"{self.name} is compressed and has more than {limit} bytes")
                    data = member.unconsumed_tail
            if not member.eof:
                raise ImageError(f"{self.name} is a truncated gzip file of {self.size} bytes")
        except zlib.error as error:
            raise ImageError(f"{self.name} is a damaged gzip file: {error}") from None
        return Image(self.name, result)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.size = 0


def _unreadable(name: str, path: os.PathLike[str], error: OSError | ValueError) -> ImageError:
    reason = error.strerror if isinstance(error, OSError) else None
    return ImageError(f"{name} {os.fspath(path)}: {reason or error}")


def _read_all(fd: int, limit: int, name: str, deadline: Deadline) -> bytearray:
    """Read *fd* to its end."""
    result = bytearray()
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    while True:
        # A named pipe that nobody has opened for writing yet reads as if it were at its end; poll knows better.
        remaining_s = deadline.remaining_s
        if not ready.poll(None if remaining_s is None else remaining_s * 1000):
            deadline.check()
            continue
        try:
            data = os.read(fd, min(_CHUNK, limit + 1 - len(result)))
        except BlockingIOError:
            continue
        if not data:
            return result
        result += data
        if not _READ.allows(len(result), room=limit):
            raise ImageError(f"{name}: has more than {limit} bytes, expected what fits into memory")
        deadline.check()
