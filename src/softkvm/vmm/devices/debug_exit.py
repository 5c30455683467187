# SPDX-License-Identifier: Apache-2.0
"""The debug-exit port: a test program ends the machine with a status.

Source: QEMU's isa-debug-exit device, as kvm-unit-tests configure it (port 0xF4, four bytes wide): writing ``v`` ends
the machine with exit status ``v << 1 | 1``, so a status is never zero.
"""

from collections.abc import Callable
from typing import Any, Final

DEBUG_EXIT_PORT: Final = 0xF4
DEBUG_EXIT_SIZE: Final = 4


class DebugExit:
    """Calls ``end(status)`` with the process status that a write asks for."""

    def __init__(self, end: Callable[[int], object] | None = None) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        """Zero, as QEMU's."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine."""
        if self._end is not None:
            self._end((value << 1 | 1) & 0xFF)

    def save(self) -> dict[str, Any]:
        """Nothing: the device holds no state."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""
