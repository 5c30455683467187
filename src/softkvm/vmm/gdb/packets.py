# SPDX-License-Identifier: Apache-2.0
"""Packets of the remote serial protocol: ``$data#checksum``, with acknowledgements or without.

Source: gdb's manual, E.1 (overview), E.11 (packet acknowledgment).
"""

from __future__ import annotations

from typing import Final

from softkvm.abi.sizes import Size

PACKET_BYTES: Final = 0x4000
PACKET: Final = Size(
    "bytes of a packet of gdb's",
    PACKET_BYTES,
    None,
    where=__name__,
    effect="the connection ends",
)
INTERRUPT: Final = b"\x03"
_ESCAPE, _ESCAPED = 0x7D, 0x20
_SPECIAL: Final = frozenset(b"#$*}")


class ProtocolError(Exception):
    """The other side does not speak the protocol; the message says where."""


def checksum(data: bytes) -> int:
    """Return the checksum of a packet's data."""
    return sum(data) & 0xFF


def frame(data: bytes) -> bytes:
    """Return the packet that has *data* (already escaped)."""
    return b"$%b#%02x" % (data, checksum(data))


def escape(data: bytes) -> bytes:
    """Return binary data as it goes into a packet."""
    if not _SPECIAL.intersection(data):
        return data
    out = bytearray()
    for byte in data:
        if byte in _SPECIAL:
            out.append(_ESCAPE)
            byte ^= _ESCAPED
        out.append(byte)
    return bytes(out)


def unescape(data: bytes) -> bytes:
    """Return the binary data that a packet has."""
    if _ESCAPE not in data:
        return data
    out = bytearray()
    escaped = False
    for byte in data:
        if escaped:
            out.append(byte ^ _ESCAPED)
        elif byte != _ESCAPE:
            out.append(byte)
        escaped = byte == _ESCAPE and not escaped
    return bytes(out)


class Decoder:
    """Takes bytes as they come, in any pieces, and gives packets, and the answers that they want.

    ``replies`` are acknowledgements to be sent, in their order; :attr:`repeat` says that the last packet has to be
    sent again.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self.acknowledge = True
        self.replies = bytearray()
        self.repeat = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the packets' data, and :data:`INTERRUPT` for each interrupt, that are complete with *data*.

        ProtocolError for a packet that is longer than :data:`PACKET_BYTES`.
        """
        self._data += data
        found = []
        while (packet := self._next()) is not None:
            found.append(packet)
        return found

    def _next(self) -> bytes | None:
        while self._data:
            first = self._data[0]
            if first == 3:
                del self._data[0]
                return INTERRUPT
            if first != ord("$"):  # an acknowledgement, or noise
                self.repeat |= first == ord("-") and self.acknowledge
                del self._data[0]
                continue
            end = self._data.find(b"#")
            if end < 0 or len(self._data) < end + 3:
                if not PACKET.allows((end if end >= 0 else len(self._data)) - 1):
                    raise ProtocolError(f"a packet of more than {PACKET_BYTES} bytes")
                return None
            packet, given = bytes(self._data[1:end]), bytes(self._data[end + 1 : end + 3])
            del self._data[: end + 3]
            if not PACKET.allows(len(packet)):
                raise ProtocolError(f"a packet of more than {PACKET_BYTES} bytes")
            try:
                right = int(given, 16) == checksum(packet)
            except ValueError:
                right = False
            if self.acknowledge:
                self.replies += b"+" if right else b"-"
                if not right:
                    continue
            return packet
        return None
