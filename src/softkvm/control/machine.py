# SPDX-License-Identifier: Apache-2.0
"""A machine that may be asked and told what to do by other processes of its user: docs/control.md."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from softkvm import _softcpu
from softkvm.closing import Closing
from softkvm.control.bridge import bridge
from softkvm.control.console import ConsoleHub
from softkvm.control.dump import dump
from softkvm.control.moves import Moves
from softkvm.live import names
from softkvm.live.server import Ask, Connection, Refused, Server, serve
from softkvm.vmm.devices.virtio_balloon import Balloon
from softkvm.vmm.devices.virtio_net import Net
from softkvm.vmm.errors import MachineError
from softkvm.vmm.events import Event
from softkvm.vmm.outcome import End, Outcome

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

_PAUSE_S: Final = 60.0
_STATISTICS_S: Final = 0.5
"""How long a guest may take to tell of its memory."""


class NotControlled(Exception):
    """A machine cannot be had under control by the name that was wanted; one line."""


class MachineControl(Closing):
    """Answers questions about *machine*, called *name* or kvmtool's ``guest-PID``, until it is closed.

    *extra* is what its user's interface needs again in another process: snapshots have it, and migrations.
    NotControlled if *name* is none, or another machine's, or there is no socket to be asked at.
    """

    def __init__(
        self,
        machine: Machine,
        name: str | None = None,
        hub: ConsoleHub | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._machine = machine
        self._hub = hub
        self._pid = os.getpid()
        self._asleep = False
        self._listeners: dict[Connection, Any] = {}
        self._asks = {
            "status": Ask(self._status),
            "pause": Ask(self._pause, waits=True),
            "resume": Ask(self._resume, waits=True),
            "power_button": Ask(self._power_button),
            "reset": Ask(self._reset),
            "end": Ask(self._end),
            "events": Ask(self._events),
            "dump": Ask(self._dump, waits=True),
            "nmi": Ask(self._nmi),
            "sysrq": Ask(self._sysrq),
            "console": Ask(self._console),
            "balloon": Ask(self._balloon, waits=True),
            "net": Ask(self._net, waits=True),
            "vsock": Ask(self._vsock, waits=True),
        }
        self.name = name or names.default_name(self._pid)
        self._claimed = False
        self._server = self._join(name)
        self._asks.update(Moves(machine, self.name, extra or {}).asks)
        machine.events.add(self._note)
        if hub is not None:
            hub.line = machine.board.serial

    def _join(self, name: str | None) -> Server | None:
        """Claim the name; None if nobody can ask, and no name was wanted."""
        server = serve()
        if server is None or not server.listens:
            if name is not None:
                raise NotControlled(
                    f"{name}: nobody could ask for it: there is no socket (SOFTKVM_LIVE, XDG_RUNTIME_DIR)"
                )
            return None
        try:
            self._claim(server, name is None)
        except (names.NameRefused, OSError) as error:
            self._leave(server)
            raise NotControlled(str(error)) from None
        server.add(self)
        return server

    def _claim(self, server: Server, any_name: bool) -> None:
        for number in range(2, 1000):
            try:
                names.claim(self.name, self._pid)
                self._claimed = True
                return
            except names.NameRefused:
                if not any_name:
                    raise
                self.name = f"{names.default_name(self._pid)}-{number}"
        raise NotControlled("no name is left")

    def _leave(self, server: Server) -> None:
        server.remove(self)
        if not server.subjects:
            server.close()

    def close(self) -> None:
        """Be asked no more, and give the name back."""
        self._machine.events.remove(self._note)
        for listener in self._listeners.values():
            self._machine.events.remove(listener)
        server, self._server = self._server, None
        if self._claimed and os.getpid() == self._pid:
            self._claimed = False
            names.release(self.name, self._pid)
        if server is not None:
            self._leave(server)

    # -- what it is

    def _note(self, event: Event, more: dict[str, str]) -> None:
        if event in (Event.ASLEEP, Event.AWAKE, Event.RESET):
            self._asleep = event is Event.ASLEEP

    @property
    def state(self) -> str:
        """What it does: ``not started``, ``running``, ``paused``, ``asleep`` or ``ended``."""
        machine = self._machine
        if machine.ended.is_set():
            return "ended"
        if machine.paused:
            return "paused"
        if self._asleep:
            return "asleep"
        return "running" if machine.started_ns else "not started"

    def describe(self) -> dict[str, Any]:
        """Say what it is, and what it does."""
        machine = self._machine
        now = machine.ended_ns or time.monotonic_ns()
        outcome = machine.outcome
        return {
            "name": self.name,
            "state": self.state,
            "vcpus": len(machine.vcpus),
            "memory_bytes": machine.config.memory_size,
            "uptime_s": round((now - machine.started_ns) / 1e9, 3) if machine.started_ns else 0,
            "boots": machine.boots,
            "end": outcome.end.value if outcome else None,
            "detail": outcome.detail if outcome else None,
            "terminals": self._hub.terminals if self._hub is not None else 0,
        }

    @property
    def asks(self) -> Mapping[str, Ask]:
        """The questions that it answers."""
        return self._asks

    # -- what it is told

    def _status(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        return self.describe()

    def _pause(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        self._machine.pause(_number(request, "timeout_s", 10.0, _PAUSE_S))
        return self.describe()

    def _resume(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        self._machine.resume()
        return self.describe()

    def _power_button(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        if self._machine.paused:
            raise Refused("the machine is paused, its guest sees no button: resume it first")
        self._machine.press_power_button()
        return self.describe()

    def _reset(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        self._machine.reset("by command")
        return self.describe()

    def _end(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        self._machine.end(Outcome(End.STOPPED, "by command"))
        return self.describe()

    def _events(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """From now on the connection gets a line for each event."""
        if connection not in self._listeners:

            def tell(event: Event, more: dict[str, str]) -> None:
                connection.post({"event": event.value, "machine": self.name, **more})

            def end() -> None:
                self._machine.events.remove(self._listeners.pop(connection, None) or tell)

            self._listeners[connection] = tell
            self._machine.events.add(tell)
            connection.at_end.append(end)
        return self.describe()

    def _dump(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        return {**self.describe(), "cpus": dump(self._machine)}

    def _nmi(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        wanted = request.get("vcpu")
        vcpus = self._machine.vcpus
        if wanted is not None and not (type(wanted) is int and 0 <= wanted < len(vcpus)):
            raise Refused(f"vcpu: expected a number from 0 to {len(vcpus) - 1}")
        self._machine.expect_going()
        for thread in vcpus:
            if wanted in (None, thread.index):
                # the vCPU's thread has its mutex while it runs
                thread.vcpu.call_soon(thread.vcpu.nmi)
        return self.describe()

    def _sysrq(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        key = request.get("key")
        if not isinstance(key, str) or len(key) != 1 or not key.isascii() or not key.isprintable():
            raise Refused("key: expected one character")
        self._machine.expect_going()
        serial = self._machine.board.serial
        serial.send_break()
        serial.feed(key.encode())
        return self.describe()

    def _console(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Serve the terminal whose socket comes with the request."""
        if self._hub is None:
            raise Refused("the machine's console is not shared")
        channel = _given_socket(connection)
        self._hub.attach(channel, past=request.get("past", True) is not False)
        return self.describe()

    def _vsock(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Lead the socket that comes with the request to a vsock port of the guest's."""
        port = request.get("port")
        if type(port) is not int or not 0 <= port < 0xFFFFFFFF:
            raise Refused("port: expected a number below 4294967295")
        with contextlib.ExitStack() as undo:
            channel = undo.enter_context(_given_socket(connection))
            try:
                guest = self._machine.vsock.connect(port)
            except OSError as error:
                raise Refused(f"port {port} of the guest's: {error.strerror or error}") from None
            undo.pop_all()
        bridge(channel, guest)
        return self.describe()

    def _balloon(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Set the balloon's size, if one is given, ask for free pages, if that is wanted, and say what there is."""
        for transport in self._machine.board.virtio.transports.values():
            device = transport.device
            if isinstance(device, Balloon):
                try:
                    _change(device, request)
                except MachineError as error:
                    raise Refused(str(error)) from None
                about = {"target_bytes": device.target, "size_bytes": device.size, **device.reclaimed}
                return {**self.describe(), "balloon": {**about, **device.statistics(_STATISTICS_S)}}
        raise Refused("the machine has no balloon (softkvm run --balloon)")

    def _net(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Say what network devices there are; pull the cable of one, or plug it in."""
        wanted, link = request.get("device"), request.get("link")
        devices = [transport.device for transport in self._machine.board.virtio.transports.values()]
        found = [device for device in devices if isinstance(device, Net) and wanted in (None, device.name)]
        if not found:
            raise Refused("the machine has no such network device (softkvm run --net)")
        if link is not None:
            if link not in ("up", "down") or len(found) != 1:
                raise Refused("link: expected up or down, and which device")
            with found[0].worker.lock:
                found[0].set_link(link == "up")
        told = []
        for device in found:
            with device.worker.lock:
                told.append(device.describe())
        return {**self.describe(), "net": told}


def _change(balloon: Balloon, request: dict[str, Any]) -> None:
    """Do what a question about *balloon* asks for first."""
    target = request.get("target_bytes")
    if target is not None:
        if type(target) is not int:
            raise Refused("target_bytes: expected a number")
        balloon.set_target(target)
    if request.get("reclaim") is True:
        if balloon.hinting is None:
            raise Refused("the machine's balloon has no hinting (softkvm run --balloon hinting)")
        balloon.hinting.reclaim()


def _given_socket(connection: Connection) -> socket.socket:
    """Return the UNIX stream socket that has come with a question; Refused if none has."""
    if not connection.given:
        raise Refused("the request lacks the descriptor of a socket")
    fd = os.dup(connection.given[0])
    _softcpu.close_own_descriptor(connection.given.pop(0))
    try:
        channel = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise Refused("the descriptor is of no socket") from None
    if channel.family != socket.AF_UNIX or channel.type != socket.SOCK_STREAM:
        channel.close()
        raise Refused("the descriptor is of no UNIX stream socket")
    return channel


def _number(request: dict[str, Any], name: str, default: float, most: float) -> float:
    value = request.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise Refused(f"{name}: expected a number above 0, up to {most:g}")
    return float(value)
