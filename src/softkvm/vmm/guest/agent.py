# SPDX-License-Identifier: Apache-2.0
"""The host's side of the default guest's agent: programs run in the guest, files go in and out.

The agent (``guests/agent/main.c``) listens at a vsock port. A connection carries one program or one file; any number of
them may be there at once::

    agent = Agent(machine.vsock.connect)
    done = agent.run(["uname", "-r"])
    print(done.status, done.stdout.decode())

A message is a header of 8 bytes (type, three zero bytes, length of what follows, little endian) and up to 64 KiB. What
of a program's input the program has not taken yet is bounded: the agent acknowledges it, so that a signal never waits
behind input.
"""

from __future__ import annotations

import contextlib
import enum
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.closing import Closing

PORT: Final = 1023
"""The agent's vsock port."""

MESSAGE: Final = Size(
    "bytes of a message of the guest's agent", 1 << 16, None, giver="guest", effect="AgentError", where=__name__
)
ARGUMENTS: Final = Size(
    "bytes of arguments for a program in the guest", (1 << 16) - 64, None, effect="AgentError", where=__name__
)
CAPTURED: Final = Size(
    "bytes of output that a program in the guest may have",
    1 << 30,
    None,
    giver="guest",
    effect="AgentError",
    where=__name__,
)
WINDOW: Final = 1 << 16
START_S: Final = 60.0
"""How long a guest may take to boot until its agent answers."""

_HEADER: Final = struct.Struct("<B3xI")
_TTY: Final = 1
_DEFAULT_ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


class Message(enum.IntEnum):
    """Types of messages."""

    HELLO = 1
    EXEC = 2
    STDIN = 3
    SIGNAL = 4
    RESIZE = 5
    PUT = 6
    GET = 7
    DATA = 8
    POWER_OFF = 9
    STARTED = 32
    STDOUT = 33
    STDERR = 34
    TAKEN = 35
    EXITED = 36
    FAILED = 37
    FILE = 38
    DONE = 39


class AgentError(Exception):
    """The agent is not there, has gone, or says what nobody understands; one line."""


class GuestOSError(OSError):
    """What the guest's kernel refused: ``errno`` and ``strerror`` are the guest's."""


class Channel(Protocol):
    """A connection to the agent: what of a socket is used."""

    def sendall(self, data: bytes, /) -> object:
        """Send all of *data*."""

    def recv(self, size: int, /) -> bytes:
        """Receive up to *size* bytes, none at the end."""

    def settimeout(self, seconds: float | None, /) -> object:
        """Wait so long in either."""

    def close(self) -> object:
        """End the connection."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a program has ended."""

    status: int
    """Its exit status; of one that a signal ended 128 and the signal, as a shell has it."""
    signal: int
    """The signal that ended it, or 0."""
    stdout: bytes = b""
    stderr: bytes = b""


