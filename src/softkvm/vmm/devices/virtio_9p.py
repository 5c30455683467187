# SPDX-License-Identifier: Apache-2.0
"""The 9P transport: one queue of requests, each with room for its reply (VIRTIO 1.3, section 5.14; 9P2000.L)."""

from __future__ import annotations

import struct

from softkvm.vmm.devices.virtio_share import ShareDevice
from softkvm.vmm.p9.session import ProtocolError, Session
from softkvm.vmm.share.share import Share
from softkvm.vmm.virtio.ids import VIRTIO_ID_9P, bit

VIRTIO_9P_MOUNT_TAG = 0


class P9(ShareDevice[Session]):
    """Serves *share*, which the guest finds by *tag*."""

    type = VIRTIO_ID_9P
    name = "9p"
    features = bit(VIRTIO_9P_MOUNT_TAG)
    queue_sizes = (128,)

    def __init__(self, share: Share, tag: str) -> None:
        super().__init__(Session(share), ProtocolError, tag)
        name = tag.encode("utf-8", "surrogateescape")
        self.config = struct.pack("<H", len(name)) + name
