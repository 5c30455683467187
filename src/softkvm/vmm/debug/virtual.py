# SPDX-License-Identifier: Apache-2.0
"""Guest memory by virtual address, as a vCPU sees it now: page by page, each by KVM_TRANSLATE."""

from __future__ import annotations

from softkvm import api
from softkvm.vmm.debug.paging import MemoryFault, pages, walk
from softkvm.vmm.memory import GuestMemory

__all__ = ["MemoryFault", "pages", "read_virtual", "translate", "write_virtual"]


def translate(vcpu: api.Vcpu, memory: GuestMemory, address: int) -> int:
    """Return the guest-physical address that a virtual one leads to; MemoryFault if there is none.

    KVM_TRANSLATE refuses what a kernel may not read now: its user's pages, with SMAP. So the tables are walked then.
    The vCPU has to be out of KVM_RUN; otherwise this waits until it is.
    """
    found = vcpu.translate(address)
    return found.physical_address if found.valid else walk(memory, vcpu.get_sregs(), address)


def _slice(memory: GuestMemory, address: int, gpa: int, size: int) -> memoryview:
    try:
        return memory.slice(gpa, size)
    except IndexError:
        raise MemoryFault(address, f"virtual {address:#x} leads to guest physical {gpa:#x}, which is no RAM") from None


def read_virtual(vcpu: api.Vcpu, memory: GuestMemory, address: int, size: int) -> bytes:
    """Return the *size* bytes at a virtual address; MemoryFault if one of its pages is not there."""
    parts = pages(address, size)
    return b"".join(bytes(_slice(memory, at, translate(vcpu, memory, at), count)) for at, count in parts)


def write_virtual(vcpu: api.Vcpu, memory: GuestMemory, address: int, data: bytes) -> None:
    """Store *data* at a virtual address, whether the guest may write there or not; MemoryFault, and nothing written."""
    parts = list(pages(address, len(data)))
    places = [translate(vcpu, memory, at) for at, _ in parts]
    for (at, count), gpa in zip(parts, places, strict=True):
        _slice(memory, at, gpa, count)
    for (at, count), gpa in zip(parts, places, strict=True):
        memory.write(gpa, data[at - address : at - address + count])
