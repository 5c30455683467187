# SPDX-License-Identifier: Apache-2.0
"""The small servers of the user-mode network: DHCP, DNS, ICMP, ARP, discovery, reassembly; and how much each keeps."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.net import GUEST_MAC, Loop, TestLink, give

from softkvm.vmm.devices.virtio_net import parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net import wire
from softkvm.vmm.net.spec import UserNet
from softkvm.vmm.net.user import dhcp, dns, policy
from softkvm.vmm.net.user.neighbours import NEIGHBOURS
from softkvm.vmm.net.user.reassembly import PACKETS
from softkvm.vmm.net.user.stack import UserStack
from softkvm.vmm.net.user.udp import FLOWS

GUEST, GATEWAY, NAMESERVER = b"\x0a\0\2\x0f", b"\x0a\0\2\2", b"\x0a\0\2\3"
OWN_MAC = b"\x52\x55" + GATEWAY
GATEWAY6 = ip_address("fd73:6f66:746b::2").packed
GUEST6 = ip_address("fd73:6f66:746b::5054:ff:fe12:3456").packed


class Net:
    """A stack, and a guest that sends packets."""

    def __init__(self, options: str = "user") -> None:
        net = parse(options).net
        assert isinstance(net, UserNet)
        self.loop = Loop()
        self.link = TestLink(self.loop)
        self.stack = UserStack(net, clock=self.loop.clock)
        self.stack.start(self.link)

    def close(self) -> None:
        """Give all back."""
        self.stack.close()
        self.loop.close()

    def send(self, *packets: bytes, kind: int = wire.ETHERTYPE_IPV4, to: bytes = OWN_MAC) -> list[bytes]:
        """Send packets; return the frames that come back at once."""
        give(self.stack, *(wire.ethernet(to, GUEST_MAC, kind) + packet for packet in packets))
        self.loop.settle()
        return self.link.take()

    def udp(
        self, port: int, data: bytes, to: bytes = GATEWAY, source: bytes = GUEST, source_port: int = 1000
    ) -> list[bytes]:
        """Send a datagram."""
        datagram = wire.udp(source, source_port, to, port, data)
        if len(source) == 16:
            return self.send(wire.ipv6(source, to, wire.UDP, len(datagram)) + datagram, kind=wire.ETHERTYPE_IPV6)
        return self.send(wire.ipv4(source, to, wire.UDP, len(datagram)) + datagram)


@pytest.fixture
def net() -> Iterator[Net]:
    """The network without options."""
    net = Net()
    yield net
    net.close()


# -- DHCP

LEASE = dhcp.Lease(GUEST, b"\xff\xff\xff\0", GATEWAY, NAMESERVER, "guest.example", 1400)


def request(kind: int, options: bytes = b"", *, client: bytes = bytes(4), flags: int = 0, **changes: int) -> bytes:
    """A client's message (RFC 2131, 2)."""
    fields = {"op": 1, "htype": 1, "hlen": 6, "hops": 0} | changes
    head = struct.pack(">BBBBIHH4s4s4s4s16s64s128s", *fields.values(), 0xABCD1234, 0, flags, client, bytes(4), bytes(4),
                       bytes(4), GUEST_MAC, b"", b"")  # fmt: skip
    return head + dhcp.COOKIE + dhcp.option(53, bytes((kind,))) + options + b"\xff"


def answered(reply: dhcp.Reply | None) -> dict[int, bytes]:
    """The options of an answer."""
    assert reply is not None
    assert reply.message[:8] == b"\2\1\6\0\xab\xcd\x12\x34" and reply.message[28:34] == GUEST_MAC
    assert len(reply.message) >= 300
    return dict(dhcp.options(reply.message[240:]))


def test_a_client_is_offered_an_address_and_gets_it() -> None:
    """RFC 2131, 3.1; options of RFC 2132."""
    offer = dhcp.answer(request(dhcp.DISCOVER), LEASE)
    found = answered(offer)
    assert offer is not None and offer.message[16:20] == GUEST and offer.destination == GUEST
    assert found[53] == bytes((dhcp.OFFER,)) and found[54] == GATEWAY
    acknowledged = dhcp.answer(request(dhcp.REQUEST, dhcp.option(50, GUEST) + dhcp.option(54, GATEWAY)), LEASE)
    found = answered(acknowledged)
    assert found[53] == bytes((dhcp.ACK,))
    assert (found[1], found[3], found[6], found[28]) == (b"\xff\xff\xff\0", GATEWAY, NAMESERVER, b"\x0a\0\2\xff")
    assert (found[12], found[26]) == (b"guest.example", b"\x05\x78")
    assert [int.from_bytes(found[code], "big") for code in (51, 58, 59)] == [86400, 43200, 75600]


