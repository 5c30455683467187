# SPDX-License-Identifier: Apache-2.0
"""A 9P2000.L client that speaks bytes to a session. Written from the protocol's documents."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softkvm.vmm.p9.session import Session
from softkvm.vmm.share.share import Share

RLERROR = 7
NOFID = 0xFFFFFFFF


def s(text: bytes | str) -> bytes:
    """A string on the wire."""
    data = os.fsencode(text)
    return struct.pack("<H", len(data)) + data


def message(kind: int, body: bytes = b"", tag: int = 1) -> bytes:
    """A whole message."""
    return struct.pack("<IBH", 7 + len(body), kind, tag) + body


def views(data: bytes | bytearray, cuts: Sequence[int] = ()) -> list[memoryview]:
    """The memory of *data* in segments, cut at *cuts*."""
    view = memoryview(data)
    edges = [0, *sorted(cuts), len(data)]
    return [view[a:b] for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Attributes:
    """What Rgetattr says."""

    times: tuple[int, ...]
    valid: int
    qid: bytes
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    blksize: int
    blocks: int


@dataclass(frozen=True)
class Entry:
    """An entry of Rreaddir."""

    qid: bytes
    offset: int
    type: int
    name: bytes


class Client:
    """A client of *session*, with a fid (0) of the share's root."""

    def __init__(self, session: Session, msize: int = 131072, uid: int = 0) -> None:
        self.session = session
        self.msize = msize
        self._next = 1
        kind, body = self.send(message(100, struct.pack("<I", msize) + s("9P2000.L"), 0xFFFF), 64)
        assert kind == 101 and body[4:] == s("9P2000.L"), body
        self.msize = struct.unpack_from("<I", body)[0]
        self.root = 0
        self.call(104, struct.pack("<II", 0, NOFID) + s("root") + s("") + struct.pack("<I", uid))

    def send(self, data: bytes, room: int | None = None, cuts: Sequence[int] = ()) -> tuple[int, bytes]:
        """Send bytes; type and body of the answer."""
        answer = bytearray(self.msize if room is None else room)
        length = self.session.handle(views(data, cuts), views(answer, [c for c in cuts if c < len(answer)]))
        size, kind, _ = struct.unpack_from("<IBH", answer)
        assert size == length <= len(answer), (size, length)
        return kind, bytes(answer[7:length])

    def call(self, kind: int, body: bytes = b"") -> bytes:
        """Do a request; OSError for what the server answers with an error."""
        answered, answer = self.send(message(kind, body))
        if answered == RLERROR:
            code = struct.unpack("<I", answer)[0]
            raise OSError(code, os.strerror(code))
        assert answered == kind + 1, (kind, answered)
        return answer

    def new_fid(self) -> int:
        """A number for a fid."""
        self._next += 1
        return self._next

    # -- requests

    def walk(self, fid: int, *names: bytes | str) -> int:
        """Walk; the new fid. FileNotFoundError if not all names are there."""
        new = self.new_fid()
        body = struct.pack("<IIH", fid, new, len(names)) + b"".join(map(s, names))
        answer = self.call(110, body)
        count = struct.unpack_from("<H", answer)[0]
        assert len(answer) == 2 + 13 * count
        if count < len(names):
            raise FileNotFoundError(names)
        return new

    def path(self, *names: bytes | str) -> int:
        """Walk from the root, however far."""
        fid = self.walk(self.root)
        for name in names:
            below = self.walk(fid, name)
            self.clunk(fid)
            fid = below
        return fid

    def clunk(self, fid: int) -> None:
        self.call(120, struct.pack("<I", fid))

    def open(self, fid: int, flags: int = 0) -> bytes:
        """Open; the qid."""
        return self.call(12, struct.pack("<II", fid, flags))[:13]

    def create(self, fid: int, name: bytes | str, flags: int = 2, mode: int = 0o644, gid: int = 0) -> bytes:
        return self.call(14, struct.pack("<I", fid) + s(name) + struct.pack("<III", flags, mode, gid))[:13]

    def read(self, fid: int, offset: int, count: int) -> bytes:
        answer = self.call(116, struct.pack("<IQI", fid, offset, count))
        assert struct.unpack_from("<I", answer)[0] == len(answer) - 4
        return answer[4:]

    def write(self, fid: int, offset: int, data: bytes) -> int:
        written: int = struct.unpack("<I", self.call(118, struct.pack("<IQI", fid, offset, len(data)) + data))[0]
        return written

    def getattr(self, fid: int) -> Attributes:
        values = struct.unpack("<Q13sIIIQQQQQ10Q", self.call(24, struct.pack("<IQ", fid, 0x7FF)))
        return Attributes(values[10:], *values[:10])

    def setattr(self, fid: int, valid: int, **given: Any) -> None:
        names = ("mode", "uid", "gid", "size", "atime", "atime_ns", "mtime", "mtime_ns")
        self.call(26, struct.pack("<IIIIIQqQqQ", fid, valid, *(given.get(name, 0) for name in names)))

    def readdir(self, fid: int, offset: int = 0, count: int = 8192) -> list[Entry]:
        answer = self.call(40, struct.pack("<IQI", fid, offset, count))
        assert struct.unpack_from("<I", answer)[0] == len(answer) - 4 <= count
        entries = []
        at = 4
        while at < len(answer):
            qid, offset, kind, length = struct.unpack_from("<13sQBH", answer, at)
            at += 24 + length
            entries.append(Entry(qid, offset, kind, answer[at - length : at]))
        assert at == len(answer)
        return entries

    def list(self, fid: int, count: int = 8192) -> list[bytes]:
        """All names in an open directory, but . and .."""
        names: list[bytes] = []
        offset = 0
        while entries := self.readdir(fid, offset, count):
            names += [entry.name for entry in entries]
            offset = entries[-1].offset
        return sorted(set(names) - {b".", b".."})

    def mkdir(self, fid: int, name: bytes | str, mode: int = 0o755) -> bytes:
        return self.call(72, struct.pack("<I", fid) + s(name) + struct.pack("<II", mode, 0))

    def symlink(self, fid: int, name: bytes | str, target: bytes | str) -> bytes:
        return self.call(16, struct.pack("<I", fid) + s(name) + s(target) + struct.pack("<I", 0))

    def readlink(self, fid: int) -> bytes:
        answer = self.call(22, struct.pack("<I", fid))
        assert answer[:2] == struct.pack("<H", len(answer) - 2)
        return answer[2:]

    def mknod(self, fid: int, name: bytes | str, mode: int, major: int = 0, minor: int = 0) -> bytes:
        return self.call(18, struct.pack("<I", fid) + s(name) + struct.pack("<IIII", mode, major, minor, 0))

    def link(self, directory: int, fid: int, name: bytes | str) -> None:
        self.call(70, struct.pack("<II", directory, fid) + s(name))

    def rename(self, fid: int, directory: int, name: bytes | str) -> None:
        self.call(20, struct.pack("<II", fid, directory) + s(name))

    def renameat(self, old: int, name: bytes | str, new: int, new_name: bytes | str) -> None:
        self.call(74, struct.pack("<I", old) + s(name) + struct.pack("<I", new) + s(new_name))

    def unlinkat(self, fid: int, name: bytes | str, flags: int = 0) -> None:
        self.call(76, struct.pack("<I", fid) + s(name) + struct.pack("<I", flags))

    def remove(self, fid: int) -> None:
        self.call(122, struct.pack("<I", fid))

    def xattrwalk(self, fid: int, name: bytes | str = b"") -> bytes:
        """The value of an attribute, or the list of all."""
        new = self.new_fid()
        (size,) = struct.unpack("<Q", self.call(30, struct.pack("<II", fid, new) + s(name)))
        value = b""
        while len(value) < size:
            value += self.read(new, len(value), 65536)
        assert self.read(new, size, 10) == b""
        self.clunk(new)
        return value

    def xattrcreate(self, fid: int, name: bytes | str, value: bytes, flags: int = 0) -> None:
        """Set an attribute as Linux's client does."""
        clone = self.walk(fid)
        self.call(32, struct.pack("<I", clone) + s(name) + struct.pack("<QI", len(value), flags))
        for at in range(0, len(value), 4096):
            self.write(clone, at, value[at : at + 4096])
        self.clunk(clone)

    def lock(
        self, fid: int, kind: int, start: int, length: int, process: int, client: bytes | str = "guest", flags: int = 1
    ) -> int:
        body = struct.pack("<IBIQQI", fid, kind, flags, start, length, process) + s(client)
        return self.call(52, body)[0]

    def getlock(
        self, fid: int, kind: int, start: int, length: int, process: int, client: bytes | str = "guest"
    ) -> tuple[int, ...]:
        answer = self.call(54, struct.pack("<IBQQI", fid, kind, start, length, process) + s(client))
        found: tuple[int, ...] = struct.unpack_from("<BQQI", answer)
        return found

    def contents(self, *names: bytes | str) -> bytes:
        """A whole file."""
        fid = self.path(*names)
        self.open(fid)
        data = b""
        while piece := self.read(fid, len(data), 65536):
            data += piece
        self.clunk(fid)
        return data


def connect(directory: Path, msize: int = 131072, **options: Any) -> Client:
    """A client of a new share of *directory*."""
    return Client(Session(Share(directory, **options)), msize)
