# SPDX-License-Identifier: Apache-2.0
"""Nodes of a share, while guest and host look, rename and remove: no circle, no leak, and each is its own file."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softkvm.vmm.share import tree as trees
from softkvm.vmm.share.share import Share
from softkvm.vmm.share.tree import Node

NAMES = [b"a", b"b", b"c"]
name = st.sampled_from(NAMES)
pick = st.integers(0, 1 << 16)
steps = st.one_of(
    st.tuples(st.just("look"), pick, name),
    st.tuples(st.just("note"), pick, name),
    st.tuples(st.just("release"), pick),
    st.tuples(st.just("mkdir"), pick, name),
    st.tuples(st.just("file"), pick, name),
    st.tuples(st.just("rename"), pick, name, pick, name),
    st.tuples(st.just("exchange"), pick, name, pick, name),
    st.tuples(st.just("remove"), pick),
    st.tuples(st.just("link"), pick, pick, name),
    st.tuples(st.just("host rename"), pick, pick, name),
    st.tuples(st.just("host remove"), pick),
)


def host_paths(top: str) -> list[str]:
    """Everything below the share, by the host's eyes."""
    return [os.path.join(at, entry) for at, below, files in os.walk(top) for entry in (*below, *files)]


class Guest:
    """Does steps, and knows what it holds."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.share = Share(top, open_paths=16)
        self.held: list[Node] = []

    def node(self, number: int) -> Node:
        return ([self.share.root, *self.held])[number % (len(self.held) + 1)]

    def do(self, kind: str, *arguments: object) -> None:
        numbers = [value for value in arguments if isinstance(value, int)]
        names = [value for value in arguments if isinstance(value, bytes)]
        share = self.share
        if kind.startswith("host"):
            self.on_the_host(kind, numbers, names)
        elif kind in ("look", "note"):
            find = share.look_up if kind == "look" else share.note
            self.held.append(find(self.node(numbers[0]), names[0])[0])
        elif kind == "release":
            if self.held:
                share.tree.release(self.held.pop(numbers[0] % len(self.held)))
        elif kind == "mkdir":
            self.held.append(share.make_directory(self.node(numbers[0]), names[0], 0o755, (0, 0))[0])
        elif kind == "file":
            node, _, file = share.create(self.node(numbers[0]), names[0], os.O_RDWR, 0o644, (0, 0))
            self.held.append(node)
            share.close_file(file)
        elif kind in ("rename", "exchange"):
            flags = 2 if kind == "exchange" else 0
            share.rename(self.node(numbers[0]), names[0], self.node(numbers[1]), names[1], flags)
        elif kind == "remove":
            share.remove(self.node(numbers[0]))
        elif kind == "link":
            share.link(self.node(numbers[0]), self.node(numbers[1]), names[0])

    def on_the_host(self, kind: str, numbers: list[int], names: list[bytes]) -> None:
        paths = host_paths(self.top)
        if not paths:
            return
        path = paths[numbers[0] % len(paths)]
        if kind == "host remove":
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
            return
        targets = [self.top, *(other for other in paths if os.path.isdir(other))]
        os.rename(path, os.path.join(targets[numbers[1] % len(targets)], names[0].decode()))

    def check(self) -> None:
        """What must hold at any time."""
        tree = self.share.tree
        inside = {(os.lstat(path).st_dev, os.lstat(path).st_ino) for path in [self.top, *host_paths(self.top)]}
        for node in tree.by_number.values():
            above: Node | None = node
            for _ in range(len(tree) + 1):
                above = above.parent if above is not None else None
            assert above is None  # no circle
            with contextlib.suppress(OSError):
                status = os.fstat(tree.fd(node))
                assert (status.st_dev, status.st_ino) == node.identity
                assert status.st_nlink == 0 or node.identity in inside
        assert len(tree._held) <= 16
        children = {id(node): 0 for node in tree.by_number.values()}
        for node in tree.by_number.values():
            if node.parent is not None:
                children[id(node.parent)] += 1
        for node in tree.by_number.values():
            if node is not tree.root:
                assert node.uses == children[id(node)] + self.held.count(node)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=40))
def test_whatever_guest_and_host_do_each_node_is_its_own_file(done: list[tuple[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as top:
        before = len(os.listdir("/proc/self/fd"))
        (Path(top) / "a/b/c").mkdir(parents=True)
        guest = Guest(top)
        for kind, *arguments in done:
            with contextlib.suppress(OSError):
                guest.do(kind, *arguments)
            guest.check()
        while guest.held:
            guest.share.tree.release(guest.held.pop())
        assert len(guest.share.tree) == 1
        guest.share.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_with_the_number_of_one_that_is_gone_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    share = Share(tmp_path)
    node, status = share.look_up(share.root, b"file")
    (tmp_path / "directory").mkdir()
    real = os.fstat

    def same_number(fd: int) -> os.stat_result:
        found = real(fd)
        values = list(found[:10])
        values[1] = status.st_ino
        return os.stat_result(values, {name: getattr(found, name) for name in ("st_mtime_ns", "st_blksize")})

    monkeypatch.setattr(os, "fstat", same_number)
    other, _ = share.look_up(share.root, b"directory")
    assert other is not node and other.kind != node.kind
    monkeypatch.undo()
    share.close()


def test_files_that_a_guest_knows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(trees.KNOWN_FILES, "most", 5)
    share = Share(tmp_path)
    nodes = [share.look_up(share.root, b"%d" % number)[0] for number in range(4)]
    for find in (share.look_up, share.note):
        with pytest.raises(OSError, check=lambda error: error.errno == 23):  # ENFILE
            find(share.root, b"5")
    share.tree.release(nodes[0])
    share.look_up(share.root, b"5")
    share.close()


def test_a_guest_knows_more_files_than_the_process_may_open(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / str(number)).write_text(str(number))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 40, hard))
    try:
        share = Share(tmp_path, open_paths=1024)
        share.tree._open_paths = 1024  # more than there are
        nodes = [share.look_up(share.root, b"%d" % number)[0] for number in range(200)]
        files = [share.open(node, os.O_RDONLY) for node in nodes[:25]]
        for number, node in enumerate(nodes):
            file = share.open(node, os.O_RDONLY)
            buffer = bytearray(10)
            assert buffer[: file.read([memoryview(buffer)], 0)] == b"%d" % number
            share.close_file(file)
        for _ in range(5000):  # the process has no more: that is the guest's to know
            try:
                files.append(share.open(nodes[0], os.O_RDONLY))
            except OSError as error:
                assert error.errno == errno.EMFILE  # noqa: PT017
                break
        else:
            pytest.fail("there were enough")
        share.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