def test_another_address_is_denied_and_another_server_is_left_alone() -> None:
    """RFC 2131, 4.3.2: DHCPNAK goes to everybody; who has chosen another server isn't answered."""
    denied = dhcp.answer(request(dhcp.REQUEST, dhcp.option(50, b"\1\2\3\4")), LEASE)
    assert answered(denied)[53] == bytes((dhcp.NAK,))
    assert denied is not None and denied.destination == b"\xff" * 4 and denied.message[16:20] == bytes(4)
    assert dhcp.answer(request(dhcp.REQUEST, dhcp.option(54, b"\1\2\3\4")), LEASE) is None


def test_a_renewal_comes_from_the_clients_address_and_an_inform_gets_no_lease() -> None:
    renewed = dhcp.answer(request(dhcp.REQUEST, client=GUEST), LEASE)
    assert answered(renewed)[53] == bytes((dhcp.ACK,)) and renewed is not None and renewed.destination == GUEST
    informed = dhcp.answer(request(dhcp.INFORM, client=b"\x0a\0\2\x20"), LEASE)
    found = answered(informed)
    assert 51 not in found and found[6] == NAMESERVER
    assert informed is not None and informed.destination == b"\x0a\0\2\x20"


def test_a_client_that_cannot_take_unicast_gets_a_broadcast() -> None:
    """RFC 2131, 4.1: the BROADCAST bit."""
    offer = dhcp.answer(request(dhcp.DISCOVER, flags=0x8000), LEASE)
    assert offer is not None and offer.destination == b"\xff" * 4


@pytest.mark.parametrize("kind", [dhcp.DECLINE, dhcp.RELEASE, dhcp.OFFER, 0, 200])
def test_other_messages_have_no_answer(kind: int) -> None:
    assert dhcp.answer(request(kind), LEASE) is None


@pytest.mark.parametrize("change", [{"op": 2}, {"htype": 6}, {"hlen": 16}])
def test_what_is_no_ethernet_clients_request_has_no_answer(change: dict[str, Any]) -> None:
    assert dhcp.answer(request(dhcp.DISCOVER, b"", **change), LEASE) is None


def test_the_longest_host_name_goes_whole() -> None:
    """253 bytes are one option; RFC 3396 divides what would be more than 255."""
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    found = answered(dhcp.answer(request(dhcp.DISCOVER), LEASE._replace(hostname=name)))
    assert found[12] == name.encode() and len(name) == 253
    assert list(dhcp.options(dhcp.option(12, b"x" * 600))) == [(12, b"x" * 255), (12, b"x" * 255), (12, b"x" * 90)]


@given(st.binary(max_size=400))
def test_no_bytes_break_the_dhcp_server(data: bytes) -> None:
    dhcp.answer(data, LEASE)
    dhcp.answer(request(1, data), LEASE)


def test_dhcp_works_before_a_guest_has_an_address(net: Net) -> None:
    """From 0.0.0.0 to 255.255.255.255, as a client sends it; the answer goes to its link-layer address."""
    message = wire.udp(bytes(4), 68, b"\xff" * 4, 67, request(dhcp.DISCOVER))
    (frame,) = net.send(wire.ipv4(bytes(4), b"\xff" * 4, wire.UDP, len(message)) + message, to=b"\xff" * 6)
    assert frame[:6] == GUEST_MAC and frame[26:34] == GATEWAY + GUEST
    assert struct.unpack(">HH", frame[34:38]) == (67, 68)


# -- DNS


