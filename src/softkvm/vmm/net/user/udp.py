# SPDX-License-Identifier: Apache-2.0
"""UDP: flows of datagrams between the guest and sockets of the host's, and forwarded ports."""

from __future__ import annotations

import socket
import struct
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.net.link import READ
from softkvm.vmm.net.user import dhcp, dns
from softkvm.vmm.net.user.forward import Listener
from softkvm.vmm.net.user.icmp import PORT, quote_of
from softkvm.vmm.net.user.policy import DNS_PORT, Target
from softkvm.vmm.net.user.whole import Whole
from softkvm.vmm.net.wire import UDP, UDP_HEADER, Packet

FLOWS: Final = Size(
    "flows of UDP in a user-mode network", 512, None, giver="guest", effect="the one idle longest goes", where=__name__
)
IDLE_S: Final = 60.0
LOOK_S: Final = 10.0
DATAGRAM_MAX: Final = 65507
BATCH: Final = 32
"""Most datagrams taken from a socket at once."""

_HEAD: Final = struct.Struct(">HHHH")


class Flow:
    """Datagrams between one port of the guest's and one of a peer's. *inner* is the guest's end, *outer* the peer's, as
    the guest sees them: an address and a port."""

    __slots__ = ("host", "inner", "key", "last", "outer", "peer")

    def __init__(
        self, key: bytes, inner: tuple[bytes, int], outer: tuple[bytes, int], host: socket.socket,
        peer: tuple[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.key = key
        self.inner = inner
        self.outer = outer
        self.host = host
        self.peer = peer
        """Whom to send to where the socket is a forwarded port's; None: it is connected."""
        self.last = 0.0
        """When it was used last, by the stack's clock."""


class Datagrams:
    """All flows of *stack*, in the order of their last use."""

    def __init__(self, stack: Whole) -> None:
        self.stack = stack
        self.flows: dict[bytes, Flow] = {}
        self._inbound: dict[tuple[Listener, tuple[str, int]], Flow] = {}
        self._port = 49151
        self._looking = False

    # -- from the guest

    def receive(self, packet: Packet) -> None:
        """Take a datagram."""
        stack = self.stack
        data = packet.payload()
        if len(data) < UDP_HEADER:
            stack.count("malformed")
            return
        source_port, port, size, _ = _HEAD.unpack_from(data)
        if not UDP_HEADER <= size <= len(data):
            stack.count("malformed")
            return
        if not packet.sum_is_right(optional=len(packet.source) == 4):
            stack.count("malformed")
            return
        data = data[UDP_HEADER:size]
        policy = stack.policy
        if port == dhcp.SERVER_PORT and len(packet.source) == 4 and packet.destination in (b"\xff" * 4, policy.gateway):
            stack.dhcp(packet, data)
            return
        if not stack.is_guest(packet.source):
            stack.count("foreign")
            return
        if packet.destination in (policy.nameserver, policy.nameserver6) and port == DNS_PORT:
            answered = dns.answer(data, stack.names, forwards=policy.dns is not None)
            if answered is not None:
                stack.send_udp(packet.destination, port, packet.source, source_port, answered)
                return
        key = packet.source + packet.destination + _HEAD.pack(source_port, port, 0, 0)
        flow = self.flows.pop(key, None)
        if flow is None:
            if stack.is_group(packet.destination):
                return
            target = policy.target(UDP, packet.destination, port)
            if target is None:
                stack.refuse(packet, port, "udp")
                return
            host = self._socket(target)
            if host is None:
                stack.count("udp_full")
                return
            flow = Flow(key, (packet.source, source_port), (packet.destination, port), host)
            self._make_room()
            stack.link.worker.add(host, READ, lambda _, flow=flow: self._readable(flow))  # type: ignore[misc]
        flow.last = self.stack.clock()
        self.flows[key] = flow
        self._look_soon()
        self._send(flow, data)

    def _send(self, flow: Flow, data: bytes) -> None:
        for _ in range(2):
            try:
                if flow.peer is None:
                    flow.host.send(data)
                else:
                    flow.host.sendto(data, flow.peer)
            except ConnectionRefusedError as error:  # of the one before; this one hasn't been sent
                self._failed(flow, error)
                continue
            except OSError:
                self.stack.count("udp_dropped")
            return

    def _failed(self, flow: Flow, error: OSError) -> None:
        """The host's socket says that nobody is there: so does an ICMP message."""
        if isinstance(error, ConnectionRefusedError) and flow.peer is None:
            (source, source_port), (destination, port) = flow.inner, flow.outer
            quote = quote_of(source, destination, UDP, struct.pack(">HH", source_port, port))
            self.stack.unreachable(destination, source, PORT, quote)
        else:
            self.stack.count("udp_dropped")

    def _socket(self, target: Target) -> socket.socket | None:
        try:
            host = socket.socket(target.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self.stack.link.report(f"no socket for a datagram of the guest's: {error.strerror}")
            return None
        try:
            host.connect(target.address)
        except OSError:
            host.close()
            return None
        return host

    # -- from the host

    def _readable(self, flow: Flow) -> None:
        for _ in range(BATCH):
            try:
                data = flow.host.recv(DATAGRAM_MAX)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(flow, error)
                break
            flow.last = self.stack.clock()
            self.stack.send_udp(*flow.outer, *flow.inner, data)
        self.stack.finish()

    def accept(self, listener: Listener) -> None:
        """Datagrams have come to a forwarded port."""
        for _ in range(BATCH):
            try:
                data, address = listener.socket.recvfrom(DATAGRAM_MAX)
            except OSError:  # nothing more, or an answer of ours could not be delivered
                break
            peer = address[:2]
            flow = self._inbound.get((listener, peer)) or self._inbound_flow(listener, peer)
            flow.last = self.stack.clock()
            self.flows[flow.key] = self.flows.pop(flow.key, flow)
            self.stack.send_udp(*flow.outer, *flow.inner, data)
        self._look_soon()
        self.stack.finish()

    def _inbound_flow(self, listener: Listener, peer: tuple[str, int]) -> Flow:
        """Make a flow for a peer that the guest sees at a port of the gateway's."""
        source, destination = self.stack.forward_addresses(listener)
        port = listener.forward.guest_port
        self._make_room()
        while True:
            self._port = 49152 if self._port == 65535 else self._port + 1
            key = destination + source + _HEAD.pack(port, self._port, 0, 0)
            if key not in self.flows:
                break
        flow = Flow(key, (destination, port), (source, self._port), listener.socket, peer)
        self._inbound[listener, peer] = self.flows[key] = flow
        return flow

    # -- time

    def _make_room(self) -> None:
        while not FLOWS.allows(len(self.flows) + 1):
            self._end(next(iter(self.flows.values())))

    def _end(self, flow: Flow) -> None:
        self.flows.pop(flow.key, None)
        if flow.peer is None:
            self.stack.link.worker.remove(flow.host)
            flow.host.close()
        else:
            self._inbound = {key: other for key, other in self._inbound.items() if other is not flow}

    def _look_soon(self) -> None:
        if not self._looking and self.flows:
            self._looking = True
            self.stack.link.worker.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        now = self.stack.clock()
        for flow in [flow for flow in self.flows.values() if now - flow.last > IDLE_S]:
            self._end(flow)
        self._look_soon()

    def drop_all(self) -> None:
        """End all flows."""
        for flow in list(self.flows.values()):
            self._end(flow)
