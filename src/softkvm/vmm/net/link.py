# SPDX-License-Identifier: Apache-2.0
"""The seam between a network device and what lies behind it: frames of Ethernet, with the work that is put off.

A frame may be a segment of up to 64 KiB that nobody has cut yet (TSO), and its checksum may be missing: a
``virtio_net_hdr`` says so in either direction (VIRTIO 1.3, 5.1.6). All is called on the device's worker thread.
"""

from __future__ import annotations

import select
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

Data = bytes | bytearray | memoryview

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
HANG_UP: Final = select.EPOLLHUP | select.EPOLLERR

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_F_DATA_VALID: Final = 2

VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80

HEADER: Final = struct.Struct("<BBHHHH")
"""``virtio_net_hdr`` without ``num_buffers``: flags, GSO type, header length, GSO size, checksum's start and offset."""

NO_OFFLOAD: Final = HEADER.pack(0, 0, 0, 0, 0, 0)
"""The header of a frame that is whole."""

FRAME_MAX: Final = 65550
"""Bytes of the largest frame: an IP packet of 65,535, and Ethernet's header (5.1.6.3.1 has 65,550 with a tag)."""

HEAD: Final = 256
"""Bytes of a frame that :attr:`Frame.head` has: all headers that there can be, with their options."""

MTU_MIN: Final = 1280
MTU_DEFAULT: Final = 1500
MTU_MAX: Final = 65521


@dataclass(frozen=True, slots=True)
class Offloads:
    """What one side can take: frames without checksums, TCP segments that are not cut, for IPv4 and for IPv6."""

    checksum: bool = False
    tso4: bool = False
    tso6: bool = False
    ecn: bool = False


class Frame:
    """A frame of the guest's: ``header`` is its ``virtio_net_hdr``, ``segments`` are views of its memory.

    The guest may change what is in them at any time; ``head`` is a copy of the beginning, to decide by.
    """

    __slots__ = ("head", "header", "segments", "size")

    def __init__(self, segments: list[memoryview], header: bytes = NO_OFFLOAD) -> None:
        self.segments = segments
        self.header = header
        first = segments[0] if segments else memoryview(b"")
        if len(segments) < 2:
            self.size = len(first)
            self.head = bytes(first[:HEAD])
        else:
            self.size = sum(map(len, segments))
            self.head = bytes(first[:HEAD]) if len(first) >= HEAD else b"".join(self.views(0, HEAD))

    @property
    def needs_checksum(self) -> bool:
        """Whether the checksum of TCP or UDP is the pseudo header's alone."""
        return bool(self.header[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM)

    def views(self, start: int, end: int) -> list[memoryview]:
        """Return the bytes from *start* to *end*, as far as there are some, in pieces."""
        segments = self.segments
        if len(segments) == 1:
            return [segments[0][start:end]] if start < end else []
        found = []
        for segment in segments:
            size = len(segment)
            if start < size and end > 0:
                found.append(segment[max(start, 0) : end])
            start -= size
            end -= size
            if end <= 0:
                break
        return found

    def copy(self, start: int, end: int) -> bytes:
        """Return a copy of the bytes from *start* to *end*."""
        if end <= HEAD:
            return self.head[start:end]
        return b"".join(self.views(start, end))


class Worker(Protocol):
    """The thread that everything here runs on."""

    def add(self, fileobj: Any, events: int, callback: Callable[[int], object]) -> None:
        """Call *callback* with the events whenever *fileobj* has some of *events*: READ, WRITE, and always HANG_UP."""

    def modify(self, fileobj: Any, events: int) -> None:
        """Wait for other *events*."""

    def remove(self, fileobj: Any) -> None:
        """Call it no more."""

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Any:
        """Call *callback* once, in *seconds*; what is returned has ``cancel()``."""


class Link(Protocol):
    """A network device, as its back end sees it."""

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet that is not cut by others."""

    @property
    def mac(self) -> bytes:
        """The guest's address, by what the device says."""

    @property
    def worker(self) -> Worker:
        """The thread that calls the back end, and that it does its work on."""

    @property
    def takes(self) -> Offloads:
        """What the driver can take."""

    def ready(self) -> bool:
        """Whether a frame would go to the driver now. If not, :meth:`Backend.room` is called when it would."""

    def send(self, head: bytes, payload: Sequence[Data] = (), header: bytes = NO_OFFLOAD) -> bool:
        """Give the guest a frame. False: it was thrown away, as too many wait for the driver."""

    def flush(self) -> None:
        """Tell the driver of the frames so far."""

    def report(self, message: str) -> None:
        """Tell the user something, once."""


class Backend(ABC):
    """What a device's frames go to."""

    offers: Offloads = Offloads()
    """What it takes from the guest; what it makes of it for the guest is for :attr:`Link.takes` to say."""

    @abstractmethod
    def start(self, link: Link) -> None:
        """Begin: the link's driver is ready. Called anew after each :meth:`stop`."""

    @abstractmethod
    def receive(self, frame: Frame) -> None:
        """Take a frame of the guest's. Its segments are the guest's again behind the call."""

    @abstractmethod
    def received(self) -> None:
        """No more frames for now: what was put off until the batch's end can be done."""

    @abstractmethod
    def room(self) -> None:
        """The driver takes frames again."""

    @abstractmethod
    def stop(self) -> None:
        """The driver has reset the device, or the machine: what is under way is broken off."""

    @abstractmethod
    def offloads(self) -> None:
        """:attr:`Link.takes` has changed."""

    @abstractmethod
    def carrier(self, up: bool) -> None:
        """The link has been pulled, or plugged in."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """What another process needs to go on with, as plain data."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. What can't go on is ended in a way that the guest sees."""

    @abstractmethod
    def close(self) -> None:
        """Give back all that it holds."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is and does, as plain data for whoever asks a running machine."""
