# SPDX-License-Identifier: Apache-2.0
"""What a guest can do in a shared directory, whatever protocol it asks in. Errors are OSError with the host's errno.

All is done as the process's own user (``owners.py``). A new file belongs to that user; only root's process gives it to
the guest's user that made it. Device nodes are not made: on the host they would be devices of the host's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Callable
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.share import syscalls
from softkvm.vmm.share.files import OpenFile, checked_offset
from softkvm.vmm.share.locks import Locks
from softkvm.vmm.share.owners import UNCHANGED, Owners
from softkvm.vmm.share.tree import OPEN_PATHS, Node, Tree, check_name

OPEN_FILES: Final = Size(
    "files of a share that a guest has open", 4096, errno.EMFILE, giver="guest", effect="EMFILE", where=__name__
)

XATTR: Final = Size("share.extended attribute", 65536, errno.E2BIG, giver="guest", effect="E2BIG", where=__name__)
"""Bytes of an extended attribute's value, and of a list of their names (XATTR_SIZE_MAX, XATTR_LIST_MAX)."""

WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_KEPT: Final = (
    os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_DSYNC | os.O_SYNC | os.O_DIRECTORY
)  # what of a guest's flags concerns the host; O_DIRECT would ask guest memory to be aligned
_OPENABLE: Final = (stat.S_IFREG, stat.S_IFDIR)
_PERMISSIONS: Final = 0o7777

Time = tuple[int, int]
NOW: Final[Time] = (0, syscalls.UTIME_NOW)
KEEP: Final[Time] = (0, syscalls.UTIME_OMIT)


def error(code: int) -> OSError:
    """Return the error with this errno."""
    return OSError(code, os.strerror(code))


