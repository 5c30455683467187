# SPDX-License-Identifier: Apache-2.0
"""Whose files are in a share: the process's user is the guest's root, and a guest can do what that user can."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.p9 import connect

from softkvm.vmm.share.owners import NOBODY, UNCHANGED, Owners
from softkvm.vmm.share.share import Share

PR_SET_DUMPABLE = 4
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def test_the_processs_user_is_the_guests_root() -> None:
    users = Owners(1000, translate=True)
    assert [users.to_guest(number) for number in (1000, 0, 1001, NOBODY)] == [0, NOBODY, 1001, NOBODY]
    assert [users.to_host(number) for number in (0, 1001, UNCHANGED)] == [1000, 1001, -1]
    with pytest.raises(PermissionError):
        users.to_host(1000)  # which would be root, seen again


@pytest.mark.parametrize("users", [Owners(1000, translate=False), Owners(0, translate=True)])
def test_owners_are_the_hosts_where_nobody_is_translated(users: Owners) -> None:
    for number in (0, 1000, 1001, NOBODY):
        assert users.to_guest(number) == users.to_host(number) == number


def as_user(number: int, work: Callable[[], object]) -> str:
    """Do *work* in a child that is another user's, with a umask; what it returns, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # /proc/self is its own again
            os.umask(0o077)
            answer = repr(work())
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as answers:
        text = answers.read().decode()
    os.waitpid(child, 0)
    return text


def code(function: Callable[..., object], *arguments: object, **more: object) -> str:
    try:
        function(*arguments, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


@ROOT
def test_a_guest_can_do_what_the_processs_user_can(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o055)
    for name, mode, uid in (("mine", 0o700, 12345), ("roots", 0o755, 0)):
        (tmp_path / name).mkdir(mode=mode)
        os.chown(tmp_path / name, uid, uid)
    (tmp_path / "secret").write_text("root's")
    (tmp_path / "secret").chmod(0o600)

    def work() -> object:
        client = connect(tmp_path)
        mine, roots, secret = client.path("mine"), client.path("roots"), client.path("secret")
        client.mkdir(mine, "new", 0o777)
        new = client.path("mine", "new")
        found = client.getattr(new)
        return [
            [client.getattr(fid).uid for fid in (mine, roots, secret)],
            (found.uid, found.gid, oct(found.mode)),
            [code(client.setattr, new, 2 | 4, uid=0, gid=0), code(client.setattr, new, 2, uid=77)],
            [code(client.open, secret), code(client.mkdir, 0, "x"), code(client.setattr, roots, 1, mode=0o777)],
            code(client.setattr, new, 2, uid=12345),
        ]

    assert as_user(12345, work) == repr(
        [
            [0, NOBODY, NOBODY],
            (0, 0, "0o40777"),  # whatever the process's umask is
            ["done", "EPERM"],
            ["EACCES", "EACCES", "EPERM"],
            "EPERM",
        ]
    )
    assert (tmp_path / "mine/new").stat().st_uid == 12345


@ROOT
def test_roots_process_gives_files_to_who_makes_them(tmp_path: Path) -> None:
    client = connect(tmp_path)
    share = client.session.share
    share.make_directory(share.root, b"dir", 0o2755, (1000, 1001))
    assert ((tmp_path / "dir").stat().st_uid, (tmp_path / "dir").stat().st_gid) == (1000, 1001)
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o2755
    directory, _ = share.look_up(share.root, b"dir")
    _, _, file = share.create(directory, b"file", os.O_RDWR, 0o4711, (1002, 1003))
    # of a directory with the set-group-ID bit, the group is the directory's
    found = (tmp_path / "dir/file").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1002, 1001, 0o4711)
    share.make_link(directory, b"link", b"file", (1004, 1005))
    assert (tmp_path / "dir/link").lstat().st_uid == 1004
    assert (tmp_path / "dir/file").stat().st_uid == 1002
    share.close_file(file)
    client.session.close()


def test_what_is_no_directory_is_no_share(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    for name, expected in (("file", "ENOTDIR"), ("none", "ENOENT"), ("x" * 300, "ENAMETOOLONG")):
        assert code(Share, tmp_path / name) == expected
    assert len(os.listdir("/proc/self/fd")) == before
