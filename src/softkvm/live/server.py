# SPDX-License-Identifier: Apache-2.0
"""The side of the machines: one thread that answers questions of the same user's other processes.

========================================  =====================================================================
``{"ask": "stats"}``                      counters of all virtual machines of the process
``{"ask": "trace", "events": [GLOB, …],   record tracepoints into the file whose descriptor comes with the request
"filters": [CONDITION, …]}``              (SCM_RIGHTS); the answer has the events' descriptions
``{"ask": "threads"}``                    the names of the threads that have recorded something, and what was lost
``{"ask": "stop"}``                       end the recording; so does the end of the connection
========================================  =====================================================================

Nobody who asks can hold a machine up: the vCPUs' threads do nothing for it, no answer is waited with, requests are
bounded, and whoever does not read is disconnected.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from softkvm import _softcpu
from softkvm.abi.sizes import Size
from softkvm.kvm.state import BLOCKING, IN_GUEST_MODE, VM_LIST
from softkvm.kvm.stats import VM_STATS, scalars
from softkvm.live.place import SWITCH, socket_of
from softkvm.threads import start_quiet, tell_after_fork

if TYPE_CHECKING:
    from softkvm.trace.record import Recorder

#: The longest request, and the most connections at a time.
_REQUEST: Final = Size("bytes of a question to a machine", 16 << 10, None, effect="disconnected", where=__name__)
_CONNECTIONS: Final = Size("processes that ask a machine", 8, None, effect="disconnected", where=__name__)
_BACKLOG: Final = 64
#: What an answer may fill of a connection's buffer.
_SEND_BUFFER: Final = 1 << 20
_DESCRIPTORS: Final = Size(
    "descriptors with a question to a machine", 4, None, element=4, effect="disconnected", where=__name__
)
_CREDENTIALS: Final = struct.Struct("3i")
_MODES: Final = {IN_GUEST_MODE: "guest", BLOCKING: "halted"}


class _Refused(Exception):
    """A request that cannot be answered; the message says why."""


def statistics() -> dict[str, Any]:
    """Return the counters of all virtual machines of this process."""
    machines = []
    for vm in sorted(VM_LIST, key=id):
        if vm.closed or vm.inherited:
            continue
        vcpus = [
            {"id": vcpu.vcpu_id, "state": _MODES.get(vcpu.mode, "host"), "stats": vcpu.stats()}  # type: ignore[attr-defined]
            for vcpu in vm.vcpus
            if not vcpu.closed
        ]
        memory = sum(slot.npages for slot in vm.memslots) << 12
        machines.append({"stats": scalars(VM_STATS, vm), "memory_bytes": memory, "vcpus": vcpus})
    return {"pid": os.getpid(), "machines": machines}


class _Connection:
    """One process that asks."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.given: list[int] = []
        self._request = b""
        self._recorder: Recorder | None = None
        self._spool: BinaryIO | None = None

    def read(self) -> bool:
        """Take what has come, and answer; False if the connection has ended."""
        try:
            data, given, flags, _ = socket.recv_fds(
                self.channel, 4096, _DESCRIPTORS.most, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        self.given += map(_softcpu.own_descriptor, given)
        if not data or flags & socket.MSG_CTRUNC or not _DESCRIPTORS.allows(len(self.given)):
            return False
        self._request += data
        while b"\n" in self._request:
            line, _, self._request = self._request.partition(b"\n")
            if not self._send(self._answer(line)):
                return False
        return _REQUEST.allows(len(self._request))

    def _send(self, answer: dict[str, Any]) -> bool:
        data = json.dumps(answer).encode() + b"\n"
        return self.channel.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            ask = _ASKS.get(request.get("ask")) if isinstance(request, dict) else None
            if ask is None:
                raise _Refused("unknown request")
            return ask(self, request)
        except (_Refused, OSError, ValueError) as error:  # ValueError: no JSON, or what tracing says of bad choices
            return {"error": str(error)}
        except Exception as error:  # whatever it is, it is the asker's to see and none of the machine's
            return {"error": f"{type(error).__name__}: {error}"}

    def _stats(self, request: dict[str, Any]) -> dict[str, Any]:
        return statistics()

    def _trace(self, request: dict[str, Any]) -> dict[str, Any]:
        from softkvm.kvm import TRACEPOINTS, trace

        if self._recorder is not None:
            raise _Refused("this connection records already")
        if not self.given:
            raise _Refused("the request lacks the descriptor of a file")
        events, filters = request.get("events", []), request.get("filters", [])
        if not all(isinstance(text, str) for given in (events, filters) for text in given):
            raise _Refused("events and filters: expected texts")
        with contextlib.ExitStack() as undo:
            fd = self.given.pop(0)
            undo.callback(_softcpu.close_own_descriptor, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # whoever writes to a pipe waits for who reads it
                raise _Refused("the descriptor is of no regular file")
            spool = open(fd, "wb", closefd=False, buffering=0)  # noqa: SIM115 (ours until close)
            self._recorder = trace.start(TRACEPOINTS, events, filters, spool)
            self._spool = spool
            undo.pop_all()
        return {"events": [[event.system, event.description] for event in self._recorder.events]}

    def _threads(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._recorder is None:
            raise _Refused("this connection records nothing")
        recorder = self._recorder
        counts = {"count": recorder.count, "lost": recorder.lost}
        return {"threads": recorder.threads, "problem": recorder.problem, **counts}

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._recorder is not None:
            self._recorder.stop()
        return self._threads(request)

    def close(self) -> None:
        """End what the connection has asked for."""
        if self._recorder is not None:
            self._recorder.stop()
        if self._spool is not None:
            _softcpu.close_own_descriptor(self._spool.fileno())
        for fd in self.given:
            _softcpu.close_own_descriptor(fd)
        _softcpu.close_own_descriptor(self.channel.detach())


_ASKS: Final[dict[Any, Callable[[_Connection, dict[str, Any]], dict[str, Any]]]] = {
    "stats": _Connection._stats,
    "trace": _Connection._trace,
    "threads": _Connection._threads,
    "stop": _Connection._stop,
}


class Server:
    """Listens at the process's socket until it is closed; the first there is begins with :func:`serve`."""

    def __init__(self) -> None:
        self._path = ""
        self._listener: socket.socket | None = None
        self._wake: tuple[int, int] = (-1, -1)
        self._connections: dict[int, _Connection] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self.pid = os.getpid()
        tell_after_fork(self)
        # Not on the thread: for a moment a descriptor has the lowest number that is free, and a client that opens
        # something meanwhile would get another one.
        if self._listen():
            self._thread = start_quiet(self._serve, "softkvm-live")

    @property
    def listens(self) -> bool:
        """Whether it listens: there may be no place for a socket."""
        return self._listener is not None

    def _listen(self) -> bool:
        path = socket_of(self.pid, make=True)
        if path is None:
            return False
        with contextlib.ExitStack() as undo:
            try:
                listener = _own(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
                undo.callback(lambda: _softcpu.close_own_descriptor(listener.detach()))
                path.unlink(missing_ok=True)  # of a process that had this number before
                listener.bind(str(path))
                os.chmod(path, 0o600)
                listener.listen(_BACKLOG)
                read, write = os.pipe2(os.O_CLOEXEC)
            except OSError:
                return False
            self._wake = _softcpu.own_descriptor(read), _softcpu.own_descriptor(write)
            undo.pop_all()
        self._path = str(path)
        self._listener = listener
        return True

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # somebody has closed the descriptors: a client that closes all there are
            while not self._closed:
                self._turn()
        for connection in self._connections.values():
            connection.close()

    def _turn(self) -> None:
        """Wait for something, and do it."""
        listener = self._listener
        assert listener is not None
        poll = select.poll()
        for fd in (self._wake[0], listener.fileno(), *self._connections):
            poll.register(fd, select.POLLIN)
        for fd, event in poll.poll():
            if event & select.POLLNVAL:
                raise OSError(f"descriptor {fd} is closed")
            if fd == listener.fileno():
                self._accept(listener)
            elif fd in self._connections:
                connection = self._connections[fd]
                try:
                    goes_on = connection.read()
                except OSError:
                    goes_on = False
                if not goes_on:
                    del self._connections[fd]
                    connection.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            channel = _own(listener.accept()[0])
        except OSError:
            return
        _, uid, _ = _CREDENTIALS.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (os.geteuid(), 0) or not _CONNECTIONS.allows(len(self._connections) + 1):
            _softcpu.close_own_descriptor(channel.detach())
            return
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._connections[channel.fileno()] = _Connection(channel)

    def close(self) -> None:
        """Stop listening."""
        if self._closed or os.getpid() != self.pid:
            return
        self._closed = True
        if self._listener is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            with contextlib.suppress(OSError):
                os.write(self._wake[1], b"\0")
            if self._thread is not None:
                self._thread.join(5)
            _softcpu.close_own_descriptor(self._listener.detach())
            for fd in self._wake:
                _softcpu.close_own_descriptor(fd)

    def after_fork(self) -> None:
        """In a child there is no thread that listens: its copies of the descriptors go, as far as they are there."""
        self._closed = True
        channels = [connection.channel for connection in self._connections.values()]
        if self._listener is not None:
            channels.append(self._listener)
        copies = [*(channel.detach() for channel in channels), *self._wake]
        self._connections, self._listener, self._wake = {}, None, (-1, -1)
        for fd in copies:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    _softcpu.close_own_descriptor(fd)


def _own(channel: socket.socket) -> socket.socket:
    """Return a socket whose descriptor is out of a client's way."""
    return socket.socket(fileno=_softcpu.own_descriptor(channel.detach()))


_server: Server | None = None
_lock = threading.Lock()


def _begin_anew() -> None:
    """A child may have been forked while somebody had the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def serve() -> Server | None:
    """Listen, if the process does not yet; None where SOFTKVM_LIVE=0 says not to."""
    global _server
    if os.environ.get(SWITCH) == "0":
        return None
    with _lock:
        if _server is None or _server.pid != os.getpid():
            _server = Server()
        return _server
