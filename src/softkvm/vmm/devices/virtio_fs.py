# SPDX-License-Identifier: Apache-2.0
"""The file system device: FUSE's requests, each with room for its reply (VIRTIO 1.3, section 5.11).

Queue 0 has those that must not wait behind others (what is forgotten, interrupts), queue 1 the rest. There is no
notification queue and no DAX window.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from softkvm.vmm.fuse.session import ProtocolError, Session
from softkvm.vmm.share.share import Share
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_FS
from softkvm.vmm.virtio.queue import QueueError

TAG_SIZE: Final = 36
_CONFIG: Final = struct.Struct(f"<{TAG_SIZE}sI")  # tag, num_request_queues


class Fs(VirtioDevice):
    """Serves *share*, which the guest finds by *tag*, of 36 bytes at most."""

    type = VIRTIO_ID_FS
    name = "fs"
    queue_sizes = (128, 1024)
    pci_class = 0x018000  # mass storage, none of its kinds

    def __init__(self, share: Share, tag: str) -> None:
        super().__init__()
        self.session = Session(share)
        self.tag = tag
        name = tag.encode("utf-8", "surrogateescape")
        if len(name) > TAG_SIZE:
            raise ValueError(f"a tag of {len(name)} bytes")
        self.config = _CONFIG.pack(name, 1)

    def notified(self, index: int) -> None:
        """Serve what has been asked for."""
        queue = self.queues[index]
        handle = self.session.handle
        for chain in queue.drain():
            try:
                written = handle(chain.readable, chain.writable)
            except ProtocolError as error:
                raise QueueError(f"queue {index}: {error}") from None
            queue.push(chain, written)

    def reset(self) -> None:
        """The guest's mount is gone."""
        self.session.reset()

    def save(self) -> dict[str, Any]:
        """The session's state: which files the guest has, and which are open."""
        return self.session.save()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.session.restore(state)

    def close(self) -> None:
        """Close all files."""
        self.session.close()
