# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor protocol, as far as it is about a machine as a whole: for programs that know it.

Source: QEMU's documentation, "QEMU Machine Protocol Specification" and "QEMU QMP Reference Manual" (run states, events,
machines, balloon).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import softkvm
from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.live.names import listening
from softkvm.live.place import address
from softkvm.threads import start_quiet
from softkvm.vmm.devices.virtio_balloon import Balloon
from softkvm.vmm.errors import MachineError
from softkvm.vmm.events import Event
from softkvm.vmm.machine import Machine
from softkvm.vmm.outcome import End, Outcome

_MESSAGE: Final = Size("bytes of a QMP command", 64 << 10, None, effect="disconnected", where=__name__)
_CONNECTIONS: Final = Size("QMP connections of a machine", 8, None, effect="disconnected", where=__name__)
_PENDING: Final = Size("QMP messages that a client has not read", 1024, None, effect="disconnected", where=__name__)
_VERSION: Final = {"major": 9, "minor": 0, "micro": 0}
"""The version of QEMU whose commands these are."""
_GRACE_S: Final = 1.0
_SEND_S: Final = 10.0

#: What a machine's end is to QMP's SHUTDOWN: whose doing, and the reason (ShutdownCause).
_CAUSES: Final = {
    End.POWER_OFF.value: (True, "guest-shutdown"),
    End.RESET.value: (True, "guest-reset"),
    End.TRIPLE_FAULT.value: (True, "guest-reset"),
    End.PANIC.value: (True, "guest-panic"),
    End.HALTED.value: (True, "guest-shutdown"),
    End.DEBUG_EXIT.value: (True, "guest-shutdown"),
    End.ERROR.value: (False, "host-error"),
    End.STOPPED.value: (False, "host-qmp-quit"),
}
_EVENTS: Final = {
    Event.PAUSED: "STOP",
    Event.RESUMED: "RESUME",
    Event.POWER_BUTTON: "POWERDOWN",
    Event.ASLEEP: "SUSPEND",
    Event.AWAKE: "WAKEUP",
}


class QmpError(Exception):
    """A command is refused; QMP's error class and description."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class QmpServer(Closing):
    """Serves QMP for *machine* at the UNIX socket *path* until it is closed; OSError if that cannot be."""

    def __init__(self, machine: Machine, path: str, name: str = "") -> None:
        self.machine = machine
        self.name = name
        self._path = path
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind()
        except BaseException:
            self._listener.close()
            raise
        machine.events.add(self._tell)
        self._thread = start_quiet(self._accept, "qmp")

    def _bind(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not _is_socket(self._path) or _is_live(self._path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.unlink(self._path)
        before = os.umask(0o177)
        try:
            with address(os.path.abspath(self._path)) as where:
                self._listener.bind(where)
        finally:
            os.umask(before)
        self._listener.listen()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closed or not _CONNECTIONS.allows(len(self._connections) + 1):
                    channel.close()
                    continue
                connection = _Connection(self, channel)
                self._connections.add(connection)
            connection.start()

    def gone(self, connection: _Connection) -> None:
        """A client has gone."""
        with self._lock:
            self._connections.discard(connection)

    def _tell(self, event: Event, more: dict[str, str]) -> None:
        if event is Event.RESET:
            self._send("RESET", {"guest": more.get("by") != "by command", "reason": "guest-reset"})
        elif event is Event.ENDED:
            guest, reason = _CAUSES.get(more["end"], (False, "host-signal"))
            if more["end"] == End.PANIC.value:
                self._send("GUEST_PANICKED", {"action": "poweroff"})
            self._send("SHUTDOWN", {"guest": guest, "reason": reason})
        else:
            self._send(_EVENTS[event], {})

    def _send(self, name: str, data: dict[str, Any]) -> None:
        """From any thread and signal's handler: nothing here waits."""
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
        for connection in tuple(self._connections):
            connection.tell({"event": name, "data": data, "timestamp": stamp})

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = tuple(self._connections)
        self.machine.events.remove(self._tell)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(_GRACE_S)
        for connection in connections:
            connection.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.stat(path).st_mode)


def _is_live(path: str) -> bool:
    return listening(Path(os.path.abspath(path)))


