# SPDX-License-Identifier: Apache-2.0
"""What a client asks for, one function a request: takes its body, returns the reply's.

Errors are OSErrors, whose errno the client gets, or BadMessage.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.p9.fids import ClientState, Fid, XattrRead, XattrWrite
from softkvm.vmm.p9.protocol import (
    AT_REMOVEDIR,
    ATTRIBUTES,
    COUNT,
    ENTRY,
    FS_MAGIC,
    GETATTR_BASIC,
    IO_HEADER,
    LOCK,
    LOCK_BLOCKED,
    LOCK_STATUS,
    LOCK_SUCCESS,
    LOCK_TYPES,
    MAX_WALK,
    QID,
    QT_DIR,
    QT_FILE,
    QT_SYMLINK,
    SETATTR_ATIME,
    SETATTR_ATIME_SET,
    SETATTR_CTIME,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    SETATTR_UID,
    STATFS,
    STRING,
    BadMessage,
    Body,
    T,
    host_flags,
    string,
)
from softkvm.vmm.share.locks import Range
from softkvm.vmm.share.owners import UNCHANGED
from softkvm.vmm.share.share import KEEP, NOW, XATTR, Share, Time, error
from softkvm.vmm.share.tree import Node

WALK: Final = Size("names of a 9p walk", MAX_WALK, errno.EINVAL, giver="guest", where=__name__)

_NUMBER: Final = struct.Struct("<I")
_TWO: Final = struct.Struct("<II")
_THREE: Final = struct.Struct("<III")
_GETATTR: Final = struct.Struct("<IQ")  # fid, request mask
_SETATTR: Final = struct.Struct("<IIIIIQqQqQ")  # fid, valid, mode, uid, gid, size, atime s, ns, mtime s, ns
_MKNOD: Final = struct.Struct("<IIII")  # mode, major, minor, gid
_XATTRCREATE: Final = struct.Struct("<QI")
_LOCK: Final = struct.Struct("<BIQQI")  # type, flags, start, length, proc_id
_READDIR: Final = struct.Struct("<IQI")

_QT: Final = {stat.S_IFDIR: QT_DIR, stat.S_IFLNK: QT_SYMLINK}


def qid(share: Share, status: os.stat_result) -> bytes:
    """Return what identifies a file: its type, a version that changes as it does and is not 0, its number.

    To Linux, version 0 means that a file must not be cached.
    """
    version = (status.st_mtime_ns ^ status.st_size << 8) & 0xFFFFFFFF
    path = share.unique_inode(status.st_dev, status.st_ino)
    return QID.pack(_QT.get(stat.S_IFMT(status.st_mode), QT_FILE), version or 1, path)


# -- finding


def attach(client: ClientState, body: Body) -> bytes:
    """``fid[4] afid[4] uname[s] aname[s] n_uname[4]``: stand for the share, or the directory *aname* in it."""
    number, _afid = body.take(_TWO)
    body.string()
    name = body.string()
    (uid,) = body.take(_NUMBER)
    body.end()
    client.fids.expect_free(number)
    share = client.share
    node, status = share.root, share.stat(share.root)
    node.uses += 1
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        try:
            below, status = share.look_up(node, part)
        finally:
            share.tree.release(node)
        node = below
    client.fids.add(number, Fid(node, uid, node))
    return qid(share, status)


def walk(client: ClientState, body: Body) -> bytes:
    """``fid[4] newfid[4] nwname[2] nwname*(wname[s])``: go down; the new fid is there if all names were found."""
    number, new_number = body.take(_TWO)
    (count,) = body.take(STRING)
    WALK.check(count)
    names = [body.string() for _ in range(count)]
    body.end()
    share, fids = client.share, client.fids
    fid = fids.get(number)
    if fid.file is not None and names:
        raise error(errno.EBUSY)
    if number != new_number:
        fids.expect_free(new_number)
    node = fid.node
    node.uses += 1
    qids: list[bytes] = []
    try:
        for name in names:
            before = node
            try:
                node, status = _step(share, fid, before, name)
            except OSError:
                if not qids:
                    raise
                return STRING.pack(len(qids)) + b"".join(qids)
            share.tree.release(before)
            qids.append(qid(share, status))
        if number == new_number:
            node.uses += 1
            fids.point(fid, node)
        else:
            node.uses += 1
            fids.add(new_number, Fid(node, fid.uid, fid.top))
    finally:
        share.tree.release(node)
    return STRING.pack(len(qids)) + b"".join(qids)


def _step(share: Share, fid: Fid, node: Node, name: bytes) -> tuple[Node, os.stat_result]:
    """Return the next file of a walk, held; above where the fid's client was attached there is nothing."""
    if name not in (b".", b".."):
        return share.look_up(node, name)
    if node.kind != stat.S_IFDIR:
        raise error(errno.ENOTDIR)
    if name == b".." and node is not fid.top and node.parent is not None:
        node = node.parent
    status = share.stat(node)
    node.uses += 1
    return node, status


