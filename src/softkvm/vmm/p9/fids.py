# SPDX-License-Identifier: Apache-2.0
"""What a client's numbers (fids) stand for: files, open files, extended attributes."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.p9.protocol import NOFID
from softkvm.vmm.share.files import OpenFile
from softkvm.vmm.share.share import Share, error
from softkvm.vmm.share.tree import Node

FIDS: Final = Size("fids of a 9p client", 1 << 18, errno.EMFILE, giver="guest", effect="EMFILE", where=__name__)


@dataclass(slots=True, eq=False)
class XattrRead:
    """An extended attribute's value, or the list of all names, as it was when it was asked for."""

    value: bytes


@dataclass(slots=True, eq=False)
class XattrWrite:
    """An extended attribute that is set when the fid is clunked, if all of its *size* bytes have come."""

    name: bytes
    size: int
    flags: int
    value: bytearray


@dataclass(slots=True, eq=False)
class Fid:
    """A client's name for *node*, which it holds; *uid* is whose it is, *top* where it was attached."""

    node: Node
    uid: int
    top: Node
    file: OpenFile | None = None
    xattr: XattrRead | XattrWrite | None = None


class Fids:
    """The fids of a session."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._fids: dict[int, Fid] = {}

    def __len__(self) -> int:
        return len(self._fids)

    def items(self) -> list[tuple[int, Fid]]:
        """All of them."""
        return list(self._fids.items())

    def get(self, number: int) -> Fid:
        """Return a fid; EBADF if the client has not got it."""
        fid = self._fids.get(number)
        if fid is None:
            raise error(errno.EBADF)
        return fid

    def get_open(self, number: int) -> tuple[Fid, OpenFile]:
        """Return a fid and its open file; EBADF if it isn't open."""
        fid = self.get(number)
        if fid.file is None:
            raise error(errno.EBADF)
        return fid, fid.file

    def expect_free(self, number: int) -> None:
        """EBADF if *number* cannot be a new fid, EMFILE if there are too many."""
        if number == NOFID or number in self._fids:
            raise error(errno.EBADF)
        FIDS.check(len(self._fids) + 1)

    def add(self, number: int, fid: Fid) -> None:
        """Add a fid, whose node is held for it."""
        self._fids[number] = fid

    def point(self, fid: Fid, node: Node) -> None:
        """Let a fid stand for another node, which is held for it."""
        before, fid.node = fid.node, node
        self._share.tree.release(before)

    def clunk(self, number: int) -> None:
        """Give a fid up, whatever comes of that; OSError if what was written through it could not be kept."""
        fid = self.get(number)
        del self._fids[number]
        try:
            if isinstance(fid.xattr, XattrWrite):
                self._set_xattr(fid, fid.xattr)
            if fid.file is not None:
                self._share.close_file(fid.file)
        finally:
            self._share.tree.release(fid.node)

    def _set_xattr(self, fid: Fid, xattr: XattrWrite) -> None:
        if len(xattr.value) != xattr.size:
            raise error(errno.EINVAL)
        if xattr.size == 0 and xattr.flags == os.XATTR_REPLACE:  # removexattr() of Linux's client comes as this
            self._share.remove_xattr(fid.node, xattr.name)
            return
        self._share.set_xattr(fid.node, xattr.name, bytes(xattr.value), xattr.flags)

    def save(self) -> list[dict[str, Any]]:
        """All fids, as plain data."""
        tree = self._share.tree
        saved = []
        for number, fid in self._fids.items():
            xattr: dict[str, Any] | None = None
            if isinstance(fid.xattr, XattrRead):
                xattr = {"value": fid.xattr.value}
            elif fid.xattr is not None:
                xattr = {name: getattr(fid.xattr, name) for name in ("name", "size", "flags")}
                xattr["value"] = bytes(fid.xattr.value)
            saved.append(
                {
                    "number": number,
                    "node": tree.save(fid.node),
                    "top": tree.save(fid.top),
                    "uid": fid.uid,
                    "open": None if fid.file is None else fid.file.flags,
                    "xattr": xattr,
                }
            )
        return saved

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take over saved fids. One whose file is gone stays, and is ESTALE; it is not open if it cannot be opened."""
        tree = self._share.tree
        FIDS.check(len(state))
        for saved in state:
            top = tree.restore(saved["top"])
            tree.release(top)
            fid = Fid(tree.restore(saved["node"]), saved["uid"], top)
            if saved["open"] is not None:
                fid.file = self._share.reopen(fid.node, saved["open"])
            xattr = saved["xattr"]
            if xattr is not None:
                value = xattr["value"]
                fid.xattr = (
                    XattrWrite(xattr["name"], xattr["size"], xattr["flags"], bytearray(value))
                    if "name" in xattr
                    else XattrRead(value)
                )
            self._fids[saved["number"]] = fid

    def close(self) -> None:
        """Give all up. Attributes that are only half there are dropped."""
        for number, fid in self.items():
            fid.xattr = None
            try:
                self.clunk(number)
            except OSError:
                pass  # nobody is there any more to be told


class ClientState:
    """What a session knows of its client."""

    def __init__(self, share: Share, msize: int) -> None:
        self.share = share
        self.fids = Fids(share)
        self.msize = msize
        """Bytes of the longest message that was agreed on."""
        self.agreed = False
        """Whether a version has been agreed on."""
