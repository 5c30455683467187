# SPDX-License-Identifier: Apache-2.0
"""Run in a network namespace of its own (``unshare -n``): makes a tap device, hands it on, runs code.

Arguments: the number of a socket, the link-layer address of the device ``eth0``.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import traceback
from typing import Any

NAME = b"eth0"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 2, 0x1000, 0x4000
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFHWADDR = 0x890B, 0x8914, 0x8916, 0x891C, 0x8924
IFF_UP, RTF_UP, RTF_GATEWAY = 1, 1, 2


def address(text: str) -> bytes:
    """Return a sockaddr_in."""
    return struct.pack("=H2s4s8x", socket.AF_INET, bytes(2), socket.inet_aton(text))


def configure(own: str = "10.0.2.15", gateway: str = "10.0.2.2", mask: str = "255.255.255.0") -> None:
    """Give the device an address and a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16s16s8x", NAME, address(own)))
        fcntl.ioctl(control, SIOCSIFNETMASK, struct.pack("16s16s8x", NAME, address(mask)))
        up(control)
        route = struct.pack(
            "@L16s16s16sHhLPhPLLH",  # struct rtentry
            0, address("0.0.0.0"), address(gateway), address("0.0.0.0"), RTF_UP | RTF_GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        fcntl.ioctl(control, SIOCADDRT, route)


def up(control: socket.socket) -> None:
    """Turn the devices on."""
    for name in (b"lo", NAME):
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, IFF_UP))


def main() -> None:
    """Make the device; run what comes."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", NAME, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            hardware = struct.pack("16sH14s8x", NAME, 1, bytes.fromhex(sys.argv[2]))
            fcntl.ioctl(control, SIOCSIFHWADDR, hardware)
    except OSError as error:
        peer.send(str(error).encode())
        return
    socket.send_fds(peer, [b"ready"], [tap])
    os.close(tap)
    names: dict[str, Any] = {"configure": configure, "up": up, "socket": socket, "os": os}
    while message := peer.recv(1 << 20):
        code, values = json.loads(message)
        names |= {"result": None, **values}
        try:
            exec(code, names)
            answer = ["result", names["result"]]
        except BaseException:
            answer = ["error", traceback.format_exc()]
        peer.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