def clunk(client: ClientState, body: Body) -> bytes:
    """``fid[4]``."""
    client.fids.clunk(_fid_only(body))
    return b""


def _fid_only(body: Body) -> int:
    (number,) = body.take(_NUMBER)
    body.end()
    return number


# -- opening, data


def _iounit_qid(client: ClientState, status: os.stat_result) -> bytes:
    return qid(client.share, status) + COUNT.pack(0)  # as much as a message takes


def lopen(client: ClientState, body: Body) -> bytes:
    """``fid[4] flags[4]``."""
    number, flags = body.take(_TWO)
    body.end()
    fid = client.fids.get(number)
    if fid.file is not None or fid.xattr is not None:
        raise error(errno.EBUSY)
    fid.file = client.share.open(fid.node, host_flags(flags))
    return _iounit_qid(client, client.share.stat(fid.node, fid.file))


def lcreate(client: ClientState, body: Body) -> bytes:
    """``fid[4] name[s] flags[4] mode[4] gid[4]``: the directory's fid becomes that of the new, open file."""
    (number,) = body.take(_NUMBER)
    name = body.string()
    flags, mode, gid = body.take(_THREE)
    body.end()
    fid = client.fids.get(number)
    if fid.file is not None or fid.xattr is not None:
        raise error(errno.EBUSY)
    node, status, file = client.share.create(fid.node, name, host_flags(flags), mode, (fid.uid, gid))
    client.fids.point(fid, node)
    fid.file = file
    return _iounit_qid(client, status)


def read(client: ClientState, number: int, into: Sequence[memoryview], offset: int) -> int:
    """Read a file, or an extended attribute; return how many bytes."""
    fid = client.fids.get(number)
    if isinstance(fid.xattr, XattrRead):
        data = fid.xattr.value[offset : offset + sum(map(len, into))]
        at = 0
        for segment in into:
            piece = data[at : at + len(segment)]
            segment[: len(piece)] = piece
            at += len(piece)
        return len(data)
    _, file = client.fids.get_open(number)
    return file.read(into, offset)


def write(client: ClientState, number: int, data: Sequence[memoryview], offset: int) -> int:
    """Write a file, or an extended attribute; return how many bytes."""
    fid = client.fids.get(number)
    if isinstance(fid.xattr, XattrWrite):
        xattr = fid.xattr
        size = sum(map(len, data))
        if offset != len(xattr.value) or offset + size > xattr.size:
            raise error(errno.ENOSPC)
        for piece in data:
            xattr.value += piece
        return size
    _, file = client.fids.get_open(number)
    return file.write(data, offset)


def read_directory(client: ClientState, body: Body, room: int) -> bytes:
    """``fid[4] offset[8] count[4]``: as many whole entries as fit."""
    number, offset, count = body.take(_READDIR)
    body.end()
    _, file = client.fids.get_open(number)
    room = min(count, room)
    share = client.share
    device, own = file.node.identity
    parts: list[bytes] = []
    length = 0
    for entry in file.entries(offset):
        size = ENTRY.size + len(entry.name)
        if length + size > room:
            break
        inode = entry.inode
        if entry.name == b".." and file.node is share.root:
            inode = own  # what is above is none of the guest's business
        kind = _QT.get(entry.type << 12, QT_FILE)
        number_of = QID.pack(kind, 1, share.unique_inode(device, inode))
        parts += (ENTRY.pack(number_of, entry.offset, entry.type, len(entry.name)), entry.name)
        length += size
    else:
        return COUNT.pack(length) + b"".join(parts)
    if not parts:
        raise error(errno.EINVAL)
    return COUNT.pack(length) + b"".join(parts)


def fsync(client: ClientState, body: Body) -> bytes:
    """``fid[4] datasync[4]``; an old client sends no second number."""
    (number,) = body.take(_NUMBER)
    try:
        (data_only,) = body.take(_NUMBER)
    except BadMessage:
        data_only = 0
    body.end()
    _, file = client.fids.get_open(number)
    (os.fdatasync if data_only else os.fsync)(file.fd)
    return b""


# -- attributes


