# SPDX-License-Identifier: Apache-2.0
"""The script by which firmware places ACPI tables: where to allocate, which addresses to add, what to sum up.

Source: the behaviour of SeaBIOS (romfile_loader) and of OVMF (AcpiPlatformDxe) with QEMU's file ``etc/table-loader``:
commands of 128 bytes, little-endian.
"""

from __future__ import annotations

import struct
from typing import Final

from softkvm.vmm.boot.acpi import Tables

FILE: Final = "etc/table-loader"
TABLES_FILE: Final = "etc/acpi/tables"
RSDP_FILE: Final = "etc/acpi/rsdp"

ALLOCATE: Final = 1
ADD_POINTER: Final = 2
ADD_CHECKSUM: Final = 3
HIGH, F_SEGMENT = 1, 2
COMMAND_SIZE: Final = 128
_NAME: Final = 56

RSDP_CHECKSUM, RSDP_FIRST_PART = 8, 20
RSDP_EXTENDED_CHECKSUM: Final = 32
TABLE_CHECKSUM: Final = 9


def _command(kind: int, body: bytes) -> bytes:
    return (struct.pack("<I", kind) + body).ljust(COMMAND_SIZE, b"\0")


def _name(text: str) -> bytes:
    return text.encode().ljust(_NAME, b"\0")


def allocate(file: str, alignment: int, zone: int) -> bytes:
    """Have memory allocated for a file, and the file put there."""
    return _command(ALLOCATE, _name(file) + struct.pack("<IB", alignment, zone))


def add_pointer(file: str, of: str, offset: int, size: int) -> bytes:
    """Have the address of the file *of* added to the number of *size* bytes at *offset* of *file*."""
    return _command(ADD_POINTER, _name(file) + _name(of) + struct.pack("<IB", offset, size))


def add_checksum(file: str, result: int, start: int, length: int) -> bytes:
    """Have the bytes of a part of *file* sum to zero by the one at *result*."""
    return _command(ADD_CHECKSUM, _name(file) + struct.pack("<III", result, start, length))


def files(built: Tables) -> dict[str, bytes]:
    """Return the script and its files, for tables that were built for address 0."""
    data = bytearray(built.data)
    root = bytearray(data[: built.rsdp_size])
    data[: built.rsdp_size] = bytes(built.rsdp_size)
    # A sum is made with its own byte 0 before it.
    root[RSDP_CHECKSUM] = root[RSDP_EXTENDED_CHECKSUM] = 0
    script = [allocate(TABLES_FILE, 64, HIGH), allocate(RSDP_FILE, 16, F_SEGMENT)]
    for offset, size in built.pointers:
        file = RSDP_FILE if offset < built.rsdp_size else TABLES_FILE
        script.append(add_pointer(file, TABLES_FILE, offset, size))
    for at, size in built.tables:
        data[at + TABLE_CHECKSUM] = 0
        script.append(add_checksum(TABLES_FILE, at + TABLE_CHECKSUM, at, size))
    script.append(add_checksum(RSDP_FILE, RSDP_CHECKSUM, 0, RSDP_FIRST_PART))
    script.append(add_checksum(RSDP_FILE, RSDP_EXTENDED_CHECKSUM, 0, built.rsdp_size))
    return {FILE: b"".join(script), TABLES_FILE: bytes(data), RSDP_FILE: bytes(root)}