def question(name: str, kind: int = dns.A, *, flags: int = 0x0100, of: int = 1, count: int = 1) -> bytes:
    """A question (RFC 1035, 4.1)."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", 77, flags, count, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, of)


NAMES = {"host": [ip_address("10.0.2.2"), ip_address("fd73::2")], "one.example": [ip_address("192.0.2.1")]}


@pytest.mark.parametrize(
    ("asked", "kind", "code", "data"),
    [
        ("host", dns.A, 0, [b"\x0a\0\2\2"]),
        ("HOST", dns.AAAA, 0, [ip_address("fd73::2").packed]),
        ("One.Example", dns.A, 0, [b"\xc0\0\2\1"]),
        ("one.example", dns.AAAA, 0, []),
        ("one.example", dns.ANY, 0, [b"\xc0\0\2\1"]),
        ("two.example", dns.A, 5, []),
        ("one.example", dns.PTR, 0, []),
    ],
)
def test_known_names_are_answered_and_others_refused(asked: str, kind: int, code: int, data: list[bytes]) -> None:
    """REFUSED, not NXDOMAIN: that the name does not exist is not for us to say."""
    message = question(asked, kind)
    found = dns.answer(message, NAMES, forwards=False)
    assert found is not None
    identification, flags, questions, answers, _, _ = struct.unpack_from(">HHHHHH", found)
    assert (identification, flags & 0x800F, questions, answers) == (77, 0x8000 | code, 1, len(data))
    assert flags & 0x0100  # recursion desired, as asked
    assert found[12 : len(message)] == message[12:]
    records = found[len(message) :]
    for value in data:
        assert struct.unpack_from(">HHHIH", records)[3:] == (60, len(value)) and records[:2] == b"\xc0\x0c"
        assert records[12 : 12 + len(value)] == value
        records = records[12 + len(value) :]
    assert not records


def test_unknown_names_are_forwarded_where_there_is_a_server() -> None:
    assert dns.answer(question("two.example"), NAMES, forwards=True) is None
    assert dns.answer(question("host"), NAMES, forwards=True) is not None


@pytest.mark.parametrize("data", [b"", b"\0" * 11, question("a", flags=0x8100)])
def test_what_is_no_question_has_no_answer(data: bytes) -> None:
    assert dns.answer(data, NAMES, forwards=False) is None


@pytest.mark.parametrize("data", [question("a", count=2), question("a")[:-3], b"\0" * 12 + b"\xc0\x0c\0\1\0\1"])
def test_damaged_questions_are_format_errors(data: bytes) -> None:
    found = dns.answer(data, NAMES, forwards=True)
    assert found is not None and found[3] & 15 == dns.FORMERR


def test_other_operations_are_not_implemented() -> None:
    found = dns.answer(question("host", flags=0x2800), NAMES, forwards=True)
    assert found is not None and found[3] & 15 == dns.NOTIMP


@given(st.binary(max_size=600))
def test_no_bytes_break_the_name_server(data: bytes) -> None:
    dns.answer(data, NAMES, forwards=True)


def test_questions_go_on_to_the_server_that_the_options_name() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        net = Net(f"user,dns=127.0.0.1:{server.getsockname()[1]}")
        try:
            assert len(net.udp(53, question("host"), NAMESERVER)) == 1
            assert net.udp(53, question("elsewhere.example"), NAMESERVER) == []
            data, address = server.recvfrom(1000)
            assert data == question("elsewhere.example")
            server.sendto(b"the answer", address)
            assert net.loop.run(lambda: net.link.sent, 5)
            (frame,) = net.link.take()
            assert frame[26:34] == NAMESERVER + GUEST and frame.endswith(b"the answer")
        finally:
            net.close()


def test_names_of_the_options_are_looked_up_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, 1, 6, "", ("192.0.2.9", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: found)
    rules = policy.Policy(UserNet(allow=parse("user,allow=one.example:443").net.allow))  # type: ignore[union-attr]
    assert rules.own_names()["one.example"] == [ip_address("192.0.2.9")]
    address = ip_address("192.0.2.9").packed
    assert rules.target(wire.TCP, address, 443) == (socket.AF_INET, ("192.0.2.9", 443))
    assert rules.target(wire.TCP, address, 80) is None
    found[:] = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    with pytest.raises(ConfigError, match="the guest reaches it as its gateway"):
        policy.Policy(UserNet(allow=parse("user,allow=localhost").net.allow))  # type: ignore[union-attr]


def test_the_hosts_first_server_is_taken_if_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "resolv.conf"
    monkeypatch.setattr(policy, "RESOLV_CONF", file)
    file.write_text("# x\nsearch a\nnameserver 192.0.2.53\nnameserver 192.0.2.54\n")
    assert policy.Policy(UserNet(dns="host")).dns == (ip_address("192.0.2.53"), 53)
    file.write_text("search a\n")
    with pytest.raises(ConfigError, match="names no server"):
        policy.Policy(UserNet(dns="host"))


def test_nothing_but_the_loopback_and_what_is_named_has_a_target() -> None:
    net = parse("user,allow=192.0.2.1:80,allow=192.0.2.2,allow=[2001:db8::1]:443").net
    assert isinstance(net, UserNet)
    rules = policy.Policy(net)
    reached = {
        (text, port)
        for text in ("10.0.2.2", "10.0.2.3", "10.0.2.4", "127.0.0.1", "192.0.2.1", "192.0.2.2", "192.0.2.3", "0.0.0.0",
                     "255.255.255.255", "224.0.0.1", "2001:db8::1", "2001:db8::2", "::1", "fd73:6f66:746b::2",
                     "fd73:6f66:746b::3", "::ffff:127.0.0.1", "fe80::2")
        for port in (53, 80, 443)
        if rules.target(wire.TCP, ip_address(text).packed, port)
    }  # fmt: skip
    assert reached == {
        ("10.0.2.2", 53), ("10.0.2.2", 80), ("10.0.2.2", 443), ("192.0.2.1", 80), ("192.0.2.2", 53), ("192.0.2.2", 80),
        ("192.0.2.2", 443), ("2001:db8::1", 443), ("fd73:6f66:746b::2", 53), ("fd73:6f66:746b::2", 80),
        ("fd73:6f66:746b::2", 443),
    }  # fmt: skip


# -- ARP, ICMP, discovery


def arp(wanted: bytes, source: bytes = GUEST, operation: int = 1) -> bytes:
    """An ARP message."""
    return struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, GUEST_MAC, source, bytes(6), wanted)


def test_arp_answers_for_gateway_and_name_server_only(net: Net) -> None:
    for wanted in (GATEWAY, NAMESERVER):
        (frame,) = net.send(arp(wanted), kind=wire.ETHERTYPE_ARP, to=b"\xff" * 6)
        assert frame[:14] == GUEST_MAC + OWN_MAC + b"\x08\x06"
        assert frame[20:] == b"\0\2" + OWN_MAC + wanted + GUEST_MAC + GUEST
    assert net.send(arp(b"\x0a\0\2\x09"), kind=wire.ETHERTYPE_ARP, to=b"\xff" * 6) == []
    assert net.send(arp(GATEWAY, operation=2), kind=wire.ETHERTYPE_ARP) == []


def test_a_guest_with_many_addresses_fills_nothing(net: Net) -> None:
    for number in range(10, 250):
        net.send(arp(GATEWAY, b"\x0a\0\2" + bytes((number,))), kind=wire.ETHERTYPE_ARP)
    assert len(net.stack.neighbours._macs) == NEIGHBOURS.most


def echo(to: bytes, size: int = 56) -> bytes:
    """An ICMP echo."""
    plain = struct.pack(">BBHHH", 8, 0, 0, 7, 1) + bytes(range(256)) * 8
    plain = plain[: 8 + size]
    message = plain[:2] + wire.checksum(plain).to_bytes(2, "big") + plain[4:]
    return wire.ipv4(GUEST, to, wire.ICMP, len(message)) + message


def test_echoes_are_answered_by_gateway_and_name_server_and_others_prohibited(net: Net) -> None:
    """RFC 792; RFC 1812, 5.2.7.1: code 13, with the packet's beginning."""
    for to in (GATEWAY, NAMESERVER):
        (frame,) = net.send(echo(to))
        assert frame[26:34] == to + GUEST and frame[34:36] == b"\0\0" and frame[38:] == echo(to)[24:]
        assert wire.checksum(frame[34:]) == 0
    packet = echo(b"\xc0\0\2\1")
    (frame,) = net.send(packet)
    assert frame[34:36] == b"\3\x0d" and frame[42:] == packet and wire.checksum(frame[34:]) == 0


