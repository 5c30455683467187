# SPDX-License-Identifier: Apache-2.0
"""Guests of a network back end: one made of frames that a test writes, and a Linux kernel of the host's.

The latter is a network namespace without any other interface: a tap device leads to the back end, and nowhere else.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from softkvm.vmm.net.link import FRAME_MAX, HEADER, NO_OFFLOAD, Backend, Data, Frame, Offloads

EVERYTHING = Offloads(True, True, True)
GUEST_MAC = bytes.fromhex("525400123456")


class Timer:
    """What :meth:`Loop.call_later` returns."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Don't call it."""
        self.callback = None


class Loop:
    """A worker without a thread: :meth:`run` does what there is to do. Its clock can be put forward.

    A *frozen* clock stands otherwise, so that nothing depends on how busy the host is.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        self.frozen_at = time.monotonic() if frozen else None
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callable[[int], object]] = {}
        self.timers: list[tuple[float, int, Timer]] = []
        self.order = itertools.count()
        self.ahead = 0.0

    def clock(self) -> float:
        """Seconds."""
        return (time.monotonic() if self.frozen_at is None else self.frozen_at) + self.ahead

    def add(self, fileobj: Any, events: int, callback: Callable[[int], object]) -> None:
        """As a worker's."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self.epoll.register(fd, events)
        self.callbacks[fd] = callback

    def modify(self, fileobj: Any, events: int) -> None:
        """As a worker's."""
        self.epoll.modify(fileobj, events)

    def remove(self, fileobj: Any) -> None:
        """As a worker's."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self.epoll.unregister(fd)
        del self.callbacks[fd]

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """As a worker's."""
        timer = Timer(callback)
        heapq.heappush(self.timers, (self.clock() + seconds, next(self.order), timer))
        return timer

    def step(self, timeout_s: float = 0.0) -> None:
        """Wait for something, and do it."""
        if self.timers:
            timeout_s = min(timeout_s, max(self.timers[0][0] - self.clock(), 0))
        for fd, events in self.epoll.poll(timeout_s):
            callback = self.callbacks.get(fd)
            if callback is not None:
                callback(events)
        while self.timers and self.timers[0][0] <= self.clock():
            timer = heapq.heappop(self.timers)[2]
            if timer.callback is not None:
                timer.callback()

    def run(self, until: Callable[[], object] = lambda: False, timeout_s: float = 10.0) -> bool:
        """Go on until something holds; False if it never does."""
        end = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > end:
                return False
            self.step(0.02)
        return True

    def settle(self) -> None:
        """Do what is to be done now."""
        for _ in range(5):
            self.step(0.0)

    def advance(self, seconds: float) -> None:
        """Let time pass, in small pieces."""
        for _ in range(int(seconds / 0.25)):
            self.ahead += 0.25
            self.settle()

    def close(self) -> None:
        """Give the descriptor back."""
        self.epoll.close()


class TestLink:
    """A network device for a back end: what it sends is :attr:`sent`, frames with their headers."""

    __test__ = False

    def __init__(self, loop: Loop, takes: Offloads = EVERYTHING, mtu: int = 1500) -> None:
        self.worker = loop
        self.takes = takes
        self.mtu = mtu
        self.mac = GUEST_MAC
        self.sent: list[tuple[bytes, bytes]] = []
        self.full = False
        self.reports: list[str] = []
        self.flushes = 0

    def ready(self) -> bool:
        """Whether the driver takes frames."""
        return not self.full

    def send(self, head: bytes, payload: Sequence[Data] = (), header: bytes = NO_OFFLOAD) -> bool:
        """Take a frame."""
        self.sent.append((b"".join([head, *payload]), header))
        return True

    def flush(self) -> None:
        """Count it."""
        self.flushes += 1

    def report(self, message: str) -> None:
        """Note it."""
        self.reports.append(message)

    def take(self) -> list[bytes]:
        """Return the frames so far, and forget them."""
        sent, self.sent = self.sent, []
        return [frame for frame, _ in sent]


def give(backend: Backend, *frames: bytes, header: bytes = NO_OFFLOAD) -> None:
    """Let the guest send frames."""
    for frame in frames:
        backend.receive(Frame([memoryview(bytearray(frame))], header))
    backend.received()


