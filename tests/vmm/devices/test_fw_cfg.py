# SPDX-License-Identifier: Apache-2.0
"""fw_cfg's files and its DMA interface, against QEMU's specification."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from softkvm.vmm.devices.fw_cfg import DMA_ERROR, DMA_READ, DMA_SELECT, DMA_SKIP, DMA_WRITE, FILE_DIR, FwCfg, FwCfgDma
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import MIB, GuestMemory

CONTROL, TARGET = 0x1000, 0x2000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(2 * MIB)
    yield made
    made.close()


def text(device: FwCfg, number: int, size: int) -> bytes:
    device.write(0, 2, number)
    return bytes(device.read(1, 1) for _ in range(size))


def transfer(dma: FwCfgDma, memory: GuestMemory, control: int, length: int, address: int, *, halves: bool) -> int:
    """Have a transfer done; return the control field afterwards."""
    memory.write(CONTROL, struct.pack(">IIQ", control, length, address))
    if halves:
        dma.write(0, 4, int.from_bytes((0).to_bytes(4, "big"), "little"))
        dma.write(4, 4, int.from_bytes(CONTROL.to_bytes(4, "big"), "little"))
    else:
        dma.write(0, 8, int.from_bytes(CONTROL.to_bytes(8, "big"), "little"))
    return int.from_bytes(memory.read(CONTROL, 4), "big")


def test_the_directory_names_files_in_order_and_a_file_is_made_when_it_is_wanted() -> None:
    made: list[str] = []

    def late() -> bytes:
        made.append("late")
        return b"made late"

    device = FwCfg({1: b"item"}, {"opt/b": b"bb", "etc/a": late})
    assert text(device, 1, 6) == b"item\0\0"
    assert not made
    directory = text(device, FILE_DIR, 4 + 2 * 64)
    assert struct.unpack_from(">I", directory) == (2,)
    assert struct.unpack_from(">IHH56s", directory, 4) == (9, 0x20, 0, b"etc/a".ljust(56, b"\0"))
    assert struct.unpack_from(">IHH56s", directory, 68) == (2, 0x21, 0, b"opt/b".ljust(56, b"\0"))
    assert text(device, 0x20, 9) == b"made late"
    assert made == ["late"]


def test_a_name_that_has_no_room_is_refused_and_not_cut() -> None:
    FwCfg({}, {"x" * 55: b""})
    with pytest.raises(ConfigError, match="56"):
        FwCfg({}, {"x" * 56: b""})


@pytest.mark.parametrize("halves", [False, True])
def test_a_transfer_selects_reads_and_skips(memory: GuestMemory, halves: bool) -> None:
    device = FwCfg({5: bytes(range(100))})
    dma = FwCfgDma(device, memory)
    assert transfer(dma, memory, 5 << 16 | DMA_SELECT | DMA_READ, 10, TARGET, halves=halves) == 0
    assert memory.read(TARGET, 10) == bytes(range(10))
    assert transfer(dma, memory, DMA_SKIP, 80, 0, halves=halves) == 0
    memory.write(TARGET, b"\xff" * 20)
    assert transfer(dma, memory, DMA_READ, 20, TARGET, halves=halves) == 0
    assert memory.read(TARGET, 20) == bytes(range(90, 100)) + bytes(10)  # zeroes behind the item's end


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [(DMA_READ, 0x1000, 2 * MIB - 1), (DMA_READ, 0xFFFF_FFFF, 0), (DMA_READ, 1, 1 << 63), (DMA_WRITE, 1, TARGET)],
)
def test_what_is_not_possible_is_an_error_that_the_guest_sees(
    memory: GuestMemory, control: int, length: int, address: int
) -> None:
    dma = FwCfgDma(FwCfg({}), memory)
    assert transfer(dma, memory, control, length, address, halves=False) == DMA_ERROR


def test_a_control_structure_outside_of_memory_is_nothing(memory: GuestMemory) -> None:
    dma = FwCfgDma(FwCfg({}), memory)
    dma.write(0, 8, int.from_bytes((1 << 40).to_bytes(8, "big"), "little"))
    dma.write(4, 4, 0xFFFF_FFFF)


def test_the_signature_is_read_big_endian(memory: GuestMemory) -> None:
    dma = FwCfgDma(FwCfg({}), memory)
    assert dma.read(0, 8).to_bytes(8, "little") == b"QEMU CFG"
    assert dma.read(4, 4).to_bytes(4, "little") == b" CFG"
