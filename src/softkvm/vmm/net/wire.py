# SPDX-License-Identifier: Apache-2.0
"""Headers of Ethernet, IP, TCP and UDP: reading those that come, and making ours.

Sources: RFC 894 and 2464 (Ethernet), 791 (IPv4), 8200 (IPv6), 9293 (TCP), 768 (UDP), 1071 (the checksum).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from softkvm.vmm.net.link import Data, Frame

ETHERNET: Final = 14
BROADCAST: Final = b"\xff" * 6

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806
ETHERTYPE_IPV6: Final = 0x86DD

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
UDP_HEADER: Final = 8
TTL: Final = 64

_DONT_FRAGMENT: Final = 0x4000
_MORE_FRAGMENTS: Final = 0x2000

_IPV4: Final = struct.Struct(">BBHHHBBH4s4s")
_IPV6: Final = struct.Struct(">IHBB16s16s")
_UDP: Final = struct.Struct(">HHHH")
_TCP4: Final = struct.Struct(">16sH6sH8s4sIIHHHH")
_TCP6: Final = struct.Struct(">18sH34s4sIIHHHH")

TCP_START4: Final = ETHERNET + IPV4_HEADER
TCP_START6: Final = ETHERNET + IPV6_HEADER
TCP_HEADER: Final = 20
TCP_CHECKSUM: Final = 16
UDP_CHECKSUM: Final = 6

IPAddress = IPv4Address | IPv6Address


def total(data: Data) -> int:
    """Return the one's complement sum of the 16-bit words of *data*, which a zero byte is added to if it is odd."""
    # Words of base 65,536 add up to the same modulo 65,535 as the number that they are: no loop over them.
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    return value % 0xFFFF or (0xFFFF if value else 0)


def fold(value: int) -> int:
    """Return a sum of words as one word, with the carries added."""
    while value > 0xFFFF:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def checksum(data: Data, start: int = 0) -> int:
    """Return the checksum of *data*, with *start* added to the sum."""
    return fold(total(data) + start) ^ 0xFFFF


def pseudo_sum(source: bytes, destination: bytes, protocol: int, size: int) -> int:
    """Return the sum of the pseudo header of TCP and UDP (RFC 9293, 3.1; RFC 8200, 8.1)."""
    return fold(total(source) + total(destination) + protocol + (size & 0xFFFF) + (size >> 16))


def ethernet(destination: bytes, source: bytes, ethertype: int) -> bytes:
    """Return a frame's header."""
    return destination + source + ethertype.to_bytes(2, "big")


def ipv4(
    source: bytes,
    destination: bytes,
    protocol: int,
    size: int,
    *,
    identification: int = 0,
    fragment: int = _DONT_FRAGMENT,
) -> bytes:
    """Return the header of a packet with *size* bytes behind it; *fragment* is flags and offset."""
    fields = (0x45, 0, IPV4_HEADER + size, identification, fragment, TTL, protocol)
    plain = _IPV4.pack(*fields, 0, source, destination)
    return _IPV4.pack(*fields, checksum(plain), source, destination)


def ipv6(source: bytes, destination: bytes, protocol: int, size: int, *, hops: int = TTL) -> bytes:
    """Return the header of a packet with *size* bytes behind it."""
    return _IPV6.pack(6 << 28, size, protocol, hops, source, destination)


def udp(source: bytes, source_port: int, destination: bytes, destination_port: int, data: Data) -> bytes:
    """Return a datagram with its header; its checksum is whole."""
    size = UDP_HEADER + len(data)
    plain = _UDP.pack(source_port, destination_port, size, 0)
    whole = checksum(b"".join((plain, data)), pseudo_sum(source, destination, UDP, size)) or 0xFFFF
    return b"".join((_UDP.pack(source_port, destination_port, size, whole), data))


class Path:
    """One way to a peer: addresses of both levels. Makes headers of TCP, with the pseudo header's sum alone."""

    __slots__ = ("_addresses", "_base", "_prefix", "_pseudo", "destination", "mac", "source", "version")

    def __init__(self, mac: bytes, own_mac: bytes, source: bytes, destination: bytes) -> None:
        self.mac = mac
        self.source = source
        self.destination = destination
        self.version = 4 if len(source) == 4 else 6
        addresses = source + destination
        self._pseudo = total(addresses) + TCP
        if self.version == 4:
            self._prefix = ethernet(mac, own_mac, ETHERTYPE_IPV4) + b"\x45\x00"
            middle = struct.pack(">HHBB", 0, _DONT_FRAGMENT, TTL, TCP)
            self._addresses = addresses
            self._base = 0x4500 + total(middle) + total(addresses)
        else:
            self._prefix = ethernet(mac, own_mac, ETHERTYPE_IPV6) + b"\x60\x00\x00\x00"
            self._addresses = bytes((TCP, TTL)) + addresses
            self._base = 0

    def tcp(
        self, ports: bytes, sequence: int, acknowledgement: int, bits: int, window: int, options: bytes, size: int
    ) -> bytes:
        """Return all headers of a segment with *size* bytes of data; *bits* are TCP's flags."""
        length = TCP_HEADER + len(options) + size
        bits |= (TCP_HEADER + len(options)) << 10
        pseudo = self._pseudo + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        if self.version == 4:
            whole = IPV4_HEADER + length
            base = self._base + whole
            base = (base & 0xFFFF) + (base >> 16)
            base = (base & 0xFFFF) + (base >> 16)
            return _TCP4.pack(
                self._prefix, whole, b"\x00\x00\x40\x00\x40\x06", base ^ 0xFFFF, self._addresses, ports,
                sequence, acknowledgement, bits, window, pseudo, 0,
            ) + options  # fmt: skip
        return (
            _TCP6.pack(self._prefix, length, self._addresses, ports, sequence, acknowledgement, bits, window, pseudo, 0)
            + options
        )

    @property
    def tcp_start(self) -> int:
        """Where TCP's header begins in the frame."""
        return TCP_START4 if self.version == 4 else TCP_START6