# -- a Linux kernel as the guest

_HELPER = Path(__file__).with_name("net_namespace.py")
_TUNSETOFFLOAD = 0x400454D0


class KernelLink(TestLink):
    """A link whose driver is the kernel behind a tap device's descriptor *fd*."""

    def __init__(self, loop: Loop, fd: int, takes: Offloads, mtu: int = 1500) -> None:
        super().__init__(loop, takes, mtu)
        self.fd = fd
        self.largest = 0

    def send(self, head: bytes, payload: Sequence[Data] = (), header: bytes = NO_OFFLOAD) -> bool:
        """Hand a frame to the kernel."""
        size = len(head) + sum(map(len, payload))
        self.largest = max(self.largest, size)
        if header == NO_OFFLOAD or not header[1]:
            assert size <= self.mtu + 14
        os.writev(self.fd, [header, head, *payload])
        return True


class Kernel:
    """A guest that is the host's kernel in a namespace of its own; *backend* is the rest of its world."""

    def __init__(self, backend: Backend, loop: Loop, *, takes: Offloads = EVERYTHING) -> None:
        self.backend, self.loop = backend, loop
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(_HELPER), str(theirs.fileno()), GUEST_MAC.hex()]
        unshare = shutil.which("unshare")
        if unshare is None:
            pytest.skip("there is no unshare(1) to make a network namespace with")
        rights = ["-n"] if os.geteuid() == 0 else ["-rn"]
        self.process = subprocess.Popen(
            [unshare, *rights, *command], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True
        )
        theirs.close()
        self.socket = ours
        ours.settimeout(20)
        message, fds, _, _ = socket.recv_fds(ours, 65536, 1)
        if not fds:
            self.process.wait(10)
            assert self.process.stderr is not None
            why = self.process.stderr.read().strip().splitlines() or [message.decode() or "no rights"]
            self.process.stderr.close()
            ours.close()
            pytest.skip(f"no tap device in a network namespace: {why[-1]}")
        self.fd = fds[0]
        os.set_blocking(self.fd, False)
        offloads = (takes.checksum and 1) | (takes.tso4 and 2) | (takes.tso6 and 4)
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, offloads)
        self.link = KernelLink(loop, self.fd, takes)
        backend.start(self.link)
        loop.add(self.fd, select.EPOLLIN, self._readable)

    def _readable(self, _: int) -> None:
        for _ in range(64):
            try:
                data = os.read(self.fd, FRAME_MAX + HEADER.size)
            except BlockingIOError:
                break
            view = memoryview(bytearray(data))
            # In two pieces, as drivers give headers and data.
            pieces = [view[HEADER.size : HEADER.size + 66], view[HEADER.size + 66 :]]
            self.backend.receive(Frame([piece for piece in pieces if len(piece)], bytes(view[: HEADER.size])))
        self.backend.received()

    def start(self, code: str, **values: Any) -> None:
        """Let the guest run *code*, whose ``result`` is what :meth:`result` returns."""
        self.socket.send(json.dumps([code, values]).encode())

    def result(self, timeout_s: float = 20.0) -> Any:
        """Run the network until the code has ended; return its result."""
        self.socket.setblocking(False)
        found: list[bytes] = []

        def ended() -> bool:
            try:
                found.append(self.socket.recv(1 << 20))
            except BlockingIOError:
                return False
            return True

        assert self.loop.run(ended, timeout_s), "the guest's code never ended"
        kind, value = json.loads(found[0])
        assert kind == "result", value
        return value

    def call(self, code: str, timeout_s: float = 20.0, **values: Any) -> Any:
        """Run *code* in the guest and the network meanwhile; return its ``result``."""
        self.start(code, **values)
        return self.result(timeout_s)

    def close(self) -> None:
        """End the guest."""
        self.loop.remove(self.fd)
        self.backend.close()
        os.close(self.fd)
        self.socket.close()
        self.process.wait(10)
        if self.process.stderr is not None:
            self.process.stderr.close()


# -- frames


def tcp_options(mss: int | None = None, scale: int | None = None) -> bytes:
    """Return a SYN's options."""
    data = b"" if mss is None else struct.pack(">BBH", 2, 4, mss)
    return data if scale is None else data + bytes((3, 3, scale, 0))
