# SPDX-License-Identifier: Apache-2.0
"""The ACPI tables of the machine: RSDP, XSDT and RSDT, FADT, FACS, MADT, HPET, DSDT.

Source: ACPI specification 6.4, sections 5.2.5 to 5.2.12 (each table's fields); 4.8 (fixed hardware).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from softkvm.abi.sizes import Size
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.dsdt import Devices, definition_block
from softkvm.vmm.devices import acpi_pm, hpet, rtc_calendar
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import GuestMemory

OEM_ID = b"SOFTKV"
OEM_TABLE_ID = b"SOFTKVM "
CREATOR_ID = b"SKVM"

LAPIC_BASE = 0xFEE00000
IOAPIC_BASE = 0xFEC00000
IOAPIC_ID = 0

# FADT, IAPC_BOOT_ARCH (5.2.9.3): no 8042 and no VGA to look for; the RTC is there
IAPC_LEGACY_DEVICES = 1 << 0
IAPC_VGA_NOT_PRESENT = 1 << 2

# FADT, fixed feature flags (5.2.9)
WBINVD = 1 << 0
PROC_C1 = 1 << 2
SLP_BUTTON = 1 << 5
TMR_VAL_EXT = 1 << 8
RESET_REG_SUP = 1 << 10

MADT_PCAT_COMPAT = 1 << 0
MADT_LAPIC = 0
MADT_IOAPIC = 1
MADT_ISO = 2
MADT_LAPIC_NMI = 4
ISO_ACTIVE_HIGH_LEVEL = 0xD  # polarity active high, trigger mode level
SYSTEM_MEMORY = 0
SYSTEM_IO = 1
BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS = 1, 2, 3

FACS_ADDRESS = layout.ACPI_TABLES + 64  # the root pointer goes first
FACS_WAKING_VECTOR = 12

TABLE_HEADER_LENGTH = 36
FADT_LENGTH = 276
FADT_POINTERS = ((36, 4), (40, 4), (140, 8))  # FIRMWARE_CTRL, DSDT, X_DSDT


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes *data* plus it sum to zero modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Return *body* behind the common header (5.2.6), with its checksum."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        TABLE_HEADER_LENGTH + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        1,
        CREATOR_ID,
        1,
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(rsdt_address: int, xsdt_address: int) -> bytes:
    """Return the root pointer of revision 2 (5.2.5.3)."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt_address, 36, xsdt_address, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def _gas(port: int, bits: int, access_size: int) -> bytes:
    """Return a generic address structure (5.2.3.2) for an I/O port."""
    return struct.pack("<BBBBQ", SYSTEM_IO, bits, 0, access_size, port)


def fadt(facs_address: int, dsdt_address: int, base: int = acpi_pm.PM_BASE_PORT) -> bytes:
    """Return the fixed ACPI description table, revision 6.3 (5.2.9); *base* is the power-management block's port."""
    event, control, timer = base + acpi_pm.PM1_STS, base + acpi_pm.PM1_CNT, base + acpi_pm.PM_TMR
    general = base + acpi_pm.GPE0_STS
    flags = WBINVD | PROC_C1 | SLP_BUTTON | TMR_VAL_EXT | RESET_REG_SUP
    fields: tuple[tuple[str, int, str, int], ...] = (
        ("FIRMWARE_CTRL", 36, "<I", facs_address),
        ("DSDT", 40, "<I", dsdt_address),
        ("SCI_INT", 46, "<H", acpi_pm.SCI_IRQ),
        ("SMI_CMD", 48, "<I", 0),  # ACPI mode from the start
        ("PM1a_EVT_BLK", 56, "<I", event),
        ("PM1a_CNT_BLK", 64, "<I", control),
        ("PM_TMR_BLK", 76, "<I", timer),
        ("GPE0_BLK", 80, "<I", general),
        ("PM1_EVT_LEN", 88, "<B", 4),
        ("PM1_CNT_LEN", 89, "<B", 2),
        ("PM_TMR_LEN", 91, "<B", 4),
        ("GPE0_BLK_LEN", 92, "<B", acpi_pm.GPE0_SIZE),
        ("P_LVL2_LAT", 96, "<H", 0xFFFF),  # no C2
        ("P_LVL3_LAT", 98, "<H", 0xFFFF),  # no C3
        ("CENTURY", 108, "<B", rtc_calendar.CENTURY),
        ("IAPC_BOOT_ARCH", 109, "<H", IAPC_LEGACY_DEVICES | IAPC_VGA_NOT_PRESENT),
        ("Flags", 112, "<I", flags),
        ("RESET_VALUE", 128, "<B", acpi_pm.RESET_VALUE),
        ("FADT Minor Version", 131, "<B", 3),
        ("X_DSDT", 140, "<Q", dsdt_address),
    )
    addresses: tuple[tuple[str, int, bytes], ...] = (
        ("RESET_REG", 116, _gas(acpi_pm.RESET_PORT, 8, BYTE_ACCESS)),
        ("X_PM1a_EVT_BLK", 148, _gas(event, 32, WORD_ACCESS)),
        ("X_PM1a_CNT_BLK", 172, _gas(control, 16, WORD_ACCESS)),
        ("X_PM_TMR_BLK", 208, _gas(timer, 32, DWORD_ACCESS)),
        ("X_GPE0_BLK", 220, _gas(general, 8 * acpi_pm.GPE0_SIZE, BYTE_ACCESS)),
    )
    data = bytearray(FADT_LENGTH)
    for _name, offset, format, value in fields:
        struct.pack_into(format, data, offset, value)
    for _name, offset, address in addresses:
        data[offset : offset + len(address)] = address
    return table(b"FACP", 6, bytes(data[TABLE_HEADER_LENGTH:]))