class _Messages(Closing):
    """Messages on a connection."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._rest = b""

    def send(self, type: Message, data: bytes = b"") -> None:
        try:
            with self._sending:
                self._channel.sendall(_HEADER.pack(type, len(data)) + data)
        except TimeoutError:
            raise
        except OSError as error:
            raise AgentError(f"the guest's agent has gone: {error.strerror or error}") from None

    def receive(self) -> tuple[Message, bytes]:
        """Return the next message; what the agent tells of a failure is raised."""
        try:
            type, length = _HEADER.unpack(self._exactly(_HEADER.size))
            if not MESSAGE.allows(length):
                raise AgentError(f"the guest's agent sends {length} bytes at once: expected up to {MESSAGE.most}")
            data = self._exactly(length)
        except TimeoutError:
            raise
        except OSError as error:
            raise AgentError(f"the guest's agent has gone: {error.strerror or error}") from None
        try:
            message = Message(type)
        except ValueError:
            raise AgentError(f"the guest's agent sends message {type}, which is none") from None
        if message is Message.FAILED:
            (number,) = _fields("<I", data[:4])
            name = data[4:].decode(errors="replace")
            raise GuestOSError(number, os.strerror(number), name)
        return message, data

    def expect(self, wanted: Message) -> bytes:
        """Return the contents of the next message, which is *wanted*."""
        message, data = self.receive()
        if message is not wanted:
            raise AgentError(f"the guest's agent sends {message.name}: expected {wanted.name}")
        return data

    def _exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            data = self._channel.recv(max(size - len(self._rest), 1 << 16))
            if not data:
                raise AgentError("the guest's agent has gone")
            self._rest += data
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def settimeout(self, seconds: float | None) -> None:
        try:
            self._channel.settimeout(seconds)
        except OSError as error:
            raise AgentError(f"the connection to the guest's agent is closed: {error.strerror or error}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.close()


def _fields(format: str, data: bytes) -> tuple[Any, ...]:
    try:
        return struct.unpack(format, data)
    except struct.error:
        raise AgentError(f"the guest's agent sends {len(data)} bytes: expected {struct.calcsize(format)}") from None


def _texts(values: Iterable[str | bytes]) -> bytes:
    encoded = [os.fsencode(value) for value in values]
    if any(b"\0" in text for text in encoded):
        raise ValueError("an argument for the guest holds a NUL character")
    return b"".join(text + b"\0" for text in encoded)


class Session(Closing):
    """A program that runs in the guest. :meth:`serve` hands its output on until it ends; all else is for any thread."""

    def __init__(self, channel: Channel, request: bytes) -> None:
        self._messages = _Messages(channel)
        self._room = threading.Condition()
        self._untaken = 0
        self._ended = False
        try:
            self._messages.send(Message.EXEC, request)
            (self.process,) = _fields("<I", self._messages.expect(Message.STARTED))
            """Its number in the guest."""
        except BaseException:
            self._messages.close()
            raise

    def serve(
        self,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        timeout_s: float | None = None,
    ) -> Done:
        """Give *stdout* and *stderr* what the program writes; return how it ends.

        AgentError if the guest goes before that, TimeoutError after *timeout_s*.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        sinks = {Message.STDOUT: stdout, Message.STDERR: stderr}
        try:
            while True:
                self._messages.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
                message, data = self._messages.receive()
                if message in sinks:
                    if data:
                        sinks[message](data)
                elif message is Message.TAKEN:
                    (count,) = _fields("<I", data)
                    with self._room:
                        self._untaken = max(self._untaken - count, 0)
                        self._room.notify_all()
                elif message is Message.EXITED:
                    status, signal = _fields("<II", data)
                    return Done(128 + signal if signal else status, signal)
                else:
                    raise AgentError(f"the guest's agent sends {message.name} of a program that runs")
        finally:
            with self._room:
                self._ended = True
                self._room.notify_all()

    def write(self, data: bytes) -> None:
        """Give the program *data* for its input; waits while it has not taken what came before."""
        view = memoryview(data)
        while view:
            with self._room:
                self._room.wait_for(lambda: self._ended or self._untaken < WINDOW)
                if self._ended:
                    return
                piece = view[: min(WINDOW - self._untaken, MESSAGE.most)]
                self._untaken += len(piece)
            self._messages.send(Message.STDIN, bytes(piece))
            view = view[len(piece) :]

    def end_input(self) -> None:
        """There is no more input."""
        self._messages.send(Message.STDIN)

    def send_signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        self._messages.send(Message.SIGNAL, struct.pack("<I", number))

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size."""
        self._messages.send(Message.RESIZE, struct.pack("<II", rows, columns))

    def close(self) -> None:
        """End the connection, and with it the program, if it is still there."""
        with self._room:
            self._ended = True
            self._room.notify_all()
        self._messages.close()


class Agent:
    """The agent of a guest, to which *connect* opens a connection: ``machine.vsock.connect``, or what does as that."""

    def __init__(self, connect: Callable[..., Channel], port: int = PORT) -> None:
        self._connect = connect
        self._port = port

    def _open(self, timeout_s: float, *, retry: bool = False) -> Channel:
        try:
            return self._connect(self._port, timeout_s=timeout_s, retry=retry)
        except TimeoutError:
            raise AgentError(f"the guest's agent does not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise AgentError(f"the guest's agent is not there: {error.strerror or error}") from None

    def wait(self, timeout_s: float = START_S) -> int:
        """Wait until the agent answers, in a guest that boots; return the version of its protocol."""
        with _Messages(self._open(timeout_s, retry=True)) as messages:
            messages.settimeout(timeout_s)
            messages.send(Message.HELLO)
            try:
                (version,) = _fields("<I", messages.expect(Message.HELLO))
            except TimeoutError:
                raise AgentError(f"the guest's agent does not answer within {timeout_s:g} s") from None
        return int(version)

    def start(
        self,
        arguments: Sequence[str | bytes],
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        terminal: tuple[int, int] | None = None,
        timeout_s: float = 10.0,
    ) -> Session:
        """Start a program, found in PATH; *terminal* (rows, columns) gives it one of its own.

        *environment* is added to a PATH and a HOME. GuestOSError if it cannot be started, AgentError if nobody answers
        or the arguments are too many.
        """
        if not arguments:
            raise ValueError("arguments: expected the program's name at least")
        variables = {**_DEFAULT_ENVIRONMENT, **(environment or {})}
        texts = _texts([directory, *arguments, *(f"{name}={value}" for name, value in variables.items())])
        if not ARGUMENTS.allows(len(texts)):
            raise AgentError(f"{len(texts)} bytes of arguments: expected up to {ARGUMENTS.most}")
        rows, columns = terminal or (0, 0)
        flags = 0 if terminal is None else _TTY
        head = struct.pack("<5I", flags, rows, columns, len(arguments), len(variables))
        return Session(self._open(timeout_s, retry=True), head + texts)

    def run(
        self,
        arguments: Sequence[str | bytes],
        input: bytes = b"",
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        timeout_s: float | None = None,
    ) -> Done:
        """Run a program and return how it ended and what it wrote; TimeoutError, and it is ended, after *timeout_s*."""
        output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        def taker(name: str) -> Callable[[bytes], object]:
            def take(data: bytes) -> None:
                if not CAPTURED.allows(len(output[name]) + len(data)):
                    raise AgentError(f"the program writes more than {CAPTURED.most} bytes")
                output[name].extend(data)

            return take

        with self.start(arguments, environment, directory) as session:

            def feed() -> None:
                with contextlib.suppress(AgentError):
                    session.write(input)
                    session.end_input()

            feeder = threading.Thread(target=feed, name="guest input", daemon=True)
            feeder.start()
            done = session.serve(taker("stdout"), taker("stderr"), timeout_s)
        feeder.join()
        return Done(done.status, done.signal, bytes(output["stdout"]), bytes(output["stderr"]))

    def put(self, path: str, data: bytes, mode: int = 0o644, timeout_s: float = 60.0) -> None:
        """Make a file in the guest, complete or not at all; GuestOSError if that cannot be."""
        with _Messages(self._open(10.0, retry=True)) as messages:
            messages.settimeout(timeout_s)
            messages.send(Message.PUT, struct.pack("<I", mode) + _texts([path]))
            try:
                for at in range(0, len(data), MESSAGE.most):
                    messages.send(Message.DATA, data[at : at + MESSAGE.most])
                messages.send(Message.DATA)
            except AgentError:  # it has said why before
                messages.expect(Message.DONE)
            messages.expect(Message.DONE)

    def get(self, path: str, timeout_s: float = 60.0) -> bytes:
        """Return the contents of a file in the guest; GuestOSError if it cannot be read."""
        with _Messages(self._open(10.0, retry=True)) as messages:
            messages.settimeout(timeout_s)
            messages.send(Message.GET, _texts([path]))
            messages.expect(Message.FILE)
            found = bytearray()
            while data := messages.expect(Message.DATA):
                found += data
                if not CAPTURED.allows(len(found)):
                    raise AgentError(f"{path} has more than {CAPTURED.most} bytes")
            return bytes(found)

    def power_off(self, timeout_s: float = 10.0) -> None:
        """Write the guest's disks out and switch it off."""
        with _Messages(self._open(timeout_s)) as messages:
            messages.settimeout(timeout_s)
            messages.send(Message.POWER_OFF)
            with contextlib.suppress(AgentError, TimeoutError):  # it goes at once
                messages.expect(Message.DONE)
