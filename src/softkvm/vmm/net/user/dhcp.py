# SPDX-License-Identifier: Apache-2.0
"""A DHCP server with one address to give (RFC 2131, 2132)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

SERVER_PORT: Final = 67
CLIENT_PORT: Final = 68
LEASE_S: Final = 86400

DISCOVER: Final = 1
OFFER: Final = 2
REQUEST: Final = 3
DECLINE: Final = 4
ACK: Final = 5
NAK: Final = 6
RELEASE: Final = 7
INFORM: Final = 8

SUBNET_MASK: Final = 1
ROUTERS: Final = 3
NAME_SERVERS: Final = 6
HOST_NAME: Final = 12
MTU: Final = 26
BROADCAST_ADDRESS: Final = 28
REQUESTED_ADDRESS: Final = 50
LEASE_TIME: Final = 51
OVERLOAD: Final = 52
MESSAGE_TYPE: Final = 53
SERVER: Final = 54
MESSAGE: Final = 56
RENEWAL_TIME: Final = 58
REBINDING_TIME: Final = 59
END: Final = 255

COOKIE: Final = b"\x63\x82\x53\x63"
MINIMUM: Final = 300
"""Bytes of the smallest BOOTP message: some clients take none that is smaller (RFC 951, 1542)."""

_FIXED: Final = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s")
_BROADCAST_FLAG: Final = 0x8000


class Lease(NamedTuple):
    """What the server gives; addresses are four bytes."""

    address: bytes
    mask: bytes
    server: bytes
    nameserver: bytes
    hostname: str
    """Empty: none."""
    mtu: int


class Reply(NamedTuple):
    """An answer, and the address it goes to: 255.255.255.255 or the client's."""

    message: bytes
    destination: bytes


def options(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield options as far as they are whole."""
    at = 0
    while at < len(data) and data[at] != END:
        if not data[at]:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return
        yield data[at], data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]


def option(code: int, value: bytes) -> bytes:
    """Return an option; one of more than 255 bytes is divided (RFC 3396)."""
    pieces = [value[at : at + 255] for at in range(0, len(value), 255)] or [b""]
    return b"".join(bytes((code, len(piece))) + piece for piece in pieces)


def answer(data: bytes, lease: Lease) -> Reply | None:
    """Return the answer to a client's message; None if there is none to give."""
    if len(data) < _FIXED.size + 4 or data[_FIXED.size : _FIXED.size + 4] != COOKIE:
        return None
    op, kind, size, _, transaction, _, flags, client, _, _, relay, hardware, _, _ = _FIXED.unpack_from(data)
    if op != 1 or kind != 1 or size != 6 or any(relay):
        return None
    found: dict[int, bytes] = {}
    for code, value in options(data[_FIXED.size + 4 :]):
        found[code] = found.get(code, b"") + value
    asked = found.get(MESSAGE_TYPE, b"")
    if len(asked) != 1:
        return None
    if found.get(SERVER, lease.server) != lease.server:
        return None  # it has chosen another server
    address = lease.address
    if asked[0] == DISCOVER:
        answered = OFFER
    elif asked[0] == REQUEST:
        wanted = found.get(REQUESTED_ADDRESS) or client
        answered = ACK if wanted == lease.address else NAK
    elif asked[0] == INFORM:
        answered, address = ACK, bytes(4)
    else:
        return None
    body = option(MESSAGE_TYPE, bytes((answered,))) + option(SERVER, lease.server)
    if answered == NAK:
        address = client = bytes(4)
        body += option(MESSAGE, b"this network has another address for you")
    else:
        if asked[0] != INFORM:
            body += option(LEASE_TIME, LEASE_S.to_bytes(4, "big"))
            body += option(RENEWAL_TIME, (LEASE_S // 2).to_bytes(4, "big"))
            body += option(REBINDING_TIME, (LEASE_S * 7 // 8).to_bytes(4, "big"))
        broadcast = bytes(a | (b ^ 0xFF) for a, b in zip(lease.server, lease.mask, strict=True))
        body += option(SUBNET_MASK, lease.mask) + option(BROADCAST_ADDRESS, broadcast)
        body += option(ROUTERS, lease.server) + option(NAME_SERVERS, lease.nameserver)
        body += option(MTU, lease.mtu.to_bytes(2, "big"))
        body += option(HOST_NAME, lease.hostname.encode()) if lease.hostname else b""
    head = _FIXED.pack(
        2, 1, 6, 0, transaction, 0, flags, client, address, lease.server, bytes(4), hardware, b"", b""
    )  # fmt: skip
    message = (head + COOKIE + body + bytes((END,))).ljust(MINIMUM, b"\0")
    # RFC 2131, 4.1: to the client's address if it has one, else to everybody; we know its link-layer address anyway.
    to = client if any(client) and answered != NAK else (b"\xff" * 4 if flags & _BROADCAST_FLAG else address)
    return Reply(message, to if any(to) else b"\xff" * 4)
