# SPDX-License-Identifier: Apache-2.0
"""Guest physical memory as the boot loaders lay it out, and the memory map that the guest is told.

========== ==============================================
address    what lies there at entry
========== ==============================================
0x0000     real-mode interrupt vectors
0x0400     BIOS data area
0x0500     global descriptor table
0x6000     PVH start info or Multiboot information, modules and memory map
0x7000     Linux's zero page
0x9000     page tables (identity map of the first 4 GiB)
0x10000    flat images; Linux's real-mode setup code, or its kernel if that is loaded low
0x20000    kernel command line
0x90000    setup code of a kernel that is loaded low, its command line from 0x9A000 on
0x9FC00    extended BIOS data area: end of conventional memory
0xB8000    text screen
0xE0000    ACPI tables
0xEF000    the virtual machine's generation ID
0xF0000    firmware: handlers of real-mode interrupts
0x100000   protected-mode kernel
0xC0000000 memory of PCI devices, up to the IOAPIC
0xFEC10000 virtio-mmio devices
========== ==============================================
"""

from __future__ import annotations

from typing import NamedTuple

from softkvm.vmm.memory import HOLE_START, GuestMemory

GDT = 0x500
BIOS_DATA = 0x400
PVH_START_INFO = 0x6000
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000
FLAT_IMAGE = 0x10000
HIGH_SETUP = 0x10000
COMMAND_LINE = 0x20000
COMMAND_LINE_MAX = 0x10000
LOW_KERNEL = 0x10000
LOW_SETUP = 0x90000
LOW_COMMAND_LINE = 0x9A000
EBDA = 0x9FC00
VIDEO_MEMORY = 0xA0000
VIDEO_MEMORY_END = 0xC0000
TEXT_SCREEN = 0xB8000
TEXT_COLUMNS, TEXT_ROWS = 80, 25
ACPI_TABLES = 0xE0000
ACPI_TABLES_END = 0xEF000
VM_GENERATION = 0xEF000  # a page of its own
FIRMWARE = 0xF0000
FIRMWARE_SIZE = 0x10000
RESET_FIRMWARE = 0xFFFF0000  # where a processor finds it after INIT
HIGH_MEMORY = 0x100000
PCI_MEMORY = HOLE_START
PCI_MEMORY_END = 0xFEC00000  # where the IOAPIC is
PCI_DEVICES = 0xFE000000  # what the machine's own functions get of it
VIRTIO_MMIO = 0xFEC10000
VIRTIO_MMIO_END = 0xFED00000  # where the HPET is

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3


class E820Entry(NamedTuple):
    """*size* bytes from *start* are of E820 *type* (ACPI specification, section 15)."""

    start: int
    size: int
    type: int


def memory_map(memory: GuestMemory) -> list[E820Entry]:
    """Return the map of *memory*, as the BIOS call INT 15h E820h would."""
    entries = [
        E820Entry(0, EBDA, E820_RAM),
        E820Entry(EBDA, VIDEO_MEMORY - EBDA, E820_RESERVED),
        E820Entry(ACPI_TABLES, HIGH_MEMORY - ACPI_TABLES, E820_RESERVED),
    ]
    for ram in memory.ranges:
        start = max(ram.start, HIGH_MEMORY)
        if ram.end > start:
            entries.append(E820Entry(start, ram.end - start, E820_RAM))
    return entries
