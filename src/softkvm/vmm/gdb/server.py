# SPDX-License-Identifier: Apache-2.0
"""The stub's thread: listens, serves one gdb after the other, and lets the machine go on when one has gone."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from softkvm.closing import Closing
from softkvm.threads import start_quiet
from softkvm.vmm.debug.debugger import Cause, Debugger, Stop
from softkvm.vmm.errors import StateError
from softkvm.vmm.gdb.address import GdbSpec
from softkvm.vmm.gdb.packets import INTERRUPT, Decoder, ProtocolError, frame
from softkvm.vmm.gdb.session import Session

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

_LOOK_S: Final = 0.2  # the machine's end wakes nobody
_SEND_S: Final = 10.0  # a client that does not read
_QUEUED_MOST: Final = 64  # packets while the guest runs: gdb sends none


class GdbServer(Closing):
    """Listens at *spec* for gdbs that debug *machine*; OSError if the address cannot be had.

    With ``wait`` the machine stands until the first gdb lets it go on, or goes away. It may be made before the machine
    has been started. :attr:`target` is what gdb's ``target remote`` takes.
    """

    def __init__(self, machine: Machine, spec: GdbSpec) -> None:
        self.machine = machine
        self._spec = spec
        self._listener = spec.listen()
        self.target = GdbSpec.target(self._listener)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._waiting: Debugger | None = None
        if spec.wait:
            self._waiting = Debugger(machine, self._woken)
            self._waiting.halt()
        self._thread = start_quiet(self._serve, "gdb")

    def _woken(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the session, if there is one, and listen no more."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._woken()
        self._thread.join()
        self._spec.remove()
        self._listener.close()
        if self._waiting is not None:
            self._waiting.close()
        os.close(self._wake)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing.is_set() and not self.machine.ended.is_set():
                for key, _ in selector.select(_LOOK_S):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wake)

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()[0]
        except OSError:
            return
        with connection:
            debugger, self._waiting = self._waiting, None
            try:
                if debugger is None:
                    debugger = Debugger(self.machine, self._woken)
                with debugger:
                    debugger.halt()
                    _Connection(self, connection, debugger).serve()
            except StateError:  # it has another debugger, or has ended
                return

    def gone(self) -> bool:
        """Whether nothing is left to serve."""
        return self._closing.is_set()

    @property
    def listener(self) -> socket.socket:
        """The listening socket."""
        return self._listener

    @property
    def wake(self) -> int:
        """The eventfd that tells of stops."""
        return self._wake


class _Connection:
    """A gdb's connection."""

    def __init__(self, server: GdbServer, connection: socket.socket, debugger: Debugger) -> None:
        self._server = server
        self._connection = connection
        self._debugger = debugger
        self._decoder = Decoder()
        self._queue: deque[bytes] = deque()
        self._last = b""
        connection.settimeout(_SEND_S)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = Session(server.machine, debugger, self._send)

    def serve(self) -> None:
        """Serve until the client detaches, goes away or misbehaves, or the machine ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._server.listener, selectors.EVENT_READ)
            selector.register(self._server.wake, selectors.EVENT_READ)
            try:
                while not self._session.over and not self._server.gone():
                    for key, _ in selector.select(_LOOK_S):
                        if key.fileobj is self._connection:
                            self._receive()
                        elif key.fileobj is self._server.listener:
                            self._turn_away()
                        else:
                            with contextlib.suppress(BlockingIOError):
                                os.eventfd_read(self._server.wake)
                    self._work()
                if self._session.running and self._server.machine.ended.is_set():
                    self._send(self._session.stopped(Stop(Cause.END, 0)))
            except (OSError, ProtocolError):  # it is gone, or should be
                return

    def _turn_away(self) -> None:
        """Another gdb while there is one."""
        with contextlib.suppress(OSError):
            self._server.listener.accept()[0].close()

    def _receive(self) -> None:
        data = self._connection.recv(1 << 16)
        if not data:
            raise ProtocolError("the connection is closed")
        for packet in self._decoder.feed(data):
            if packet == INTERRUPT:
                if self._session.running:
                    self._debugger.interrupt(self._session.selected)
            else:
                self._queue.append(packet)
        if self._decoder.replies:
            self._connection.sendall(self._decoder.replies)
            self._decoder.replies.clear()
        if self._decoder.repeat:
            self._decoder.repeat = False
            self._connection.sendall(self._last)
        if len(self._queue) > _QUEUED_MOST:
            raise ProtocolError("packets while the guest runs")

    def _work(self) -> None:
        """Tell of a stop; answer packets while the machine stands."""
        while not self._session.over:
            if self._session.running:
                stop = self._debugger.poll()
                if stop is None:
                    return
                self._send(self._session.stopped(stop))
            elif self._queue:
                reply = self._session.handle(self._queue.popleft())
                if reply is not None:
                    self._send(reply)
                if self._session.no_ack:
                    self._decoder.acknowledge = False
            else:
                return

    def _send(self, data: bytes) -> None:
        self._last = frame(data)
        self._connection.sendall(self._last)
