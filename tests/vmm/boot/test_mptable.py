# SPDX-License-Identifier: Apache-2.0
"""The MultiProcessor tables, read as section 4 of the specification lays them out."""

import struct

import pytest

from softkvm.vmm.boot import layout, mptable
from softkvm.vmm.memory import MIB, GuestMemory

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}  # table 4-3


def find_pointer(memory: GuestMemory) -> bytes:
    """Search the first KiB of the extended BIOS data area as an operating system does (section 4)."""
    for address in range(layout.EBDA, layout.EBDA + 1024, 16):
        pointer = memory.read(address, 16)
        if pointer[:4] == b"_MP_" and sum(pointer) & 0xFF == 0:
            return pointer
    raise AssertionError("no floating pointer structure")


def entries(table: bytes) -> list[bytes]:
    found = []
    at = 44
    while at < len(table):
        found.append(table[at : at + SIZES[table[at]]])
        at += SIZES[table[at]]
    assert at == len(table)
    return found


@pytest.mark.parametrize("count", [1, 3, 16])
def test_table_is_found_and_lists_the_machine(count: int) -> None:
    memory = GuestMemory(2 * MIB)
    mptable.write_table(memory, range(count))
    pointer = find_pointer(memory)
    address, length, revision, _, feature = struct.unpack_from("<IBBBB", pointer, 4)
    assert (length, revision, feature) == (1, 4, 0)
    size = struct.unpack("<H", memory.read(address + 4, 2))[0]
    table = memory.read(address, size)
    assert address + size <= 0xA0000
    assert table[:4] == b"PCMP"
    assert sum(table) & 0xFF == 0
    assert struct.unpack_from("<I", table, 36)[0] == 0xFEE00000
    found = entries(table)
    assert struct.unpack_from("<H", table, 34)[0] == len(found)
    assert [(e[1], e[3]) for e in found if e[0] == 0] == [(n, 3 if n == 0 else 1) for n in range(count)]
    assert [e[1:] for e in found if e[0] == 1] == [b"\0PCI   ", b"\1ISA   "]
    (ioapic,) = [e for e in found if e[0] == 2]
    assert ioapic[1] not in range(count)  # "must be unique" (4.3.3)
    assert (ioapic[3], struct.unpack_from("<I", ioapic, 4)[0]) == (1, 0xFEC00000)
    # source bus and IRQ, destination pin: identity, but for the timer at pin 2
    interrupts = {e[5]: (e[1], e[4], e[6], e[7]) for e in found if e[0] == 3}
    assert interrupts == {n: (0, 1, ioapic[1], n or 2) for n in range(16) if n != 2}
    assert [(e[1], e[6], e[7]) for e in found if e[0] == 4] == [(3, 0xFF, 0), (1, 0xFF, 1)]
    memory.close()
