# SPDX-License-Identifier: Apache-2.0
"""Nobody gets out of a share, also while somebody on the host renames directories and puts links in their place."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.p9 import Client, connect

from softkvm.vmm.share import syscalls

ROUNDS = 300


@pytest.fixture(params=["openat2", "walk"])
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Paths are resolved by openat2, or by a walk as on a kernel that has none."""
    if request.param == "walk":

        def none(*arguments: object) -> int:
            raise OSError(38, os.strerror(38))

        monkeypatch.setattr(syscalls, "openat2", none)
    monkeypatch.setattr(syscalls.open_beneath, "has_openat2", True)
    return str(request.param)


@contextlib.contextmanager
def meanwhile(change: Callable[[], None]) -> Iterator[None]:
    """Make changes on another thread as long as the block lasts."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not stop.is_set():
                change()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the share, of the same shape, whose files hold SECRET."""
    for top, text in (("share", "inside"), ("outside", "SECRET")):
        (tmp_path / top / "a/b").mkdir(parents=True)
        (tmp_path / top / "a/b/file").write_text(text)
    return tmp_path / "outside"


def read_all(client: Client, *names: str) -> bytes:
    try:
        return client.contents(*names)
    except OSError:
        return b""


@pytest.mark.usefixtures("resolver")
def test_links_that_take_a_directorys_place_are_not_followed(outside: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    client = connect(share, open_paths=16)

    def change() -> None:
        os.rename(share / "a", share / "kept")
        os.symlink(outside / "a", share / "a")
        os.unlink(share / "a")
        os.rename(share / "kept", share / "a")

    seen = set()
    with meanwhile(change):
        for _ in range(ROUNDS):
            seen.add(read_all(client, "a", "b", "file"))
            with contextlib.suppress(OSError):
                fid = client.path("a", "b")
                client.create(fid, "new", 0o1102)
                client.write(fid, 0, b"written")
                client.clunk(fid)
    assert seen <= {b"", b"inside"}
    assert sorted(os.listdir(outside / "a/b")) == ["file"]


@pytest.mark.usefixtures("resolver")
def test_fids_whose_descriptors_were_given_up_lead_nowhere_else(outside: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    for index in range(40):
        (share / f"d{index}").mkdir()
    client = connect(share, open_paths=16)
    fid = client.path("a", "b", "file")
    for index in range(40):
        client.path(f"d{index}")
    os.rename(share / "a", tmp_path / "moved")
    os.symlink(outside / "a", share / "a")
    with pytest.raises(OSError, check=lambda error: error.errno == 116):  # ESTALE
        client.open(fid)
    os.unlink(share / "a")
    os.rename(tmp_path / "moved", share / "a")
    client.open(fid)
    assert client.read(fid, 0, 10) == b"inside"


@pytest.mark.usefixtures("resolver")
def test_two_dots_do_not_lead_out_of_a_directory_that_is_moved_out(outside: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    client = connect(share, open_paths=16)
    root = client.getattr(0).qid

    def change() -> None:
        os.rename(share / "a/b", outside / "b")
        os.rename(outside / "b", share / "a/b")

    with meanwhile(change):
        for _ in range(ROUNDS):
            with contextlib.suppress(OSError):
                fid = client.path("a", "b")
                assert client.getattr(client.walk(fid, "..", "..")).qid == root
                assert client.getattr(client.walk(fid, "..", "..", "..")).qid == root
                assert read_all(client, "a", "b", "..", "..", "..", "outside", "a", "b", "file") == b""
                client.clunk(fid)


@pytest.mark.usefixtures("resolver")
def test_guests_that_rename_against_each_other_stay_within(outside: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    client, other = connect(share, open_paths=16), connect(share, open_paths=16)

    def change() -> None:
        with contextlib.suppress(OSError):
            other.renameat(other.path("a"), "b", 0, "b")
        with contextlib.suppress(OSError):
            other.renameat(0, "a", other.path("b"), "a")
        with contextlib.suppress(OSError):
            other.renameat(other.path("b"), "a", 0, "a")
        with contextlib.suppress(OSError):
            other.renameat(0, "b", other.path("a"), "b")

    with meanwhile(change):
        for _ in range(ROUNDS):
            assert read_all(client, "a", "b", "file") in (b"", b"inside")
            assert read_all(client, "b", "a", "..", "file") in (b"", b"inside")
    assert (outside / "a/b/file").read_text() == "SECRET"
    inside = [name for _, _, names in os.walk(share) for name in names]
    assert inside == ["file"]


def test_links_to_descriptors_and_to_the_outside_are_only_read(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    for name, target in (("root", "/"), ("up", ".."), ("proc", "/proc/self/root"), ("fd", "/proc/self/fd/0")):
        (tmp_path / "share" / name).symlink_to(target)
    client = connect(tmp_path / "share")
    for name in ("root", "up", "proc", "fd"):
        fid = client.path(name)
        assert client.readlink(fid) == os.fsencode(os.readlink(tmp_path / "share" / name))
        for call in (lambda fid=fid: client.open(fid), lambda fid=fid: client.walk(fid, "etc")):
            with pytest.raises(OSError):
                call()


def test_a_share_of_proc_gives_no_way_out() -> None:
    client = connect(Path("/proc"), read_only=True)
    for path in (("self", "root"), (str(os.getpid()), "root"), (str(os.getpid()), "cwd")):
        with contextlib.suppress(OSError):
            fid = client.path(*path)
            with pytest.raises(OSError):
                client.walk(fid, "etc")
            with pytest.raises(OSError):
                client.open(fid)
