# SPDX-License-Identifier: Apache-2.0
"""What a guest asks for, one function an operation: takes the request, returns the reply's body.

Errors are OSErrors, whose errno the guest gets.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.fuse.mount import Mount
from softkvm.vmm.fuse.protocol import (
    ATTR,
    ATTR_OUT,
    BATCH_FORGET_IN,
    COPY_IN,
    CREATE_IN,
    DIRENT,
    ENTRY_OUT,
    FALLOCATE_IN,
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_FH,
    FATTR_GID,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FATTR_SIZE,
    FATTR_UID,
    FORGET_IN,
    FORGET_ONE,
    FSYNC_FDATASYNC,
    FSYNC_IN,
    GETATTR_FH,
    GETATTR_IN,
    GETXATTR_IN,
    LINK_IN,
    LSEEK_IN,
    LSEEK_OUT,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_IN,
    OPEN_OUT,
    RELEASE_IN,
    RENAME2_IN,
    RENAME_IN,
    SETATTR_IN,
    SETXATTR_IN,
    STATFS_OUT,
    WRITE_CACHE,
    WRITE_OUT,
    XATTR_OUT,
    Op,
    Request,
)
from softkvm.vmm.fuse.protocol import DATA_IN as READDIR_IN
from softkvm.vmm.share import syscalls
from softkvm.vmm.share.files import OpenFile, checked_offset
from softkvm.vmm.share.owners import UNCHANGED
from softkvm.vmm.share.share import KEEP, NOW, XATTR, Time, error
from softkvm.vmm.share.tree import Node

FORGOTTEN: Final = Size(
    "nodes that a guest forgets at once",
    1 << 16,
    errno.EINVAL,
    giver="guest",
    effect="none is forgotten",
    where=__name__,
)

_NO_NODE: Final = ENTRY_OUT.pack(0, 0, 0, 0, 0, 0) + bytes(ATTR.size)
_SECOND: Final = 10**9


def _attributes(mount: Mount, status: os.stat_result) -> bytes:
    share = mount.share
    atime, atime_ns = divmod(status.st_atime_ns, _SECOND)
    mtime, mtime_ns = divmod(status.st_mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(status.st_ctime_ns, _SECOND)
    return ATTR.pack(
        share.unique_inode(status.st_dev, status.st_ino),
        status.st_size,
        status.st_blocks,
        atime & 0xFFFFFFFFFFFFFFFF,
        mtime & 0xFFFFFFFFFFFFFFFF,
        ctime & 0xFFFFFFFFFFFFFFFF,
        atime_ns,
        mtime_ns,
        ctime_ns,
        status.st_mode,
        status.st_nlink,
        share.users.to_guest(status.st_uid),
        share.groups.to_guest(status.st_gid),
        status.st_rdev & 0xFFFFFFFF,
        status.st_blksize or 4096,
        0,
    )


def _entry(mount: Mount, found: tuple[Node, os.stat_result]) -> bytes:
    """Tell the guest of a file that is held for it."""
    node, status = found
    seconds, nanoseconds = mount.valid
    number = mount.hold(node)
    return ENTRY_OUT.pack(number, 0, seconds, seconds, nanoseconds, nanoseconds) + _attributes(mount, status)


# -- finding


def lookup(mount: Mount, request: Request) -> bytes:
    """Find a name."""
    return _entry(mount, mount.share.look_up(mount.node(request.node), request.string()))


def forget(mount: Mount, request: Request) -> bytes:
    """Hold a node so many times less."""
    (count,) = request.take(FORGET_IN)
    mount.forget(request.node, count)
    return b""


def batch_forget(mount: Mount, request: Request) -> bytes:
    """The same for several."""
    count, _ = request.take(BATCH_FORGET_IN)
    for _ in range(FORGOTTEN.check(count)):
        mount.forget(*request.take(FORGET_ONE))
    return b""


# -- attributes


def _attributes_out(mount: Mount, status: os.stat_result) -> bytes:
    seconds, nanoseconds = mount.valid
    return ATTR_OUT.pack(seconds, nanoseconds, 0) + _attributes(mount, status)


def getattr_(mount: Mount, request: Request) -> bytes:
    """Return a file's status."""
    flags, _, handle = request.take(GETATTR_IN)
    file = mount.file(handle) if flags & GETATTR_FH else None
    return _attributes_out(mount, mount.share.stat(mount.node(request.node), file))


