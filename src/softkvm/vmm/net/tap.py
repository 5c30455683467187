# SPDX-License-Identifier: Apache-2.0
"""A tap device of the host's kernel, where the user may have one (Linux, Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any, Final

from softkvm.vmm.errors import ConfigError
from softkvm.vmm.net.link import FRAME_MAX, HEADER, READ, Backend, Frame, Link, Offloads
from softkvm.vmm.net.spec import tap_name

TUN: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 1
TUN_F_TSO4: Final = 2
TUN_F_TSO6: Final = 4
TUN_F_TSO_ECN: Final = 8

BATCH: Final = 64
"""Most frames taken at once, before others on the thread have their turn."""

_IFREQ: Final = struct.Struct("16sH22x")


class Tap(Backend):
    """The tap device *name*. Raises ConfigError if there is none to be had."""

    offers = Offloads(checksum=True, tso4=True, tso6=True, ecn=True)

    def __init__(self, name: str) -> None:
        self.name = tap_name(name)
        self._link: Link | None = None
        self._watched = False
        self.dropped = 0
        self.fd = -1
        try:
            self.fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            request = _IFREQ.pack(os.fsencode(self.name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            answer = fcntl.ioctl(self.fd, TUNSETIFF, request)
        except OSError as error:
            self.close()
            raise ConfigError(f"--net tap={name}: {_why(error)}") from None
        got = os.fsdecode(_IFREQ.unpack(answer)[0].rstrip(b"\0"))
        if got != self.name:  # it would be another's
            self.close()
            raise ConfigError(f"--net tap={name}: the kernel made {got} of it")

    def start(self, link: Link) -> None:
        """Begin."""
        self._link = link
        self.offloads()
        self._watch(True)

    def offloads(self) -> None:
        """Tell the kernel what the driver takes."""
        if self._link is None:
            return
        takes = self._link.takes
        flags = 0
        if takes.checksum:
            flags = TUN_F_CSUM | (takes.tso4 and TUN_F_TSO4) | (takes.tso6 and TUN_F_TSO6)
            flags |= TUN_F_TSO_ECN if takes.ecn and (takes.tso4 or takes.tso6) else 0
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, flags)

    def _watch(self, on: bool) -> None:
        if self._link is not None and on != self._watched:
            self._watched = on
            if on:
                self._link.worker.add(self.fd, READ, self._readable)
            else:
                self._link.worker.remove(self.fd)

    def _readable(self, _: int) -> None:
        link = self._link
        if link is None:
            return
        for _ in range(BATCH):
            if not link.ready():
                self._watch(False)
                break
            try:
                data = os.read(self.fd, FRAME_MAX + HEADER.size)
            except BlockingIOError:
                break
            except OSError as error:  # the device is down (EIO), or gone (EBADFD)
                link.report(f"tap {self.name}: {error.strerror}")
                self._watch(False)
                break
            view = memoryview(data)
            link.send(data[HEADER.size : HEADER.size + 64], (view[HEADER.size + 64 :],), data[: HEADER.size])
        link.flush()

    def receive(self, frame: Frame) -> None:
        """Hand a frame to the kernel, which looks at its header."""
        try:
            os.writev(self.fd, [frame.header, *frame.segments])
        except OSError:  # a full queue, a device that is down, or a header that means nothing
            self.dropped += 1

    def received(self) -> None:
        """Nothing has been put off."""

    def room(self) -> None:
        """The driver takes frames again."""
        self._watch(True)

    def stop(self) -> None:
        """The driver is gone."""
        self._watch(False)
        self._link = None

    def carrier(self, up: bool) -> None:
        """Frames are thrown away meanwhile."""
        self._watch(True)

    def save(self) -> dict[str, Any]:
        """What is under way is the network's to send again."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """Give the device back."""
        self.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def describe(self) -> dict[str, Any]:
        """The device's name."""
        return {"kind": "tap", "name": self.name, "counters": {"dropped": self.dropped}}


def _why(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "the kernel lets nobody without CAP_NET_ADMIN make or take it (ip tuntap add user … lets one)"
    if error.errno == errno.ENOENT:
        return f"there is no {TUN}"
    return f"{error.strerror}"
