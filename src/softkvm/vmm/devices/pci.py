# SPDX-License-Identifier: Apache-2.0
"""PCI functions: configuration space with base address registers that place the function on the buses.

Source: PCI Local Bus Specification 3.0, section 6.1 (configuration header), 6.2.5.1 (base address registers).
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any, Final

from softkvm.vmm.bus import Bus, Device

CONFIG_SIZE: Final = 256

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
REVISION: Final = 0x08
CLASS: Final = 0x09
HEADER_TYPE: Final = 0x0E
BAR_0: Final = 0x10
BAR_COUNT: Final = 6
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
INTERRUPT_LINE: Final = 0x3C

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
BAR_IO: Final = 1

HOST_BRIDGE_CLASS: Final = 0x060000


@dataclass(slots=True)
class Bar:
    """A base address register: *size* bytes (a power of two) where *device* answers, in I/O or in memory space."""

    size: int
    device: Device
    is_io: bool
    name: str
    mapped_at: int | None = None


class Function:
    """A function with header type 0. ``connect`` gives it the buses that its registers map it on."""

    def __init__(self, vendor: int, device: int, class_code: int, revision: int = 0) -> None:
        self._config = bytearray(CONFIG_SIZE)
        struct.pack_into("<HH", self._config, VENDOR_ID, vendor, device)
        self._config[REVISION] = revision
        self._config[CLASS : CLASS + 3] = class_code.to_bytes(3, "little")
        self._writable = bytearray(CONFIG_SIZE)
        struct.pack_into("<H", self._writable, COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER)
        self._writable[INTERRUPT_LINE] = 0xFF
        self._bars: dict[int, Bar] = {}
        self._pio: Bus | None = None
        self._mmio: Bus | None = None

    def add_bar(self, index: int, bar: Bar, address: int) -> None:
        """Give the function base address register *index*, set to *address* as firmware would."""
        offset = BAR_0 + 4 * index
        flags = BAR_IO if bar.is_io else 0
        mask = ~(bar.size - 1) & 0xFFFFFFFF & ~flags
        struct.pack_into("<I", self._config, offset, address | flags)
        struct.pack_into("<I", self._writable, offset, mask)
        self._config[COMMAND] |= COMMAND_IO if bar.is_io else COMMAND_MEMORY
        self._bars[index] = bar
        self._map()

    def connect(self, pio: Bus, mmio: Bus) -> None:
        """Map the function on these buses."""
        self._pio, self._mmio = pio, mmio
        self._map()

    def read(self, register: int, size: int) -> int:
        """Read *size* bytes of the configuration space."""
        return int.from_bytes(self._config[register : register + size], "little")

    def write(self, register: int, size: int, value: int) -> None:
        """Write the writable bits of *size* bytes of the configuration space."""
        for index in range(register, min(register + size, CONFIG_SIZE)):
            mask = self._writable[index]
            self._config[index] = self._config[index] & ~mask | value & mask
            value >>= 8
        if register < BAR_0 + 4 * BAR_COUNT:
            self._map()

    def _map(self) -> None:
        """Let each register's device answer where the register says, if the command register lets it."""
        command = self._config[COMMAND]
        for index, bar in self._bars.items():
            bus = self._pio if bar.is_io else self._mmio
            if bus is None:
                continue
            (value,) = struct.unpack_from("<I", self._config, BAR_0 + 4 * index)
            address = value & ~(bar.size - 1)
            decoded = command & (COMMAND_IO if bar.is_io else COMMAND_MEMORY)
            # while a register is sized, it holds an address at the end of the space: nothing is there to answer
            wanted = address if decoded and 0 < address < min(bus.limit, 1 << 32) - bar.size else None
            if wanted == bar.mapped_at:
                continue
            if bar.mapped_at is not None:
                bus.remove(bar.mapped_at)
                bar.mapped_at = None
            if wanted is not None:
                with contextlib.suppress(ValueError):  # where another device answers, we don't
                    bus.add(wanted, bar.size, bar.device, bar.name)
                    bar.mapped_at = wanted

    def save(self) -> dict[str, Any]:
        """The configuration space."""
        return {"config": bytes(self._config)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._config[:] = state["config"]
        self._map()


def host_bridge() -> Function:
    """Return the host bridge of QEMU's ``pc`` machine, an Intel 82441FX, without its memory controls."""
    return Function(0x8086, 0x1237, HOST_BRIDGE_CLASS, revision=2)
