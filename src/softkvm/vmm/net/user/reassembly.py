# SPDX-License-Identifier: Apache-2.0
"""IPv4 packets that come in fragments, put together (RFC 791, 3.2; RFC 815's holes, RFC 5722's refusal of overlaps)."""

from __future__ import annotations

from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.net.link import Frame
from softkvm.vmm.net.wire import ETHERNET, Packet, ipv4

PACKETS: Final = Size(
    "IPv4 packets that a user-mode network puts together at a time", 16, None, giver="guest", effect="the oldest goes",
    where=__name__,
)  # fmt: skip
PIECES: Final = Size(
    "fragments of an IPv4 packet", 64, None, giver="guest", effect="the packet is dropped", where=__name__
)
BYTES_MAX: Final = 65535 - 20
TIME_S: Final = 15.0


class _Parts:
    __slots__ = ("pieces", "since", "size")

    def __init__(self, since: float) -> None:
        self.since = since
        self.pieces: dict[int, bytes] = {}
        self.size: int | None = None


class Reassembly:
    """Packets in the making."""

    def __init__(self) -> None:
        self._parts: dict[tuple[bytes, bytes, int, int], _Parts] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def clear(self) -> None:
        """Forget them."""
        self._parts.clear()

    def add(self, packet: Packet, identification: int, fragment: int, now: float) -> Packet | None:
        """Take a fragment that comes *now*; return the packet if it was the last that was missing."""
        key = (packet.source, packet.destination, packet.protocol, identification)
        for other in [other for other, parts in self._parts.items() if now - parts.since > TIME_S]:
            del self._parts[other]
        at, more = (fragment & 0x1FFF) * 8, bool(fragment & 0x2000)
        data = packet.payload()
        if not data or at + len(data) > BYTES_MAX or (more and len(data) % 8):
            self._parts.pop(key, None)
            return None
        parts = self._parts.get(key)
        if parts is None:
            if not PACKETS.allows(len(self._parts) + 1):
                del self._parts[next(iter(self._parts))]
            parts = self._parts[key] = _Parts(now)
        if parts.pieces.get(at) == data:
            return None  # the same once more
        end = at + len(data)
        overlaps = any(at < start + len(piece) and start < end for start, piece in parts.pieces.items())
        wrong_end = not more and parts.size not in (None, end)
        if overlaps or wrong_end or not PIECES.allows(len(parts.pieces) + 1):
            del self._parts[key]
            return None
        parts.pieces[at] = data
        if not more:
            parts.size = end
        if parts.size is None or sum(map(len, parts.pieces.values())) != parts.size:
            return None
        del self._parts[key]
        whole = b"".join(parts.pieces[start] for start in sorted(parts.pieces))
        header = ipv4(packet.source, packet.destination, packet.protocol, len(whole))
        frame = Frame([memoryview(packet.frame.head[:ETHERNET] + header + whole)])
        start = ETHERNET + len(header)
        return Packet(frame, packet.source, packet.destination, packet.protocol, start, start + len(whole))
