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
STATUS: Final = 0x06
REVISION: Final = 0x08
CLASS: Final = 0x09
HEADER_TYPE: Final = 0x0E
BAR_0: Final = 0x10
BAR_COUNT: Final = 6
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4
BAR_IO: Final = 1

HOST_BRIDGE_CLASS: Final = 0x060000
FIRST_CAPABILITY: Final = 0x40


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
        self._capabilities_end = FIRST_CAPABILITY
        self._last_capability = CAPABILITIES
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

    def add_capability(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability (6.7): *body* behind its ID and its link; return where it begins.

        Bits of *body* that *writable* has set can be written.
        """
        at = self._capabilities_end
        end = at + 2 + len(body)
        if end > CONFIG_SIZE:
            raise ValueError(f"capability {identifier:#x} of {len(body)} bytes: no room behind {at:#x}")
        self._config[at] = identifier
        self._config[at + 2 : end] = body
        self._writable[at + 2 : at + 2 + len(writable)] = writable
        self._config[self._last_capability if self._last_capability == CAPABILITIES else self._last_capability + 1] = at
        self._config[STATUS] |= STATUS_CAPABILITIES
        self._last_capability = at
        self._capabilities_end = (end + 3) & ~3
        return at

    def set_interrupt(self, line: int) -> None:
        """Let the function have INTA#, which is wired to *line*."""
        self._config[INTERRUPT_LINE] = line
        self._config[INTERRUPT_PIN] = 1
        self._writable[COMMAND + 1] |= COMMAND_INTX_DISABLE >> 8

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self._config[COMMAND : COMMAND + 2], "little")

    def moved(self, index: int) -> None:
        """Base address register *index* has another place on its bus, or none: ``mapped_at``."""

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
            before = bar.mapped_at
            if before is not None:
                bus.remove(before)
                bar.mapped_at = None
            if wanted is not None:
                with contextlib.suppress(ValueError):  # where another device answers, we don't
                    bus.add(wanted, bar.size, bar.device, bar.name)
                    bar.mapped_at = wanted
            if bar.mapped_at != before:
                self.moved(index)

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
