# SPDX-License-Identifier: Apache-2.0
"""What firmware for QEMU's ``pc`` machine wants of the chip set: the 82441FX's memory controls, the PIIX3's interrupt
routing, and the PIIX4's power-management function, which places the ACPI registers.

Source: Intel 82441FX data sheet (290549), PAM[6:0]; 82371SB (PIIX3, 290550), PIRQRC; 82371AB (PIIX4, 290562), section
7.1 (PMBA, DEVACTB, PMREGMISC).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.bus import Bus, Device
from softkvm.vmm.devices.pci import HEADER_TYPE, HOST_BRIDGE_CLASS, Function

INTEL: Final = 0x8086
I440FX: Final = 0x1237
PIIX3_ISA: Final = 0x7000
PIIX4_PM: Final = 0x7113
ISA_BRIDGE_CLASS: Final = 0x060100
OTHER_BRIDGE_CLASS: Final = 0x068000
MULTIFUNCTION: Final = 1 << 7

PAM: Final = 0x59
PAM_REGISTERS: Final = 7
PIRQ_ROUTE: Final = 0x60
PIRQ_ROUTES: Final = 4
PIRQ_OFF: Final = 0x80
PM_BASE: Final = 0x40
PM_BASE_MASK: Final = 0xFFC0
PM_BASE_IO: Final = 1
DEVICE_ACTIVITY_B: Final = 0x58
APMC_ENABLE: Final = 1 << 25
PM_MISC: Final = 0x80
PM_IO_ENABLE: Final = 1
SMBUS_BASE: Final = 0x90
SMBUS_CONFIG: Final = 0xD2


class HostBridge(Function):
    """The 82441FX, whose PAM registers can be written: the memory behind them is RAM whatever they say."""

    def __init__(self) -> None:
        super().__init__(INTEL, I440FX, HOST_BRIDGE_CLASS, revision=2)
        self._writable[PAM : PAM + PAM_REGISTERS] = b"\x33" * PAM_REGISTERS


class IsaBridge(Function):
    """The PIIX3's ISA bridge. Its routes can be written and read; devices' lines are wired to the chips directly."""

    def __init__(self) -> None:
        super().__init__(INTEL, PIIX3_ISA, ISA_BRIDGE_CLASS)
        self._config[HEADER_TYPE] = MULTIFUNCTION
        self._config[PIRQ_ROUTE : PIRQ_ROUTE + PIRQ_ROUTES] = bytes([PIRQ_OFF]) * PIRQ_ROUTES
        self._writable[PIRQ_ROUTE : PIRQ_ROUTE + PIRQ_ROUTES] = b"\x8f" * PIRQ_ROUTES


class PowerManagement(Function):
    """The PIIX4's function 3: *device*, the ACPI registers of *size* ports, lies on *pio* where PMBA says.

    *moved* is told of each new place. System management mode is said to be set up: firmware leaves it alone then.
    """

    def __init__(self, pio: Bus, device: Device, size: int, moved: Callable[[int], None]) -> None:
        super().__init__(INTEL, PIIX4_PM, OTHER_BRIDGE_CLASS, revision=3)
        self._ports = pio
        self._device = device
        self._size = size
        self._told = moved
        self._at: int | None = None
        struct.pack_into("<I", self._config, PM_BASE, PM_BASE_IO)
        struct.pack_into("<I", self._config, DEVICE_ACTIVITY_B, APMC_ENABLE)
        struct.pack_into("<I", self._config, SMBUS_BASE, PM_BASE_IO)
        struct.pack_into("<I", self._writable, PM_BASE, PM_BASE_MASK)
        struct.pack_into("<I", self._writable, SMBUS_BASE, 0xFFF0)
        self._writable[PM_MISC] = PM_IO_ENABLE
        self._writable[SMBUS_CONFIG] = 0x0F

    def write(self, register: int, size: int, value: int) -> None:
        """Write, and move the registers if that is what it means."""
        super().write(register, size, value)
        if register <= PM_MISC:
            self._place()

    def _place(self) -> None:
        (base,) = struct.unpack_from("<I", self._config, PM_BASE)
        base &= PM_BASE_MASK
        wanted = base if base and self._config[PM_MISC] & PM_IO_ENABLE else None
        if wanted == self._at:
            return
        if self._at is not None:
            self._ports.remove(self._at)
            self._at = None
        if wanted is not None:
            with contextlib.suppress(ValueError):  # where another device answers, this one doesn't
                self._ports.add(wanted, self._size, self._device, "acpi-pm")
                self._at = wanted
                self._told(wanted)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        super().restore(state)
        self._place()
