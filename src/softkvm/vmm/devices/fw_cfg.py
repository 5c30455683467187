# SPDX-License-Identifier: Apache-2.0
"""The firmware configuration device: numbered items, some of them files, that a guest selects by one port and reads.

Source: QEMU's specification of fw_cfg (docs/specs/fw_cfg), x86 I/O ports: selector at port 0x510 (16 bits), data at
port 0x511 (8 bits), and the DMA interface's address at 0x514 (64 bits, big-endian; the lower half starts the transfer).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import GuestMemory

FW_CFG_PORT: Final = 0x510
FW_CFG_SIZE: Final = 2
DMA_PORT: Final = 0x514
DMA_SIZE: Final = 8

SIGNATURE: Final = 0x00
ID: Final = 0x01
UUID: Final = 0x02
RAM_SIZE: Final = 0x03
NOGRAPHIC: Final = 0x04
NB_CPUS: Final = 0x05
MAX_CPUS: Final = 0x0F
FILE_DIR: Final = 0x19
FIRST_FILE: Final = 0x20

ID_TRADITIONAL: Final = 1 << 0
ID_DMA: Final = 1 << 1

DMA_ERROR: Final = 1 << 0
DMA_READ: Final = 1 << 1
DMA_SKIP: Final = 1 << 2
DMA_SELECT: Final = 1 << 3
DMA_WRITE: Final = 1 << 4
DMA_SIGNATURE: Final = int.from_bytes(b"QEMU CFG", "big")
_ACCESS: Final = struct.Struct(">IIQ")  # control, length, address
_ENTRY: Final = struct.Struct(">IHH56s")  # size, select, reserved, name

Contents = bytes | Callable[[], bytes]
"""An item: its bytes, or what makes them when a guest first wants to know."""

_ITEM: Final = Size(
    "bytes read of an item of fw_cfg", 0xFFFFFFFF, None, giver="guest", effect="read as zeroes", where=__name__
)
_NAME: Final = Size("bytes of a file's name in fw_cfg", 55, ConfigError, effect="ConfigError", where=__name__)
_FILES: Final = Size("files of fw_cfg", 0x4000 - FIRST_FILE, ConfigError, effect="ConfigError", where=__name__)


def machine_items(ram_size: int, vcpus: int, max_apic_id: int, *, dma: bool = False) -> dict[int, Contents]:
    """Return the items that describe a machine."""
    return {
        SIGNATURE: b"QEMU",
        ID: (ID_TRADITIONAL | (ID_DMA if dma else 0)).to_bytes(4, "little"),
        UUID: bytes(16),
        RAM_SIZE: ram_size.to_bytes(8, "little"),
        NOGRAPHIC: (1).to_bytes(2, "little"),
        NB_CPUS: vcpus.to_bytes(2, "little"),
        MAX_CPUS: (max_apic_id + 1).to_bytes(2, "little"),
    }


class FwCfg:
    """*items* by their number, and *files* by their name. An item that is not there, or has ended, reads as zeroes."""

    def __init__(self, items: Mapping[int, Contents], files: Mapping[str, Contents] | None = None) -> None:
        self._items = dict(items)
        self._names = sorted(files or {})  # as the directory has them
        _FILES.check(len(self._names))
        for number, name in enumerate(self._names, FIRST_FILE):
            _NAME.check(len(name.encode()), called=f"file {name!r}")
            self._items[number] = (files or {})[name]
        self._items[FILE_DIR] = self._directory
        self._lock = threading.Lock()
        self._selected = 0
        self._position = 0

    def _directory(self) -> bytes:
        entries = [
            _ENTRY.pack(len(self._item(number)), number, 0, name.encode())
            for number, name in enumerate(self._names, FIRST_FILE)
        ]
        return len(entries).to_bytes(4, "big") + b"".join(entries)

    def _item(self, number: int) -> bytes:
        """The contents of an item, made now if nobody has asked before."""
        item = self._items.get(number, b"")
        if not isinstance(item, bytes):
            item = self._items[number] = item()
        return item

    def take(self, size: int) -> bytes:
        """Read *size* bytes of the selected item, of which there may be fewer."""
        with self._lock:
            start = self._position
            self._position = _ITEM.cut(start + size)
            return self._item(self._selected)[start : start + size]

    def select(self, number: int) -> None:
        """Select an item, from its beginning."""
        with self._lock:
            self._selected = number
            self._position = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the selected item; the selector cannot be read."""
        if offset != 1 or size != 1:
            return 0
        return int.from_bytes(self.take(1), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item; writing data is not part of the interface any more."""
        if offset == 0 and size == 2:
            self.select(value)

    def save(self) -> dict[str, Any]:
        """The selection."""
        with self._lock:
            return {"selected": self._selected, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        with self._lock:
            self._selected = state["selected"]
            self._position = state["position"]


class FwCfgDma:
    """The DMA interface of *fw_cfg*: the guest gives the address of a control structure in *memory*."""

    def __init__(self, fw_cfg: FwCfg, memory: GuestMemory) -> None:
        self._fw_cfg = fw_cfg
        self._memory = memory
        self._high = 0

    def read(self, offset: int, size: int) -> int:
        """The interface's signature."""
        return int.from_bytes(DMA_SIGNATURE.to_bytes(DMA_SIZE, "big")[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take an address, whose lower half starts the transfer."""
        data = value.to_bytes(size, "little")
        if size == DMA_SIZE:
            self._transfer(int.from_bytes(data, "big"))
        elif size == 4 and offset == 0:
            self._high = int.from_bytes(data, "big")
        elif size == 4 and offset == 4:
            address, self._high = self._high << 32 | int.from_bytes(data, "big"), 0
            self._transfer(address)

    def _transfer(self, at: int) -> None:
        """Do what the structure at *at* says; its control field tells whether that was possible."""
        try:
            control, length, address = _ACCESS.unpack(self._memory.read(at, _ACCESS.size))
        except IndexError:
            return  # nowhere to tell it
        if control & DMA_SELECT:
            self._fw_cfg.select(control >> 16)
        error = 0
        try:
            if control & DMA_READ:
                target = self._memory.slice(address, length)
                data = self._fw_cfg.take(length)
                target[: len(data)] = data
                if len(data) < length:
                    self._memory.clear(address + len(data), length - len(data))
                self._written(address, length)
            elif control & DMA_WRITE:
                error = DMA_ERROR  # no item can be written
            elif control & DMA_SKIP:
                self._fw_cfg.take(length)
        except IndexError:
            error = DMA_ERROR
        self._memory.write(at, error.to_bytes(4, "big"))
        self._written(at, 4)

    def _written(self, address: int, size: int) -> None:
        if self._memory.logging:
            self._memory.mark_written(address, size)

    def save(self) -> dict[str, Any]:
        """The half of an address that was written."""
        return {"high": self._high}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._high = state["high"]
