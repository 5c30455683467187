# SPDX-License-Identifier: Apache-2.0
"""A guest's mount: requests in, replies out.

A request comes as the segments of memory that it lies in, and its reply goes into others, as virtio has them. A file's
data goes from one to the other without a copy of ours. Requests are served one after the other.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.fuse import handlers
from softkvm.vmm.fuse.mount import Mount
from softkvm.vmm.fuse.protocol import (
    DATA_IN,
    IN_HEADER,
    INIT_IN,
    INIT_OUT,
    IO_HEADER,
    MAJOR,
    MAX_PAGES,
    MINOR,
    MINOR_LEAST,
    OUT_HEADER,
    SILENT,
    WANTED,
    WRITE_OUT,
    Op,
    Request,
)
from softkvm.vmm.share.segments import behind, gather, scatter, total

PAGE: Final = 4096
DATA_PAGES: Final = 256
REQUEST: Final = Size(
    "bytes of a FUSE request",
    IO_HEADER + DATA_PAGES * PAGE,
    errno.EINVAL,
    least=IN_HEADER.size,
    giver="guest",
    where=__name__,
)


class ProtocolError(Exception):
    """What no driver may do: a request without a header, or without room for its reply."""


class Session(Mount):
    """Serves a share to one mount."""

    def handle(self, readable: Sequence[memoryview], writable: Sequence[memoryview]) -> int:
        """Serve the request in *readable*, put the reply into *writable*; return how many bytes that has.

        Raises ProtocolError where there cannot be a reply.
        """
        head = gather(readable, IN_HEADER.size)
        if len(head) < IN_HEADER.size:
            raise ProtocolError(f"a FUSE request of {len(head)} bytes")
        _, operation, unique, *_ = IN_HEADER.unpack(head)
        silent = operation in SILENT
        if not silent and total(writable) < OUT_HEADER.size:
            raise ProtocolError("a FUSE request without room for its reply")
        try:
            if operation == Op.READ:
                return self._read(readable, unique, writable)
            if operation == Op.WRITE:
                reply = self._write(readable)
            else:
                size = total(readable)
                REQUEST.check(size)
                request = Request(gather(readable, size))
                if operation == Op.INIT:
                    reply = self._init(request)
                else:
                    reply = self._serve(operation, request, total(writable) - OUT_HEADER.size)
        except OSError as failure:
            return 0 if silent else _fail(writable, unique, failure.errno or errno.EIO)
        if silent:
            return 0
        length = OUT_HEADER.size + len(reply)
        if length > total(writable):
            return _fail(writable, unique, errno.ERANGE)
        scatter(writable, OUT_HEADER.pack(length, 0, unique) + reply)
        return length

    def _serve(self, operation: int, request: Request, room: int) -> bytes:
        if not self.agreed:
            raise OSError(errno.EIO, "no FUSE_INIT yet")
        handler = handlers.HANDLERS.get(operation)
        if handler is not None:
            return handler(self, request)
        sized = handlers.SIZED_HANDLERS.get(operation)
        if sized is not None:
            return sized(self, request, room)
        raise OSError(errno.ENOSYS, "no such operation")

    def _init(self, request: Request) -> bytes:
        """Agree on a version and on flags; a new mount begins with nothing open."""
        major, minor, readahead, flags = request.take(INIT_IN)
        self.reset()
        if major > MAJOR:  # it may come again with ours
            return INIT_OUT.pack(MAJOR, MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        if major < MAJOR or minor < MINOR_LEAST:
            raise OSError(errno.EPROTO, "too old")
        self.agreed = True
        pages = DATA_PAGES if flags & MAX_PAGES else 32
        wanted = flags & WANTED
        return INIT_OUT.pack(MAJOR, min(minor, MINOR), readahead, wanted, 64, 48, pages * PAGE, 1, pages, 0, 0)

    def _read(self, readable: Sequence[memoryview], unique: int, writable: Sequence[memoryview]) -> int:
        request = Request(gather(readable, IO_HEADER))
        handle, offset, size, *_ = request.take(DATA_IN)
        into = behind(writable, OUT_HEADER.size, size)
        length = OUT_HEADER.size + self.file(handle).read(into, offset)
        scatter(writable, OUT_HEADER.pack(length, 0, unique))
        return length

    def _write(self, readable: Sequence[memoryview]) -> bytes:
        request = Request(gather(readable, IO_HEADER))
        handle, offset, size, flags, _, file_flags, _ = request.take(DATA_IN)
        data = behind(readable, IO_HEADER, size)
        if total(data) != size:
            raise OSError(errno.EINVAL, "less data than that")
        return WRITE_OUT.pack(handlers.write(self.file(handle), data, offset, flags, file_flags), 0)

    def close(self) -> None:
        """End the session and the share."""
        self.reset()
        self.share.close()


def _fail(writable: Sequence[memoryview], unique: int, code: int) -> int:
    scatter(writable, OUT_HEADER.pack(OUT_HEADER.size, -code, unique))
    return OUT_HEADER.size
