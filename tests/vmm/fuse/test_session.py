# SPDX-License-Identifier: Apache-2.0
"""Requests of FUSE, by bytes. What must come is what ``fuse.h`` and the system calls' pages say."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fuse import ROOT, Client, connect, header

from softkvm.vmm.fuse.session import ProtocolError, Session
from softkvm.vmm.share.share import Share


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = connect(tmp_path)
    yield made
    made.session.close()


def failing(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def test_a_mount_begins_with_an_agreement(tmp_path: Path) -> None:
    session = Session(Share(tmp_path))
    answer = bytearray(80)

    def init(major: int, minor: int) -> tuple[int, ...]:
        request = header(26, 0, 16) + struct.pack("<IIII", major, minor, 4096, 0xFFFFFFFF)
        length = session.handle([memoryview(request)], [memoryview(answer)])
        return struct.unpack_from("<Ii", answer)[1], *struct.unpack_from("<II", answer, 16), length

    request = header(3, ROOT, 16) + bytes(16)
    session.handle([memoryview(request)], [memoryview(answer)])
    assert struct.unpack_from("<Ii", answer)[1] == -errno.EIO
    assert init(8, 0) == (0, 7, 36, 80)  # it has to come again with what we have
    assert not session.agreed
    assert init(7, 5)[0] == -errno.EPROTO
    assert init(7, 31) == (0, 7, 31, 80)
    session.close()


def test_files_are_found_held_and_forgotten(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(b"x" * 10)
    found = client.lookup(client.path("a", "b"), "file")
    real = (tmp_path / "a/b/file").stat()
    assert (found.attr.ino, found.attr.size, found.attr.mode) == (real.st_ino, 10, real.st_mode)
    again = client.lookup(client.path("a", "b"), "file")
    assert again.node == found.node
    client.forget(found.node)
    assert client.getattr(found.node).size == 10
    client.forget(found.node, 5)
    with failing(errno.ESTALE):
        client.getattr(found.node)
    client.batch_forget((again.node, 1), (12345, 6), (ROOT, 1))
    assert stat.S_ISDIR(client.getattr(ROOT).mode)
    for name, code in ((b"x", errno.ENOENT), (b"..", errno.EINVAL), (b"a/b", errno.EINVAL), (b"", errno.ENOENT)):
        with failing(code):
            client.lookup(ROOT, name)
    with failing(errno.ENAMETOOLONG):
        client.lookup(ROOT, "n" * 256)


def test_names_of_one_file_are_one_node(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    os.link(tmp_path / "file", tmp_path / "again")
    node = client.lookup(ROOT, "file").node
    assert client.lookup(ROOT, "again").node == node
    assert client.link(node, ROOT, "third").node == node
    client.unlink(ROOT, "again")
    client.unlink(ROOT, "third")
    assert client.getattr(node).nlink == 1


def test_a_file_is_written_and_read(client: Client, tmp_path: Path) -> None:
    entry, handle = client.create(ROOT, "new", mode=0o100640)
    assert client.write(handle, 3, b"hello") == 5
    assert client.read(handle, 0, 100) == b"\0\0\0hello"
    assert client.read(handle, 8, 100) == b""
    client.call(20, entry.node, struct.pack("<QII", handle, 1, 0))
    client.release(handle)
    with failing(errno.EBADF):
        client.read(handle, 0, 1)
    assert (tmp_path / "new").read_bytes() == b"\0\0\0hello"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert client.contents("new") == b"\0\0\0hello"
    with failing(errno.EEXIST):
        client.create(ROOT, "new", os.O_RDWR | os.O_EXCL)


def test_who_appends_writes_behind_the_end_and_pages_where_they_belong(client: Client, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"abc")
    handle = client.open(client.path("log"), os.O_RDWR | os.O_APPEND)
    (tmp_path / "log").write_bytes(b"abcdef")  # the guest does not know yet
    client.write(handle, 3, b"!", os.O_RDWR | os.O_APPEND)
    client.write(handle, 0, b"ABC", os.O_RDWR | os.O_APPEND, cached=True)
    assert (tmp_path / "log").read_bytes() == b"ABCdef!"


def test_data_lies_in_as_many_segments_as_the_driver_likes(client: Client) -> None:
    _, handle = client.create(ROOT, "new")
    data = bytes(range(200))
    body = struct.pack("<QQIIQII", handle, 0, 200, 0, 0, 0, 0)
    for cuts in ((3,), (40,), (40, 80), (16, 80, 81), (1, 2, 3)):
        assert client.send(header(16, 2, 240) + body + data, cuts=cuts) == (0, struct.pack("<II", 200, 0))
        read = struct.pack("<QQIIQII", handle, 0, 500, 0, 0, 0, 0)
        assert client.send(header(15, 2, 40) + read, cuts=cuts) == (0, data)
    assert client.send(header(15, 2, 40) + read, room=26) == (0, data[:10])


def test_attributes_are_changed(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 50)
    node = client.path("file")
    attr = client.setattr(node, 1 | 8, mode=0o100604, size=20)
    assert (attr.mode, attr.size) == (0o100604, 20) == (path.stat().st_mode, path.stat().st_size)
    attr = client.setattr(node, 16 | 32, atime=5, atimensec=6, mtime=-5, mtimensec=7)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5_000_000_006, -4_999_999_993)
    client.setattr(node, 32 | 256)
    assert path.stat().st_atime_ns == 5_000_000_006 and path.stat().st_mtime > 1e9
    with failing(errno.EINVAL):
        client.setattr(node, 16, atimensec=10**9)
    handle = client.open(node, os.O_WRONLY)
    client.setattr(node, 8 | 64, size=3, fh=handle)
    assert path.stat().st_size == 3


def test_directories_are_read_whole_whatever_fits(client: Client, tmp_path: Path) -> None:
    names = {f"{index:04}{'n' * (index % 200)}".encode() for index in range(300)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    handle = client.open(ROOT, directory=True)
    for size, plus in ((400, False), (4096, False), (400, True), (4096, True), (100_000, True)):
        found = client.list(handle, size, plus)
        assert {entry.name for entry in found} == names and len(found) == 300
        for entry in found[:5]:
            assert entry.ino == (tmp_path / os.fsdecode(entry.name)).stat().st_ino
            if entry.entry is not None:
                assert client.getattr(entry.entry.node).ino == entry.entry.attr.ino == entry.ino
    dots = {entry.name: entry for entry in client.readdir(handle, plus=True) if entry.name in (b".", b"..")}
    assert dots[b".."].ino == dots[b"."].ino == tmp_path.stat().st_ino
    assert all(entry.entry is not None and entry.entry.node == 0 for entry in dots.values())


def test_names_come_and_go(client: Client, tmp_path: Path) -> None:
    directory = client.mkdir(ROOT, "dir", 0o700).node
    link = client.symlink(ROOT, "link", "../../etc/passwd").node
    assert client.readlink(link) == b"../../etc/passwd"
    client.mknod(ROOT, "pipe", stat.S_IFIFO | 0o600)
    client.mknod(ROOT, "file", stat.S_IFREG | 0o600)
    with failing(errno.EPERM):
        client.mknod(ROOT, "null", stat.S_IFCHR | 0o666, 0x103)
    client.rename(ROOT, "file", directory, "moved")
    client.rename(directory, "moved", ROOT, "pipe", syscall_exchange := 2)
    assert syscall_exchange and stat.S_ISFIFO((tmp_path / "dir/moved").lstat().st_mode)
    with failing(errno.EEXIST):
        client.rename(directory, "moved", ROOT, "pipe", 1)
    with failing(errno.EINVAL):
        client.rename(directory, "moved", ROOT, "x", 8)
    with failing(errno.ENOTEMPTY):
        client.rmdir(ROOT, "dir")
    with failing(errno.ENXIO):
        client.open(client.path("dir", "moved"))
    client.unlink(directory, "moved")
    client.rmdir(ROOT, "dir")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_holes_ranges_and_copies(client: Client, tmp_path: Path) -> None:
    with open(tmp_path / "source", "wb") as file:
        file.seek(1 << 20)
        file.write(b"data" * 1000)
    source = client.open(client.path("source"))
    _, target = client.create(ROOT, "target")
    answer = client.call(46, 2, struct.pack("<QQII", source, 0, os.SEEK_DATA, 0))
    assert struct.unpack("<Q", answer)[0] in (0, 1 << 20)
    with failing(errno.EINVAL):
        client.call(46, 2, struct.pack("<QQII", source, 0, os.SEEK_END, 0))
    answer = client.call(47, 2, struct.pack("<7Q", source, 1 << 20, 0, target, 10, 4000, 0))
    assert struct.unpack("<II", answer)[0] == 4000
    assert (tmp_path / "target").read_bytes() == bytes(10) + b"data" * 1000
    try:
        client.call(43, 2, struct.pack("<QQQII", target, 0, 8192, 0, 0))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    else:
        assert (tmp_path / "target").stat().st_size == 8192
    client.call(50, ROOT, bytes(8))


def test_extended_attributes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    try:
        os.setxattr(path, "user.probe", b"x")
    except OSError:
        pytest.skip("no extended attributes where the tests' files are")
    node = client.path("file")
    value = bytes(range(256)) * 8
    client.setxattr(node, "user.long", value)
    assert os.getxattr(path, "user.long") == value == client.getxattr(node, "user.long")
    assert struct.unpack("<II", client.getxattr(node, "user.long", 0))[0] == len(value)
    assert sorted(client.listxattr(node).split(b"\0")[:-1]) == [b"user.long", b"user.probe"]
    with failing(errno.ERANGE):
        client.getxattr(node, "user.long", 100)
    client.named(24, node, "user.probe")
    with failing(errno.ENODATA):
        client.getxattr(node, "user.probe")
    with failing(errno.EINVAL):
        client.call(21, node, struct.pack("<II", 10, 0) + b"user.x\0" + b"123")


def test_a_share_that_is_read_only_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    client = connect(tmp_path, read_only=True)
    node = client.path("file")
    calls = (
        lambda: client.open(node, os.O_RDWR),
        lambda: client.open(node, os.O_TRUNC),
        lambda: client.create(ROOT, "new"),
        lambda: client.mkdir(ROOT, "d"),
        lambda: client.mknod(ROOT, "p", stat.S_IFIFO),
        lambda: client.symlink(ROOT, "l", "t"),
        lambda: client.link(node, ROOT, "again"),
        lambda: client.rename(ROOT, "file", ROOT, "other"),
        lambda: client.rename(ROOT, "file", ROOT, "other", 1),
        lambda: client.unlink(ROOT, "file"),
        lambda: client.rmdir(ROOT, "file"),
        lambda: client.setattr(node, 8, size=0),
        lambda: client.setxattr(node, "user.x", b"y"),
        lambda: client.named(24, node, "user.x"),
    )
    for call in calls:
        with failing(errno.EROFS):
            call()
    assert client.contents("file") == b"text"
    assert os.listdir(tmp_path) == ["file"]
    client.session.close()


def test_what_cannot_be_answered_is_said(client: Client) -> None:
    for data, room in ((b"short", 100), (header(3, ROOT, 16) + bytes(16), 15)):
        with pytest.raises(ProtocolError):
            client.send(data, room)
    for opcode in (0, 7, 19, 31, 34, 39, 48, 51, 4096):
        assert client.send(header(opcode, ROOT, 8) + bytes(8)) == (errno.ENOSYS, b"")
    assert client.send(header(5, client.symlink(ROOT, "l", "t" * 100).node, 0), 60) == (errno.ERANGE, b"")


def test_a_new_mount_finds_nothing_open(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    node = client.path("file")
    handle = client.open(node)
    held = len(os.listdir("/proc/self/fd"))
    again = Client(client.session)
    assert len(os.listdir("/proc/self/fd")) == held - 2
    with failing(errno.EBADF):
        again.read(handle, 0, 1)
    with failing(errno.ESTALE):
        again.getattr(node)


def test_a_saved_mount_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/file", "a/gone"):
        (tmp_path / name).write_text(name)
    client = connect(tmp_path)
    node, gone = client.path("a", "file"), client.path("a", "gone")
    directory = client.path("a")
    client.forget(directory, 3)  # now the last that is saved, and above the others
    assert client.path("a") == directory
    client.lookup(client.path("a"), "file")
    handle = client.open(node, os.O_RDWR)
    client.write(handle, 0, b"written")
    state = client.session.save()
    client.session.close()
    (tmp_path / "a/gone").unlink()
    (tmp_path / "another").touch()

    client.session = Session(Share(tmp_path))
    client.session.restore(state)
    assert client.read(handle, 0, 100) == b"written"
    assert client.path("a") == directory and client.lookup(directory, "file").node == node
    assert client.lookup(ROOT, "another").node not in (node, gone, ROOT)
    with failing(errno.ESTALE):
        client.getattr(gone)
    client.forget(gone)
    client.forget(node, 3)
    with failing(errno.ESTALE):
        client.getattr(node)
    assert client.open(client.path("a", "file")) != handle
    client.session.close()