def setattr_(mount: Mount, request: Request) -> bytes:
    """Change what ``valid`` names."""
    valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = request.take(SETATTR_IN)
    node = mount.node(request.node)
    file = mount.file(handle) if valid & FATTR_FH else None

    def time(changed: int, now: int, seconds: int, nanoseconds: int) -> Time:
        if not valid & changed:
            return KEEP
        if valid & now:
            return NOW
        if nanoseconds >= _SECOND:
            raise error(errno.EINVAL)
        return seconds - (seconds >> 63 << 64), nanoseconds

    times = (
        time(FATTR_ATIME, FATTR_ATIME_NOW, atime, atime_ns),
        time(FATTR_MTIME, FATTR_MTIME_NOW, mtime, mtime_ns),
    )
    mount.share.change(
        node,
        file=file,
        mode=mode if valid & FATTR_MODE else None,
        user=uid if valid & FATTR_UID else UNCHANGED,
        group=gid if valid & FATTR_GID else UNCHANGED,
        size=size if valid & FATTR_SIZE else None,
        times=None if times == (KEEP, KEEP) else times,
    )
    return _attributes_out(mount, mount.share.stat(node, file))


def readlink(mount: Mount, request: Request) -> bytes:
    """Where a symbolic link leads to."""
    return mount.share.read_link(mount.node(request.node))


def statfs(mount: Mount, request: Request) -> bytes:
    """What the file system has."""
    found = mount.share.statvfs(mount.node(request.node))
    return STATFS_OUT.pack(
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
        found.f_bsize,
        found.f_namemax,
        found.f_frsize,
        0,
    )


# -- names


def symlink(mount: Mount, request: Request) -> bytes:
    """Make a symbolic link."""
    name, target = request.string(), request.string()
    owner = request.uid, request.gid
    return _entry(mount, mount.share.make_link(mount.node(request.node), name, target, owner))


def mknod(mount: Mount, request: Request) -> bytes:
    """Make a file, pipe or socket."""
    mode, device, _, _ = request.take(MKNOD_IN)
    owner = request.uid, request.gid
    return _entry(mount, mount.share.make_node(mount.node(request.node), request.string(), mode, device, owner))


def mkdir(mount: Mount, request: Request) -> bytes:
    """Make a directory."""
    mode, _ = request.take(MKDIR_IN)
    owner = request.uid, request.gid
    return _entry(mount, mount.share.make_directory(mount.node(request.node), request.string(), mode, owner))


def unlink(mount: Mount, request: Request) -> bytes:
    """Remove a file's name."""
    mount.share.unlink(mount.node(request.node), request.string())
    return b""


def rmdir(mount: Mount, request: Request) -> bytes:
    """Remove a directory."""
    mount.share.remove_directory(mount.node(request.node), request.string())
    return b""


def _rename(mount: Mount, request: Request, target: int, flags: int) -> bytes:
    old, new = request.string(), request.string()
    mount.share.rename(mount.node(request.node), old, mount.node(target), new, flags)
    return b""


def rename(mount: Mount, request: Request) -> bytes:
    """Rename."""
    (target,) = request.take(RENAME_IN)
    return _rename(mount, request, target, 0)


def rename2(mount: Mount, request: Request) -> bytes:
    """Rename, with flags."""
    target, flags, _ = request.take(RENAME2_IN)
    return _rename(mount, request, target, flags)


