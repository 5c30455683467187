# SPDX-License-Identifier: Apache-2.0
"""What the parts of the user-mode network ask of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from softkvm.vmm.net.link import Data, Link
from softkvm.vmm.net.user.forward import Listener
from softkvm.vmm.net.user.policy import Policy
from softkvm.vmm.net.wire import IPAddress, Packet, Path


class Whole(Protocol):
    """The network, as its parts see it: :class:`~softkvm.vmm.net.user.stack.UserStack`."""

    clock: Callable[[], float]
    policy: Policy
    names: dict[str, list[IPAddress]]
    mac: bytes

    @property
    def link(self) -> Link:
        """The device."""

    def count(self, name: str) -> None:
        """Count something that happened."""

    def finish(self) -> None:
        """Acknowledge what came, show the driver what was sent."""

    def emit(self, head: bytes, payload: Sequence[Data], header: bytes) -> None:
        """Send a segment of TCP whose checksum is the pseudo header's alone, as *header* says."""

    def send_udp(self, source: bytes, source_port: int, destination: bytes, port: int, data: bytes) -> None:
        """Send a datagram."""

    def refuse(self, packet: Packet, port: int, protocol: str) -> None:
        """Say that *packet* may not go where it wants to."""

    def unreachable(self, of: bytes, to: bytes, code: int, quote: bytes) -> None:
        """Tell the guest's address *to* that *of* can't be reached, by ICMP's *code*."""

    def dhcp(self, packet: Packet, data: bytes) -> None:
        """Answer a message to the DHCP server."""

    def is_guest(self, address: bytes) -> bool:
        """Whether a guest may have *address*."""

    def is_group(self, address: bytes) -> bool:
        """Whether *address* is of more than one host."""

    def forward_addresses(self, listener: Listener) -> tuple[bytes, bytes]:
        """Return from where to where a forwarded connection goes, as the guest sees it."""

    def path_back(self, packet: Packet) -> Path:
        """Return the way back to who sent *packet*."""

    def path_to(self, source: bytes, destination: bytes) -> Path:
        """Return the way to an address of the guest's."""

    def name_of(self, address: bytes, port: int) -> str:
        """Return an address and a port, as a user writes it."""
