# SPDX-License-Identifier: Apache-2.0
"""SMBIOS tables: who made the machine, its processors, its memory.

Source: DMTF DSP0134, System Management BIOS Reference Specification 2.8: 5.2.1 (entry point), 6 (structures), 7.1 to
7.5, 7.17, 7.18, 7.20, 7.33 (types 0, 1, 3, 4, 16, 17, 19, 32), 7.45 (type 127).
"""

from __future__ import annotations

import struct
from typing import Final

from softkvm.vmm.boot.acpi import checksum
from softkvm.vmm.memory import KIB, MIB, RamRange

ANCHOR_FILE: Final = "etc/smbios/smbios-anchor"
TABLES_FILE: Final = "etc/smbios/smbios-tables"
MANUFACTURER: Final = "softkvm"
PRODUCT: Final = "softkvm machine"

_MEMORY_HANDLE: Final = 0x1000
_MAX_DIMM_MIB: Final = 0x7FFF
_NONE: Final = 0xFFFE  # no error information


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Return one structure (6.1.2, 6.1.3): header, fields, its strings, and an empty one behind."""
    text = b"".join(string.encode() + b"\0" for string in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"


def structures(vcpus: int, memory: int, ranges: list[RamRange]) -> list[bytes]:
    """Return the structures of a machine of *vcpus* processors and *memory* bytes."""
    size = memory // MIB
    dimm = size if size < _MAX_DIMM_MIB else _MAX_DIMM_MIB
    firmware = struct.pack("<BBHBBQBBBBBB", 1, 1, 0xE800, 1, 0, 1 << 3, 0, 0x14, 0, 0, 0xFF, 0xFF)
    system = struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), 6, 0, 0)
    chassis = struct.pack("<BBBBBBBBBIBBBB", 1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0)
    processor = struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHH",
        *(1, 3, 1, 2, 0, 0, 0, 0, 2000, 2000, 0x41, 1, 0xFFFF, 0xFFFF, 0xFFFF),
        *(0, 0, 0, min(vcpus, 255), min(vcpus, 255), 1, 4, 1),
    )
    array = struct.pack("<BBBIHHQ", 1, 3, 6, 0x80000000, _NONE, 1, memory)
    device = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        *(_MEMORY_HANDLE, _NONE, 64, 64, dimm, 9, 0, 1, 0, 7, 2, 0),
        *(0, 0, 0, 0, 0, size if size > dimm else 0, 0, 0, 0, 0),
    )
    return [
        _structure(0, 0, firmware, MANUFACTURER),
        _structure(1, 0x100, system, MANUFACTURER, PRODUCT),
        _structure(3, 0x300, chassis, MANUFACTURER),
        _structure(4, 0x400, processor, "CPU 0", MANUFACTURER),
        _structure(16, _MEMORY_HANDLE, array),
        _structure(17, 0x1100, device, "DIMM 0"),
        *(
            _structure(19, 0x1300 + n, struct.pack("<IIHB", ram.start // KIB, ram.end // KIB - 1, _MEMORY_HANDLE, 1))
            for n, ram in enumerate(ranges)
        ),
        _structure(32, 0x2000, bytes(7)),
        _structure(127, 0x7F00, b""),
    ]


def files(vcpus: int, memory: int, ranges: list[RamRange]) -> dict[str, bytes]:
    """Return fw_cfg's files: the entry point, whose table address firmware fills in, and the structures."""
    parts = structures(vcpus, memory, ranges)
    table = b"".join(parts)
    middle = bytearray(struct.pack("<5sBHIHB", b"_DMI_", 0, len(table), 0, len(parts), 0x28))
    middle[5] = checksum(middle)
    anchor = bytearray(
        struct.pack("<4sBBBBHB5s", b"_SM_", 0, 0x1F, 2, 8, max(map(len, parts)), 0, bytes(5)) + bytes(middle)
    )
    anchor[4] = checksum(anchor)
    return {ANCHOR_FILE: bytes(anchor), TABLES_FILE: table}
