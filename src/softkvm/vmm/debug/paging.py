# SPDX-License-Identifier: Apache-2.0
"""Page tables, walked in guest memory: without asking a vCPU, so that it may run meanwhile.

Source: AMD64 Architecture Programmer's Manual, volume 2, 5.2 (legacy-mode page translation) and 5.3 (long mode).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_CACHED_MOST: Final = 1 << 16
_CR0_PG, _CR4_PSE, _CR4_PAE, _CR4_LA57, _EFER_LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
_END: Final = 1 << 64
_BYTES: Final = Size(
    "bytes that a debugger reads or writes at once", 1 << 30, lambda message: MemoryFault(0, message), where=__name__,
    effect="MemoryFault",
)  # fmt: skip


class MemoryFault(LookupError):
    """Nothing to read or write at *address*: no translation leads from there, or not to RAM."""

    def __init__(self, address: int, message: str) -> None:
        super().__init__(message)
        self.address = address


def pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that lie in one page each: address and size. MemoryFault if it wraps."""
    _BYTES.check(size)
    if not 0 <= address < _END or address + size > _END:
        raise MemoryFault(address, f"virtual {address:#x}+{size:#x} is beyond 64 bits")
    while size > 0:
        part = min(size, PAGE_SIZE - address % PAGE_SIZE)
        yield address, part
        address += part
        size -= part


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


def walk(memory: GuestMemory, sregs: abi.kvm_sregs, address: int) -> int:
    """Return where a virtual address leads by the tables of a vCPU with these registers, whoever may go there.

    MemoryFault if there is no translation.
    """
    if not sregs.cr0 & _CR0_PG:
        return address & 0xFFFF_FFFF
    if sregs.efer & _EFER_LMA:
        levels = 5 if sregs.cr4 & _CR4_LA57 else 4
        return PageTables(memory, sregs.cr3 & _ADDRESS, levels).translate(address)
    try:
        if sregs.cr4 & _CR4_PAE:
            return _walk_pae(memory, sregs.cr3 & 0xFFFF_FFE0, address)
        return _walk_legacy(memory, sregs.cr3 & 0xFFFF_F000, address, large=bool(sregs.cr4 & _CR4_PSE))
    except IndexError:
        raise MemoryFault(address, f"the tables of virtual {address:#x} lead out of RAM") from None


def _entry(memory: GuestMemory, place: int, size: int, address: int) -> int:
    entry = int.from_bytes(memory.read(place, size), "little")
    if not entry & _PRESENT:
        raise MemoryFault(address, f"virtual {address:#x} is not mapped")
    return entry


def _walk_pae(memory: GuestMemory, table: int, address: int) -> int:
    """Three levels with entries of 8 bytes (5.2.3, 5.2.4)."""
    table = _entry(memory, table + 8 * (address >> 30 & 3), 8, address) & _ADDRESS
    entry = _entry(memory, table + 8 * (address >> 21 & 511), 8, address)
    if entry & _LARGE:
        return (entry & _ADDRESS & ~0x1F_FFFF) + (address & 0x1F_FFFF)
    entry = _entry(memory, (entry & _ADDRESS) + 8 * (address >> 12 & 511), 8, address)
    return (entry & _ADDRESS) + address % PAGE_SIZE


def _walk_legacy(memory: GuestMemory, table: int, address: int, *, large: bool) -> int:
    """Two levels with entries of 4 bytes; large pages have bits 39:32 of their address in bits 20:13 (5.2.2)."""
    entry = _entry(memory, table + 4 * (address >> 22 & 1023), 4, address)
    if large and entry & _LARGE:
        return (entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32) + (address & 0x3F_FFFF)
    entry = _entry(memory, (entry & 0xFFFF_F000) + 4 * (address >> 12 & 1023), 4, address)
    return (entry & 0xFFFF_F000) + address % PAGE_SIZE