class Packet:
    """An IP packet of the guest's: *start* to *end* of the frame lies behind the IP header."""

    __slots__ = ("destination", "end", "frame", "header_start", "mac", "protocol", "source", "start")

    def __init__(
        self,
        frame: Frame,
        source: bytes,
        destination: bytes,
        protocol: int,
        start: int,
        end: int,
        header_start: int = ETHERNET,
    ) -> None:
        self.frame = frame
        self.mac = frame.head[6:12]
        self.source = source
        self.destination = destination
        self.protocol = protocol
        self.header_start = header_start
        self.start = start
        self.end = end

    def payload(self) -> bytes:
        """A copy of what is behind the IP header."""
        return self.frame.copy(self.start, self.end)

    def sum_is_right(self, *, optional: bool = False) -> bool:
        """Whether the checksum of TCP or UDP is right, or left to us; *optional*: none is right, too (RFC 768)."""
        frame = self.frame
        if frame.needs_checksum:
            return True
        data = self.payload()
        if optional and data[UDP_CHECKSUM : UDP_CHECKSUM + 2] == b"\0\0":
            return True
        return checksum(data, pseudo_sum(self.source, self.destination, self.protocol, len(data))) == 0

    def beginning(self, limit: int) -> bytes:
        """The packet's first bytes, with its IP header, for a message about it."""
        return self.frame.copy(self.header_start, min(self.end, self.header_start + limit))


class Malformed(Exception):
    """A packet that is none."""


def read_ipv4(frame: Frame) -> tuple[Packet, int, int]:
    """Return the IPv4 packet of a frame, its identification, its fragment flags and offset; Malformed if it is none.

    Options are passed over: none of them concerns us, and source routes are not followed.
    """
    head = frame.head
    if len(head) < ETHERNET + IPV4_HEADER:
        raise Malformed("short IPv4 header")
    first, _, whole, identification, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(head, ETHERNET)
    size = (first & 15) * 4
    if first >> 4 != 4 or size < IPV4_HEADER or whole < size or ETHERNET + whole > frame.size:
        raise Malformed("IPv4 lengths")
    if checksum(head[ETHERNET : ETHERNET + size]):
        raise Malformed("IPv4 checksum")
    return (
        Packet(frame, source, destination, protocol, ETHERNET + size, ETHERNET + whole),
        identification,
        fragment & 0x3FFF,
    )


_IPV6_OPTIONS: Final = (0, 60)  # hop-by-hop, destination


def read_ipv6(frame: Frame) -> Packet:
    """Return the IPv6 packet of a frame; Malformed if it is none, a fragment, or has another extension than options."""
    head = frame.head
    if len(head) < ETHERNET + IPV6_HEADER:
        raise Malformed("short IPv6 header")
    first, size, protocol, _, source, destination = _IPV6.unpack_from(head, ETHERNET)
    start = ETHERNET + IPV6_HEADER
    end = start + size
    if first >> 28 != 6 or end > frame.size:
        raise Malformed("IPv6 lengths")
    while protocol in _IPV6_OPTIONS:
        if start + 8 > min(end, len(head)):
            raise Malformed("IPv6 extension")
        protocol, length = head[start], head[start + 1]
        start += 8 * (length + 1)
    if start > end:
        raise Malformed("IPv6 extension")
    return Packet(frame, source, destination, protocol, start, end)


def fragments(
    source: bytes, destination: bytes, protocol: int, data: bytes, mtu: int, identification: int
) -> Iterable[bytes]:
    """Yield the IPv4 packets that carry *data*: one, or as many as fit *mtu* (RFC 791, 2.3)."""
    room = mtu - IPV4_HEADER
    if len(data) <= room:
        yield ipv4(source, destination, protocol, len(data)) + data
        return
    room &= ~7
    for at in range(0, len(data), room):
        piece = data[at : at + room]
        more = _MORE_FRAGMENTS if at + room < len(data) else 0
        flags = more | at // 8
        yield ipv4(source, destination, protocol, len(piece), identification=identification, fragment=flags) + piece
