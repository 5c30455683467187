# SPDX-License-Identifier: Apache-2.0
"""Which frames a driver wants: what it has told the device of addresses, groups and VLANs (VIRTIO 1.3, 5.1.6.5)."""

from __future__ import annotations

from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.net.wire import BROADCAST, ETHERNET

ADDRESSES: Final = Size(
    "entries of a MAC address table", 64, None, giver="guest", effect="every frame of its kind is taken", where=__name__
)
VLANS: Final = 4096
_TAGGED: Final = b"\x81\x00"


class ReceiveFilter:
    """The state of VIRTIO_NET_CTRL_RX, _MAC and _VLAN; *mac* is the device's address."""

    def __init__(self, mac: bytes, *, vlan: bool = False) -> None:
        self.mac = mac
        self.promiscuous = True
        """A driver that has no control queue gets everything."""
        self.all_multicast = self.all_unicast = False
        self.no_multicast = self.no_unicast = self.no_broadcast = False
        self.unicast: frozenset[bytes] | None = frozenset()
        """None: more than we keep."""
        self.multicast: frozenset[bytes] | None = frozenset()
        self.vlans: set[int] | None = set() if vlan else None
        """None: not negotiated, all are taken."""

    def wants(self, frame: bytes) -> bool:
        """Whether the driver gets a frame that begins so."""
        if self.vlans is not None and frame[12:14] == _TAGGED:
            if int.from_bytes(frame[ETHERNET : ETHERNET + 2], "big") & 0xFFF not in self.vlans:
                return False
        if self.promiscuous:
            return True
        to = frame[:6]
        if to == BROADCAST:
            return not self.no_broadcast
        if frame[0] & 1:
            if self.no_multicast:
                return False
            return self.all_multicast or self.multicast is None or to in self.multicast
        if self.no_unicast:
            return False
        return self.all_unicast or to == self.mac or self.unicast is None or to in self.unicast

    def set_tables(self, unicast: list[bytes], multicast: list[bytes]) -> None:
        """Take other tables."""
        self.unicast = frozenset(unicast) if ADDRESSES.allows(len(unicast)) else None
        self.multicast = frozenset(multicast) if ADDRESSES.allows(len(multicast)) else None

    def save(self) -> dict[str, Any]:
        """The state, as plain data."""
        state = dict(vars(self))
        for name in ("unicast", "multicast", "vlans"):
            value = state[name]
            state[name] = None if value is None else sorted(value)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        vars(self).update(state)
        self.unicast = None if state["unicast"] is None else frozenset(state["unicast"])
        self.multicast = None if state["multicast"] is None else frozenset(state["multicast"])
        self.vlans = None if state["vlans"] is None else set(state["vlans"])
