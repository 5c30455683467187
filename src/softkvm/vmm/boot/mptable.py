# SPDX-License-Identifier: Apache-2.0
"""The MultiProcessor tables: processors and interrupts for operating systems without ACPI, such as Linux with acpi=off.

They lie in the extended BIOS data area, one of the three places where a system looks.

Source: Intel MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from softkvm.vmm.boot import layout
from softkvm.vmm.boot.acpi import IOAPIC_BASE, LAPIC_BASE, checksum
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.routing import TIMER_PIN

OEM_ID = b"SOFTKVM "
PRODUCT_ID = b"PC          "
SPECIFICATION = 4  # revision 1.4
ISA_IRQS = 16
CASCADE_IRQ = 2

FLOATING_POINTER = layout.EBDA + 0x10
CONFIGURATION = layout.EBDA + 0x20

# entry types (table 4-3)
PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
CPU_ENABLED, CPU_BOOTSTRAP = 1, 2
CPU_FPU, CPU_APIC = 1 << 0, 1 << 9
LAPIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
IOAPIC_ENABLED = 1
PCI_BUS, ISA_BUS = 0, 1
INT, NMI, EXTINT = 0, 1, 3
ALL_LAPICS = 0xFF


def configuration_table(apic_ids: Sequence[int]) -> bytes:
    """Return the table for one processor per local APIC ID, the first of which boots the machine (4.2, 4.3)."""
    ioapic_id = max(apic_ids) + 1
    entries = [
        struct.pack(
            *("<BBBBII8x", PROCESSOR, apic_id, LAPIC_VERSION),
            *(CPU_ENABLED | (CPU_BOOTSTRAP if apic_id == apic_ids[0] else 0), 0, CPU_FPU | CPU_APIC),
        )
        for apic_id in apic_ids
    ]
    entries += [struct.pack("<BB6s", BUS, bus, name) for bus, name in ((PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   "))]
    entries.append(struct.pack("<BBBBI", IOAPIC, ioapic_id, IOAPIC_VERSION, IOAPIC_ENABLED, IOAPIC_BASE))
    entries += [
        struct.pack("<BBHBBBB", IO_INTERRUPT, INT, 0, ISA_BUS, irq, ioapic_id, irq or TIMER_PIN)
        for irq in range(ISA_IRQS)
        if irq != CASCADE_IRQ
    ]
    entries += [
        struct.pack("<BBHBBBB", LOCAL_INTERRUPT, kind, 0, ISA_BUS, 0, ALL_LAPICS, pin)
        for kind, pin in ((EXTINT, 0), (NMI, 1))
    ]
    body = b"".join(entries)
    header = struct.pack(
        *("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), SPECIFICATION, 0, OEM_ID, PRODUCT_ID),
        *(0, 0, len(entries), LAPIC_BASE, 0, 0, 0),
    )
    table = bytearray(header + body)
    table[7] = checksum(table)
    return bytes(table)


def floating_pointer(table_address: int) -> bytes:
    """Return the structure that a system searches for (4.1)."""
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", table_address, 1, SPECIFICATION, 0))
    pointer[10] = checksum(pointer)
    return bytes(pointer)


def write_table(memory: GuestMemory, apic_ids: Sequence[int]) -> None:
    """Put both into the extended BIOS data area of *memory*."""
    table = configuration_table(apic_ids)
    if CONFIGURATION + len(table) > layout.VIDEO_MEMORY:
        raise ValueError(f"MultiProcessor table for {len(apic_ids)} processors: no room below the video memory")
    memory.write(FLOATING_POINTER, floating_pointer(CONFIGURATION))
    memory.write(CONFIGURATION, table)
