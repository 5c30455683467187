# SPDX-License-Identifier: Apache-2.0
"""The file system device: FUSE's requests, each with room for its reply (VIRTIO 1.3, section 5.11).

Queue 0 has those that must not wait behind others (what is forgotten, interrupts), queue 1 the rest. There is no
notification queue and no DAX window.
"""

from __future__ import annotations

import struct
from typing import Final

from softkvm.vmm.devices.virtio_share import ShareDevice
from softkvm.vmm.fuse.session import ProtocolError, Session
from softkvm.vmm.share.share import Share
from softkvm.vmm.virtio.ids import VIRTIO_ID_FS

TAG_SIZE: Final = 36
_CONFIG: Final = struct.Struct(f"<{TAG_SIZE}sI")  # tag, num_request_queues


class Fs(ShareDevice[Session]):
    """Serves *share*, which the guest finds by *tag*, of 36 bytes at most."""

    type = VIRTIO_ID_FS
    name = "fs"
    queue_sizes = (128, 1024)

    def __init__(self, share: Share, tag: str) -> None:
        super().__init__(Session(share), ProtocolError, tag)
        name = tag.encode("utf-8", "surrogateescape")
        if len(name) > TAG_SIZE:
            raise ValueError(f"a tag of {len(name)} bytes")
        self.config = _CONFIG.pack(name, 1)
