# SPDX-License-Identifier: Apache-2.0
"""The side that asks: which processes have machines, and one line of JSON for another."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.live.place import SUFFIX, address, directory, socket_of

_TIMEOUT_S: Final = 10.0
_ANSWER: Final = Size("bytes of a machine's answer", 64 << 20, None, effect="LiveError", where=__name__)


class LiveError(Exception):
    """A process that does not answer, or refuses; one line."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process with machines."""

    pid: int
    name: str
    command: str


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def process(pid: int) -> Process:
    """Return what the system says of a process."""
    name = _read(f"/proc/{pid}/comm").decode(errors="replace").strip()
    command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, name, command or name)


def processes() -> list[Process]:
    """Return the processes that listen; sockets that dead ones have left are taken away."""
    where = directory()
    found = []
    for path in sorted(where.iterdir()) if where is not None else ():
        number = path.name.removesuffix(SUFFIX)
        if path.suffix != SUFFIX or not number.isdecimal():
            continue
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as channel:
            channel.settimeout(_TIMEOUT_S)
            try:
                with address(path) as at:
                    channel.connect(at)
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            except OSError:
                continue
        found.append(process(int(number)))
    return found


class Asker(Closing):
    """A connection to a process; LiveError if it does not answer."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._rest = b""
        self._events: deque[dict[str, Any]] = deque()
        path = socket_of(pid)
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.settimeout(_TIMEOUT_S)
        try:
            if path is None:
                raise FileNotFoundError
            with address(path) as where:
                self._channel.connect(where)
        except OSError as error:
            self._channel.close()
            why = "it does not run" if not os.path.exists(f"/proc/{pid}") else "it has no machine to look at"
            if not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
                why = error.strerror or str(error)
            raise LiveError(f"process {pid}: {why}") from None

    def ask(self, what: str, descriptor: int | None = None, **more: Any) -> dict[str, Any]:
        """Return the answer to a question, with which a *descriptor* may go; LiveError for none, or a refusal."""
        request = json.dumps({"ask": what, **more}).encode() + b"\n"
        try:
            if descriptor is None:
                self._channel.sendall(request)
            else:
                socket.send_fds(self._channel, [request], [descriptor])
            answer: dict[str, Any] = json.loads(self._line())
            while "event" in answer:  # it comes unasked
                self._events.append(answer)
                answer = json.loads(self._line())
        except TimeoutError:
            raise LiveError(f"process {self.pid}: it does not answer") from None
        except (OSError, ValueError):
            raise LiveError(f"process {self.pid}: it has ended") from None
        if "error" in answer:
            raise LiveError(f"process {self.pid}: {answer['error']}")
        return answer

    def ask_long(self, what: str, wait_s: float, **more: Any) -> dict[str, Any]:
        """Return the answer to a question that takes up to *wait_s*, about; LiveError as :meth:`ask` has it."""
        self._channel.settimeout(wait_s + _TIMEOUT_S)
        try:
            return self.ask(what, **more)
        finally:
            self._channel.settimeout(_TIMEOUT_S)

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next line that comes unasked, an event; None if none does. LiveError when the process ends."""
        if self._events:
            return self._events.popleft()
        self._channel.settimeout(max(timeout_s, 0.001))
        try:
            message: dict[str, Any] = json.loads(self._line())
        except TimeoutError:
            return None
        except (OSError, ValueError):
            raise LiveError(f"process {self.pid}: it has ended") from None
        finally:
            self._channel.settimeout(_TIMEOUT_S)
        return message

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            data = self._channel.recv(1 << 16)
            if not data or not _ANSWER.allows(len(self._rest)):
                raise ConnectionResetError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End the connection, and what it has asked for."""
        self._channel.close()
