# SPDX-License-Identifier: Apache-2.0
"""ICMP and ICMPv6: echoes, and the errors that tell a guest why something can't be reached (RFC 792, 4443, 1812)."""

from __future__ import annotations

import struct
from typing import Final

from softkvm.vmm.net.wire import ICMP, ICMPV6, IPV4_HEADER, TCP, UDP, Packet, checksum, ipv4, ipv6, pseudo_sum

ECHO_REPLY: Final = 0
UNREACHABLE: Final = 3
ECHO: Final = 8

UNREACHABLE6: Final = 1
ECHO6: Final = 128
ECHO_REPLY6: Final = 129

NET: Final = 0
HOST: Final = 1
PROTOCOL: Final = 2
PORT: Final = 3
PROHIBITED: Final = 13

#: The codes of ICMPv6 (RFC 4443, 3.1) for those of ICMP.
CODES6: Final = {NET: 0, HOST: 3, PROTOCOL: 3, PORT: 4, PROHIBITED: 1}

QUOTE: Final = 548
"""Bytes of the packet that an error quotes: with its headers it has at most 576 (RFC 1812, 4.3.2.3)."""

QUOTE6: Final = 1232


def message(kind: int, code: int, rest: bytes, data: bytes) -> bytes:
    """Return an ICMP message: *rest* is the four bytes behind the checksum."""
    plain = struct.pack(">BBH", kind, code, 0) + rest + data
    return struct.pack(">BBH", kind, code, checksum(plain)) + rest + data


def message6(source: bytes, destination: bytes, kind: int, code: int, rest: bytes, data: bytes) -> bytes:
    """Return an ICMPv6 message, whose checksum has a pseudo header in it (RFC 4443, 2.3)."""
    plain = struct.pack(">BBH", kind, code, 0) + rest + data
    whole = checksum(plain, pseudo_sum(source, destination, ICMPV6, len(plain)))
    return struct.pack(">BBH", kind, code, whole) + rest + data


def echo_reply(data: bytes) -> bytes | None:
    """Return the answer to an ICMP message; None if it isn't an echo, or damaged."""
    if len(data) < 8 or data[0] != ECHO or data[1] or checksum(data):
        return None
    return message(ECHO_REPLY, 0, data[4:8], data[8:])


def may_answer(packet: Packet) -> bool:
    """Whether a packet may be answered with an error: not another error, no group's (RFC 1122, 3.2.2)."""
    if packet.protocol == ICMP:
        return packet.frame.head[packet.start : packet.start + 1] == bytes((ECHO,))
    if packet.protocol == ICMPV6:
        return packet.frame.head[packet.start : packet.start + 1] == bytes((ECHO6,))
    return True


def unreachable(source: bytes, destination: bytes, code: int, quote: bytes) -> tuple[int, bytes]:
    """Return protocol and message for "destination unreachable" with ICMP's *code*, in either family."""
    if len(source) == 4:
        return ICMP, message(UNREACHABLE, code, bytes(4), quote[:QUOTE])
    return ICMPV6, message6(source, destination, UNREACHABLE6, CODES6[code], bytes(4), quote[:QUOTE6])


def quote_of(source: bytes, destination: bytes, protocol: int, ports: bytes, sequence: int = 0) -> bytes:
    """Return the beginning of a packet from *source*, to be quoted: its headers' first bytes are enough."""
    assert protocol in (TCP, UDP)
    rest = ports + (struct.pack(">I", sequence) if protocol == TCP else struct.pack(">HH", 8, 0))
    if len(source) == 4:
        return ipv4(source, destination, protocol, IPV4_HEADER) + rest
    return ipv6(source, destination, protocol, 20) + rest + bytes(12)
