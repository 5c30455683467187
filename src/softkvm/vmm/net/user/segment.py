# SPDX-License-Identifier: Apache-2.0
"""TCP's segments: flags, sequence numbers, options (RFC 9293, 3.1, 3.4)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
PSH: Final = 8
ACK: Final = 16

MASK: Final = 0xFFFFFFFF
_HALF: Final = 1 << 31

#: What an error of the host's connect() is to the guest: (ICMP code of "destination unreachable"), None: a reset.
UNREACHABLE: Final = {
    errno.ENETUNREACH: 0,
    errno.EHOSTUNREACH: 1,
    errno.ETIMEDOUT: 1,
    errno.EACCES: 13,
    errno.EPERM: 13,
}


def signed(value: int) -> int:
    """Return a difference of sequence numbers as a number with a sign (3.4)."""
    return ((value + _HALF) & MASK) - _HALF


class Options:
    """What a SYN's options say (3.1, RFC 7323): largest segment and scale of windows; None where it is silent."""

    __slots__ = ("mss", "scale")

    def __init__(self, data: bytes) -> None:
        self.mss: int | None = None
        self.scale: int | None = None
        at = 0
        while at < len(data) and data[at]:
            if data[at] == 1:
                at += 1
                continue
            if at + 1 >= len(data) or data[at + 1] < 2 or at + data[at + 1] > len(data):
                return
            kind, size = data[at], data[at + 1]
            if kind == 2 and size == 4:
                self.mss = int.from_bytes(data[at + 2 : at + 4], "big")
            elif kind == 3 and size == 3:
                self.scale = min(data[at + 2], 14)
            at += size


def behind(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """Return the views without their first *size* bytes."""
    found = []
    for view in views:
        if size < len(view):
            found.append(view[size:] if size else view)
            size = 0
        else:
            size -= len(view)
    return found


def before(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """Return the first *size* bytes of the views."""
    found = []
    for view in views:
        if not size:
            break
        found.append(view[:size])
        size -= len(found[-1])
    return found
