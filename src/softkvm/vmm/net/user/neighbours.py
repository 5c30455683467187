# SPDX-License-Identifier: Apache-2.0
"""Who has which address on the link: ARP (RFC 826), and IPv6's neighbour and router discovery (RFC 4861, 8106)."""

from __future__ import annotations

import struct
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.net.link import Frame
from softkvm.vmm.net.user.icmp import message6
from softkvm.vmm.net.user.policy import NETWORK6
from softkvm.vmm.net.wire import BROADCAST, ETHERNET, ETHERTYPE_ARP, Packet, checksum, ethernet, pseudo_sum

NEIGHBOURS: Final = Size(
    "addresses of a guest's that a user-mode network remembers", 64, None, giver="guest", effect="the oldest goes",
    where=__name__,
)  # fmt: skip

ARP: Final = struct.Struct(">HHBBH6s4s6s4s")
REQUEST: Final = 1
REPLY: Final = 2

ROUTER_SOLICITATION: Final = 133
ROUTER_ADVERTISEMENT: Final = 134
NEIGHBOUR_SOLICITATION: Final = 135
NEIGHBOUR_ADVERTISEMENT: Final = 136

ROUTER: Final = bytes.fromhex("fe800000000000000000000000000002")
"""Our address on the link (fe80::2)."""

ALL_NODES: Final = bytes.fromhex("ff020000000000000000000000000001")
ALL_NODES_MAC: Final = bytes.fromhex("333300000001")

_LIFETIME_S: Final = 86400
_ROUTER_LIFETIME_S: Final = 9000  # the most there may be (RFC 4861, 6.2.1)


class Neighbours:
    """The link-layer addresses of the guest's addresses; *own* is ours."""

    def __init__(self, own: bytes) -> None:
        self.own = own
        self._macs: dict[bytes, bytes] = {}

    def learn(self, address: bytes, mac: bytes) -> None:
        """*address* is at *mac*."""
        macs = self._macs
        if macs.get(address) == mac or mac[0] & 1:
            return
        macs.pop(address, None)
        if not NEIGHBOURS.allows(len(macs) + 1):
            del macs[next(iter(macs))]
        macs[address] = mac

    def find(self, address: bytes) -> bytes | None:
        """Return where *address* is."""
        return self._macs.get(address)

    def clear(self) -> None:
        """Forget all."""
        self._macs.clear()

    # -- ARP

    def arp(self, frame: Frame, answers: tuple[bytes, ...], network: int, mask: int) -> bytes | None:
        """Take an ARP message; return the reply's frame, if it asks for one of *answers*."""
        if frame.size < ETHERNET + ARP.size:
            return None
        kind, protocol, size, protocol_size, operation, mac, address, _, wanted = ARP.unpack_from(frame.head, ETHERNET)
        if (kind, protocol, size, protocol_size) != (1, 0x0800, 6, 4):
            return None
        if int.from_bytes(address, "big") & mask == network and address not in answers:
            self.learn(address, mac)
        if operation != REQUEST or wanted not in answers:
            return None
        body = ARP.pack(1, 0x0800, 6, 4, REPLY, self.own, wanted, mac, address)
        return ethernet(mac, self.own, ETHERTYPE_ARP) + body

    def arp_request(self, source: bytes, wanted: bytes) -> bytes:
        """Return a frame that asks who has *wanted*."""
        body = ARP.pack(1, 0x0800, 6, 4, REQUEST, self.own, source, bytes(6), wanted)
        return ethernet(BROADCAST, self.own, ETHERTYPE_ARP) + body

    # -- IPv6

    def discovery(
        self, packet: Packet, data: bytes, answers: tuple[bytes, ...], nameserver: bytes, mtu: int
    ) -> tuple[bytes, bytes, bytes, bytes] | None:
        """Take a message of neighbour discovery; return an answer: link-layer address, source, destination, message."""
        if packet.frame.head[ETHERNET + 7] != 255 or len(data) < 8 or data[1]:
            return None
        if checksum(data, pseudo_sum(packet.source, packet.destination, packet.protocol, len(data))):
            return None
        if data[0] == ROUTER_SOLICITATION:
            return ALL_NODES_MAC, ROUTER, ALL_NODES, self.advertisement(nameserver, mtu)
        if len(data) < 24:
            return None
        wanted = data[8:24]
        if data[0] == NEIGHBOUR_ADVERTISEMENT:
            if wanted not in answers:
                self.learn(wanted, packet.mac)
            return None
        if data[0] != NEIGHBOUR_SOLICITATION or wanted not in answers:
            return None
        asks = any(packet.source)  # nobody's address: it looks for duplicates (RFC 4862, 5.4.3)
        to = packet.source if asks else ALL_NODES
        flags = 0xE0 if asks else 0xA0  # router, solicited, override
        rest = bytes((flags, 0, 0, 0))
        body = wanted + bytes((2, 1)) + self.own
        return packet.mac, wanted, to, message6(wanted, to, NEIGHBOUR_ADVERTISEMENT, 0, rest, body)

    def advertisement(self, nameserver: bytes, mtu: int) -> bytes:
        """Return a router advertisement: the network, from which guests make addresses, the MTU and the name server."""
        rest = struct.pack(">BBH", 64, 0, _ROUTER_LIFETIME_S)
        prefix = struct.pack(
            ">BBBBIII16s", 3, 4, 64, 0xC0, _LIFETIME_S, _LIFETIME_S, 0, NETWORK6.network_address.packed
        )
        own = bytes((1, 1)) + self.own
        largest = struct.pack(">BBHI", 5, 1, 0, mtu)
        servers = struct.pack(">BBHI16s", 25, 3, 0, _LIFETIME_S, nameserver)
        body = struct.pack(">II", 0, 0) + own + largest + prefix + servers
        return message6(ROUTER, ALL_NODES, ROUTER_ADVERTISEMENT, 0, rest, body)