def test_an_error_is_never_answered_with_an_error(net: Net) -> None:
    """RFC 1122, 3.2.2."""
    message = b"\3\1\0\0" + bytes(4) + echo(GATEWAY)
    message = message[:2] + wire.checksum(message).to_bytes(2, "big") + message[4:]
    assert net.send(wire.ipv4(GUEST, b"\xc0\0\2\1", wire.ICMP, len(message)) + message) == []


def test_protocols_that_go_nowhere_are_unreachable(net: Net) -> None:
    """RFC 792, code 2: GRE."""
    (frame,) = net.send(wire.ipv4(GUEST, GATEWAY, 47, 8) + bytes(8))
    assert frame[34:36] == b"\3\2"


def test_a_large_echo_goes_in_fragments_both_ways(net: Net) -> None:
    plain = struct.pack(">BBHHH", 8, 0, 0, 7, 1) + bytes(range(250)) * 16
    message = plain[:2] + wire.checksum(plain).to_bytes(2, "big") + plain[4:]
    frames = net.send(*wire.fragments(GUEST, GATEWAY, wire.ICMP, message, 1500, 9))
    assert [len(frame) <= 1514 for frame in frames] == [True] * 3
    data = b"".join(
        frame[34:] for frame in sorted(frames, key=lambda frame: int.from_bytes(frame[20:22], "big") & 0x1FFF)
    )
    assert data[0] == 0 and data[8:] == plain[8:] and wire.checksum(data) == 0


