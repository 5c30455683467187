# SPDX-License-Identifier: Apache-2.0
"""Ports by which programs without an ACPI interpreter turn emulated PCs off.

========  ============================================  =====================================================
port      what powers the machine off                   where it is from
========  ============================================  =====================================================
0x604     a word with bit 13 set and bits 12:10 clear   QEMU: PM1_CNT of its PIIX4, see :mod:`acpi_pm`
0xB004    the same                                      Bochs, and QEMU before 1.7: the same register's old place
0x8900    the characters of ``Shutdown``, one by one    Bochs, its "unmapped" device
========  ============================================  =====================================================

Teaching kernels use all three (Pintos's ``shutdown_power_off`` tries one after the other).
"""

from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.acpi_pm import CNT_SLP_EN, CNT_SLP_TYP_MASK

OLD_PM1_CNT_PORT: Final = 0xB004
OLD_PM1_CNT_SIZE: Final = 2
SHUTDOWN_PORT: Final = 0x8900
SHUTDOWN_SIZE: Final = 1
SHUTDOWN_TEXT: Final = b"Shutdown"


class OldPm1Control:
    """PM1_CNT at its old place: it only powers off."""

    def __init__(self, power_off: Callable[[], object]) -> None:
        self._power_off = power_off

    def read(self, offset: int, size: int) -> int:
        """Nothing is there to read."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """SLP_EN with sleep type 0 powers off."""
        value <<= 8 * offset
        if value & (CNT_SLP_EN | CNT_SLP_TYP_MASK) == CNT_SLP_EN:
            self._power_off()


class ShutdownPort:
    """Waits for its text; any other character starts over."""

    def __init__(self, power_off: Callable[[], object]) -> None:
        self._power_off = power_off
        self._seen = 0

    def read(self, offset: int, size: int) -> int:
        """Nothing is there to read."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the next character."""
        if value == SHUTDOWN_TEXT[self._seen]:
            self._seen += 1
        else:
            self._seen = int(value == SHUTDOWN_TEXT[0])
        if self._seen == len(SHUTDOWN_TEXT):
            self._seen = 0
            self._power_off()

    def save(self) -> dict[str, Any]:
        """How much of the text came."""
        return {"seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._seen = state["seen"]
