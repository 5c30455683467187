# SPDX-License-Identifier: Apache-2.0
"""A vsock packet's header (VIRTIO 1.3, section 5.10.6: ``struct virtio_vsock_hdr``), and who is who."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = HEADER.size

#: The host's own context ID (5.10.4).
VMADDR_CID_HOST: Final = 2
#: The least that a guest can have; 32 bits are all that there are yet.
CID_MIN, CID_MAX = 3, 0xFFFFFFFE
PORT_ANY: Final = 0xFFFFFFFF

# types (5.10.6)
VIRTIO_VSOCK_TYPE_STREAM: Final = 1
VIRTIO_VSOCK_TYPE_SEQPACKET: Final = 2

# operations
VIRTIO_VSOCK_OP_INVALID: Final = 0
VIRTIO_VSOCK_OP_REQUEST: Final = 1
VIRTIO_VSOCK_OP_RESPONSE: Final = 2
VIRTIO_VSOCK_OP_RST: Final = 3
VIRTIO_VSOCK_OP_SHUTDOWN: Final = 4
VIRTIO_VSOCK_OP_RW: Final = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE: Final = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST: Final = 7

# flags of SHUTDOWN (5.10.6.5): what its sender will do no more
VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: Final = 1
VIRTIO_VSOCK_SHUTDOWN_F_SEND: Final = 2
SHUTDOWN_BOTH: Final = VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE | VIRTIO_VSOCK_SHUTDOWN_F_SEND

# flags of RW in a seqpacket connection (5.10.6.6)
VIRTIO_VSOCK_SEQ_EOM: Final = 1
VIRTIO_VSOCK_SEQ_EOR: Final = 2

# features (5.10.3)
VIRTIO_VSOCK_F_STREAM: Final = 0
VIRTIO_VSOCK_F_SEQPACKET: Final = 1
VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: Final = 2

# events (5.10.6.7)
VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: Final = 0

TYPES: Final[dict[int, int]] = {
    socket.SOCK_STREAM: VIRTIO_VSOCK_TYPE_STREAM,
    socket.SOCK_SEQPACKET: VIRTIO_VSOCK_TYPE_SEQPACKET,
}
"""A packet's type by that of the sockets."""

MAX_PACKET_BYTES: Final = 64 << 10
"""Most bytes of data that we put into one packet."""


class Header(NamedTuple):
    """The fields of ``struct virtio_vsock_hdr``."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Return the header that *data* is."""
        return cls._make(HEADER.unpack(data))
