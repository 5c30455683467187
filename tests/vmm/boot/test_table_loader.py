# SPDX-License-Identifier: Apache-2.0
"""The script by which firmware places ACPI tables, carried out as SeaBIOS does it (romfile_loader.c)."""

from __future__ import annotations

import pytest
from tests.support.firmware import place

from softkvm.vmm.boot import acpi, table_loader
from softkvm.vmm.boot.dsdt import Devices, VirtioMmio

TABLES, RSDP = 0x0FFF_F000, 0xF5A20


@pytest.mark.parametrize("vcpus", [1, 16])
def test_placed_tables_are_those_that_were_built_for_their_address(vcpus: int) -> None:
    devices = Devices(virtio_mmio=[VirtioMmio(0xFEC10000, 0x200, 16)])
    files = table_loader.files(acpi.build(0, range(vcpus), devices, pm_base=0xB000))
    places = {table_loader.TABLES_FILE: TABLES, table_loader.RSDP_FILE: RSDP}
    placed = place(files[table_loader.FILE], files, places)
    direct = acpi.build(TABLES, range(vcpus), devices, pm_base=0xB000)
    size = direct.rsdp_size
    assert placed[table_loader.TABLES_FILE][size:] == direct.data[size:]
    assert placed[table_loader.RSDP_FILE] == direct.data[:size]


def test_every_command_is_of_its_size() -> None:
    script = table_loader.files(acpi.build(0, range(2)))[table_loader.FILE]
    assert len(script) % table_loader.COMMAND_SIZE == 0
    assert script[:4] == (1).to_bytes(4, "little")  # allocation first