class _Connection:
    """One client: a thread that reads, one that writes."""

    def __init__(self, server: QmpServer, channel: socket.socket) -> None:
        self._server = server
        self._channel = channel
        self._channel.settimeout(None)
        self._ready = False  # capabilities are negotiated
        self._pending: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        package = f"softkvm {softkvm.__version__}"
        self._pending.put({"QMP": {"version": {"qemu": _VERSION, "package": package}, "capabilities": []}})
        self._writer = start_quiet(self._write, "qmp output")
        self._reader = start_quiet(self._read, "qmp input")

    def tell(self, message: dict[str, Any]) -> None:
        """Send an event, if the client has got so far."""
        if self._ready and _PENDING.allows(self._pending.qsize()):
            self._pending.put(message)

    def close(self) -> None:
        self._pending.put(None)
        if self._writer is not None:
            self._writer.join(_GRACE_S)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        if self._reader is not None:
            self._reader.join(_GRACE_S)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._pending.get()) is not None:
                self._channel.sendall(json.dumps(message).encode() + b"\r\n")
        with contextlib.suppress(OSError):  # who does not read is not waited for
            self._channel.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        rest = b""
        try:
            while data := self._channel.recv(4096):
                rest += data
                while (end := value_end(rest)) > 0:
                    text, rest = rest[:end], rest[end:]
                    if text.strip():
                        self._answer(text)
                if not _MESSAGE.allows(len(rest)) or not _PENDING.allows(self._pending.qsize()):
                    return
        except OSError:
            return
        finally:
            self._server.gone(self)
            self._pending.put(None)
            assert self._writer is not None
            self._writer.join(_SEND_S)
            self._channel.close()

    def _answer(self, text: bytes) -> None:
        request: Any = None
        try:
            try:
                request = json.loads(text)
            except (ValueError, RecursionError):
                raise QmpError("Invalid JSON syntax") from None
            if not isinstance(request, dict):
                raise QmpError("QMP input must be a JSON object")
            answer = {"return": self._execute(request)}
        except QmpError as error:
            answer = {"error": {"class": error.kind, "desc": str(error)}}
        except (MachineError, OSError) as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        if isinstance(request, dict) and "id" in request:
            answer["id"] = request["id"]
        self._pending.put(answer)

    def _execute(self, request: dict[str, Any]) -> Any:
        unknown = set(request) - {"execute", "arguments", "id"}
        if unknown:
            raise QmpError(f"QMP input member '{min(unknown)}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input lacks member 'execute'" if name is None else "'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            if self._ready:
                raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
            self._ready = True
            return {}
        if not self._ready:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        command = _COMMANDS.get(name)
        if command is None:
            raise QmpError(f"The command {name[:64]} has not been found", "CommandNotFound")
        return command(self._server, arguments)


def value_end(data: bytes) -> int:
    """Return where the first JSON value of *data* ends, or a line that is none; 0 if it isn't whole yet."""
    depth, quoted, escaped = 0, False, False
    for at, byte in enumerate(data):
        if quoted:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                quoted = False
        elif byte == 0x22:
            quoted = True
        elif byte in b"{[":
            depth += 1
        elif byte in b"}]":
            depth -= 1
            if depth <= 0:
                return at + 1
        elif byte == 0x0A and depth == 0:
            return at + 1
    return 0


# -- commands


def _expect(arguments: dict[str, Any], *names: str) -> None:
    unknown = set(arguments) - set(names)
    if unknown:
        raise QmpError(f"Parameter '{min(unknown)[:64]}' is unexpected")


def _query_status(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    machine = server.machine
    running = bool(machine.started_ns) and not machine.paused and not machine.ended.is_set()
    status = "running" if running else "shutdown" if machine.ended.is_set() else "paused"
    if not machine.started_ns:
        status = "prelaunch"
    return {"status": status, "running": running}


def _stop(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.pause()
    return {}


def _cont(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.expect_going()
    server.machine.resume()
    return {}


def _quit(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.end(Outcome(End.STOPPED, "quit by QMP"))
    return {}


def _powerdown(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.press_power_button()
    return {}


def _reset(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.reset("by command")
    return {}


def _nmi(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    server.machine.expect_going()
    for thread in server.machine.vcpus:
        thread.vcpu.call_soon(thread.vcpu.nmi)
    return {}


def _cpus(server: QmpServer, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "cpu-index": thread.index,
            "qom-path": f"/machine/unattached/device[{thread.index}]",
            "thread-id": thread.thread.native_id or 0,
            "target": "x86_64",
            "props": {"socket-id": 0, "core-id": thread.index, "thread-id": 0},
        }
        for thread in server.machine.vcpus
    ]


def _the_balloon(server: QmpServer) -> Balloon:
    for transport in server.machine.board.virtio.transports.values():
        if isinstance(transport.device, Balloon):
            return transport.device
    raise QmpError("No balloon device has been activated", "DeviceNotActive")


def _balloon(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    """*value* is what the guest shall have, not what the balloon shall hold."""
    _expect(arguments, "value")
    value = arguments.get("value")
    if type(value) is not int:
        raise QmpError("Parameter 'value' is missing" if value is None else "Parameter 'value' expects an integer")
    size = server.machine.config.memory_size
    if not value > 0:
        raise QmpError("Parameter 'target' expects a size")
    _the_balloon(server).set_target((size - min(value, size)) & ~0xFFF)
    return {}


def _query_balloon(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"actual": server.machine.config.memory_size - _the_balloon(server).size}


def _query_version(server: QmpServer, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"qemu": _VERSION, "package": f"softkvm {softkvm.__version__}"}


def _query_commands(server: QmpServer, arguments: dict[str, Any]) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*_COMMANDS, "qmp_capabilities"])]


def _query_events(server: QmpServer, arguments: dict[str, Any]) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*_EVENTS.values(), "GUEST_PANICKED", "RESET", "SHUTDOWN"])]


def _query_name(server: QmpServer, arguments: dict[str, Any]) -> dict[str, str]:
    return {"name": server.name} if server.name else {}


def _query_kvm(server: QmpServer, arguments: dict[str, Any]) -> dict[str, bool]:
    return {"enabled": True, "present": True}


def _query_memory(server: QmpServer, arguments: dict[str, Any]) -> dict[str, int]:
    return {"base-memory": server.machine.config.memory_size, "plugged-memory": 0}


_COMMANDS: Final[Mapping[str, Callable[[QmpServer, dict[str, Any]], Any]]] = {
    "balloon": _balloon,
    "cont": _cont,
    "inject-nmi": _nmi,
    "query-balloon": _query_balloon,
    "query-commands": _query_commands,
    "query-cpus-fast": _cpus,
    "query-events": _query_events,
    "query-kvm": _query_kvm,
    "query-memory-size-summary": _query_memory,
    "query-name": _query_name,
    "query-status": _query_status,
    "query-version": _query_version,
    "quit": _quit,
    "stop": _stop,
    "system_powerdown": _powerdown,
    "system_reset": _reset,
}
