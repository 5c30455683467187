# SPDX-License-Identifier: Apache-2.0
"""A guest's end of a vsock device, packet by packet: a driver that does as it is told."""

from __future__ import annotations

import socket
import threading
from typing import Final

from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.packet import (
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_TYPE_STREAM,
    Header,
)

CID: Final = 3
HOST: Final = 2
BUF_ALLOC: Final = 1 << 16

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
STREAM, SEQPACKET = 1, 2
RCV, SEND = 1, 2
EOM, EOR = 1, 2


class Clock:
    """A clock that is told how late it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class Guest:
    """Sends packets to a hub and takes those that the hub sends."""

    def __init__(self, hub: Hub, *, room: int = 4096) -> None:
        self.hub = hub
        self.room = room
        self.fwd_cnt = 0
        self.buf_alloc = BUF_ALLOC

    def send(
        self,
        op: int,
        guest: int,
        host: int,
        data: bytes = b"",
        *,
        kind: int = VIRTIO_VSOCK_TYPE_STREAM,
        flags: int = 0,
        buf_alloc: int | None = None,
        fwd_cnt: int | None = None,
        src_cid: int = CID,
        dst_cid: int = HOST,
        length: int | None = None,
    ) -> None:
        """Send one packet from the guest's port to the host's."""
        header = Header(
            src_cid,
            dst_cid,
            guest,
            host,
            len(data) if length is None else length,
            kind,
            op,
            flags,
            self.buf_alloc if buf_alloc is None else buf_alloc,
            self.fwd_cnt if fwd_cnt is None else fwd_cnt,
        )
        self.hub.receive(header, data)

    def take(self) -> tuple[Header, bytes] | None:
        """Take the hub's next packet."""
        packet = self.hub.transmit(self.room)
        if packet is None:
            return None
        header = Header.unpack(packet[0])
        assert header.src_cid == HOST and header.dst_cid == self.hub.guest_cid and header.len == len(packet[1])
        return header, packet[1]

    def all(self) -> list[tuple[Header, bytes]]:
        """Take all that the hub has to send."""
        found = []
        while (packet := self.take()) is not None:
            found.append(packet)
            assert len(found) < 10_000
        return found

    def ops(self) -> list[int]:
        """Take all; return the operations."""
        return [header.op for header, _ in self.all()]


class Responder:
    """A guest on a thread that answers as Linux does: accepts what comes to its ports, and echoes or collects."""

    def __init__(self, hub: Hub, ports: set[int], *, echo: bool = True, room: int = 4096) -> None:
        self.guest = Guest(hub, room=room)
        self.ports = ports
        self.echo = echo
        self.received: dict[tuple[int, int], bytearray] = {}
        self.shutdowns: list[int] = []
        self._forwarded: dict[tuple[int, int], int] = {}
        self._wake = threading.Event()
        self._end = False
        hub.wake = self._wake.set
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            self._wake.wait()
            self._wake.clear()
            while (packet := self.guest.take()) is not None:
                self._answer(*packet)

    def _answer(self, header: Header, data: bytes) -> None:
        host, port, kind = header.src_port, header.dst_port, header.type
        key = (host, port)
        if header.op == VIRTIO_VSOCK_OP_REQUEST:
            known = port in self.ports
            self.guest.send(VIRTIO_VSOCK_OP_RESPONSE if known else VIRTIO_VSOCK_OP_RST, port, host, kind=kind)
            self._forwarded[key] = 0
        elif header.op == VIRTIO_VSOCK_OP_RW:
            self._forwarded[key] = self._forwarded.get(key, 0) + len(data)
            self.received.setdefault(key, bytearray()).extend(data)
            self.guest.send(
                VIRTIO_VSOCK_OP_RW if self.echo else VIRTIO_VSOCK_OP_CREDIT_UPDATE,
                port,
                host,
                data if self.echo else b"",
                kind=kind,
                flags=header.flags if self.echo else 0,
                fwd_cnt=self._forwarded[key] & 0xFFFFFFFF,
            )
        elif header.op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self.shutdowns.append(header.flags)
            if header.flags == 3:
                self.guest.send(VIRTIO_VSOCK_OP_RST, port, host, kind=kind)
            elif header.flags & SEND:
                self.guest.send(
                    VIRTIO_VSOCK_OP_SHUTDOWN, port, host, kind=kind, flags=SEND, fwd_cnt=self._forwarded[key]
                )

    def close(self) -> None:
        """End the thread."""
        self._end = True
        self._wake.set()
        self._thread.join()


KINDS: Final = {socket.SOCK_STREAM: STREAM, socket.SOCK_SEQPACKET: SEQPACKET}