def test_ipv6_neighbours_find_router_gateway_and_name_server(net: Net) -> None:
    """RFC 4861, 4.3, 4.4: solicited, override, and the link-layer address; a hop limit of 255."""
    for wanted in ("fe80::2", "fd73:6f66:746b::2", "fd73:6f66:746b::3"):
        address = ip_address(wanted).packed
        plain = struct.pack(">BBHI", 135, 0, 0, 0) + address + b"\1\1" + GUEST_MAC
        group = ip_address("ff02::1:ff00:2").packed
        whole = wire.checksum(plain, wire.pseudo_sum(GUEST6, group, wire.ICMPV6, len(plain)))
        message = plain[:2] + whole.to_bytes(2, "big") + plain[4:]
        for hops, count in ((255, 1), (64, 0)):
            head = wire.ipv6(GUEST6, group, wire.ICMPV6, len(message), hops=hops)
            frames = net.send(head + message, kind=wire.ETHERTYPE_IPV6, to=b"\x33\x33\xff\0\0\2")
            assert len(frames) == count
        head = wire.ipv6(GUEST6, group, wire.ICMPV6, len(message), hops=255)
        (frame,) = net.send(head + message, kind=wire.ETHERTYPE_IPV6, to=b"\x33\x33\xff\0\0\2")
        assert frame[21] == 255 and frame[22:54] == address + GUEST6
        assert frame[54] == 136 and frame[58] & 0x60 == 0x60 and frame[62:78] == address and frame[80:86] == OWN_MAC


def test_the_routers_advertisement_names_network_mtu_and_server(net: Net) -> None:
    plain = struct.pack(">BBHI", 133, 0, 0, 0)
    source, group = ip_address("fe80::1:2").packed, ip_address("ff02::2").packed
    whole = wire.checksum(plain, wire.pseudo_sum(source, group, wire.ICMPV6, len(plain)))
    message = plain[:2] + whole.to_bytes(2, "big") + plain[4:]
    head = wire.ipv6(source, group, wire.ICMPV6, len(message), hops=255)
    (frame,) = net.send(head + message, kind=wire.ETHERTYPE_IPV6, to=b"\x33\x33\0\0\0\2")
    data = frame[54:]
    assert data[0] == 134 and not data[5] & 0xC0  # no DHCPv6
    assert wire.checksum(data, wire.pseudo_sum(frame[22:38], frame[38:54], wire.ICMPV6, len(data))) == 0
    options, at = {}, 16
    while at < len(data):
        options[data[at]] = data[at : at + 8 * data[at + 1]]
        at += 8 * data[at + 1]
    assert options[3][2:4] == b"\x40\xc0" and options[3][16:] == ip_address("fd73:6f66:746b::").packed
    assert options[5][4:] == struct.pack(">I", 1500) and options[25][8:] == ip_address("fd73:6f66:746b::3").packed


def test_ipv6_datagrams_reach_the_hosts_loopback_or_are_prohibited(net: Net) -> None:
    """RFC 4443, 3.1: code 1, "communication with destination administratively prohibited"."""
    frames = net.udp(9, b"x", ip_address("2001:db8::1").packed, GUEST6)
    assert frames[-1][54:56] == b"\1\1"
    try:
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.bind(("::1", 0))
    except OSError:
        pytest.skip("the host has no IPv6")
    with server:
        server.settimeout(5)
        net.udp(server.getsockname()[1], b"six", GATEWAY6, GUEST6)
        data, address = server.recvfrom(100)
        assert data == b"six"
        server.sendto(b"answer", address)
        assert net.loop.run(lambda: net.link.sent, 5)
        assert net.link.take()[-1].endswith(b"answer")