def getattr_(client: ClientState, body: Body) -> bytes:
    """``fid[4] request_mask[8]``."""
    number, _mask = body.take(_GETATTR)
    body.end()
    fid = client.fids.get(number)
    share = client.share
    status = share.stat(fid.node, fid.file)
    block = status.st_blksize or 4096
    return ATTRIBUTES.pack(
        GETATTR_BASIC,
        qid(share, status),
        status.st_mode,
        share.users.to_guest(status.st_uid),
        share.groups.to_guest(status.st_gid),
        status.st_nlink,
        status.st_rdev,
        status.st_size,
        max((client.msize - IO_HEADER) // block * block, block),  # what programs read at a time
        status.st_blocks,
        *divmod(status.st_atime_ns, 10**9),
        *divmod(status.st_mtime_ns, 10**9),
        *divmod(status.st_ctime_ns, 10**9),
        0,
        0,
        0,
        0,
    )


def setattr_(client: ClientState, body: Body) -> bytes:
    """``fid[4] valid[4] mode[4] uid[4] gid[4] size[8] atime_sec[8] atime_nsec[8] mtime_sec[8] mtime_nsec[8]``."""
    number, valid, mode, uid, gid, size, atime, atime_ns, mtime, mtime_ns = body.take(_SETATTR)
    body.end()
    fid = client.fids.get(number)

    def time(changed: int, given: int, value: Time) -> Time:
        if not valid & changed:
            return KEEP
        if not valid & given:
            return NOW
        if value[1] >= 10**9:
            raise error(errno.EINVAL)
        return value

    times = (
        time(SETATTR_ATIME, SETATTR_ATIME_SET, (atime, atime_ns)),
        time(SETATTR_MTIME, SETATTR_MTIME_SET, (mtime, mtime_ns)),
    )
    client.share.change(
        fid.node,
        file=fid.file,
        mode=mode if valid & SETATTR_MODE else None,
        user=uid if valid & SETATTR_UID else UNCHANGED,
        group=gid if valid & SETATTR_GID else UNCHANGED,
        size=size if valid & SETATTR_SIZE else None,
        times=None if times == (KEEP, KEEP) else times,
        touch_ctime=valid == SETATTR_CTIME,
    )
    return b""


def statfs(client: ClientState, body: Body) -> bytes:
    """``fid[4]``."""
    fid = client.fids.get(_fid_only(body))
    found = client.share.statvfs(fid.node)
    return STATFS.pack(
        FS_MAGIC,
        found.f_frsize,
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
        found.f_fsid & (1 << 64) - 1,
        found.f_namemax,
    )


def readlink(client: ClientState, body: Body) -> bytes:
    """``fid[4]``."""
    return string(client.share.read_link(client.fids.get(_fid_only(body)).node))


def xattrwalk(client: ClientState, body: Body) -> bytes:
    """``fid[4] newfid[4] name[s]``: the new fid reads the attribute, or, without a name, the list of all."""
    number, new_number = body.take(_TWO)
    name = body.string()
    body.end()
    fid = client.fids.get(number)
    client.fids.expect_free(new_number)
    share = client.share
    value = share.get_xattr(fid.node, name) if name else share.list_xattrs(fid.node)
    fid.node.uses += 1
    client.fids.add(new_number, Fid(fid.node, fid.uid, fid.top, xattr=XattrRead(value)))
    return struct.pack("<Q", len(value))


def xattrcreate(client: ClientState, body: Body) -> bytes:
    """``fid[4] name[s] attr_size[8] flags[4]``: the fid writes the attribute, which is set when it is clunked."""
    (number,) = body.take(_NUMBER)
    name = body.string()
    size, flags = body.take(_XATTRCREATE)
    body.end()
    fid = client.fids.get(number)
    if fid.file is not None or fid.xattr is not None:
        raise error(errno.EBUSY)
    if client.share.read_only:
        raise error(errno.EROFS)
    fid.xattr = XattrWrite(name, XATTR.check(size), flags, bytearray())
    return b""


# -- names


def _in_directory(client: ClientState, body: Body) -> tuple[Fid, bytes]:
    (number,) = body.take(_NUMBER)
    return client.fids.get(number), body.string()


def _made(client: ClientState, made: tuple[Node, os.stat_result]) -> bytes:
    node, status = made
    client.share.tree.release(node)
    return qid(client.share, status)


def symlink(client: ClientState, body: Body) -> bytes:
    """``fid[4] name[s] symtgt[s] gid[4]``."""
    fid, name = _in_directory(client, body)
    target = body.string()
    (gid,) = body.take(_NUMBER)
    body.end()
    return _made(client, client.share.make_link(fid.node, name, target, (fid.uid, gid)))


def mknod(client: ClientState, body: Body) -> bytes:
    """``dfid[4] name[s] mode[4] major[4] minor[4] gid[4]``."""
    fid, name = _in_directory(client, body)
    mode, major, minor, gid = body.take(_MKNOD)
    body.end()
    device = 1 if major or minor else 0  # which one it would be does not matter
    return _made(client, client.share.make_node(fid.node, name, mode, device, (fid.uid, gid)))


def mkdir(client: ClientState, body: Body) -> bytes:
    """``dfid[4] name[s] mode[4] gid[4]``."""
    fid, name = _in_directory(client, body)
    mode, gid = body.take(_TWO)
    body.end()
    return _made(client, client.share.make_directory(fid.node, name, mode, (fid.uid, gid)))


def link(client: ClientState, body: Body) -> bytes:
    """``dfid[4] fid[4] name[s]``."""
    directory, number = body.take(_TWO)
    name = body.string()
    body.end()
    client.share.link(client.fids.get(number).node, client.fids.get(directory).node, name)
    return b""


def rename(client: ClientState, body: Body) -> bytes:
    """``fid[4] dfid[4] name[s]``."""
    number, directory = body.take(_TWO)
    name = body.string()
    body.end()
    node = client.fids.get(number).node
    if node.parent is None or node.name is None:
        raise error(errno.EBUSY if node is client.share.root else errno.ESTALE)
    client.share.rename(node.parent, node.name, client.fids.get(directory).node, name)
    return b""


def renameat(client: ClientState, body: Body) -> bytes:
    """``olddirfid[4] oldname[s] newdirfid[4] newname[s]``."""
    old_fid, old = _in_directory(client, body)
    new_fid, new = _in_directory(client, body)
    body.end()
    client.share.rename(old_fid.node, old, new_fid.node, new)
    return b""


def unlinkat(client: ClientState, body: Body) -> bytes:
    """``dirfd[4] name[s] flags[4]``."""
    fid, name = _in_directory(client, body)
    (flags,) = body.take(_NUMBER)
    body.end()
    if flags & ~AT_REMOVEDIR:
        raise error(errno.EINVAL)
    (client.share.remove_directory if flags else client.share.unlink)(fid.node, name)
    return b""


def remove(client: ClientState, body: Body) -> bytes:
    """``fid[4]``: remove the file and clunk the fid, which happens in any case."""
    number = _fid_only(body)
    fid = client.fids.get(number)
    try:
        client.share.remove(fid.node)
    finally:
        client.fids.clunk(number)
    return b""


# -- locks


def lock(client: ClientState, body: Body) -> bytes:
    """``fid[4] type[1] flags[4] start[8] length[8] proc_id[4] client_id[s]``.

    Nobody waits here: a client that wants to is told that it is blocked, and asks again.
    """
    (number,) = body.take(_NUMBER)
    kind, _flags, start, length, process = body.take(_LOCK)
    name = body.string()
    body.end()
    _, file = client.fids.get_open(number)
    if kind not in LOCK_TYPES:
        raise error(errno.EINVAL)
    done = client.share.locks.set(file, (name, process), Range(kind, start, length))
    return LOCK_STATUS.pack(LOCK_SUCCESS if done else LOCK_BLOCKED)


def getlock(client: ClientState, body: Body) -> bytes:
    """``fid[4] type[1] start[8] length[8] proc_id[4] client_id[s]``."""
    (number,) = body.take(_NUMBER)
    kind, start, length, process = body.take(LOCK)
    name = body.string()
    body.end()
    _, file = client.fids.get_open(number)
    if kind not in LOCK_TYPES:
        raise error(errno.EINVAL)
    found = client.share.locks.get(file, (name, process), Range(kind, start, length, process))
    return LOCK.pack(found.kind, found.start, found.length, found.pid & 0xFFFFFFFF) + string(name)


def flush(client: ClientState, body: Body) -> bytes:
    """``oldtag[2]``: that request has been answered already."""
    body.take(STRING)
    body.end()
    return b""


HANDLERS: Final[dict[int, Callable[[ClientState, Body], bytes]]] = {
    T.ATTACH: attach,
    T.WALK: walk,
    T.CLUNK: clunk,
    T.LOPEN: lopen,
    T.LCREATE: lcreate,
    T.FSYNC: fsync,
    T.GETATTR: getattr_,
    T.SETATTR: setattr_,
    T.STATFS: statfs,
    T.READLINK: readlink,
    T.XATTRWALK: xattrwalk,
    T.XATTRCREATE: xattrcreate,
    T.SYMLINK: symlink,
    T.MKNOD: mknod,
    T.MKDIR: mkdir,
    T.LINK: link,
    T.RENAME: rename,
    T.RENAMEAT: renameat,
    T.UNLINKAT: unlinkat,
    T.REMOVE: remove,
    T.LOCK: lock,
    T.GETLOCK: getlock,
    T.FLUSH: flush,
}
