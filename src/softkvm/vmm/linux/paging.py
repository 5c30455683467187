# SPDX-License-Identifier: Apache-2.0
"""Page tables of long mode, walked in guest memory: without a vCPU, so that one may run meanwhile.

Source: AMD64 Architecture Programmer's Manual, volume 2, 5.3 (long-mode page translation).
"""

from __future__ import annotations

from typing import Final

from softkvm.vmm.debug.virtual import MemoryFault, pages
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_CACHED_MOST: Final = 1 << 16


class PageTables:
    """The address space whose top table is at guest-physical *root*, with *levels* of tables (4 or 5).

    ``mask`` is what the guest has in entries beside addresses (memory encryption). Translations are kept until
    :meth:`forget`: for a kernel's own addresses, which hardly change.
    """

    def __init__(self, memory: GuestMemory, root: int, levels: int = 4, mask: int = 0) -> None:
        self._memory = memory
        self._root = root
        self._levels = levels
        self._address = _ADDRESS & ~mask
        self._pages: dict[int, int] = {}

    def forget(self) -> None:
        """Look into the tables again."""
        self._pages.clear()

    def translate(self, address: int) -> int:
        """Return the guest-physical address that a virtual one leads to; MemoryFault if there is none."""
        page = address // PAGE_SIZE
        found = self._pages.get(page)
        if found is None:
            found = self._walk(address)
            if len(self._pages) < _CACHED_MOST:
                self._pages[page] = found
        return found + address % PAGE_SIZE

    def _walk(self, address: int) -> int:
        top = address >> (47 if self._levels == 4 else 56)
        if top not in (0, (1 << 17) - 1, (1 << 8) - 1) or (self._levels == 4 and top == (1 << 8) - 1):
            raise MemoryFault(address, f"virtual {address:#x} is not canonical")
        table = self._root
        for level in range(self._levels - 1, -1, -1):
            index = address >> 12 + 9 * level & 511
            try:
                entry = int.from_bytes(self._memory.read(table + 8 * index, 8), "little")
            except IndexError:
                raise MemoryFault(address, f"the tables of virtual {address:#x} lead out of RAM") from None
            if not entry & _PRESENT:
                break
            frame = entry & self._address
            if level == 0:
                return frame
            if entry & _LARGE and level <= 2:
                size = PAGE_SIZE << 9 * level
                return (frame & ~(size - 1)) + (address & (size - 1) & ~(PAGE_SIZE - 1))
            table = frame
        raise MemoryFault(address, f"virtual {address:#x} is not mapped")

    def read(self, address: int, size: int) -> bytes:
        """Return the *size* bytes at a virtual address; MemoryFault if one of its pages is not there."""
        parts = []
        for at, count in pages(address, size):
            try:
                parts.append(self._memory.read(self.translate(at), count))
            except IndexError:
                raise MemoryFault(at, f"virtual {at:#x} leads to no RAM") from None
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Store *data* at a virtual address, read-only or not; MemoryFault, and nothing written."""
        parts = [(at, count, self.translate(at)) for at, count in pages(address, len(data))]
        for at, count, gpa in parts:
            try:
                self._memory.slice(gpa, count)
            except IndexError:
                raise MemoryFault(at, f"virtual {at:#x} leads to no RAM") from None
        for at, count, gpa in parts:
            self._memory.write(gpa, data[at - address : at - address + count])
