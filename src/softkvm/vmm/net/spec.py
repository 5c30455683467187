# SPDX-License-Identifier: Apache-2.0
"""``--net``: what it may say, and what comes of it.

::

    user[,hostfwd=tcp:[HOST]:PORT-[GUEST]:PORT][,allow=ADDR[:PORT]][,dns=ADDR[:PORT]|host][,hostname=NAME]
        [,net=ADDR/BITS][,restrict=on|off]
    tap=NAME

What both have, ``mac=``, ``mtu=`` and ``queues=``, is the device's (``vmm.devices.virtio_net``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, ip_address
from typing import Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.spec import Words
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.link import MTU_MAX, MTU_MIN
from softkvm.vmm.net.wire import IPAddress

QUEUE_PAIRS: Final = Size(
    "queue pairs of a network device", 16, ConfigError, least=1, effect="ConfigError", where=__name__
)
HOST_NAME: Final = Size("bytes of a host name", 253, ConfigError, least=1, effect="ConfigError", where=__name__)
TAP_NAME: Final = Size("bytes of a tap device's name", 15, ConfigError, least=1, effect="ConfigError", where=__name__)
"""IFNAMSIZ less the byte that ends it: the kernel would cut a longer one, and take another device."""
MTU: Final = Size("MTU of a network device", MTU_MAX, ConfigError, least=MTU_MIN, effect="ConfigError", where=__name__)

_NETWORK: Final = IPv4Network("10.0.2.0/24")
_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_FORWARD: Final = re.compile(
    r"(?:(?P<protocol>tcp|udp):)(?P<host>\[[^\]]*\]|[^:\[\]]*):(?P<host_port>\d{1,5})"
    r"-(?P<guest>\[[^\]]*\]|[^:\[\]]*):(?P<guest_port>\d{1,5})"
)


@dataclass(frozen=True, slots=True)
class Forward:
    """Connections to an address of the host's that go to the guest: ``hostfwd=``. Port 0 of the host's: a free one."""

    protocol: str
    host: IPAddress
    host_port: int
    guest: IPAddress | None
    """None: the address that DHCP gives."""
    guest_port: int

    def __str__(self) -> str:
        guest = "" if self.guest is None else show(self.guest)
        return f"{self.protocol}:{show(self.host)}:{self.host_port}-{guest}:{self.guest_port}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a guest may reach: an address, or a name of one, and a port, 0 for every."""

    host: IPAddress | str
    port: int

    def __str__(self) -> str:
        name = self.host if isinstance(self.host, str) else show(self.host)
        return f"{name}:{self.port}" if self.port else name


@dataclass(frozen=True, slots=True)
class UserNet:
    """The user-mode network's options."""

    network: IPv4Network = _NETWORK
    hostname: str = ""
    """What DHCP calls the guest; none: nothing."""
    dns: tuple[IPAddress, int] | str | None = None
    """Whom questions go to that we have no answer to; "host": the first that the host asks; None: nobody."""
    allow: tuple[Allowed, ...] = ()
    forwards: tuple[Forward, ...] = ()
    restrict: bool = False
    """Whether ``allow`` names what the guest reaches of the host, too."""

    @property
    def gateway(self) -> IPv4Address:
        """The host's loopback, as the guest sees it."""
        return self.network[2]

    @property
    def nameserver(self) -> IPv4Address:
        """Who answers DNS."""
        return self.network[3]

    @property
    def guest(self) -> IPv4Address:
        """What DHCP gives to the guest."""
        return self.network[15]


@dataclass(frozen=True, slots=True)
class TapNet:
    """A tap device of the host's, which is made where it is not there."""

    name: str


def show(address: IPAddress) -> str:
    """Return an address as it stands before a port."""
    return f"[{address}]" if address.version == 6 else str(address)


def network_of(words: Words) -> UserNet | TapNet:
    """Take what an option says of the network; ConfigError with one line for what it can't."""
    if words.first == "user":
        net = UserNet(
            network=words.checked("net", network, UserNet().network),
            hostname=words.checked("hostname", host_name, UserNet().hostname),
            dns=words.checked("dns", _dns, None),
            allow=words.each("allow", _allow),
            forwards=words.each("hostfwd", _forward),
            restrict=words.flag("restrict"),
        )
        _check_user(words, net)
        return net
    kind, equals, name = words.first.partition("=")
    if kind != "tap" or not equals:
        raise words.error(f"{words.first or 'nothing'}, expected user or tap=NAME")
    try:
        return TapNet(tap_name(name))
    except ValueError as error:
        raise words.error(f"tap={name}, {error}") from None


