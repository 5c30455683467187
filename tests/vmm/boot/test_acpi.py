# SPDX-License-Identifier: Apache-2.0
"""The tables against the specification's layout, and against ACPICA's disassembler where it is installed."""

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from softkvm.vmm.boot import acpi, layout
from softkvm.vmm.boot.dsdt import Devices
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import MIB, GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(2 * MIB)
    yield ram
    ram.close()


def read_table(memory: GuestMemory, address: int) -> bytes:
    """Return the table at *address*, whose checksum must be right."""
    length = struct.unpack("<I", memory.read(address + 4, 4))[0]
    data = memory.read(address, length)
    if data[:4] != b"FACS":
        assert sum(data) & 0xFF == 0, data[:4]
    return data


def all_tables(memory: GuestMemory, root: int) -> dict[str, bytes]:
    """Walk from the root pointer to every table."""
    pointer = memory.read(root, 36)
    assert pointer[:8] == b"RSD PTR "
    assert sum(pointer[:20]) & 0xFF == 0
    assert sum(pointer) & 0xFF == 0
    rsdt_at, _, xsdt_at = struct.unpack("<IIQ", pointer[16:32])
    rsdt, xsdt = read_table(memory, rsdt_at), read_table(memory, xsdt_at)
    addresses = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
    assert struct.unpack(f"<{(len(rsdt) - 36) // 4}I", rsdt[36:]) == addresses
    tables = {"RSDT": rsdt, "XSDT": xsdt}
    for address in addresses:
        data = read_table(memory, address)
        tables[data[:4].decode()] = data
    facs_at, dsdt_at = struct.unpack("<II", tables["FACP"][36:44])
    assert facs_at % 64 == 0
    tables["FACS"] = read_table(memory, facs_at)
    tables["DSDT"] = read_table(memory, dsdt_at)
    assert struct.unpack("<Q", tables["FACP"][140:148])[0] == dsdt_at
    return tables


@pytest.mark.parametrize("count", [1, 2, 16])
def test_tables_hang_together_and_lie_in_the_bios_area(memory: GuestMemory, count: int) -> None:
    root = acpi.write_tables(memory, range(count))
    assert root % 16 == 0
    assert 0xE0000 <= root < 0x100000
    tables = all_tables(memory, root)
    assert set(tables) == {"RSDT", "XSDT", "FACP", "FACS", "APIC", "HPET", "DSDT"}
    assert memory.read(0x100000, 16) == bytes(16)


def test_madt_lists_processors_ioapic_and_overrides(memory: GuestMemory) -> None:
    madt = all_tables(memory, acpi.write_tables(memory, [0, 1, 5]))["APIC"]
    assert struct.unpack("<II", madt[36:44]) == (0xFEE00000, 1)
    entries = []
    at = 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [(e[2], e[3], e[4]) for e in entries if e[0] == 0] == [(0, 0, 1), (1, 1, 1), (2, 5, 1)]
    assert [struct.unpack("<II", e[4:]) for e in entries if e[0] == 1] == [(0xFEC00000, 0)]
    assert [(e[3], *struct.unpack("<IH", e[4:])) for e in entries if e[0] == 2] == [(0, 2, 0), (9, 9, 0xD)]
    assert [e[2:] for e in entries if e[0] == 4] == [b"\xff\0\0\1"]


def test_fadt_has_soft_off_and_reset(memory: GuestMemory) -> None:
    fadt = all_tables(memory, acpi.write_tables(memory, [0]))["FACP"]
    assert len(fadt) == 276
    assert struct.unpack("<I", fadt[64:68])[0] == 0x604  # PM1a_CNT_BLK
    assert struct.unpack_from("<I", fadt, 80)[0] == 0x60C  # GPE0_BLK
    assert fadt[92] == 4
    assert fadt[220:232] == struct.pack("<BBBBQ", 1, 32, 0, 1, 0x60C)
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, 0xCF9)
    assert fadt[128] == 6
    assert struct.unpack("<I", fadt[112:116])[0] & 1 << 10


def test_apic_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="APIC id=255"):
        acpi.madt([0, 255])


def test_iasl_disassembles_the_tables_without_a_complaint(memory: GuestMemory, tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed")
    tables = all_tables(memory, acpi.write_tables(memory, [0, 1]))
    for name in ("FACP", "APIC", "HPET", "DSDT", "XSDT", "RSDT", "FACS"):
        path = tmp_path / f"{name}.aml"
        path.write_bytes(tables[name])
        done = subprocess.run(["iasl", "-d", path], capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        assert "Warning" not in text, text
        assert "Error" not in text, text
    source = (tmp_path / "DSDT.dsl").read_text()
    for part in (
        "Name (_S3",
        "Name (_S5",
        "PNP0501",
        "PNP0B00",
        "QEMU0001",
        "0x03F8",
        "{4}",
        "PNP0A03",
        "PNP0103",
        "VM_Gen_Counter",
        "Notify (\\_SB.VGEN, 0x80)",
    ):
        assert part in source
    done = subprocess.run(["iasl", "-p", tmp_path / "again", tmp_path / "DSDT.dsl"], capture_output=True, text=True)
    assert " 0 Errors" in done.stdout, done.stdout
    # only the compiler's name and the checksum differ
    assert (tmp_path / "again.aml").read_bytes()[36:] == tables["DSDT"][36:]


def test_layout_of_the_bios_area_agrees_with_the_memory_map(memory: GuestMemory) -> None:
    assert (layout.ACPI_TABLES, layout.HIGH_MEMORY - layout.ACPI_TABLES, 2) in layout.memory_map(memory)


def test_hpet_is_described_where_there_is_one(memory: GuestMemory) -> None:
    without = all_tables(memory, acpi.write_tables(memory, [0], Devices(hpet=False)))
    assert "HPET" not in without
    assert b"HPET" not in without["DSDT"]
    tables = all_tables(memory, acpi.write_tables(memory, [0]))
    assert struct.unpack_from("<I", tables["HPET"], 36)[0] == 0x8086A201
    assert struct.unpack_from("<Q", tables["HPET"], 44)[0] == 0xFED00000
    # Memory32Fixed of 1 KiB there
    assert bytes.fromhex("86 0900 01 0000d0fe 00040000") in tables["DSDT"]


def test_windows_of_the_host_bridge(memory: GuestMemory) -> None:
    """As QEMU's pc machine has them, compiled by iasl: buses, ports but CONFIG_ADDRESS and CONFIG_DATA, memory."""
    dsdt = all_tables(memory, acpi.write_tables(memory, [0]))["DSDT"]
    for descriptor in (
        "88 0d00 02 0c 00 0000 0000 ff00 0000 0001",
        "47 01 f80c f80c 01 08",
        "88 0d00 01 0c 03 0000 0000 f70c 0000 f80c",
        "88 0d00 01 0c 03 0000 000d ffff 0000 00f3",
        "87 1700 00 0c 01 00000000 00000a00 ffff0b00 00000000 00000200",
        "87 1700 00 0c 01 00000000 000000c0 ffffbffe 00000000 0000c03e",
    ):
        assert bytes.fromhex(descriptor) in dsdt, descriptor


def test_waking_vector_is_the_one_that_the_guest_wrote_into_the_facs(memory: GuestMemory) -> None:
    tables = all_tables(memory, acpi.write_tables(memory, [0]))
    assert acpi.waking_vector(memory) == 0
    facs = struct.unpack_from("<I", tables["FACP"], 36)[0]
    memory.write(facs + 12, struct.pack("<I", 0x1234))
    assert acpi.waking_vector(memory) == 0x1234
