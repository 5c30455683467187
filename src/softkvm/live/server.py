# SPDX-License-Identifier: Apache-2.0
"""The side of the machines: one thread that answers questions of the same user's other processes.

Every question is a line of JSON, ``{"ask": WHAT, …}``, and so is its answer; docs/control.md has them all. Some are
about the process (its version, its machines, KVM's counters and tracing), the others about a machine of it, a
:class:`Subject`, which brings its own.

Nobody who asks can hold a machine up: the vCPUs' threads do nothing for it, requests are bounded, an answer that takes
a while is made on a thread of its own, and whoever does not read is disconnected.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import softkvm
from softkvm import _softcpu
from softkvm.abi.sizes import Size
from softkvm.live.place import SWITCH, address, socket_of
from softkvm.threads import start_quiet, tell_after_fork

PROTOCOL: Final = 1
"""The version of the questions and answers: another one for what those who know this one would misunderstand."""

#: The longest request, and the most connections at a time.
_REQUEST: Final = Size("bytes of a question to a machine", 16 << 10, None, effect="disconnected", where=__name__)
_CONNECTIONS: Final = Size("processes that ask a machine", 32, None, effect="disconnected", where=__name__)
_BACKLOG: Final = 64
#: What an answer may fill of a connection's buffer.
_SEND_BUFFER: Final = 1 << 20
_DESCRIPTORS: Final = Size(
    "descriptors with a question to a machine", 4, None, element=4, effect="disconnected", where=__name__
)
_CREDENTIALS: Final = struct.Struct("3i")


class Refused(Exception):
    """A request that cannot be answered; the message says why."""


Answer = Callable[["Connection", dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: what answers it, and whether that may take a while."""

    answer: Answer
    waits: bool = False