def facs() -> bytes:
    """Return the firmware ACPI control structure (5.2.10)."""
    return struct.pack("<4sIIIIIQB", b"FACS", 64, 0, 0, 0, 0, 0, 2).ljust(64, b"\0")


_APIC_IDS = Size("APIC ids of a MADT's entries", 255, ConfigError, element=8, effect="ConfigError", where=__name__)


def madt(apic_ids: Sequence[int]) -> bytes:
    """Return the multiple APIC description table (5.2.12) for one processor per APIC id."""
    _APIC_IDS.index(max(apic_ids), called="APIC id")
    body = struct.pack("<II", LAPIC_BASE, MADT_PCAT_COMPAT)
    for index, apic_id in enumerate(apic_ids):
        body += struct.pack("<BBBBI", MADT_LAPIC, 8, index, apic_id, 1)
    body += struct.pack("<BBBBII", MADT_IOAPIC, 12, IOAPIC_ID, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBBIH", MADT_ISO, 10, 0, 0, 2, 0)  # the PIT's IRQ 0 arrives at pin 2
    sci = acpi_pm.SCI_IRQ
    body += struct.pack("<BBBBIH", MADT_ISO, 10, 0, sci, sci, ISO_ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", MADT_LAPIC_NMI, 6, 0xFF, 0, 1)  # LINT1 of every processor
    return table(b"APIC", 5, body)


def hpet_table() -> bytes:
    """Return the HPET description table (IA-PC HPET specification 1.0a, section 3.2.4)."""
    address = struct.pack("<BBBBQ", SYSTEM_MEMORY, 64, 0, 0, hpet.HPET_ADDRESS)
    return table(
        b"HPET", 1, struct.pack("<I", hpet.BLOCK_ID) + address + struct.pack("<BHB", 0, hpet.MIN_PERIOD_TICKS, 0)
    )


def dsdt(devices: Devices) -> bytes:
    """Return the definition block (5.2.11.1)."""
    return table(b"DSDT", 2, definition_block(devices))


def waking_vector(memory: GuestMemory) -> int:
    """Return the real-mode address where the guest wants to go on after S3 (5.2.10); 0 if it has set none."""
    return int.from_bytes(memory.read(FACS_ADDRESS + FACS_WAKING_VECTOR, 4), "little")


class Tables(NamedTuple):
    """All tables, one behind the other, as they lie at an address; the root pointer is first."""

    data: bytes
    rsdp_size: int
    tables: list[tuple[int, int]]
    """Offset and size of each table that has the common header, the checksum in it."""
    pointers: list[tuple[int, int]]
    """Offset and size of each address of a table, the root pointer's among them."""


def build(
    base: int,
    apic_ids: Sequence[int],
    devices: Devices | None = None,
    *,
    room: int = layout.ACPI_TABLES_END - layout.ACPI_TABLES,
    pm_base: int = acpi_pm.PM_BASE_PORT,
) -> Tables:
    """Return the tables for the address *base*; ConfigError if they take more than *room* bytes."""
    devices = devices or Devices()
    data = bytearray(FACS_ADDRESS - layout.ACPI_TABLES)  # the root pointer is known last
    tables: list[tuple[int, int]] = []
    pointers: list[tuple[int, int]] = [(16, 4), (24, 8)]

    def put(contents: bytes, addresses: Sequence[tuple[int, int]] = (), *, header: bool = True) -> int:
        at = len(data)
        if at + len(contents) > room:
            raise ConfigError(f"ACPI tables for {len(apic_ids)} processors do not fit below 1 MiB")
        data.extend(contents)
        data.extend(bytes(-len(data) % 64))
        if header:
            tables.append((at, len(contents)))
        pointers.extend((at + offset, size) for offset, size in addresses)
        return base + at

    facs_at = put(facs(), header=False)
    dsdt_at = put(dsdt(devices))
    listed = [put(fadt(facs_at, dsdt_at, pm_base), FADT_POINTERS), put(madt(apic_ids))]
    if devices.hpet:
        listed.append(put(hpet_table()))
    count, end = len(listed), TABLE_HEADER_LENGTH
    rsdt_at = put(table(b"RSDT", 1, struct.pack(f"<{count}I", *listed)), [(end + 4 * n, 4) for n in range(count)])
    xsdt_at = put(table(b"XSDT", 1, struct.pack(f"<{count}Q", *listed)), [(end + 8 * n, 8) for n in range(count)])
    root = rsdp(rsdt_at, xsdt_at)
    data[: len(root)] = root
    return Tables(bytes(data), len(root), tables, pointers)


def write_tables(memory: GuestMemory, apic_ids: Sequence[int], devices: Devices | None = None) -> int:
    """Write all tables into the BIOS area of *memory*; return the address of the root pointer."""
    memory.write(layout.ACPI_TABLES, build(layout.ACPI_TABLES, apic_ids, devices).data)
    return layout.ACPI_TABLES
