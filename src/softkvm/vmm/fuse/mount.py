# SPDX-License-Identifier: Apache-2.0
"""What a guest's mount holds: files by node number, open files by handle."""

from __future__ import annotations

import contextlib
import errno

from softkvm.vmm.fuse.protocol import ROOT_ID
from softkvm.vmm.share.files import OpenFile
from softkvm.vmm.share.share import Share, error
from softkvm.vmm.share.tree import Node


class Mount:
    """The state of a mount of *share*; a guest keeps names and attributes for *valid_s* seconds without asking."""

    def __init__(self, share: Share, valid_s: float = 1.0) -> None:
        self.share = share
        self.agreed = False
        self.valid = int(valid_s), int(valid_s % 1 * 1e9)
        """Seconds and nanoseconds."""
        self.files: dict[int, OpenFile] = {}
        self._lookups: dict[int, int] = {}  # by node number: how often the guest holds it
        self._next_handle = 1

    # -- nodes

    def node(self, number: int) -> Node:
        """Return the file that the guest calls *number*; ESTALE if there is none."""
        if number != ROOT_ID and number not in self._lookups:
            raise error(errno.ESTALE)
        return self.share.tree.by_number[number]

    def hold(self, node: Node) -> int:
        """Note that the guest holds a node, which is held for it, once more; return its number."""
        self._lookups[node.number] = self._lookups.get(node.number, 0) + 1
        return node.number

    def forget(self, number: int, count: int) -> None:
        """The guest holds a node *count* times less."""
        held = self._lookups.get(number, 0)
        count = min(count, held)
        if count == 0:
            return
        if count == held:
            del self._lookups[number]
        else:
            self._lookups[number] = held - count
        self.share.tree.release(self.share.tree.by_number[number], count)

    # -- open files

    def file(self, handle: int) -> OpenFile:
        """Return an open file; EBADF if there is none."""
        file = self.files.get(handle)
        if file is None:
            raise error(errno.EBADF)
        return file

    def opened(self, file: OpenFile) -> int:
        """Give an open file its handle."""
        handle = self._next_handle
        self._next_handle += 1
        self.files[handle] = file
        return handle

    def release(self, handle: int) -> None:
        """Close an open file."""
        self.share.close_file(self.file(handle))
        del self.files[handle]

    def reset(self) -> None:
        """Give back all."""
        self.agreed = False
        for handle in list(self.files):
            with contextlib.suppress(OSError):
                self.release(handle)
        self.files.clear()
        for number, count in list(self._lookups.items()):
            self.forget(number, count)
