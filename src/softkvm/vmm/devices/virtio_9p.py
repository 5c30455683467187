# SPDX-License-Identifier: Apache-2.0
"""The 9P transport: one queue of requests, each with room for its reply (VIRTIO 1.3, section 5.14; 9P2000.L)."""

from __future__ import annotations

import struct
from typing import Any

from softkvm.vmm.p9.session import ProtocolError, Session
from softkvm.vmm.share.share import Share
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_9P, bit
from softkvm.vmm.virtio.queue import QueueError

VIRTIO_9P_MOUNT_TAG = 0


class P9(VirtioDevice):
    """Serves *share*, which the guest finds by *tag*."""

    type = VIRTIO_ID_9P
    name = "9p"
    features = bit(VIRTIO_9P_MOUNT_TAG)
    queue_sizes = (128,)
    pci_class = 0x018000  # mass storage, none of its kinds

    def __init__(self, share: Share, tag: str) -> None:
        super().__init__()
        self.session = Session(share)
        self.tag = tag
        name = tag.encode("utf-8", "surrogateescape")
        self.config = struct.pack("<H", len(name)) + name

    def notified(self, index: int) -> None:
        """Serve what has been asked for."""
        queue = self.queues[0]
        handle = self.session.handle
        for chain in queue.drain():
            try:
                written = handle(chain.readable, chain.writable)
            except ProtocolError as error:
                raise QueueError(f"queue 0: {error}") from None
            queue.push(chain, written)

    def reset(self) -> None:
        """The client is gone."""
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
