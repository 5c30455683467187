# SPDX-License-Identifier: Apache-2.0
"""What firmware does with the files of fw_cfg that place ACPI tables, for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping

COMMAND_SIZE = 128
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3


def _name(data: bytes) -> str:
    return data.rstrip(b"\0").decode()


def place(script: bytes, files: Mapping[str, bytes], addresses: Mapping[str, int]) -> dict[str, bytearray]:
    """Carry out a table loader's script as SeaBIOS does; return each file as it lies in memory then."""
    placed: dict[str, bytearray] = {}
    for at in range(0, len(script), COMMAND_SIZE):
        (kind,) = struct.unpack_from("<I", script, at)
        body = script[at + 4 : at + COMMAND_SIZE]
        file = _name(body[:56])
        if kind == ALLOCATE:
            alignment, zone = struct.unpack_from("<IB", body, 56)
            assert file not in placed
            assert alignment & (alignment - 1) == 0 and addresses[file] % alignment == 0
            assert zone in (1, 2)
            placed[file] = bytearray(files[file])
        elif kind == ADD_POINTER:
            of = _name(body[56:112])
            offset, size = struct.unpack_from("<IB", body, 112)
            value = int.from_bytes(placed[file][offset : offset + size], "little")
            assert 0 < value < len(placed[of])  # within the file that it points into
            placed[file][offset : offset + size] = (value + addresses[of]).to_bytes(size, "little")
        else:
            assert kind == ADD_CHECKSUM
            result, start, length = struct.unpack_from("<III", body, 56)
            part = placed[file][start : start + length]
            assert len(part) == length
            placed[file][result] = placed[file][result] - sum(part) & 0xFF
    return placed
