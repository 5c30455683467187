# SPDX-License-Identifier: Apache-2.0
"""A FUSE client that speaks bytes to a session, as Linux's does over virtio-fs."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.p9 import views

from softkvm.vmm.fuse.session import Session
from softkvm.vmm.share.share import Share

ROOT = 1
READDIRPLUS, MAX_PAGES = 1 << 13, 1 << 22


def header(opcode: int, node: int, size: int, uid: int = 0, gid: int = 0) -> bytes:
    """``fuse_in_header``."""
    return struct.pack("<IIQQIIIHH", 40 + size, opcode, 7, node, uid, gid, 1, 0, 0)


@dataclass(frozen=True)
class Attr:
    """``fuse_attr``."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @classmethod
    def of(cls, data: bytes) -> Attr:
        return cls(*struct.unpack("<6Q10I", data))


@dataclass(frozen=True)
class Entry:
    """``fuse_entry_out``."""

    node: int
    attr: Attr


@dataclass(frozen=True)
class Dirent:
    """``fuse_dirent``, or ``fuse_direntplus`` with *entry*."""

    ino: int
    off: int
    type: int
    name: bytes
    entry: Entry | None = None


class Client:
    """A client of *session*, which has been greeted."""

    def __init__(self, session: Session, flags: int = 0xFFFFFFFF & ~(1 << 30)) -> None:
        self.session = session
        self.room = 1 << 20
        answer = self.call(26, 0, struct.pack("<IIII", 7, 38, 131072, flags))
        major, minor, _, self.flags, _, _, self.max_write, _, self.max_pages = struct.unpack_from("<IIIIHHIIH", answer)
        assert (major, len(answer)) == (7, 64) and 31 <= minor <= 38

    def send(self, data: bytes, room: int | None = None, cuts: Sequence[int] = ()) -> tuple[int, bytes]:
        """Send bytes; error (positive) and body of the answer."""
        answer = bytearray(self.room if room is None else room)
        length = self.session.handle(views(data, cuts), views(answer, [cut for cut in cuts if cut < len(answer)]))
        if length == 0:
            return 0, b""
        size, error, unique = struct.unpack_from("<IiQ", answer)
        assert (size, unique) == (length, 7) and error <= 0
        return -error, bytes(answer[16:length])

    def call(self, opcode: int, node: int, body: bytes = b"", uid: int = 0, gid: int = 0) -> bytes:
        """Do a request; OSError for what the server answers with an error."""
        error, answer = self.send(header(opcode, node, len(body), uid, gid) + body)
        if error:
            raise OSError(error, os.strerror(error))
        return answer

    @staticmethod
    def _entry(answer: bytes) -> Entry:
        return Entry(struct.unpack_from("<Q", answer)[0], Attr.of(answer[40:128]))

    def lookup(self, node: int, name: bytes | str) -> Entry:
        answer = self.call(1, node, os.fsencode(name) + b"\0")
        assert len(answer) == 128
        return self._entry(answer)

    def path(self, *names: bytes | str) -> int:
        """The node that the names lead to."""
        node = ROOT
        for name in names:
            node = self.lookup(node, name).node
        return node

    def forget(self, node: int, count: int = 1) -> None:
        assert self.send(header(2, node, 8) + struct.pack("<Q", count), 0) == (0, b"")

    def batch_forget(self, *nodes: tuple[int, int]) -> None:
        body = struct.pack("<II", len(nodes), 0) + b"".join(struct.pack("<QQ", *node) for node in nodes)
        assert self.send(header(42, 0, len(body)) + body, 0) == (0, b"")

    def getattr(self, node: int, handle: int | None = None) -> Attr:
        answer = self.call(3, node, struct.pack("<IIQ", handle is not None, 0, handle or 0))
        assert len(answer) == 104
        return Attr.of(answer[16:])

    def setattr(self, node: int, valid: int, **given: Any) -> Attr:
        names = ("fh", "size", "owner", "atime", "mtime", "ctime")
        more = ("atimensec", "mtimensec", "ctimensec", "mode", "unused4", "uid", "gid", "unused5")
        body = struct.pack("<II", valid, 0)
        body += struct.pack("<QQQqqq", *(given.get(name, 0) for name in names))
        body += struct.pack("<8I", *(given.get(name, 0) for name in more))
        return Attr.of(self.call(4, node, body)[16:])

    def open(self, node: int, flags: int = 0, directory: bool = False) -> int:
        answer = self.call(27 if directory else 14, node, struct.pack("<II", flags, 0))
        assert len(answer) == 16
        handle: int = struct.unpack_from("<Q", answer)[0]
        return handle

    def create(self, node: int, name: bytes | str, flags: int = os.O_RDWR, mode: int = 0o644) -> tuple[Entry, int]:
        answer = self.call(35, node, struct.pack("<IIII", flags, mode, 0, 0) + os.fsencode(name) + b"\0")
        assert len(answer) == 144
        return self._entry(answer), struct.unpack_from("<Q", answer, 128)[0]

    def read(self, handle: int, offset: int, size: int, node: int = 2) -> bytes:
        return self.call(15, node, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0, cached: bool = False) -> int:
        body = struct.pack("<QQIIQII", handle, offset, len(data), cached, 0, flags, 0) + data
        written: int = struct.unpack("<II", self.call(16, 2, body))[0]
        return written

    def release(self, handle: int, directory: bool = False) -> None:
        self.call(29 if directory else 18, 2, struct.pack("<QIIQ", handle, 0, 0, 0))

    def readdir(self, handle: int, offset: int = 0, size: int = 4096, plus: bool = False) -> list[Dirent]:
        answer = self.call(44 if plus else 28, 2, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))
        assert len(answer) <= size and len(answer) % 8 == 0
        found = []
        at = 0
        while at < len(answer):
            entry = None
            if plus:
                entry = self._entry(answer[at : at + 128])
                at += 128
            ino, off, length, kind = struct.unpack_from("<QQII", answer, at)
            found.append(Dirent(ino, off, kind, answer[at + 24 : at + 24 + length], entry))
            at += (24 + length + 7) & -8
        return found

    def list(self, handle: int, size: int = 4096, plus: bool = False) -> list[Dirent]:
        """All entries but . and .."""
        found: list[Dirent] = []
        offset = 0
        while entries := self.readdir(handle, offset, size, plus):
            found += entries
            offset = entries[-1].off
        return [entry for entry in found if entry.name not in (b".", b"..")]

    def named(self, opcode: int, node: int, *names: bytes | str, before: bytes = b"") -> bytes:
        """A request whose body is names."""
        return self.call(opcode, node, before + b"".join(os.fsencode(name) + b"\0" for name in names))

    def mkdir(self, node: int, name: bytes | str, mode: int = 0o755) -> Entry:
        return self._entry(self.named(9, node, name, before=struct.pack("<II", mode, 0)))

    def mknod(self, node: int, name: bytes | str, mode: int, rdev: int = 0) -> Entry:
        return self._entry(self.named(8, node, name, before=struct.pack("<IIII", mode, rdev, 0, 0)))

    def symlink(self, node: int, name: bytes | str, target: bytes | str) -> Entry:
        return self._entry(self.named(6, node, name, target))

    def readlink(self, node: int) -> bytes:
        return self.call(5, node)

    def unlink(self, node: int, name: bytes | str) -> None:
        self.named(10, node, name)

    def rmdir(self, node: int, name: bytes | str) -> None:
        self.named(11, node, name)

    def link(self, old: int, node: int, name: bytes | str) -> Entry:
        return self._entry(self.named(13, node, name, before=struct.pack("<Q", old)))

    def rename(self, node: int, name: bytes | str, new: int, new_name: bytes | str, flags: int | None = None) -> None:
        if flags is None:
            self.named(12, node, name, new_name, before=struct.pack("<Q", new))
        else:
            self.named(45, node, name, new_name, before=struct.pack("<QII", new, flags, 0))

    def setxattr(self, node: int, name: bytes | str, value: bytes, flags: int = 0) -> None:
        self.call(21, node, struct.pack("<II", len(value), flags) + os.fsencode(name) + b"\0" + value)

    def getxattr(self, node: int, name: bytes | str, size: int = 65536) -> bytes:
        return self.named(22, node, name, before=struct.pack("<II", size, 0))

    def listxattr(self, node: int, size: int = 65536) -> bytes:
        return self.call(23, node, struct.pack("<II", size, 0))

    def contents(self, *names: bytes | str) -> bytes:
        """A whole file."""
        handle = self.open(self.path(*names))
        data = b""
        while piece := self.read(handle, len(data), 65536):
            data += piece
        self.release(handle)
        return data


def connect(directory: Path, **options: Any) -> Client:
    """A client of a new share of *directory*."""
    return Client(Session(Share(directory, **options)))
