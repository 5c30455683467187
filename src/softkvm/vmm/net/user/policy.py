# SPDX-License-Identifier: Apache-2.0
"""What a guest may reach: the host's loopback, as the gateway, and what ``allow=`` names. Nothing else."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Final, NamedTuple

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.spec import UserNet
from softkvm.vmm.net.wire import TCP, UDP, IPAddress

NETWORK6: Final = IPv6Network("fd73:6f66:746b::/64")
"""The guest's IPv6 network: a local one (RFC 4193), which no router of the world's takes."""

DNS_PORT: Final = 53
RESOLV_CONF: Final = Path("/etc/resolv.conf")


class Target(NamedTuple):
    """Where the host's socket goes to."""

    family: socket.AddressFamily
    address: tuple[str, int]


class Policy:
    """Answers for the options *net*; names among them are looked up now (ConfigError if there is no such)."""

    def __init__(self, net: UserNet) -> None:
        self.net = net
        self.gateway = net.gateway.packed
        self.nameserver = net.nameserver.packed
        self.guest = net.guest.packed
        self.gateway6 = NETWORK6[2].packed
        self.nameserver6 = NETWORK6[3].packed
        self.names: dict[str, list[IPAddress]] = {}
        """Addresses of names that the options have."""
        self._loopback_ports: set[int] = set()
        self._allowed: set[tuple[bytes, int]] = set()
        for allowed in net.allow:
            addresses = self._resolve(allowed.host) if isinstance(allowed.host, str) else [allowed.host]
            for address in addresses:
                if address == net.gateway:
                    self._loopback_ports.add(allowed.port)
                else:
                    self._allowed.add((address.packed, allowed.port))
        self.dns = _host_dns() if net.dns == "host" else net.dns
        if isinstance(self.dns, str):
            raise TypeError(self.dns)

    def _resolve(self, name: str) -> list[IPAddress]:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"--net allow={name}: {error.strerror or error}") from None
        addresses = list(dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))
        outside = [address for address in addresses if not address.is_loopback]
        if not outside:
            raise ConfigError(f"--net allow={name}: the host's loopback: the guest reaches it as its gateway")
        self.names[name] = outside
        return outside

    def is_own(self, address: bytes) -> bool:
        """Whether *address* is one that we answer for on the link."""
        return address in (self.gateway, self.nameserver, self.gateway6, self.nameserver6)

    def target(self, protocol: int, destination: bytes, port: int) -> Target | None:
        """Return where a guest's way to *destination* and *port* goes on; None if it may not."""
        if destination in (self.gateway, self.gateway6):
            if self.net.restrict and not self._loopback_ports & {port, 0}:
                return None
            if destination == self.gateway:
                return Target(socket.AF_INET, ("127.0.0.1", port))
            return Target(socket.AF_INET6, ("::1", port))
        if destination in (self.nameserver, self.nameserver6):
            if port == DNS_PORT and self.dns is not None and protocol in (TCP, UDP):
                return self.dns_target()
            return None
        if (destination, port) in self._allowed or (destination, 0) in self._allowed:
            family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
            return Target(family, (socket.inet_ntop(family, destination), port))
        return None

    def dns_target(self) -> Target:
        """Return whom questions go to."""
        assert isinstance(self.dns, tuple)
        address, port = self.dns
        return Target(socket.AF_INET if address.version == 4 else socket.AF_INET6, (str(address), port))

    def own_names(self) -> dict[str, list[IPAddress]]:
        """Return what we answer ourselves: the host, the guest, what the options name."""
        gateway: list[IPAddress] = [IPv4Address(self.gateway), IPv6Address(self.gateway6)]
        guest: list[IPAddress] = [IPv4Address(self.guest)]
        names = {"gateway": gateway, "host": gateway} | self.names
        return names | {self.net.hostname.lower(): guest} if self.net.hostname else names


def _host_dns() -> tuple[IPAddress, int]:
    """Return the name server that the host asks first (resolv.conf(5))."""
    try:
        for line in RESOLV_CONF.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                return ip_address(words[1].partition("%")[0]), DNS_PORT
    except (OSError, ValueError):
        pass
    raise ConfigError(f"--net dns=host: {RESOLV_CONF} names no server")
