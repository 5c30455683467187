# SPDX-License-Identifier: Apache-2.0
"""The user-mode network: takes the guest's frames, answers them, and has the parts that know how."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from softkvm.vmm.net.link import HEADER, Backend, Data, Frame, Link, Offloads
from softkvm.vmm.net.spec import UserNet, show
from softkvm.vmm.net.user import dhcp, icmp
from softkvm.vmm.net.user.connections import Connections
from softkvm.vmm.net.user.forward import BATCH, Listener
from softkvm.vmm.net.user.neighbours import ROUTER, Neighbours
from softkvm.vmm.net.user.policy import NETWORK6, Policy
from softkvm.vmm.net.user.reassembly import Reassembly
from softkvm.vmm.net.user.udp import Datagrams
from softkvm.vmm.net.wire import (
    BROADCAST,
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    ICMP,
    ICMPV6,
    IPV6_HEADER,
    TCP,
    UDP,
    UDP_HEADER,
    Malformed,
    Packet,
    Path,
    checksum,
    ethernet,
    fragments,
    ipv6,
    pseudo_sum,
    read_ipv4,
    read_ipv6,
    udp,
)

REST_S: Final = 1.0

REPORTS: Final = 8
"""How many refused destinations the user is told of."""

_IPV4: Final = ETHERTYPE_IPV4.to_bytes(2, "big")
_IPV6: Final = ETHERTYPE_IPV6.to_bytes(2, "big")
_ARP: Final = ETHERTYPE_ARP.to_bytes(2, "big")


class UserStack(Backend):
    """The network that *net* says. Ports are taken at once: ConfigError if the host refuses one."""

    offers = Offloads(checksum=True, tso4=True, tso6=True, ecn=True)

    def __init__(self, net: UserNet, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.net = net
        self.clock = clock
        self.policy = Policy(net)
        self.names = self.policy.own_names()
        self.mac = b"\x52\x55" + self.policy.gateway
        self.neighbours = Neighbours(self.mac)
        self.counters: Counter[str] = Counter()
        self._network = int(net.network.network_address)
        self._mask = int(net.network.netmask)
        self._broadcast = net.network.broadcast_address.packed
        self._answers = (self.policy.gateway, self.policy.nameserver)
        self._answers6 = (ROUTER, self.policy.gateway6, self.policy.nameserver6)
        self._reassembly = Reassembly()
        self._identification = itertools.count(1)
        self._reported: set[str] = set()
        self._link: Link | None = None
        self.listeners: list[Listener] = []
        self._resting: list[Listener] = []
        """Those that take no connections for a moment."""
        self._saved: list[dict[str, Any]] = []
        try:
            for forward in net.forwards:
                self.listeners.append(Listener(forward))
        except BaseException:
            self.close()
            raise

    @property
    def link(self) -> Link:
        """The device; only while there is one."""
        assert self._link is not None
        return self._link

    # -- life

    def start(self, link: Link) -> None:
        """Begin."""
        self._link = link
        self.connections = Connections(self)
        self.datagrams = Datagrams(self)
        for listener in self.listeners:
            listener.start(link.worker, self._arrived)
        if self._saved:
            saved, self._saved = self._saved, []
            self.connections.reset_saved(saved)

    def stop(self) -> None:
        """The driver is gone: so are connections."""
        if self._link is None:
            return
        for listener in self.listeners:
            if listener not in self._resting:
                listener.stop(self._link.worker)
        self._resting = []
        self.connections.drop_all()
        self.datagrams.drop_all()
        self.neighbours.clear()
        self._reassembly.clear()
        self._link = None

    def close(self) -> None:
        """Break everything off, give ports back."""
        self.stop()
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def offloads(self) -> None:
        """Connections make other segments."""
        if self._link is not None:
            self.connections.offloads()

    def carrier(self, up: bool) -> None:
        """Connections outlive a link that is down for a while."""

    def save(self) -> dict[str, Any]:
        """Connections are sockets of this process's, which nobody can save: which there are, so that they are reset."""
        return {"connections": self.connections.save() if self._link is not None else list(self._saved)}

    def restore(self, state: dict[str, Any]) -> None:
        """Connections that there were when it was saved are reset: the guest's programs see "connection reset"."""
        self._saved = [dict(entry) for entry in state["connections"]]
        if self._saved and self._link is not None:
            saved, self._saved = self._saved, []
            self.connections.reset_saved(saved)

    def describe(self) -> dict[str, Any]:
        """Addresses, forwarded ports, connections, counters."""
        net = self.net
        return {
            "kind": "user",
            "network": str(net.network),
            "guest": str(net.guest),
            "gateway": str(net.gateway),
            "nameserver": str(net.nameserver),
            "allow": [str(allowed) for allowed in net.allow],
            "forwards": [listener.describe() for listener in self.listeners],
            "connections": self.connections.describe() if self._link is not None else [],
            "udp_flows": len(self.datagrams.flows) if self._link is not None else 0,
            "counters": dict(self.counters),
        }

    # -- from the guest

    def receive(self, frame: Frame) -> None:
        """Take a frame."""
        head = frame.head
        if head[:6] != self.mac and not (head and head[0] & 1):
            self.count("foreign")
            return
        kind = head[12:14]
        try:
            if kind == _IPV4:
                self._receive_ipv4(frame)
            elif kind == _IPV6:
                self._receive_ipv6(frame)
            elif kind == _ARP:
                reply = self.neighbours.arp(frame, self._answers, self._network, self._mask)
                if reply is not None:
                    self.link.send(reply)
            else:
                self.count("unknown")
        except Malformed:
            self.count("malformed")

    def received(self) -> None:
        """The end of a batch."""
        self.finish()

    def finish(self) -> None:
        """Acknowledge what came, show the driver what was sent."""
        if self._link is not None:
            self.connections.finish()

    def room(self) -> None:
        """The driver takes frames again."""
        if self._link is not None:
            self.connections.room_again()

    def _receive_ipv4(self, frame: Frame) -> None:
        packet, identification, fragment = read_ipv4(frame)
        if fragment:
            whole = self._reassembly.add(packet, identification, fragment, self.clock())
            if whole is None:
                return
            packet = whole
        guest = self.is_guest(packet.source)
        if guest:
            self.neighbours.learn(packet.source, packet.mac)
        if packet.protocol == UDP:  # DHCP's clients have no address yet
            self.datagrams.receive(packet)
        elif not guest:
            self.count("foreign")
        elif packet.protocol == TCP:
            if not self.is_group(packet.destination):
                self.connections.receive(packet)
        elif packet.protocol == ICMP:
            self._receive_icmp(packet)
        else:
            self._no_protocol(packet)

    def _receive_icmp(self, packet: Packet) -> None:
        if not self.policy.is_own(packet.destination):
            self.refuse(packet, 0, "icmp")
            return
        reply = icmp.echo_reply(packet.payload())
        if reply is not None:
            self.send_ip(packet.destination, packet.source, ICMP, reply)

    def _receive_ipv6(self, frame: Frame) -> None:
        packet = read_ipv6(frame)
        if packet.protocol == TCP and self.is_guest(packet.source) and not self.is_group(packet.destination):
            self.neighbours.learn(packet.source, packet.mac)
            self.connections.receive(packet)
        elif packet.protocol == UDP:
            self.datagrams.receive(packet)
        elif packet.protocol == ICMPV6:
            self._receive_icmp6(packet)
        elif packet.protocol != TCP:
            self._no_protocol(packet)

    def _receive_icmp6(self, packet: Packet) -> None:
        data = packet.payload()
        if data[:1] == bytes((icmp.ECHO6,)):
            right = checksum(data, pseudo_sum(packet.source, packet.destination, ICMPV6, len(data))) == 0
            if len(data) >= 8 and right and packet.destination in self._answers6:
                pair = packet.destination, packet.source
                self._send_ipv6(packet.mac, *pair, icmp.message6(*pair, icmp.ECHO_REPLY6, 0, data[4:8], data[8:]))
            elif right and self.is_guest(packet.source) and not self.is_group(packet.destination):
                self.refuse(packet, 0, "icmp")
            return
        found = self.neighbours.discovery(packet, data, self._answers6, self.policy.nameserver6, self.link.mtu)
        if found is not None:
            self._send_ipv6(*found, hops=255)

    def _no_protocol(self, packet: Packet) -> None:
        """Only TCP, UDP and ICMP go anywhere."""
        self.count("unknown")
        if self.is_guest(packet.source) and not self.is_group(packet.destination):
            quote = packet.beginning(icmp.QUOTE)
            self.unreachable(packet.destination, packet.source, icmp.PROTOCOL, quote)

    def is_guest(self, address: bytes) -> bool:
        """Whether a guest may have *address*."""
        if len(address) == 4:
            own = int.from_bytes(address, "big") & self._mask == self._network
            return own and address not in self._answers and address != self._broadcast
        return address[:8] == NETWORK6.network_address.packed[:8] or address[:2] == b"\xfe\x80"

    def is_group(self, address: bytes) -> bool:
        """Whether *address* is of more than one host."""
        if len(address) == 4:
            return address[0] >= 224 or address == self._broadcast
        return address[0] == 0xFF

    def dhcp(self, packet: Packet, data: bytes) -> None:
        """Answer a message to the DHCP server."""
        policy, net = self.policy, self.net
        mask = net.network.netmask.packed
        lease = dhcp.Lease(policy.guest, mask, policy.gateway, policy.nameserver, net.hostname, self.link.mtu)
        reply = dhcp.answer(data, lease)
        if reply is None:
            return
        message = udp(policy.gateway, dhcp.SERVER_PORT, reply.destination, dhcp.CLIENT_PORT, reply.message)
        mac = BROADCAST if reply.destination == b"\xff" * 4 else packet.mac
        self._send_ipv4(mac, policy.gateway, reply.destination, UDP, message)

    # -- what may not be

    def count(self, name: str) -> None:
        """Count something that happened."""
        self.counters[name] += 1

    def refuse(self, packet: Packet, port: int, protocol: str) -> None:
        """Say that *packet* may not go where it wants to (RFC 1812, 5.3.9)."""
        self.count("refused")
        name = self.name_of(packet.destination, port)
        if name not in self._reported and len(self._reported) < REPORTS:
            self._reported.add(name)
            self.link.report(f"the guest may not reach {name} ({protocol}): allow= names what it may")
        if icmp.may_answer(packet):
            quote = packet.beginning(icmp.QUOTE if len(packet.source) == 4 else icmp.QUOTE6)
            self.unreachable(packet.destination, packet.source, icmp.PROHIBITED, quote)

    def unreachable(self, of: bytes, to: bytes, code: int, quote: bytes) -> None:
        """Tell the guest's address *to* that *of* can't be reached."""
        if len(to) == 4:
            source = self.policy.gateway
            self.send_ip(source, to, *icmp.unreachable(source, to, code, quote))
        else:
            source = self.policy.gateway6
            self.send_ip(source, to, *icmp.unreachable(source, to, code, quote))

    def name_of(self, address: bytes, port: int) -> str:
        """Return an address and a port, as a user writes it."""
        name = show(IPv4Address(address) if len(address) == 4 else IPv6Address(address))
        return f"{name}:{port}" if port else name

    # -- from the host

    def _arrived(self, listener: Listener) -> None:
        """Something has come to a forwarded port."""
        if listener.forward.protocol == "udp":
            self.datagrams.accept(listener)
            return
        for _ in range(BATCH):
            try:
                host, _ = listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors, most likely: they wait, and so do we
                self.link.report(f"hostfwd={listener.forward}: {error.strerror}")
                listener.stop(self.link.worker)
                self._resting.append(listener)
                self.link.worker.call_later(REST_S, self._rested)
                return
            self.connections.accept(listener, host)

    def _rested(self) -> None:
        resting, self._resting = self._resting, []
        if self._link is not None:
            for listener in resting:
                listener.start(self._link.worker, self._arrived)

    def forward_addresses(self, listener: Listener) -> tuple[bytes, bytes]:
        """Return from where to where a forwarded connection goes, as the guest sees it."""
        guest = listener.forward.guest
        destination = self.policy.guest if guest is None else guest.packed
        return (self.policy.gateway if len(destination) == 4 else self.policy.gateway6), destination

    # -- to the guest

    def path_back(self, packet: Packet) -> Path:
        """Return the way back to who sent *packet*."""
        return Path(packet.mac, self.mac, packet.destination, packet.source)

    def path_to(self, source: bytes, destination: bytes) -> Path:
        """Return the way to an address of the guest's; if nobody has said where it is, to the device, and ask."""
        return Path(self._mac_of(source, destination), self.mac, source, destination)

    def _mac_of(self, source: bytes, destination: bytes) -> bytes:
        mac = self.neighbours.find(destination)
        if mac is None:
            mac = self.link.mac
            if len(destination) == 4:
                self.link.send(self.neighbours.arp_request(source, destination))
        return mac

    def send_ip(self, source: bytes, destination: bytes, protocol: int, data: bytes) -> None:
        """Send a packet, in fragments if it has to be."""
        mac = self._mac_of(source, destination)
        if len(source) == 4:
            self._send_ipv4(mac, source, destination, protocol, data)
        else:
            self._send_ipv6(mac, source, destination, data, protocol=protocol)

    def _send_ipv4(self, mac: bytes, source: bytes, destination: bytes, protocol: int, data: bytes) -> None:
        head = ethernet(mac, self.mac, ETHERTYPE_IPV4)
        identification = next(self._identification) & 0xFFFF
        for packet in fragments(source, destination, protocol, data, self.link.mtu, identification):
            self.link.send(head + packet)

    def _send_ipv6(
        self, mac: bytes, source: bytes, destination: bytes, data: bytes, *, protocol: int = ICMPV6, hops: int = 64
    ) -> None:
        if IPV6_HEADER + len(data) > self.link.mtu:
            self.count("too_big")
            return
        head = ethernet(mac, self.mac, ETHERTYPE_IPV6)
        self.link.send(head + ipv6(source, destination, protocol, len(data), hops=hops) + data)

    def send_udp(self, source: bytes, source_port: int, destination: bytes, port: int, data: bytes) -> None:
        """Send a datagram."""
        if len(data) > 65535 - UDP_HEADER - 20:
            self.count("too_big")
            return
        self.send_ip(source, destination, UDP, udp(source, source_port, destination, port, data))

    def emit(self, head: bytes, payload: Sequence[Data], header: bytes) -> None:
        """Send a segment of TCP whose checksum is the pseudo header's alone, as *header* says."""
        link = self.link
        if link.takes.checksum:
            link.send(head, payload, header)
            return
        _, _, _, _, start, offset = HEADER.unpack(header)
        whole = bytearray(head)
        at = start + offset
        data = b"".join([head[start:], *payload])
        whole[at : at + 2] = checksum(data).to_bytes(2, "big")
        link.send(bytes(whole), payload)
