# SPDX-License-Identifier: Apache-2.0
"""What a guest's mount holds: files by node number, open files by handle."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

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

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """What the mount holds, as plain data."""
        tree = self.share.tree
        nodes = [[number, count, tree.save(tree.by_number[number])] for number, count in self._lookups.items()]
        files = [[handle, file.node.number, file.flags] for handle, file in self.files.items()]
        return {"agreed": self.agreed, "nodes": nodes, "files": files, "next_handle": self._next_handle}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state: files are found again by their paths; one that is gone stays, and is ESTALE."""
        self.reset()
        self.agreed = state["agreed"]
        tree = self.share.tree
        tree.reserve(number for number, _, _ in state["nodes"])
        for number, count, saved in state["nodes"]:
            tree.restore(saved, number).uses += count - 1
            self._lookups[number] = count
        for handle, number, flags in state["files"]:
            file = self.share.reopen(self.node(number), flags) if number in tree.by_number else None
            if file is not None:
                self.files[handle] = file
        self._next_handle = state["next_handle"]

    def reset(self) -> None:
        """Give back all."""
        self.agreed = False
        for handle in list(self.files):
            with contextlib.suppress(OSError):
                self.release(handle)
        self.files.clear()
        for number, count in list(self._lookups.items()):
            self.forget(number, count)
