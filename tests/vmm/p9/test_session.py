# SPDX-License-Identifier: Apache-2.0
"""Requests of 9P2000.L, by bytes. What must come is what the protocol's documents and the system calls' pages say."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.p9 import NOFID, Client, connect, message, s

from softkvm.vmm.p9.session import ProtocolError, Session
from softkvm.vmm.share.share import Share

DIR, SYMLINK = 0x80, 0x02


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = connect(tmp_path)
    yield made
    made.session.close()


def failing(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def test_a_version_that_is_not_known_is_answered_with_unknown(tmp_path: Path) -> None:
    session = Session(Share(tmp_path))
    answer = bytearray(64)
    length = session.handle(
        [memoryview(message(100, struct.pack("<I", 8192) + s("9P2000.u"), 0xFFFF))], [memoryview(answer)]
    )
    assert bytes(answer[4:length]) == b"\x65\xff\xff" + struct.pack("<I", 8192) + s("unknown")
    assert not session.agreed
    session.close()


def test_the_shorter_of_both_longest_messages_is_agreed_on(tmp_path: Path) -> None:
    for asked, agreed in ((8192, 8192), (1 << 30, 1 << 20), (4096, 4096)):
        client = connect(tmp_path, asked)
        assert client.msize == agreed
        client.session.close()


def test_a_version_begins_anew(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    fid = client.path("file")
    client.open(fid)
    held = len(os.listdir("/proc/self/fd"))
    client.send(message(100, struct.pack("<I", 8192) + s("9P2000.L"), 0xFFFF))
    assert len(os.listdir("/proc/self/fd")) <= held - 2
    with failing(errno.EBADF):
        client.read(fid, 0, 1)


def test_walking_gives_a_qid_for_each_name_that_is_there(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/link").symlink_to("nowhere")
    answer = client.call(110, struct.pack("<IIH", 0, 9, 3) + s("a") + s("b") + s("link"))
    assert struct.unpack_from("<H", answer)[0] == 3
    kinds = [answer[2 + 13 * index] for index in range(3)]
    assert kinds == [DIR, DIR, SYMLINK]
    inode = struct.unpack_from("<Q", answer, 2 + 5)[0]
    assert inode == (tmp_path / "a").stat().st_ino
    # walk(5): if not all are found, as many qids as were, and no new fid; if the first is not, an error
    answer = client.call(110, struct.pack("<IIH", 0, 10, 3) + s("a") + s("x") + s("y"))
    assert struct.unpack_from("<H", answer)[0] == 1
    with failing(errno.EBADF):
        client.getattr(10)
    with failing(errno.ENOENT):
        client.walk(0, "x")


def test_symbolic_links_are_the_clients_to_follow(client: Client, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").write_text("inside")
    (tmp_path / "link").symlink_to("dir")
    fid = client.walk(0, "link")
    assert client.readlink(fid) == b"dir"
    with failing(errno.ENOTDIR):
        client.walk(fid, "file")
    with failing(errno.ELOOP):
        client.open(fid)
    assert stat.S_ISLNK(client.getattr(fid).mode)


def test_dots_lead_no_further_up_than_the_share(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    root = client.getattr(0).qid
    assert client.getattr(client.walk(0, "..")).qid == root
    assert client.getattr(client.walk(0, "a", "b", "..", "..", "..", "..")).qid == root
    assert client.getattr(client.walk(0, "a", ".", "b", "..")).qid == client.getattr(client.path("a")).qid
    assert client.getattr(client.path("a", "..", "..", "..")).qid == root


def test_attaching_to_a_directory_of_the_share(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    client.call(104, struct.pack("<II", 50, NOFID) + s("root") + s("/a/b") + struct.pack("<I", 0))
    assert client.getattr(client.walk(50, "..")).qid == client.getattr(client.path("a", "b")).qid
    for name, code in (("/x", errno.ENOENT), ("..", errno.EINVAL), ("a/../..", errno.EINVAL)):
        with failing(code):
            client.call(104, struct.pack("<II", 51, NOFID) + s("root") + s(name) + struct.pack("<I", 0))


def test_a_file_is_written_and_read(client: Client, tmp_path: Path) -> None:
    fid = client.walk(0)
    client.create(fid, "new", os.O_RDWR, 0o640)
    assert client.write(fid, 3, b"hello") == 5
    assert client.read(fid, 0, 100) == b"\0\0\0hello"
    assert client.read(fid, 8, 100) == b""
    assert (tmp_path / "new").read_bytes() == b"\0\0\0hello"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    client.call(50, struct.pack("<II", fid, 1))
    with failing(errno.EINVAL):
        client.read(fid, 1 << 63, 1)


def test_data_lies_in_as_many_segments_as_the_driver_likes(client: Client, tmp_path: Path) -> None:
    fid = client.walk(0)
    client.create(fid, "new")
    data = bytes(range(200))
    for cuts in ((3,), (7, 11), (23,), (23, 24, 25, 200), (1, 2, 3, 4, 5, 6, 7, 8)):
        kind, body = client.send(message(118, struct.pack("<IQI", fid, 0, 200) + data), cuts=cuts)
        assert (kind, body) == (119, struct.pack("<I", 200))
        kind, body = client.send(message(116, struct.pack("<IQI", fid, 0, 500)), cuts=cuts)
        assert (kind, body[4:]) == (117, data)


def test_a_client_may_leave_data_out_of_its_messages_size(client: Client) -> None:
    fid = client.walk(0)
    client.create(fid, "new")
    head = struct.pack("<IBHIQI", 23, 118, 1, fid, 0, 5)
    assert client.send(head + b"hello") == (119, struct.pack("<I", 5))


def test_a_reply_has_no_more_than_there_is_room_for(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("y" * 200)
    fid = client.path("file")
    client.open(fid)
    kind, body = client.send(message(116, struct.pack("<IQI", fid, 0, 100)), room=21)
    assert (kind, body[4:]) == (117, b"x" * 10)
    link = client.path("link")
    assert client.send(message(22, struct.pack("<I", link)), room=100) == (7, struct.pack("<I", errno.EMSGSIZE))
    for room in (0, 10):
        with pytest.raises(ProtocolError):
            client.send(message(22, struct.pack("<I", link)), room=room)
    with pytest.raises(ProtocolError):
        client.send(b"\7\0\0\0")


def test_attributes_are_the_files(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    (tmp_path / "file").chmod(0o4751)
    os.utime(tmp_path / "file", ns=(1_000_000_007, 2_000_000_009))
    found, real = client.getattr(client.path("file")), (tmp_path / "file").stat()
    assert found.valid == 0x7FF
    assert (found.mode, found.nlink, found.size, found.blocks) == (real.st_mode, 1, 5000, real.st_blocks)
    assert found.times[:4] == (1, 7, 2, 9)
    assert struct.unpack("<BIQ", found.qid)[2] == real.st_ino
    assert struct.unpack("<BIQ", found.qid)[1] != 0


def test_attributes_are_changed(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 50)
    fid = client.path("file")
    client.setattr(fid, 1 | 8, mode=0o100604, size=20)
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o604, 20)
    client.setattr(fid, 0x10 | 0x80, atime=5, atime_ns=6)
    modified = path.stat().st_mtime_ns
    assert path.stat().st_atime_ns == 5_000_000_006
    client.setattr(fid, 0x20 | 0x100, mtime=-5, mtime_ns=7)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5_000_000_006, -4_999_999_993)
    client.setattr(fid, 0x20)
    assert path.stat().st_mtime_ns >= modified
    with failing(errno.EINVAL):
        client.setattr(fid, 0x20 | 0x100, mtime_ns=10**9)
    with failing(errno.EINVAL):
        client.setattr(fid, 8, size=1 << 63)
    changed = path.stat().st_ctime_ns
    client.setattr(fid, 0x40)
    assert path.stat().st_ctime_ns >= changed


def test_a_links_attributes_are_its_own(client: Client, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to("target")
    before = (tmp_path / "target").stat()
    fid = client.path("link")
    client.setattr(fid, 0x20 | 0x100, mtime=5)
    with failing(errno.EOPNOTSUPP):
        client.setattr(fid, 1, mode=0o600)
    with failing(errno.EINVAL):
        client.setattr(fid, 8, size=0)
    assert (tmp_path / "link").lstat().st_mtime == 5
    assert (tmp_path / "target").stat() == before


def test_directories_are_read_whole_whatever_fits_into_a_message(client: Client, tmp_path: Path) -> None:
    names = {f"{index:04}{'n' * (index % 200)}" for index in range(300)}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    for count in (300, 1000, 100_000):
        fid = client.path()
        client.open(fid, 0o200000)
        assert client.list(fid, count) == sorted(name.encode() for name in names | {"sub"})
        # who begins anew sees what has changed
        (tmp_path / "later").touch()
        assert b"later" in client.list(fid, count)
        (tmp_path / "later").unlink()
        with failing(errno.EINVAL):
            client.readdir(fid, 0, 10)
    entries = {entry.name: entry for entry in client.readdir(fid, 0, 100_000)}
    assert entries[b"sub"].type == 4 and entries[b"sub"].qid[0] == DIR
    assert struct.unpack("<BIQ", entries[b"sub"].qid)[2] == (tmp_path / "sub").stat().st_ino
    assert entries[b".."].qid == entries[b"."].qid  # of the root, what is above is not told


def test_names_come_and_go(client: Client, tmp_path: Path) -> None:
    client.mkdir(0, "dir", 0o2775)
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o2775
    client.symlink(0, "link", "../../etc/passwd")
    assert os.readlink(tmp_path / "link") == "../../etc/passwd"
    client.mknod(0, "pipe", stat.S_IFIFO | 0o622)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    client.mknod(0, "file", stat.S_IFREG | 0o600)
    client.link(client.path("dir"), client.path("file"), "again")
    assert (tmp_path / "dir/again").stat().st_nlink == 2
    client.link(0, client.path("link"), "link2")  # the link, not what it leads to
    assert os.readlink(tmp_path / "link2") == "../../etc/passwd"
    client.renameat(0, "file", client.path("dir"), "moved")
    assert sorted(os.listdir(tmp_path / "dir")) == ["again", "moved"]
    with failing(errno.ENOTEMPTY):
        client.unlinkat(0, "dir", 0x200)
    with failing(errno.EISDIR):
        client.unlinkat(0, "dir")
    client.unlinkat(client.path("dir"), "again")
    fid = client.path("dir", "moved")
    client.remove(fid)
    with failing(errno.EBADF):
        client.getattr(fid)
    client.unlinkat(0, "dir", 0x200)
    assert sorted(os.listdir(tmp_path)) == ["link", "link2", "pipe"]


def test_a_fid_stays_its_file_whatever_the_names_are(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("text")
    fid = client.path("a", "b", "file")
    client.renameat(0, "a", 0, "z")
    client.rename(client.path("z", "b"), 0, "y")
    client.open(fid)
    assert client.read(fid, 0, 10) == b"text"
    client.unlinkat(client.path("y"), "file")
    assert client.read(fid, 0, 10) == b"text"
    assert client.getattr(fid).nlink == 0


def test_device_nodes_are_not_made(client: Client, tmp_path: Path) -> None:
    for mode, major in ((stat.S_IFCHR, 1), (stat.S_IFBLK, 8), (stat.S_IFBLK, 0)):
        with failing(errno.EPERM):
            client.mknod(0, "null", mode | 0o666, major, 3)
    assert not os.listdir(tmp_path)


def test_what_would_wait_or_do_something_when_opened_is_not(client: Client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fid = client.path("pipe")
    for flags in (0, 1, 2, 0o4000):
        with failing(errno.ENXIO):
            client.open(fid, flags)
        with failing(errno.ENXIO):
            client.create(client.walk(0), "pipe", flags)


def test_an_exclusive_creation_finds_what_is_there(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("not-yet")
    with failing(errno.EEXIST):
        client.create(client.walk(0), "file", 0o202)
    with failing(errno.ELOOP):
        client.create(client.walk(0), "link", 0o2)
    fid = client.walk(0)
    client.create(fid, "file", 0o2)
    assert client.read(fid, 0, 10) == b"text"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_share_that_is_read_only_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    client = connect(tmp_path, read_only=True)
    fid = client.path("file")
    assert client.contents("file") == b"text"
    calls = (
        lambda: client.open(client.path("file"), 1),
        lambda: client.open(client.path("file"), 0o1000),
        lambda: client.create(client.walk(0), "new"),
        lambda: client.mkdir(0, "d"),
        lambda: client.symlink(0, "l", "t"),
        lambda: client.mknod(0, "p", stat.S_IFIFO),
        lambda: client.link(0, fid, "again"),
        lambda: client.renameat(0, "file", 0, "other"),
        lambda: client.rename(fid, 0, "other"),
        lambda: client.unlinkat(0, "file"),
        lambda: client.remove(client.path("file")),
        lambda: client.setattr(fid, 1, mode=0o600),
        lambda: client.setattr(fid, 8, size=0),
        lambda: client.setattr(fid, 0x20),
        lambda: client.xattrcreate(fid, "user.x", b"y"),
    )
    for call in calls:
        with failing(errno.EROFS):
            call()
    assert os.listdir(tmp_path) == ["file"]
    client.session.close()


def test_extended_attributes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    try:
        os.setxattr(path, "user.probe", b"")
    except OSError:
        pytest.skip("no extended attributes where the tests' files are")
    os.removexattr(path, "user.probe")
    fid = client.path("file")
    value = bytes(range(256)) * 8
    client.xattrcreate(fid, "user.long", value)
    client.xattrcreate(fid, "user.empty", b"")
    assert os.getxattr(path, "user.long") == value and os.getxattr(path, "user.empty") == b""
    assert client.xattrwalk(fid, "user.long") == value
    assert sorted(client.xattrwalk(fid).split(b"\0")[:-1]) == [b"user.empty", b"user.long"]
    with failing(errno.EEXIST):
        client.xattrcreate(fid, "user.long", b"x", os.XATTR_CREATE)
    client.xattrcreate(fid, "user.long", b"", os.XATTR_REPLACE)  # how Linux's client removes one
    with failing(errno.ENODATA):
        client.xattrwalk(fid, "user.long")
    with failing(errno.E2BIG):
        client.call(32, struct.pack("<I", client.walk(fid)) + s("user.x") + struct.pack("<QI", 65537, 0))
    clone = client.walk(fid)
    client.call(32, struct.pack("<I", clone) + s("user.half") + struct.pack("<QI", 10, 0))
    client.write(clone, 0, b"12345")
    with failing(errno.ENOSPC):
        client.write(clone, 5, b"123456")
    with failing(errno.EINVAL):
        client.clunk(clone)
    assert os.listxattr(path) == ["user.empty"]


def test_locks_are_their_owners(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    first, second = client.path("file"), client.path("file")
    client.open(first, 2)
    client.open(second, 2)
    read, write, unlock = 0, 1, 2
    assert client.lock(first, write, 0, 10, 1) == 0
    assert client.lock(second, write, 5, 1, 2) == 1  # blocked
    assert client.lock(second, write, 5, 1, 1) == 0  # the same process, by another file
    assert client.lock(second, read, 10, 10, 2) == 0
    assert client.lock(first, read, 10, 10, 1) == 0
    assert client.getlock(first, write, 0, 0, 2)[:3] == (write, 0, 10)
    assert client.getlock(first, write, 50, 0, 1)[0] == unlock
    assert client.lock(first, unlock, 0, 5, 1) == 0
    assert client.lock(second, write, 0, 5, 2) == 0
    with open(tmp_path / "file", "r+b") as ours:  # the host's processes are kept out, too
        import fcntl

        with pytest.raises(BlockingIOError):
            fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)
        client.clunk(first)
        client.clunk(second)
        fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with failing(errno.EBADF):
        client.lock(first, write, 0, 1, 1)


def test_statfs_is_the_file_systems(client: Client, tmp_path: Path) -> None:
    kind, block, blocks, *_, name_max = struct.unpack("<IIQQQQQQI", client.call(8, struct.pack("<I", 0)))
    real = os.statvfs(tmp_path)
    assert (kind, block, blocks, name_max) == (0x01021997, real.f_frsize, real.f_blocks, real.f_namemax)


def test_requests_nobody_knows_are_refused(client: Client) -> None:
    for kind in (0, 1, 6, 102, 106, 112, 114, 124, 126, 200, 255):
        assert client.send(message(kind, b"\0" * 20)) == (7, struct.pack("<I", errno.EOPNOTSUPP))


def test_files_that_are_open_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    client = connect(tmp_path, open_files=20)
    fids = [client.path("file") for _ in range(21)]
    for fid in fids[:20]:
        client.open(fid)
    with failing(errno.EMFILE):
        client.open(fids[20])
    with failing(errno.EMFILE):
        client.create(client.walk(0), "new")
    client.clunk(fids[0])
    client.open(fids[20])
    client.session.close()


def test_fids_are_not_bounded_by_descriptors(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"d{index}").mkdir()
        (tmp_path / f"d{index}/file").write_text(str(index))
    client = connect(tmp_path, open_paths=16)
    before = len(os.listdir("/proc/self/fd"))
    fids = [client.path(f"d{index}", "file") for index in range(300)]
    directories = [client.path(f"d{index}") for index in range(300)]
    assert len(os.listdir("/proc/self/fd")) <= before + 16
    client.renameat(0, "d7", client.path("d8"), "below")
    (tmp_path / "d9").rename(tmp_path / "elsewhere")
    (tmp_path / "d9").mkdir()
    (tmp_path / "d9/file").write_text("another")
    for index, fid in enumerate(fids):
        if index == 9:  # another file is there now, and it is none of this fid's
            with failing(errno.ESTALE):
                client.open(fid)
            continue
        client.open(fid)
        assert client.read(fid, 0, 10) == str(index).encode()
        client.clunk(fid)
        client.clunk(directories[index])
    client.session.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_saved_session_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("text")
    (tmp_path / "gone").write_text("gone")
    client = connect(tmp_path)
    fid, directory, gone = client.path("a", "b", "file"), client.path("a"), client.path("gone")
    client.open(fid, os.O_RDWR | os.O_TRUNC)
    client.write(fid, 0, b"written")
    client.open(directory)
    first = client.readdir(directory, 0, 60)
    clone = client.walk(0)
    client.call(32, struct.pack("<I", clone) + s("user.half") + struct.pack("<QI", 10, 0))
    client.write(clone, 0, b"12345")
    state = client.session.save()
    client.session.close()
    (tmp_path / "gone").unlink()

    client.session = Session(Share(tmp_path))
    client.session.restore(state)
    assert client.read(fid, 0, 100) == b"written"
    assert client.write(fid, 7, b"!") == 1
    names = {entry.name for entry in first + client.readdir(directory, first[-1].offset, 8192)}
    assert names == {b".", b"..", b"b"}
    assert client.getattr(client.walk(client.path("a", "b"), "..")).qid == client.getattr(client.path("a")).qid
    with failing(errno.ESTALE):
        client.getattr(gone)
    client.clunk(gone)
    with failing(errno.ENOSPC):
        client.write(clone, 5, b"123456")
    client.session.close()
