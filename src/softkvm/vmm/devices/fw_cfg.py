# SPDX-License-Identifier: Apache-2.0
"""The firmware configuration device: numbered items that a guest selects by one port and reads from another.

Source: QEMU's specification of fw_cfg (docs/specs/fw_cfg), x86 I/O port variant without DMA: selector at port 0x510
(16 bits), data at port 0x511 (8 bits).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from softkvm.abi.sizes import Size

FW_CFG_PORT: Final = 0x510
FW_CFG_SIZE: Final = 2

SIGNATURE: Final = 0x00
ID: Final = 0x01
UUID: Final = 0x02
RAM_SIZE: Final = 0x03
NOGRAPHIC: Final = 0x04
NB_CPUS: Final = 0x05
MAX_CPUS: Final = 0x0F
FILE_DIR: Final = 0x19

ID_TRADITIONAL: Final = 1 << 0  # no DMA interface

_ITEM: Final = Size(
    "bytes read of an item of fw_cfg", 0xFFFFFFFF, None, giver="guest", effect="read as zeroes", where=__name__
)


def machine_items(ram_size: int, vcpus: int, max_apic_id: int) -> dict[int, bytes]:
    """Return the items that describe a machine."""
    return {
        SIGNATURE: b"QEMU",
        ID: ID_TRADITIONAL.to_bytes(4, "little"),
        UUID: bytes(16),
        RAM_SIZE: ram_size.to_bytes(8, "little"),
        NOGRAPHIC: (1).to_bytes(2, "little"),
        NB_CPUS: vcpus.to_bytes(2, "little"),
        MAX_CPUS: (max_apic_id + 1).to_bytes(2, "little"),
        FILE_DIR: bytes(4),  # no files
    }


class FwCfg:
    """*items* by their number. An item that is not there, or has ended, reads as zeroes."""

    def __init__(self, items: Mapping[int, bytes]) -> None:
        self._items = dict(items)
        self._lock = threading.Lock()
        self._selected = 0
        self._position = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the selected item; the selector cannot be read."""
        if offset != 1 or size != 1:
            return 0
        with self._lock:
            item = self._items.get(self._selected, b"")
            position = self._position
            self._position = _ITEM.cut(position + 1)
            return item[position] if position < len(item) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item; writing data is not part of the interface any more."""
        if offset == 0 and size == 2:
            with self._lock:
                self._selected = value
                self._position = 0

    def save(self) -> dict[str, Any]:
        """The selection."""
        with self._lock:
            return {"selected": self._selected, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        with self._lock:
            self._selected = state["selected"]
            self._position = state["position"]