def link(mount: Mount, request: Request) -> bytes:
    """Give a file another name."""
    (number,) = request.take(LINK_IN)
    node = mount.node(number)
    status = mount.share.link(node, mount.node(request.node), request.string())
    node.uses += 1
    return _entry(mount, (node, status))


# -- open files


def open_(mount: Mount, request: Request) -> bytes:
    """Open a file or a directory. O_APPEND is looked at with each write."""
    flags, _ = request.take(OPEN_IN)
    handle = mount.opened(mount.share.open(mount.node(request.node), flags & ~os.O_APPEND))
    return OPEN_OUT.pack(handle, 0, 0)


def create(mount: Mount, request: Request) -> bytes:
    """Make a file and open it."""
    flags, mode, _, _ = request.take(CREATE_IN)
    owner = request.uid, request.gid
    parent = mount.node(request.node)
    node, status, file = mount.share.create(parent, request.string(), flags & ~os.O_APPEND, mode, owner)
    return _entry(mount, (node, status)) + OPEN_OUT.pack(mount.opened(file), 0, 0)


def release(mount: Mount, request: Request) -> bytes:
    """Close an open file."""
    mount.release(request.take(RELEASE_IN)[0])
    return b""


def write(file: OpenFile, data: Sequence[memoryview], offset: int, flags: int, file_flags: int) -> int:
    """Write; behind the file's end if the guest has it open to append, whoever else appends."""
    append = file_flags & os.O_APPEND and not flags & WRITE_CACHE
    return file.append(data) if append else file.write(data, offset)


def fsync(mount: Mount, request: Request) -> bytes:
    """Keep what was written."""
    handle, flags, _ = request.take(FSYNC_IN)
    (os.fdatasync if flags & FSYNC_FDATASYNC else os.fsync)(mount.file(handle).fd)
    return b""


def syncfs(mount: Mount, request: Request) -> bytes:
    """Keep all that was written in the share's file system."""
    if not mount.share.read_only:
        mount.share.sync()
    return b""


def fallocate(mount: Mount, request: Request) -> bytes:
    """Allocate, punch or zero a range."""
    handle, offset, length, mode, _ = request.take(FALLOCATE_IN)
    syscalls.fallocate(mount.file(handle).fd, mode, checked_offset(offset), checked_offset(length))
    return b""


def lseek(mount: Mount, request: Request) -> bytes:
    """Find data or a hole."""
    handle, offset, whence, _ = request.take(LSEEK_IN)
    file = mount.file(handle)
    if whence not in (syscalls.SEEK_DATA, syscalls.SEEK_HOLE) or file.is_directory:
        raise error(errno.EINVAL)
    return LSEEK_OUT.pack(os.lseek(file.fd, checked_offset(offset), whence))


def copy_file_range(mount: Mount, request: Request) -> bytes:
    """Copy within the host."""
    source, at, _, target, to, length, flags = request.take(COPY_IN)
    if flags:
        raise error(errno.EINVAL)
    source_fd, target_fd = mount.file(source).fd, mount.file(target).fd
    length = min(length, _COPY_MOST)
    copied = os.copy_file_range(source_fd, target_fd, length, checked_offset(at), checked_offset(to))
    return WRITE_OUT.pack(copied, 0)


_COPY_MOST: Final = 1 << 26  # of one request: others wait for it


# -- directories


def _listed(mount: Mount, request: Request, room: int, *, plus: bool) -> bytes:
    handle, offset, size, *_ = request.take(READDIR_IN)
    file = mount.file(handle)
    share = mount.share
    room = min(size, room)
    device, own = file.node.identity
    parts: list[bytes] = []
    length = 0
    for entry in file.entries(offset):
        dots = entry.name in (b".", b"..")
        record = DIRENT.size + len(entry.name)
        padding = -record % 8
        needed = record + padding + (ENTRY_OUT.size + ATTR.size if plus else 0)
        if length + needed > room:
            break
        if plus:
            parts.append(_NO_NODE if dots else _noted(mount, file.node, entry.name))
        inode = own if entry.name == b".." and file.node is share.root else entry.inode
        number = share.unique_inode(device, inode)
        parts += (DIRENT.pack(number, entry.offset, len(entry.name), entry.type), entry.name, bytes(padding))
        length += needed
    return b"".join(parts)


