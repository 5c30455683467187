# SPDX-License-Identifier: Apache-2.0
"""The files of a shared directory that a guest has a name or a handle for.

Nobody gets out of a share, whoever renames what meanwhile: a file is found from its directory's descriptor by a name of
one component that is neither ``..`` nor holds a slash, and no symbolic link is followed. The guest follows links
itself, in its own tree. What is above a file is what the guest has come down through, not what the host says now.

A :class:`Node` is a file that the guest knows. It is named by an O_PATH descriptor as long as there is room for it
(:data:`OPEN_PATHS`); one that has been given up is opened again by its path beneath the share's root, and has to lead
to the same file then.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.share.syscalls import open_beneath

#: The most nodes that a share keeps an O_PATH descriptor of.
OPEN_PATHS: Final = 1024

KNOWN_FILES: Final = Size(
    "files of a share that a guest knows", 1 << 20, errno.ENFILE, giver="guest", effect="ENFILE", where=__name__
)

_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

Identity = tuple[int, int]
"""What a file is on its host: device and inode."""


class Named(Protocol):
    """What has a descriptor of a file."""

    @property
    def fd(self) -> int:
        """The descriptor."""


class Node:
    """A file that a guest knows. ``parent`` and ``name`` say where it has been found last."""

    __slots__ = ("fd", "files", "identity", "kind", "name", "number", "parent", "uses")

    def __init__(self, identity: Identity, kind: int, parent: Node | None, name: bytes) -> None:
        self.identity = identity
        self.kind = kind
        """S_IFMT of its mode."""
        self.parent = parent
        self.name: bytes | None = name
        """None when it is not there any more."""
        self.number = 0
        """A number of its own, for protocols that name files by one."""
        self.uses = 1
        """How often the guest, and nodes below it, hold it."""
        self.fd = -1
        self.files: list[Named] = []
        """Its open files, each of which names it as well as an O_PATH descriptor does."""

    def __repr__(self) -> str:
        return f"<Node {self.number}: {self.name!r}, {self.uses} uses>"


def identity_of(status: os.stat_result) -> Identity:
    """Return what the file is that has this status."""
    return status.st_dev, status.st_ino


def check_name(name: bytes) -> bytes:
    """Return *name* if it is one of a directory's entries; an OSError, as the kernel's, if it never can be.

    How long a name may be is the file system's to say (ENAMETOOLONG): it gets it whole.
    """
    if not name:
        raise OSError(errno.ENOENT, "empty name")
    if name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "not a name")
    return name


class Tree:
    """The nodes below the directory *path*; OSError if that is none or cannot be opened."""

    def __init__(self, path: str | os.PathLike[str], *, open_paths: int = OPEN_PATHS) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_paths = max(min(open_paths, soft // 8 if soft > 0 else open_paths), 16)
        self._held: OrderedDict[Node, None] = OrderedDict()  # those with an fd of their own, the last used last
        self.by_number: dict[int, Node] = {}
        self._by_identity: dict[Identity, Node] = {}
        self._next_number = 1
        self._reserved = 0
        self.proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        """The directory whose entries are our descriptors: what opens a file again that an O_PATH descriptor names."""
        try:
            self.path = Path(path)
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self.proc)
            raise
        status = os.fstat(fd)
        self.root = Node(identity_of(status), stat.S_IFDIR, None, b"")
        self.root.fd = fd
        self._add(self.root)

    def _add(self, node: Node) -> None:
        node.number = self._next_number
        self._next_number += 1
        self.by_number[node.number] = node
        self._by_identity[node.identity] = node

    def __len__(self) -> int:
        return len(self.by_number)

    # -- descriptors

    def fd(self, node: Node) -> int:
        """Return a descriptor that names the node's file; good until the next call for as many others as may be held.

        ESTALE if that file is not there any more.
        """
        fd = node.fd
        if fd >= 0:
            if node is not self.root:
                self._held.move_to_end(node)
            return fd
        if node.files:
            return node.files[0].fd
        return self._reopen(node)

    def entry(self, node: Node) -> tuple[str, int]:
        """Return the node's file as a path, and the directory that this is relative to; the path is a magic link."""
        return str(self.fd(node)), self.proc

    def names(self, node: Node) -> list[bytes]:
        """Return the names from the root to where the node was found last; ESTALE if it is gone from there."""
        names: list[bytes] = []
        at: Node | None = node
        while at is not None and at is not self.root:
            if at.name is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            names.append(at.name)
            at = at.parent
        names.reverse()
        return names

    def _reopen(self, node: Node) -> int:
        try:
            fd = self.opened(lambda: self._open_again(node))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
            raise
        if identity_of(os.fstat(fd)) != node.identity:
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self._hold(node, fd)
        return fd

    def _open_again(self, node: Node) -> int:
        """Open the path of *node* from the nearest directory above it that has a descriptor."""
        names: list[bytes] = []
        at = node
        while at.fd < 0:
            if at.name is None or at.parent is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            names.append(at.name)
            at = at.parent
        names.reverse()
        return open_beneath(at.fd, names, _PATH_FLAGS)

    def opened(self, opening: Callable[[], int]) -> int:
        """Return the descriptor that *opening* gives; some of ours are given up where the process has no more."""
        try:
            return opening()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._held:
                raise
            for _ in range(len(self._held) // 2 + 1):
                self._give_up_oldest()
            return opening()

    def _give_up_oldest(self) -> None:
        oldest, _ = self._held.popitem(last=False)
        os.close(oldest.fd)
        oldest.fd = -1

    def _hold(self, node: Node, fd: int) -> None:
        node.fd = fd
        held = self._held
        held[node] = None
        if len(held) > self._open_paths:
            self._give_up_oldest()

    # -- finding

    def look_up(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Return the file *name* in the directory *parent*, held once more, and its status."""
        check_name(name)
        fd = self.opened(lambda: os.open(name, _PATH_FLAGS, dir_fd=self.fd(parent)))
        return self.take(parent, name, fd)

    def take(self, parent: Node, name: bytes, fd: int) -> tuple[Node, os.stat_result]:
        """Return the node of what the O_PATH descriptor *fd* names and was found as *name* in *parent*; takes *fd*."""
        status = os.fstat(fd)
        try:
            node = self._known(parent, name, status)
        except BaseException:
            os.close(fd)
            raise
        if node.fd < 0:
            self._hold(node, fd)
        else:
            os.close(fd)
        return node, status

    def note(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Do what :meth:`look_up` does, for a file that may never be asked for: it isn't opened yet."""
        status = os.stat(check_name(name), dir_fd=self.fd(parent), follow_symlinks=False)
        return self._known(parent, name, status), status

    def _known(self, parent: Node, name: bytes, status: os.stat_result) -> Node:
        """Return the node of the file with this status, held once more."""
        identity = identity_of(status)
        kind = stat.S_IFMT(status.st_mode)
        node = self._by_identity.get(identity)
        if node is not None and node.kind != kind:  # another file that got the number of one that is gone
            self._forget_name(node)
            del self._by_identity[identity]
            node = None
        if node is None:
            KNOWN_FILES.check(len(self.by_number) + 1)
            node = Node(identity, kind, parent, name)
            parent.uses += 1
            self._add(node)
            return node
        node.uses += 1
        if (node.parent is not parent or node.name != name) and node is not self.root:
            self._place(node, parent, name)
        return node

    def release(self, node: Node, uses: int = 1) -> None:
        """Give back *uses* of a node; without any it is forgotten."""
        while True:
            node.uses -= uses
            if node.uses > 0 or node is self.root:
                return
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
                del self._held[node]
            del self.by_number[node.number]
            if self._by_identity.get(node.identity) is node:
                del self._by_identity[node.identity]
            if node.parent is None:
                return
            node, uses = node.parent, 1

    # -- moving

    def _forget_name(self, node: Node) -> None:
        node.name = None

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        """Note where *node* has been found."""
        if node.kind == stat.S_IFDIR:
            # What is below itself was found before somebody moved it.
            above: Node | None = parent
            while above is not None:
                if above is node:
                    return
                above = above.parent
        before = node.parent
        node.parent, node.name = parent, name
        parent.uses += 1
        if before is not None:
            self.release(before)

    def find_known(self, parent: Node, name: bytes) -> Node | None:
        """Return the node of the file that is *name* in *parent* now, if the guest knows it. It is not held."""
        try:
            status = os.stat(name, dir_fd=self.fd(parent), follow_symlinks=False)
        except OSError:
            return None
        return self._by_identity.get(identity_of(status))

    def removed(self, node: Node | None, parent: Node, name: bytes) -> None:
        """Note that *name* in *parent*, which was *node*, is no more."""
        if node is not None and node.parent is parent and node.name == name:
            self._forget_name(node)

    def renamed(self, node: Node | None, parent: Node, name: bytes) -> None:
        """Note that *node* is *name* in *parent* now."""
        if node is not None and node is not self.root:
            self._place(node, parent, name)

    # -- save and restore

    def save(self, node: Node) -> dict[str, Any]:
        """Where a node's file is to be found again: not at all, if it has no name any more."""
        try:
            names = self.names(node)
        except OSError:
            names = None
        return {"names": names, "kind": node.kind}

    def restore(self, state: dict[str, Any], number: int | None = None) -> Node:
        """Return the node of a saved file, held; one that always is ESTALE if there is no such file any more.

        Protocols that name files by their node's number say which it has, after :meth:`reserve`.
        """
        if number == self.root.number:
            self.root.uses += 1
            return self.root
        try:
            if state["names"] is None:
                raise FileNotFoundError
            node = self._find(state["names"])
            if node.kind != state["kind"] or (number is not None and node.number < self._reserved):
                self.release(node)
                raise FileNotFoundError
        except OSError:
            node = Node((-1, self._next_number), state["kind"], None, b"")
            node.name = None
            self._add(node)
        if number is not None and number != node.number:
            del self.by_number[node.number]
            node.number = number
            self.by_number[number] = node
        return node

    def reserve(self, numbers: Iterable[int]) -> None:
        """Give no node any of these *numbers*, nor one below: they are those of nodes that are restored."""
        self._reserved = max(numbers, default=0) + 1
        self._next_number = max(self._next_number, self._reserved)

    def _find(self, names: list[bytes]) -> Node:
        node = self.root
        node.uses += 1
        for name in names:
            try:
                below, _ = self.look_up(node, name)
            finally:
                self.release(node)
            node = below
        return node

    def close(self) -> None:
        """Close all descriptors."""
        for node in self._held:
            os.close(node.fd)
            node.fd = -1
        self._held.clear()
        self.by_number.clear()
        self._by_identity.clear()
        if self.root.fd >= 0:
            os.close(self.root.fd)
            os.close(self.proc)
            self.root.fd = -1
