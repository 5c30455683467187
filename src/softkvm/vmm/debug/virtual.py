# SPDX-License-Identifier: Apache-2.0
"""Guest memory by virtual address, as a vCPU sees it now: page by page, each by KVM_TRANSLATE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from softkvm import api
from softkvm.abi.sizes import Size
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

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


def translate(vcpu: api.Vcpu, address: int) -> int:
    """Return the guest-physical address that a virtual one leads to; MemoryFault if there is none.

    The vCPU has to be out of KVM_RUN; otherwise this waits until it is.
    """
    found = vcpu.translate(address)
    if not found.valid:
        raise MemoryFault(address, f"virtual {address:#x} is not mapped")
    return found.physical_address


def _slice(memory: GuestMemory, address: int, gpa: int, size: int) -> memoryview:
    try:
        return memory.slice(gpa, size)
    except IndexError:
        raise MemoryFault(address, f"virtual {address:#x} leads to guest physical {gpa:#x}, which is no RAM") from None


def read_virtual(vcpu: api.Vcpu, memory: GuestMemory, address: int, size: int) -> bytes:
    """Return the *size* bytes at a virtual address; MemoryFault if one of its pages is not there."""
    parts = pages(address, size)
    return b"".join(bytes(_slice(memory, at, translate(vcpu, at), count)) for at, count in parts)


def write_virtual(vcpu: api.Vcpu, memory: GuestMemory, address: int, data: bytes) -> None:
    """Store *data* at a virtual address, whether the guest may write there or not; MemoryFault, and nothing written."""
    parts = list(pages(address, len(data)))
    places = [translate(vcpu, at) for at, _ in parts]
    for (at, count), gpa in zip(parts, places, strict=True):
        _slice(memory, at, gpa, count)
    for (at, count), gpa in zip(parts, places, strict=True):
        memory.write(gpa, data[at - address : at - address + count])