def _noted(mount: Mount, parent: Node, name: bytes) -> bytes:
    """Tell of an entry's file; of none if it is gone meanwhile, or too many are known."""
    try:
        return _entry(mount, mount.share.note(parent, name))
    except OSError:
        return _NO_NODE


def readdir(mount: Mount, request: Request, room: int) -> bytes:
    """Return as many whole entries as fit."""
    return _listed(mount, request, room, plus=False)


def readdirplus(mount: Mount, request: Request, room: int) -> bytes:
    """The same, with what a look-up would say of each."""
    return _listed(mount, request, room, plus=True)


# -- extended attributes


def setxattr(mount: Mount, request: Request) -> bytes:
    """Set an extended attribute."""
    size, flags = request.take(SETXATTR_IN)
    name = request.string()
    mount.share.set_xattr(mount.node(request.node), name, request.data(XATTR.check(size)), flags)
    return b""


def _xattr(value: bytes, size: int) -> bytes:
    if size == 0:
        return XATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise error(errno.ERANGE)
    return value


def getxattr(mount: Mount, request: Request) -> bytes:
    """Return an extended attribute, or how long it is."""
    size, _ = request.take(GETXATTR_IN)
    return _xattr(mount.share.get_xattr(mount.node(request.node), request.string()), size)


def listxattr(mount: Mount, request: Request) -> bytes:
    """Return all their names, or how long that is."""
    size, _ = request.take(GETXATTR_IN)
    return _xattr(mount.share.list_xattrs(mount.node(request.node)), size)


def removexattr(mount: Mount, request: Request) -> bytes:
    """Remove an extended attribute."""
    mount.share.remove_xattr(mount.node(request.node), request.string())
    return b""


# -- the mount


def destroy(mount: Mount, request: Request) -> bytes:
    """The guest has unmounted it."""
    mount.reset()
    return b""


def interrupt(mount: Mount, request: Request) -> bytes:
    """Nothing waits here."""
    return b""


HANDLERS: Final[dict[int, Callable[[Mount, Request], bytes]]] = {
    Op.LOOKUP: lookup,
    Op.FORGET: forget,
    Op.BATCH_FORGET: batch_forget,
    Op.GETATTR: getattr_,
    Op.SETATTR: setattr_,
    Op.READLINK: readlink,
    Op.STATFS: statfs,
    Op.SYMLINK: symlink,
    Op.MKNOD: mknod,
    Op.MKDIR: mkdir,
    Op.UNLINK: unlink,
    Op.RMDIR: rmdir,
    Op.RENAME: rename,
    Op.RENAME2: rename2,
    Op.LINK: link,
    Op.OPEN: open_,
    Op.OPENDIR: open_,
    Op.CREATE: create,
    Op.RELEASE: release,
    Op.RELEASEDIR: release,
    Op.FSYNC: fsync,
    Op.FSYNCDIR: fsync,
    Op.SYNCFS: syncfs,
    Op.FALLOCATE: fallocate,
    Op.LSEEK: lseek,
    Op.COPY_FILE_RANGE: copy_file_range,
    Op.SETXATTR: setxattr,
    Op.GETXATTR: getxattr,
    Op.LISTXATTR: listxattr,
    Op.REMOVEXATTR: removexattr,
    Op.DESTROY: destroy,
    Op.INTERRUPT: interrupt,
}

SIZED_HANDLERS: Final[dict[int, Callable[[Mount, Request, int], bytes]]] = {
    Op.READDIR: readdir,
    Op.READDIRPLUS: readdirplus,
}
