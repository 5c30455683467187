# SPDX-License-Identifier: Apache-2.0
"""The paravirtual panic device: a guest's kernel says that it panicked by writing one byte.

Source: QEMU's specification of the pvpanic device (docs/specs/pvpanic): the ISA variant at port 0x505 with ACPI id
QEMU0001, the PCI variant 1b36:0011 with the byte in its first memory range. Reading gives the events the machine
understands, writing reports events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from softkvm.vmm.devices.pci import Bar, Function
from softkvm.vmm.errors import ConfigError

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

PVPANIC_PORT: Final = 0x505

PANICKED: Final = 1 << 0
CRASH_LOADED: Final = 1 << 1  # a crash kernel takes over and will write its dump
SHUTDOWN: Final = 1 << 2
VENDOR: Final = 0x1B36
DEVICE: Final = 0x0011
CLASS_SYSTEM_OTHER: Final = 0x088000
MEMORY_SIZE: Final = 16

_EVENTS: Final = PANICKED | CRASH_LOADED | SHUTDOWN


class PvPanic:
    """Calls ``event(bits)`` with the known bits of what the guest reports."""

    def __init__(self, event: Callable[[int], object] | None = None) -> None:
        self._event = event

    def read(self, offset: int, size: int = 1) -> int:
        """The supported events."""
        return _EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        """Report events; unknown bits are ignored."""
        if value & _EVENTS and self._event is not None:
            self._event(value & _EVENTS)

    def save(self) -> dict[str, Any]:
        """Nothing: the device holds no state."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class PvPanicPci(Function):
    """The same as a function on the PCI bus."""

    def __init__(self, device: PvPanic, address: int) -> None:
        super().__init__(VENDOR, DEVICE, CLASS_SYSTEM_OTHER, revision=1)
        self.add_bar(0, Bar(MEMORY_SIZE, device, False, "pvpanic-pci"), address)


@dataclass(frozen=True, slots=True)
class PvPanicSpec:
    """``--pvpanic``: the PCI variant, beside the ISA one that every machine has."""

    def attach(self, machine: Machine) -> PvPanicPci:
        """Make the function."""
        device = PvPanic(machine.board.panicked)
        return machine.board.add_function(lambda address: PvPanicPci(device, address))


def parse(text: str) -> PvPanicSpec:
    """Read ``--pvpanic``'s text: ``pci``."""
    if text != "pci":
        raise ConfigError(f"--pvpanic {text}: expected pci (the ISA variant is always there)")
    return PvPanicSpec()
