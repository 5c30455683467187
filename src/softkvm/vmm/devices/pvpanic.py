# SPDX-License-Identifier: Apache-2.0
"""The paravirtual panic device: a guest's kernel says that it panicked by writing one port.

Source: QEMU's specification of the pvpanic device (docs/specs/pvpanic), ISA variant: one byte at port 0x505, ACPI
id QEMU0001. Reading gives the events the machine understands, writing reports events.
"""

from collections.abc import Callable
from typing import Any, Final

PVPANIC_PORT: Final = 0x505

PANICKED: Final = 1 << 0
CRASH_LOADED: Final = 1 << 1  # a crash kernel takes over and will write its dump
SHUTDOWN: Final = 1 << 2
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
