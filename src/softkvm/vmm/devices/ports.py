# SPDX-License-Identifier: Apache-2.0
"""``--port NAME=unix:PATH|pty|file:PATH|stdio``: named streams between guest and host, and the console as a device.

All ports of a machine are one device's. A guest finds a port by its name: ``/dev/virtio-ports/NAME`` with udev,
``/sys/class/virtio-ports/*/name`` without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.port_ends import FileEnd, PtyEnd, StdioEnd, UnixEnd
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.devices.virtio_console import PORTS, Console, Outlet, Port, PortEnd
from softkvm.vmm.errors import ConfigError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

OPTION: Final = "--port"

NAME: Final = Size("bytes of a port's name", 255, ConfigError, least=1, effect="ConfigError", where=__name__)
"""A name is a file's in the guest."""

UNIX, FILE, PTY, STDIO = "unix:", "file:", "pty", "stdio"


@dataclass(frozen=True, slots=True)
class PortSpec:
    """``--port``."""

    name: str
    end: str
    """``unix:PATH``, ``file:PATH``, ``pty`` or ``stdio``."""
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> Console:
        """Make the device of all ports when the first comes; return it."""
        specs = [spec for spec in machine.config.device_specs if isinstance(spec, PortSpec)]
        present = (transport.device for transport in machine.board.virtio.transports.values())
        found = next((one for one in present if isinstance(one, Console) and one.multiport), None)
        if found is not None:
            return found
        names = [spec.name for spec in specs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{OPTION} {name}: two ports have that name")
        if not PORTS.allows(len(specs)):
            raise ConfigError(f"{len(specs)} ports: expected at most {PORTS.most}")
        if sum(spec.end == STDIO for spec in specs) > 1:
            raise ConfigError(f"{OPTION}: standard input and output can be one port's only")
        ends: list[PortEnd] = []
        try:
            for spec in specs:
                ends.append(spec.open())  # noqa: PERF401  those before have to be closed
        except ConfigError:
            for end in ends:
                end.close()
            raise
        device = Console([Port(end, spec.name) for end, spec in zip(ends, specs, strict=True)])
        self.placement.add(machine, device)
        return device

    def open(self) -> PortEnd:
        """Open the host's end; ConfigError if that cannot be."""
        try:
            if self.end.startswith(UNIX):
                return UnixEnd(self.end.removeprefix(UNIX))
            if self.end.startswith(FILE):
                return FileEnd(self.end.removeprefix(FILE))
            return PtyEnd(self.name) if self.end == PTY else StdioEnd()
        except ConfigError as error:
            raise ConfigError(f"{OPTION} {self.name}={error}") from None


def parse(text: str) -> PortSpec:
    """Read ``--port``'s text."""
    words = Words.of(OPTION, text)
    name, equals, end = words.first.partition("=")
    if not name or not equals:
        raise words.error("expected NAME=unix:PATH, NAME=file:PATH, NAME=pty or NAME=stdio")
    length = len(name.encode("utf-8", "surrogateescape"))
    if not NAME.allows(length):
        raise words.error(f"a name of {length} bytes, expected at most {NAME.most}")
    if "/" in name or not name.isprintable() or name in (".", ".."):
        raise words.error(f"name {name!r}: expected printable characters, and no '/'")
    if end not in (PTY, STDIO) and not (end.startswith((UNIX, FILE)) and end.partition(":")[2]):
        raise words.error(f"{end or 'nothing'}: expected unix:PATH, file:PATH, pty or stdio")
    spec = PortSpec(name, end, words.placement())
    words.end()
    return spec


@dataclass(frozen=True, slots=True)
class ConsoleSpec:
    """A console, ``/dev/hvc0`` of a Linux guest, whose output goes to a function; *size* is columns and rows."""

    output: Callable[[bytes], object]
    size: tuple[int, int] = (0, 0)
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> ConsoleLine:
        """Make the device."""
        outlet = Outlet(self.output)
        device = Console([Port(outlet, console=True)], self.size)
        self.placement.add(machine, device)
        return ConsoleLine(device, outlet)


@dataclass(frozen=True, slots=True)
class ConsoleLine:
    """A console device, and its end, which is a line as a serial port is one."""

    device: Console
    outlet: Outlet

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size; from any thread."""
        self.device.call(self.device.resize, columns, rows)