def test_a_datagram_behind_one_that_nobody_took_is_sent_all_the_same(net: Net) -> None:
    """The host's socket says of the first that the port was closed when it is to send the second."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    give(net.stack, *[wire.ethernet(OWN_MAC, GUEST_MAC, wire.ETHERTYPE_IPV4) + packet(port, b"first")])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", port))
        server.settimeout(5)
        give(net.stack, *[wire.ethernet(OWN_MAC, GUEST_MAC, wire.ETHERTYPE_IPV4) + packet(port, b"second")])
        assert server.recv(100) == b"second"
    assert any(frame[34:36] == b"\3\3" for frame in net.link.take())


def packet(port: int, data: bytes) -> bytes:
    """A datagram to the gateway."""
    datagram = wire.udp(GUEST, 1000, GATEWAY, port, data)
    return wire.ipv4(GUEST, GATEWAY, wire.UDP, len(datagram)) + datagram


# -- bounds


def test_flows_of_datagrams_are_bounded_and_the_oldest_goes(net: Net) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        for number in range(FLOWS.most + 20):
            net.udp(port, b"x", source_port=1024 + number)
        assert len(net.stack.datagrams.flows) == FLOWS.most
        first = next(iter(net.stack.datagrams.flows.values()))
        assert first.inner == (GUEST, 1024 + 20)
        net.loop.advance(80)
        assert not net.stack.datagrams.flows


def test_half_packets_are_bounded_and_forgotten(net: Net) -> None:
    """RFC 791, 3.2: a time limit; here a number, too."""
    for number in range(PACKETS.most + 20):
        first, *_ = wire.fragments(GUEST, GATEWAY, wire.UDP, bytes(3000), 1500, number)
        net.send(first)
    assert len(net.stack._reassembly) == PACKETS.most
    net.loop.ahead += 20
    first, *_ = wire.fragments(GUEST, GATEWAY, wire.UDP, bytes(3000), 1500, 1)
    net.send(first)
    assert len(net.stack._reassembly) == 1


def test_overlapping_fragments_are_no_packet(net: Net) -> None:
    """RFC 5722's rule, for IPv4 as well (RFC 1858: one could hide another's ports)."""
    one, two, *_ = wire.fragments(GUEST, GATEWAY, wire.ICMP, bytes(3000), 1500, 5)
    moved = bytearray(two)
    moved[6:8] = (0x2000 | 1).to_bytes(2, "big")
    moved[10:12] = b"\0\0"
    moved[10:12] = wire.checksum(bytes(moved[:20])).to_bytes(2, "big")
    net.send(one, bytes(moved))
    assert not len(net.stack._reassembly)


def test_a_fragment_beyond_a_packets_end_is_none(net: Net) -> None:
    """The "ping of death": offset and length above 65,535."""
    piece = bytearray(next(iter(wire.fragments(GUEST, GATEWAY, wire.ICMP, bytes(1000), 1500, 5))))
    piece[6:8] = (0x1FFF).to_bytes(2, "big")
    piece[10:12] = b"\0\0"
    piece[10:12] = wire.checksum(bytes(piece[:20])).to_bytes(2, "big")
    assert net.send(bytes(piece)) == [] and not len(net.stack._reassembly)


def test_who_is_not_on_the_network_is_not_answered(net: Net) -> None:
    """A source address of another network, or ours."""
    for source in (b"\xc0\0\2\1", GATEWAY, NAMESERVER, b"\x0a\0\2\xff", b"\x7f\0\0\1"):
        assert net.udp(53, question("host"), NAMESERVER, source) == []
    assert net.stack.counters["foreign"] == 5


def test_the_user_is_told_of_a_few_refusals_only(net: Net) -> None:
    for number in range(50):
        net.udp(9, b"x", b"\xc0\0\2" + bytes((number,)))
    assert len(net.link.reports) == 8 and net.stack.counters["refused"] == 50


def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        net = parse(f"user,hostfwd=tcp::{port}-:22").net
        assert isinstance(net, UserNet)
        with pytest.raises(ConfigError, match=f"hostfwd=tcp:127.0.0.1:{port}-:22: Address already in use"):
            UserStack(net)


def test_it_says_what_it_is_and_does() -> None:
    net = Net("user,hostfwd=tcp::0-:22,allow=192.0.2.1:80")
    try:
        told = net.stack.describe()
        assert told["gateway"] == "10.0.2.2" and told["allow"] == ["192.0.2.1:80"]
        assert told["forwards"][0]["host"] == f"127.0.0.1:{net.stack.listeners[0].port}"
        assert told["connections"] == [] and told["udp_flows"] == 0
    finally:
        net.close()