def _check_user(words: Words, net: UserNet) -> None:
    for forward in net.forwards:
        if isinstance(forward.guest, IPv4Address) and forward.guest not in net.network:
            raise words.error(f"hostfwd={forward}, {forward.guest} is not in {net.network}")
    for allowed in net.allow:
        host = allowed.host
        if isinstance(host, IPv4Address) and host in net.network and (host != net.gateway or not net.restrict):
            what = "the host's loopback, which restrict=off allows" if host == net.gateway else f"in {net.network}"
            raise words.error(f"allow={allowed}, {host} is {what}")


def _check_length(size: Size, text: str) -> None:
    count = len(text.encode("utf-8", "surrogateescape"))
    if not size.allows(count):
        raise ValueError(f"a name of {count} bytes, expected {size.least} to {size.most}")


def tap_name(name: str) -> str:
    """A name that the kernel takes for a network device (``dev_valid_name``)."""
    _check_length(TAP_NAME, name)
    if name in (".", "..") or re.search(r"[/:%\s\0]", name):
        raise ValueError("expected the name of a network device")
    return name


def host_name(name: str) -> str:
    """Return a host name that DNS takes (RFC 1035, 2.3.4), or raise ValueError."""
    _check_length(HOST_NAME, name)
    for label in name.split("."):
        if len(label) > 63:
            raise ValueError(f"a label of {len(label)} bytes, expected at most 63")
        if not _LABEL.fullmatch(label):
            raise ValueError("expected letters, digits and hyphens, in labels with dots between")
    return name


def mac_address(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", "")) if _MAC.fullmatch(text) else b""
    if not mac:
        raise ValueError("expected six bytes such as 52:54:00:12:34:56")
    if mac[0] & 1 or not any(mac):
        raise ValueError("expected an address of one device: no group's, not all zeroes")
    return mac


def _address(text: str) -> IPAddress:
    try:
        return ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError(f"{text} is no address") from None


def _port(text: str, least: int = 1) -> int:
    if text.isdecimal() and len(text) < 6 and least <= int(text) <= 65535:
        return int(text)
    raise ValueError(f"{text} is no port: expected {least} to 65535")


def _host_port(text: str) -> tuple[str, str]:
    """Divide ADDR, ADDR:PORT, [ADDR6] or [ADDR6]:PORT; a bare IPv6 address has no port."""
    match = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+)(?::([^:]*))?", text)
    if match:
        return match[1], match[2] if match[2] is not None else ""
    return text, ""


def _one(address: IPAddress) -> IPAddress:
    if address.is_multicast or address.is_unspecified or str(address) == "255.255.255.255":
        raise ValueError(f"{address} is no single host")
    return address


def _allow(text: str) -> Allowed:
    host, port = _host_port(text)
    if text.endswith(":") and not text.startswith("[") and text.count(":") == 1:
        raise ValueError("expected ADDR or ADDR:PORT")
    number = _port(port) if port else 0
    if re.search(r"[:\[\]]", host) or re.fullmatch(r"[0-9.]+", host):
        address = _one(_address(host))
        if address.is_loopback:
            raise ValueError("the host's loopback: the guest reaches it as its gateway")
        return Allowed(address, number)
    return Allowed(host_name(host).lower(), number)


def _dns(text: str) -> tuple[IPAddress, int] | str:
    if text == "host":
        return text
    host, port = _host_port(text)
    return _one(_address(host)), _port(port) if port else 53


def _forward(text: str) -> Forward:
    match = _FORWARD.fullmatch(text)
    if match is None:
        raise ValueError("expected tcp|udp:[HOST]:PORT-[GUEST]:PORT")
    host = _address(match["host"]) if match["host"] else IPv4Address("127.0.0.1")
    guest = _one(_address(match["guest"])) if match["guest"] else None
    return Forward(match["protocol"], host, _port(match["host_port"], 0), guest, _port(match["guest_port"]))


def network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text)
    except (AddressValueError, ValueError) as error:
        raise ValueError(str(error)) from None
    if not 8 <= network.prefixlen <= 27:
        raise ValueError("expected 8 to 27 bits")
    if network.is_loopback or network.is_multicast or network.is_unspecified or network.is_reserved:
        raise ValueError("expected a network of hosts")
    return network


REPEATED: Final = ("hostfwd", "allow")
"""Options that may be there more than once."""
