# SPDX-License-Identifier: Apache-2.0
"""A guest's end of a vsock device, packet by packet: a driver that does as it is told."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from softkvm.vmm.vsock.hub import Hub
from softkvm.vmm.vsock.packet import VIRTIO_VSOCK_TYPE_STREAM, Header

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


class _Echo:
    """What a responder knows of a connection."""

    def __init__(self, guest: Guest, key: tuple[int, int], kind: int) -> None:
        self.guest, self.kind = guest, kind
        self.host, self.port = key
        self.waiting: deque[tuple[bytes, int]] = deque()
        self.forwarded = self.sent = self.credit = 0
        self.ended = False

    def send(self, op: int, data: bytes = b"", flags: int = 0) -> None:
        """Send a packet of the connection's."""
        forwarded = self.forwarded & 0xFFFFFFFF
        self.guest.send(op, self.port, self.host, data, kind=self.kind, flags=flags, fwd_cnt=forwarded)

    def pump(self) -> None:
        """Send what there is credit for."""
        while self.waiting:
            data, flags = self.waiting[0]
            room = self.credit - self.sent
            if len(data) > room > 0:
                self.waiting[0] = data[room:], flags
                data, flags = data[:room], 0
            elif data and not room:
                return
            else:
                self.waiting.popleft()
            self.sent += len(data)
            self.forwarded += len(data)
            self.send(RW, data, flags)
        if self.ended:
            self.send(SHUTDOWN, flags=SEND)
            self.ended = False


class Responder:
    """A guest on a thread that answers as Linux does: accepts what comes to its ports, and echoes as credit allows."""

    def __init__(self, hub: Hub, ports: set[int], *, room: int = 4096) -> None:
        self.guest = Guest(hub, room=room)
        self.ports = ports
        self._echoes: dict[tuple[int, int], _Echo] = {}
        self._wake = threading.Event()
        self._end = False
        hub.wake = self._wake.set
        hub.wake_at = lambda seconds: None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            self._wake.wait()
            self._wake.clear()
            while (packet := self.guest.take()) is not None:
                self._answer(*packet)

    def _answer(self, header: Header, data: bytes) -> None:
        key = (header.src_port, header.dst_port)
        echo = self._echoes.get(key)
        if header.op == REQUEST:
            echo = self._echoes[key] = _Echo(self.guest, key, header.type)
        elif echo is None:
            return
        echo.credit = header.fwd_cnt + header.buf_alloc  # tests send less than wraps it
        if header.op == REQUEST:
            echo.send(RESPONSE if header.dst_port in self.ports else RST)
        elif header.op == RW:
            echo.waiting.append((data, header.flags))
        elif header.op == CREDIT_REQUEST:
            echo.send(CREDIT_UPDATE)
        elif header.op == SHUTDOWN and header.flags == RCV | SEND:
            del self._echoes[key]
            echo.send(RST)
            return
        elif header.op == SHUTDOWN and header.flags & SEND:
            echo.ended = True
        elif header.op == RST:
            del self._echoes[key]
            return
        echo.pump()

    def close(self) -> None:
        """End the thread."""
        self._end = True
        self._wake.set()
        self._thread.join()
