# SPDX-License-Identifier: Apache-2.0
"""SMBIOS structures against DSP0134 2.8, and by dmidecode where the system has it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from softkvm.vmm.boot import smbios
from softkvm.vmm.memory import GIB, RamRange

RANGES = [RamRange(0, 3 * GIB, 0, 0), RamRange(4 * GIB, 6 * GIB, 0, 3 * GIB)]
LENGTHS = {0: 0x18, 1: 0x1B, 3: 0x15, 4: 0x2A, 16: 0x17, 17: 0x28, 19: 0x0F, 32: 0x0B, 127: 4}  # 7.1 to 7.45


def structures(table: bytes) -> list[tuple[int, int, list[str]]]:
    """Return kind, length and strings of each structure, as a reader that knows none goes through them (6.1)."""
    found, at = [], 0
    while at < len(table):
        kind, length, _handle = struct.unpack_from("<BBH", table, at)
        end = table.index(b"\0\0", at + length)
        strings = [text.decode() for text in table[at + length : end].split(b"\0") if text]
        found.append((kind, length, strings))
        at = end + 2
    return found


def test_structures_have_the_specifications_lengths_and_the_entry_point_counts_them() -> None:
    files = smbios.files(4, 5 * GIB, RANGES)
    table, anchor = files[smbios.TABLES_FILE], files[smbios.ANCHOR_FILE]
    found = structures(table)
    assert [kind for kind, _, _ in found] == [0, 1, 3, 4, 16, 17, 19, 19, 32, 127]
    assert all(length == LENGTHS[kind] for kind, length, _ in found)
    assert len(anchor) == 0x1F and sum(anchor) & 0xFF == 0
    assert anchor[:4] == b"_SM_" and anchor[16:21] == b"_DMI_" and sum(anchor[16:]) & 0xFF == 0
    assert struct.unpack_from("<H", anchor, 22) == (len(table),)
    assert struct.unpack_from("<H", anchor, 28) == (len(found),)


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="no dmidecode to read them with")
def test_dmidecode_reads_them(tmp_path: Path) -> None:
    files = smbios.files(4, 5 * GIB, RANGES)
    anchor = bytearray(files[smbios.ANCHOR_FILE])
    struct.pack_into("<I", anchor, 24, 32)  # as firmware does: where the table is, and both sums
    for at, start in ((21, 16), (4, 0)):
        anchor[at] = anchor[at] - sum(anchor[start:]) & 0xFF
    dump = tmp_path / "dump"
    dump.write_bytes(bytes(anchor).ljust(32, b"\0") + files[smbios.TABLES_FILE])
    done = subprocess.run(["dmidecode", "--from-dump", dump], capture_output=True, text=True, check=True)
    assert "softkvm machine" in done.stdout
    assert "Core Count: 4" in done.stdout
    assert "Size: 5 GB" in done.stdout
    assert "<BAD INDEX>" not in done.stdout and "broken" not in done.stdout.lower()
