# SPDX-License-Identifier: Apache-2.0
"""A client's session: messages in, replies out.

A message comes as the segments of memory that it lies in, and its reply goes into others, as virtio has them. What a
file's data is goes from one to the other without a copy of ours. Requests are served one after the other, so a flush
finds that what it would cancel has been answered.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.p9 import handlers
from softkvm.vmm.p9.fids import ClientState
from softkvm.vmm.p9.protocol import (
    COUNT,
    HEADER,
    READ_HEADER,
    RLERROR,
    UNKNOWN,
    VERSION,
    WRITE_HEADER,
    BadMessage,
    Body,
    T,
    string,
)
from softkvm.vmm.share.segments import behind, gather, scatter, total
from softkvm.vmm.share.share import Share

MESSAGE: Final = Size(
    "bytes of a 9p message (msize)",
    1 << 20,
    None,
    least=4096,
    giver="guest",
    effect="less is agreed on",
    where=__name__,
)

_READ: Final = struct.Struct("<IQI")  # fid, offset, count


class ProtocolError(Exception):
    """What no driver may do: a request without a header, or without room for an answer."""


class Session(ClientState):
    """Serves *share* to one client."""

    def __init__(self, share: Share) -> None:
        super().__init__(share, MESSAGE.least)

    def handle(self, readable: Sequence[memoryview], writable: Sequence[memoryview]) -> int:
        """Serve the request in *readable*, put the reply into *writable*; return how many bytes that has.

        Raises ProtocolError where there cannot be a reply.
        """
        head = gather(readable, HEADER.size)
        if len(head) < HEADER.size:
            raise ProtocolError(f"a 9p request of {len(head)} bytes")
        size, kind, tag = HEADER.unpack(head)
        if total(writable) < READ_HEADER:
            raise ProtocolError("a 9p request without room for its reply")
        try:
            if kind == T.READ:
                return self._read(_message(readable, size, self.msize), tag, writable)
            reply: bytes | None
            if kind == T.WRITE:
                reply = self._write(readable)
            else:
                reply = self._serve(kind, _message(readable, size, self.msize), writable)
        except OSError as failure:
            return _reply(writable, RLERROR, tag, COUNT.pack(failure.errno or errno.EIO))
        except BadMessage:
            return _reply(writable, RLERROR, tag, COUNT.pack(errno.EPROTO))
        if reply is None:
            return _reply(writable, RLERROR, tag, COUNT.pack(errno.EOPNOTSUPP))
        return _reply(writable, kind + 1, tag, reply)

    def _serve(self, kind: int, message: bytes, writable: Sequence[memoryview]) -> bytes | None:
        """Return the body of the reply to any request but those that move data; None if there is no such request."""
        body = Body(message)
        if kind == T.VERSION:
            return self._version(body)
        if not self.agreed:
            raise BadMessage("no version has been agreed on")
        handler = handlers.HANDLERS.get(kind)
        if handler is not None:
            return handler(self, body)
        if kind == T.READDIR:
            return handlers.read_directory(self, body, _room(writable, self.msize) - READ_HEADER)
        return None

    def _version(self, body: Body) -> bytes:
        """Begin anew: version(5). The client proposes the longest message that it takes, and so do we."""
        (msize,) = body.take(COUNT)
        version = body.string()
        body.end()
        self.reset()
        msize = MESSAGE.cut(msize)
        if version != VERSION or not MESSAGE.allows(msize):
            return COUNT.pack(msize) + string(UNKNOWN)
        self.msize = msize
        self.agreed = True
        return COUNT.pack(msize) + string(VERSION)

    def _read(self, message: bytes, tag: int, writable: Sequence[memoryview]) -> int:
        body = Body(message)
        number, offset, count = body.take(_READ)
        body.end()
        room = min(count, _room(writable, self.msize) - READ_HEADER)
        into = behind(writable, READ_HEADER, room)
        taken = handlers.read(self, number, into, offset)
        scatter(writable, HEADER.pack(READ_HEADER + taken, T.READ + 1, tag) + COUNT.pack(taken))
        return READ_HEADER + taken

    def _write(self, readable: Sequence[memoryview]) -> bytes:
        # The size in the header is not looked at: before Linux 5.2, clients don't count data there that lies in pages.
        number, offset, count = Body(gather(readable, WRITE_HEADER)).take(_READ)
        data = behind(readable, WRITE_HEADER, min(count, self.msize))
        if total(data) != count:
            raise BadMessage(f"{count} bytes to write are not there, or more than a message may have")
        return COUNT.pack(handlers.write(self, number, data, offset))

    def reset(self) -> None:
        """End the session: all that is open is closed."""
        self.fids.close()
        self.agreed = False

    def save(self) -> dict[str, Any]:
        """What the client has; not its locks."""
        return {"msize": self.msize, "agreed": self.agreed, "fids": self.fids.save()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state: files are found again by their paths."""
        self.reset()
        self.msize, self.agreed = MESSAGE.check(state["msize"]), state["agreed"]
        self.fids.restore(state["fids"])

    def close(self) -> None:
        """End the session and the share."""
        self.reset()
        self.share.close()


def _message(readable: Sequence[memoryview], size: int, limit: int) -> bytes:
    """Return the request as a whole; BadMessage if it isn't there, or longer than agreed on."""
    if not HEADER.size <= size <= limit:
        raise BadMessage(f"a message of {size} bytes")
    message = gather(readable, size)
    if len(message) < size:
        raise BadMessage(f"{size} bytes are more than there are")
    return message


def _room(writable: Sequence[memoryview], limit: int) -> int:
    return min(total(writable), limit)


def _reply(writable: Sequence[memoryview], kind: int, tag: int, body: bytes) -> int:
    message = HEADER.pack(HEADER.size + len(body), kind, tag) + body
    if len(message) > total(writable):
        return _reply(writable, RLERROR, tag, COUNT.pack(errno.EMSGSIZE))
    scatter(writable, message)
    return len(message)