class Subject(Protocol):
    """A machine that may be asked."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def asks(self) -> Mapping[str, Ask]:
        """The questions that it answers."""

    def describe(self) -> dict[str, Any]:
        """Say in short what it is, and what it does."""


class Connection:
    """One process that asks."""

    def __init__(self, server: Server, channel: socket.socket) -> None:
        self.server = server
        self.channel = channel
        self.given: list[int] = []
        """Descriptors that came and that no question has taken; ours (``own_descriptor``)."""
        self.recording: Closable | None = None
        self.at_end: list[Callable[[], object]] = []
        """Called when the connection ends."""
        self.busy = False
        self._request = b""

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
        return self.go_on()

    def go_on(self) -> bool:
        """Answer what has come, up to a question that takes a while; False if the connection has ended."""
        while b"\n" in self._request and not self.busy:
            line, _, self._request = self._request.partition(b"\n")
            answer = self._answer(line)
            if answer is not None and not self.send(answer):
                return False
        return self.busy or _REQUEST.allows(len(self._request))

    def send(self, message: dict[str, Any]) -> bool:
        """Send a line, on the server's thread; False if it does not go out whole."""
        data = json.dumps(message).encode() + b"\n"
        try:
            return self.channel.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    def post(self, message: dict[str, Any]) -> None:
        """Have *message* sent soon: from any thread, without waiting, in a signal's handler too."""
        self.server.post(self, message)

    def _answer(self, line: bytes) -> dict[str, Any] | None:
        """Return the answer; None if it will come."""
        request: Any = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise Refused("unknown request")
            ask = self.server.find(request)
            if ask.waits:
                self.busy = True
                start_quiet(self._work, "softkvm-answer", ask, request)
                return None
        except Exception as error:
            return _error(error, request)
        return self._ask(ask, request)

    def _ask(self, ask: Ask, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = ask.answer(self, request)
        except Exception as error:  # whatever it is, it is the asker's to see and none of the machine's
            return _error(error, request)
        return {**_id(request), **answer}

    def _work(self, ask: Ask, request: dict[str, Any]) -> None:
        self.server.post(self, self._ask(ask, request), answered=True)

    def close(self) -> None:
        """End what the connection has asked for."""
        for end in self.at_end:
            with contextlib.suppress(Exception):
                end()
        if self.recording is not None:
            self.recording.close()
        for fd in self.given:
            _softcpu.close_own_descriptor(fd)
        _softcpu.close_own_descriptor(self.channel.detach())


class Closable(Protocol):
    """What ends with a connection."""

    def close(self) -> None:
        """End it."""


def _id(request: Any) -> dict[str, Any]:
    """What comes back as it was sent."""
    return {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}


def _error(error: Exception, request: Any) -> dict[str, Any]:
    """What is said of an error: of bad choices what they are, of the unexpected what it is, too."""
    expected = isinstance(error, (Refused, OSError, ValueError)) or type(error).__module__ == "softkvm.vmm.errors"
    return {**_id(request), "error": str(error) if expected else f"{type(error).__name__}: {error}"}


def _version(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "softkvm": softkvm.__version__, "pid": os.getpid()}


def _machines(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    server = connection.server
    return {**_version(connection, request), "machines": [subject.describe() for subject in server.subjects]}


def _question(name: str) -> Ask:
    """Return a question to KVM in Python, which is imported when somebody asks."""

    def answer(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        module = importlib.import_module("softkvm.live.questions")
        result: dict[str, Any] = getattr(module, name)(connection, request)
        return result

    return Ask(answer)


_ASKS: Final[Mapping[str, Ask]] = {
    "version": Ask(_version),
    "machines": Ask(_machines),
    **{name: _question(name) for name in ("stats", "trace", "threads", "stop")},
}


class Server:
    """Listens at the process's socket until it is closed; the first there is begins with :func:`serve`."""

    def __init__(self) -> None:
        self._path = ""
        self._listener: socket.socket | None = None
        self._wake: tuple[int, int] = (-1, -1)
        self._connections: dict[int, Connection] = {}
        self._posted: deque[tuple[Connection, dict[str, Any], bool]] = deque()
        self._thread: threading.Thread | None = None
        self.closed = False
        self.subjects: tuple[Subject, ...] = ()
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

    # -- machines

    def add(self, subject: Subject) -> None:
        """Let *subject* be asked."""
        self.subjects = (*self.subjects, subject)

    def remove(self, subject: Subject) -> None:
        """Let *subject* be asked no more."""
        self.subjects = tuple(other for other in self.subjects if other is not subject)

    def find(self, request: dict[str, Any]) -> Ask:
        """Return what answers *request*; Refused if nothing does."""
        what, name = request.get("ask"), request.get("machine")
        if not isinstance(what, str):
            raise Refused("unknown request: expected the name of one as ask")
        if what in _ASKS:
            return _ASKS[what]
        if name is not None and not isinstance(name, str):
            raise Refused("machine: expected a name")
        found = [subject for subject in self.subjects if name in (None, subject.name)]
        if len(found) != 1 and any(what in subject.asks for subject in self.subjects):
            names = ", ".join(subject.name for subject in self.subjects)
            raise Refused(f"{name or 'which machine'}: expected one of {names}")
        if len(found) != 1 or what not in found[0].asks:
            raise Refused(f"unknown request {what[:64]}")
        return found[0].asks[what]

    # -- the socket

    def _listen(self) -> bool:
        path = socket_of(self.pid, make=True)
        if path is None:
            return False
        with contextlib.ExitStack() as undo:
            try:
                listener = _own(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
                undo.callback(lambda: _softcpu.close_own_descriptor(listener.detach()))
                path.unlink(missing_ok=True)  # of a process that had this number before
                with address(path) as where:
                    listener.bind(where)
                os.chmod(path, 0o600)
                listener.listen(_BACKLOG)
                read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                return False
            self._wake = _softcpu.own_descriptor(read), _softcpu.own_descriptor(write)
            undo.pop_all()
        self._path = str(path)
        self._listener = listener
        return True

    def post(self, connection: Connection, message: dict[str, Any], *, answered: bool = False) -> None:
        """Have *message* sent on *connection*; with *answered* it goes on with its next question."""
        self._posted.append((connection, message, answered))
        with contextlib.suppress(OSError):  # full: it wakes up anyway
            os.write(self._wake[1], b"\0")

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # somebody has closed the descriptors: a client that closes all there are
            while not self.closed:
                self._turn()
        for connection in self._connections.values():
            connection.close()

    def _turn(self) -> None:
        """Wait for something, and do it."""
        listener = self._listener
        assert listener is not None
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        poll.register(listener.fileno(), select.POLLIN)
        for fd, connection in self._connections.items():
            if not connection.busy:
                poll.register(fd, select.POLLIN)
        for fd, event in poll.poll():
            if event & select.POLLNVAL:
                raise OSError(f"descriptor {fd} is closed")
            if fd == self._wake[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 4096)
            elif fd == listener.fileno():
                self._accept(listener)
            elif fd in self._connections:
                connection = self._connections[fd]
                try:
                    goes_on = connection.read()
                except OSError:
                    goes_on = False
                if not goes_on:
                    self._drop(connection)
        self._send_posted()

    def _send_posted(self) -> None:
        while self._posted:
            connection, message, answered = self._posted.popleft()
            if self._connections.get(connection.channel.fileno()) is not connection:
                continue
            goes_on = connection.send(message)
            if answered:
                connection.busy = False
                goes_on = goes_on and connection.go_on()
            if not goes_on:
                self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop(connection.channel.fileno(), None) is not None:
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
        self._connections[channel.fileno()] = Connection(self, channel)

    def close(self) -> None:
        """Stop listening."""
        if self.closed or os.getpid() != self.pid:
            return
        self.closed = True
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
        self.closed = True
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
        if _server is None or _server.pid != os.getpid() or _server.closed:
            _server = Server()
        return _server