class Share:
    """The directory *path*, for one guest. Not for several threads at once.

    *own_is_root*: the process's own user is the guest's root. *open_files* and *open_paths* are the most descriptors
    that it has of files that are open, and of others; OSError if *path* is not a directory that can be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        own_is_root: bool = True,
        open_files: int = OPEN_FILES.most,
        open_paths: int = OPEN_PATHS,
    ) -> None:
        self.read_only = read_only
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_room = OPEN_FILES.cut(min(open_files, max(soft // 4, 16)) if soft > 0 else open_files)
        self.tree = Tree(path, open_paths=open_paths)
        self.users = Owners(os.geteuid(), translate=own_is_root)
        self.groups = Owners(os.getegid(), translate=own_is_root)
        self._is_root = os.geteuid() == 0
        self._open: set[OpenFile] = set()
        self.locks = Locks(self.tree, read_only=read_only)
        self._devices: dict[int, int] = {self.tree.root.identity[0]: 0}

    @property
    def root(self) -> Node:
        """The shared directory."""
        return self.tree.root

    def close(self) -> None:
        """Close all that is open."""
        self.locks.close()
        for file in list(self._open):
            with contextlib.suppress(OSError):
                self.close_file(file)
        self.tree.close()

    def unique_inode(self, device: int, inode: int) -> int:
        """Return a number of 64 bits that is one file's: file systems below the root get a number on top of theirs."""
        index = self._devices.setdefault(device, len(self._devices))
        return (inode ^ index << 48) & (1 << 64) - 1

    # -- looking

    def look_up(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Return the file *name* of *parent*, held once more, and its status."""
        return self.tree.look_up(parent, name)

    def note(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Do what :meth:`look_up` does, for one of many files that may never be asked for."""
        return self.tree.note(parent, name)

    def stat(self, node: Node, file: OpenFile | None = None) -> os.stat_result:
        """Return a file's status."""
        return os.fstat(self.tree.fd(node) if file is None else file.fd)

    def read_link(self, node: Node) -> bytes:
        """Return where a symbolic link leads to, whole."""
        if node.kind != stat.S_IFLNK:
            raise error(errno.EINVAL)
        target = os.readlink(b"", dir_fd=self.tree.fd(node))
        return target if isinstance(target, bytes) else os.fsencode(target)

    def statvfs(self, node: Node) -> os.statvfs_result:
        """Return what its file system has and is."""
        return os.fstatvfs(self.tree.fd(node))

    def sync(self) -> None:
        """Have the root's file system keep what was written."""
        fd = os.open(b".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.tree.fd(self.root))
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    # -- open files

    def open(self, node: Node, flags: int) -> OpenFile:
        """Open a file or directory; what only stands for something else (device, pipe, socket) is ENXIO."""
        if flags & WRITES:
            self._expect_writable()
        if node.kind == stat.S_IFLNK:
            raise error(errno.ELOOP)
        if node.kind not in _OPENABLE:
            raise error(errno.ENXIO)
        self._expect_room()
        flags = flags & _KEPT | os.O_CLOEXEC | os.O_NOCTTY

        def opening() -> int:
            entry, directory = self.tree.entry(node)
            return os.open(entry, flags, dir_fd=directory)

        return self._opened(self.tree.opened(opening), flags, node)

    def _opened(self, fd: int, flags: int, node: Node) -> OpenFile:
        node.uses += 1
        file = OpenFile(fd, flags, node)
        self._open.add(file)
        return file

    def close_file(self, file: OpenFile) -> None:
        """Close an open file."""
        self._open.discard(file)
        try:
            file.close()
        finally:
            self.locks.closed(file.node)
            self.tree.release(file.node)

    def create(
        self, parent: Node, name: bytes, flags: int, mode: int, owner: tuple[int, int]
    ) -> tuple[Node, os.stat_result, OpenFile]:
        """Make *name* for *owner*, the guest's user and group, and open it; open it if it is there, unless O_EXCL."""
        self._expect_writable()
        check_name(name)
        self._expect_room()
        kept = flags & _KEPT | os.O_CLOEXEC | os.O_NOCTTY
        made = kept & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            fd = self.tree.opened(
                lambda: os.open(name, made, mode & _PERMISSIONS, dir_fd=self.tree.fd(parent)),
            )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, status = self.look_up(parent, name)
            try:
                file = self.open(node, flags)
            except BaseException:
                self.tree.release(node)
                raise
            return node, os.fstat(file.fd) if flags & os.O_TRUNC else status, file
        try:
            self._give(str(fd), self.tree.proc, os.fstat(fd), parent, mode, owner)
            path_fd = self.tree.opened(lambda: os.open(str(fd), os.O_PATH | os.O_CLOEXEC, dir_fd=self.tree.proc))
            node, status = self.tree.take(parent, name, path_fd)
        except BaseException:
            os.close(fd)
            raise
        return node, status, self._opened(fd, kept, node)

    def reopen(self, node: Node, flags: int) -> OpenFile | None:
        """Open a file again that was open, with the flags that it had; None if that cannot be any more."""
        try:
            return self.open(node, flags & ~(os.O_TRUNC | os.O_EXCL))
        except OSError:
            return None

    # -- names

    def make_directory(
        self, parent: Node, name: bytes, mode: int, owner: tuple[int, int]
    ) -> tuple[Node, os.stat_result]:
        """Make a directory."""
        self._expect_writable()
        os.mkdir(check_name(name), mode & _PERMISSIONS, dir_fd=self.tree.fd(parent))
        return self._made(parent, name, mode, owner)

    def make_node(
        self, parent: Node, name: bytes, mode: int, device: int, owner: tuple[int, int]
    ) -> tuple[Node, os.stat_result]:
        """Make a file, pipe or socket; EPERM for a device, but that with number 0 which stands for nothing."""
        self._expect_writable()
        check_name(name)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind == stat.S_IFBLK or (kind == stat.S_IFCHR and device):
            raise error(errno.EPERM)
        os.mknod(name, kind | mode & _PERMISSIONS, device, dir_fd=self.tree.fd(parent))
        return self._made(parent, name, mode, owner)

    def make_link(
        self, parent: Node, name: bytes, target: bytes, owner: tuple[int, int]
    ) -> tuple[Node, os.stat_result]:
        """Make a symbolic link to *target*, which is for the guest to follow."""
        self._expect_writable()
        if b"\0" in target:
            raise error(errno.EINVAL)
        os.symlink(target, check_name(name), dir_fd=self.tree.fd(parent))
        return self._made(parent, name, None, owner)

    def _made(self, parent: Node, name: bytes, mode: int | None, owner: tuple[int, int]) -> tuple[Node, os.stat_result]:
        """Give a new file what it is to have; hold it."""
        node, status = self.look_up(parent, name)
        try:
            entry, directory = self.tree.entry(node)
            changed = self._give(entry, directory, status, parent, mode, owner)
            return node, os.fstat(self.tree.fd(node)) if changed else status
        except BaseException:
            self.tree.release(node)
            raise

    def _give(
        self,
        entry: str,
        directory: int,
        status: os.stat_result,
        parent: Node,
        mode: int | None,
        owner: tuple[int, int],
    ) -> bool:
        """Give a new file owner and permissions: those asked for, although the process has a umask of its own."""
        changed = False
        if self._is_root:
            # In a directory with the set-group-ID bit, a file has the directory's group.
            above = os.fstat(self.tree.fd(parent))
            user, group = (self.users.to_host(owner[0]), self.groups.to_host(owner[1]))
            if above.st_mode & stat.S_ISGID:
                group = -1
            if user not in (-1, status.st_uid) or group not in (-1, status.st_gid):
                os.chown(entry, user, group, dir_fd=directory)
                changed = True
        if mode is not None:
            wanted = mode & _PERMISSIONS
            if stat.S_ISDIR(status.st_mode):
                wanted |= status.st_mode & stat.S_ISGID  # inherited
            if changed or stat.S_IMODE(status.st_mode) != wanted:
                with contextlib.suppress(PermissionError):  # set-group-ID for a group that is not ours
                    os.chmod(entry, wanted, dir_fd=directory)
                changed = True
        return changed

    def link(self, node: Node, parent: Node, name: bytes) -> os.stat_result:
        """Give a file another name; return its status."""
        self._expect_writable()
        check_name(name)
        if node.kind == stat.S_IFDIR:
            raise error(errno.EPERM)
        target = self.tree.fd(parent)
        entry, directory = self.tree.entry(node)
        # Through the magic link, and no further: also a symbolic link gets the name itself.
        os.link(entry, name, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=True)
        return self.stat(node)

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove the name of a file that is no directory."""
        self._remove(parent, name, os.unlink)

    def remove_directory(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory."""
        self._remove(parent, name, os.rmdir)

    def _remove(self, parent: Node, name: bytes, how: Callable[..., None]) -> None:
        self._expect_writable()
        check_name(name)
        node = self.tree.find_known(parent, name)
        how(name, dir_fd=self.tree.fd(parent))
        self.tree.removed(node, parent, name)

    def remove(self, node: Node) -> None:
        """Remove a file or an empty directory by the name that it was found with; ESTALE if that is another's now."""
        if node is self.root:
            raise error(errno.EBUSY)
        if node.parent is None or node.name is None or self.tree.find_known(node.parent, node.name) is not node:
            raise error(errno.ESTALE)
        self._remove(node.parent, node.name, os.rmdir if node.kind == stat.S_IFDIR else os.unlink)

    def rename(self, old_parent: Node, old: bytes, new_parent: Node, new: bytes, flags: int = 0) -> None:
        """Rename; *flags* are renameat2's."""
        self._expect_writable()
        check_name(old)
        check_name(new)
        tree = self.tree
        moved, target = tree.find_known(old_parent, old), tree.find_known(new_parent, new)
        source = tree.fd(old_parent)
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise error(errno.EINVAL)
        if flags:
            syscalls.renameat2(source, old, tree.fd(new_parent), new, flags)
        else:
            os.rename(old, new, src_dir_fd=source, dst_dir_fd=tree.fd(new_parent))
        if target is not moved:
            if flags & syscalls.RENAME_EXCHANGE:
                tree.renamed(target, old_parent, old)
            else:
                tree.removed(target, new_parent, new)
            tree.renamed(moved, new_parent, new)

    # -- attributes

    def change(
        self,
        node: Node,
        *,
        file: OpenFile | None = None,
        mode: int | None = None,
        user: int = UNCHANGED,
        group: int = UNCHANGED,
        size: int | None = None,
        times: tuple[Time, Time] | None = None,
        touch_ctime: bool = False,
    ) -> None:
        """Change attributes: permissions, the guest's user and group, size, times (access, modification).

        *touch_ctime*: change none, but set the time of the change.
        """
        self._expect_writable()
        if file is None:
            entry, directory = self.tree.entry(node)
        else:
            entry, directory = str(file.fd), self.tree.proc
        if (user, group) != (UNCHANGED, UNCHANGED) or touch_ctime:
            os.chown(entry, self.users.to_host(user), self.groups.to_host(group), dir_fd=directory)
        if mode is not None:
            os.chmod(entry, mode & _PERMISSIONS, dir_fd=directory)
        if size is not None:
            self._resize(node, file, checked_offset(size))
        if times is not None:
            syscalls.utimensat(directory, entry.encode(), *times)

    def _resize(self, node: Node, file: OpenFile | None, size: int) -> None:
        if node.kind == stat.S_IFDIR:
            raise error(errno.EISDIR)
        if node.kind != stat.S_IFREG:
            raise error(errno.EINVAL)
        if file is not None and file.flags & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(file.fd, size)
            return
        os.truncate(self._magic_link(node), size)

    def _magic_link(self, node: Node) -> str:
        """The file's name for system calls that take no directory."""
        return f"/proc/self/fd/{self.tree.fd(node)}"

    # -- extended attributes

    def get_xattr(self, node: Node, name: bytes) -> bytes:
        """Return an extended attribute."""
        return os.getxattr(self._magic_link(node), _attribute_name(name))

    def list_xattrs(self, node: Node) -> bytes:
        """Return the names of all extended attributes, each with a NUL behind it."""
        return b"".join(os.fsencode(name) + b"\0" for name in os.listxattr(self._magic_link(node)))

    def set_xattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute; *flags* are setxattr's."""
        self._expect_writable()
        XATTR.check(len(value))
        if flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
            raise error(errno.EINVAL)
        os.setxattr(self._magic_link(node), _attribute_name(name), value, flags)

    def remove_xattr(self, node: Node, name: bytes) -> None:
        """Remove an extended attribute."""
        self._expect_writable()
        os.removexattr(self._magic_link(node), _attribute_name(name))

    # -- limits

    def _expect_writable(self) -> None:
        if self.read_only:
            raise error(errno.EROFS)

    def _expect_room(self) -> None:
        if not OPEN_FILES.allows(len(self._open) + 1, room=self._open_room):
            raise error(errno.EMFILE)


def _attribute_name(name: bytes) -> bytes:
    if not name or b"\0" in name:
        raise error(errno.EINVAL)
    return name
