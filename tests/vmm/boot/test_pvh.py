# SPDX-License-Identifier: Apache-2.0
"""ELF files made for the purpose; offsets from the ELF specification and from Xen's start_info.h."""

import struct
from collections.abc import Iterator

import pytest
from tests.support.machines import RecordingVcpu

from softkvm.vmm.boot import elf, pvh
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory

PT_LOAD, PT_NOTE = 1, 4
NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100010)


def make_elf(
    *,
    machine: int = 62,
    type: int = 2,
    address: int = 0x100000,
    data: bytes = b"code" * 16,
    memory_size: int = 0x2000,
    note: bytes = NOTE,
    file_size: int | None = None,
) -> bytes:
    """Return an ELF64 file with one segment to load and one of notes."""
    ehdr_size, phdr_size = 64, 56
    data_at = ehdr_size + 2 * phdr_size
    note_at = data_at + len(data)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", type, machine, 1, address, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack(
        "<IIQQQQQQ", PT_LOAD, 7, data_at, 0xFFFFFFFF80000000, address, file_size or len(data), memory_size, 4096
    )
    notes = struct.pack("<IIQQQQQQ", PT_NOTE, 4, note_at, 0, 0, len(note), len(note), 4)
    return header + load + notes + data + note


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(32 * MIB)
    yield ram
    ram.close()


def load(memory: GuestMemory, image: bytes, initrd: bytes | None = None) -> RecordingVcpu:
    vcpu = RecordingVcpu()
    modules = [Module(Image("initrd", initrd))] if initrd else []
    pvh.load(vcpu, memory, Image("kernel", image), modules, b"console=ttyS0", 0xE0000)  # type: ignore[arg-type]
    return vcpu


def test_entry_state_is_that_of_the_pvh_abi(memory: GuestMemory) -> None:
    vcpu = load(memory, make_elf())
    assert vcpu.regs.rip == 0x100010
    assert vcpu.regs.rflags == 2
    sregs = vcpu.sregs
    assert sregs.cr0 & 0x80000001 == 1, "protection on, paging off"
    assert sregs.cr4 == 0
    assert sregs.efer == 0
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.limit, segment.db, segment.l, segment.g) == (0, 0xFFFFFFFF, 1, 0, 1)
    assert (sregs.tr.base, sregs.tr.limit, sregs.tr.type) == (0, 0x67, 0xB)


def test_segments_are_loaded_and_zero_filled(memory: GuestMemory) -> None:
    memory.write(0x100000, b"\xff" * 0x3000)
    load(memory, make_elf())
    assert memory.read(0x100000, 64) == b"code" * 16
    assert memory.read(0x100040, 0x2000 - 64) == bytes(0x2000 - 64)
    assert memory.read(0x102000, 1) == b"\xff"


def test_start_info_describes_command_line_modules_and_memory(memory: GuestMemory) -> None:
    vcpu = load(memory, make_elf(), b"ramdisk")
    info = struct.unpack("<IIIIQQQQII", memory.read(vcpu.regs.rbx, 56))
    magic, version, flags, modules, modules_at, line_at, rsdp, map_at, map_entries, _ = info
    assert (magic, version, flags, modules, rsdp) == (0x336EC578, 1, 0, 1, 0xE0000)
    assert memory.read(line_at, 14) == b"console=ttyS0\0"
    initrd_at, initrd_size, _, _ = struct.unpack("<4Q", memory.read(modules_at, 32))
    assert memory.read(initrd_at, initrd_size) == b"ramdisk"
    entries = [struct.unpack("<QQII", memory.read(map_at + 24 * i, 24)) for i in range(map_entries)]
    assert entries[0] == (0, 0x9FC00, 1, 0)
    assert entries[-1] == (0x100000, 31 * MIB, 1, 0)


def test_no_initrd_means_no_module(memory: GuestMemory) -> None:
    vcpu = load(memory, make_elf())
    assert struct.unpack("<I", memory.read(vcpu.regs.rbx + 12, 4))[0] == 0
    assert struct.unpack("<Q", memory.read(vcpu.regs.rbx + 16, 8))[0] == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (make_elf(note=b""), "no PVH entry point"),
        (make_elf(machine=183), "kernel is for AArch64: expected x86-64"),
        (make_elf(machine=22), "expected x86-64"),
        (make_elf(type=1), "expected an executable"),
        (make_elf(file_size=0x10000, memory_size=0x10000), "truncated"),
        (make_elf(address=0x8000), "expected physical addresses from 0x100000"),
        (make_elf(memory_size=1 << 30), "there are 32 MiB"),
        (make_elf(address=(1 << 64) - 4096), "there are 32 MiB"),
        (make_elf()[:30], "damaged ELF"),
        (make_elf()[:70], "damaged ELF"),
        (b"\x7fELF", "damaged ELF"),
        (make_elf(note=b"\xff" * 40), "no PVH entry point|damaged"),
    ],
)
def test_unusable_files_are_refused_in_one_line(memory: GuestMemory, image: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(memory, image)
    assert "\n" not in str(caught.value)


def test_any_damaged_file_is_refused_or_loaded_but_nothing_else(memory: GuestMemory) -> None:
    image = make_elf()
    for position in range(64 + 112 + 64 + 20):
        damaged = bytearray(image)
        damaged[position] ^= 0xFF
        try:
            load(memory, bytes(damaged))
        except ImageError:
            pass


def test_recognition() -> None:
    assert elf.is_elf(Image("kernel", make_elf()))
    assert not elf.is_elf(Image("kernel", b"MZ"))
