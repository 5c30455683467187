# SPDX-License-Identifier: Apache-2.0
"""bzImages made for the purpose; fields and offsets are those of Linux's boot protocol document."""

import struct
from collections.abc import Iterator

import pytest
from tests.support.machines import RecordingVcpu

from softkvm.vmm.boot import bzimage
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory

RSDP = 0xE0000


def make_bzimage(**fields: int) -> bytes:
    """Return a bzImage of 1 KiB of NOPs; *fields* override header fields."""
    payload = b"\x90" * 0x400
    values = {
        "setup_sects": 3,
        "version": 0x20F,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 0x200000,
        "relocatable": 1,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "pref_address": 0x1000000,
        "init_size": 0x800000,
        "syssize": (len(payload) + 15) // 16,
    } | fields
    image = bytearray(4 * 512 + len(payload))
    for offset, format, name in (
        (0x1F1, "<B", "setup_sects"),
        (0x1F4, "<I", "syssize"),
        (0x206, "<H", "version"),
        (0x211, "<B", "loadflags"),
        (0x22C, "<I", "initrd_addr_max"),
        (0x230, "<I", "kernel_alignment"),
        (0x234, "<B", "relocatable"),
        (0x236, "<H", "xloadflags"),
        (0x238, "<I", "cmdline_size"),
        (0x258, "<Q", "pref_address"),
        (0x260, "<I", "init_size"),
    ):
        struct.pack_into(format, image, offset, values[name])
    image[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"  # the header ends at 0x202 + 0x6a
    image[0x202:0x206] = b"HdrS"
    image[4 * 512 :] = payload
    return bytes(image)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


def load(memory: GuestMemory, image: bytes, initrd: bytes | None = None, line: bytes = b"quiet") -> RecordingVcpu:
    vcpu = RecordingVcpu()
    modules = [Module(Image("initrd", initrd))] if initrd else []
    bzimage.load(vcpu, memory, Image("kernel", image), modules, line, RSDP)  # type: ignore[arg-type]
    return vcpu


def test_entry_state_is_that_of_the_64_bit_protocol(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage())
    assert vcpu.regs.rip == 0x100200
    assert vcpu.regs.rflags == 2, "interrupts are disabled"
    sregs = vcpu.sregs
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db) == (0x10, 1, 0)
    assert (sregs.ds.selector, sregs.es.selector, sregs.ss.selector) == (0x18, 0x18, 0x18)
    assert sregs.cr0 & 0x80000001 == 0x80000001
    assert sregs.cr4 & 0x20
    assert sregs.efer & 0x500 == 0x500
    # the descriptor table holds what the segment registers say
    table = struct.unpack("<6Q", memory.read(sregs.gdt.base, sregs.gdt.limit + 1))
    assert table[2] == 0x00AF9B000000FFFF
    assert table[3] == 0x00CF93000000FFFF


def test_first_4_gib_are_mapped_onto_themselves(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage())

    def entry(table: int, index: int) -> int:
        return int(struct.unpack("<Q", memory.read((table & 0xFFFFF000) + 8 * index, 8))[0])

    for address in (0, 0x200000, 0x7FFFFFFF, 0xFEE00000, 0xFFFFFFFF):
        directory = entry(entry(entry(vcpu.sregs.cr3, 0), address >> 30), address >> 21 & 0x1FF)
        assert directory & 0x83 == 0x83, "present, writable, 2 MiB"
        assert directory & 0xFFE00000 == address & 0xFFE00000
    assert entry(vcpu.sregs.cr3, 1) == 0


def test_zero_page_tells_the_kernel_what_it_needs(memory: GuestMemory) -> None:
    initrd = b"initrd!" * 1000
    vcpu = load(memory, make_bzimage(), initrd, b"console=ttyS0")
    page = memory.read(vcpu.regs.rsi, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF, "type_of_loader"
    assert struct.unpack_from("<Q", page, 0x70)[0] == RSDP
    line_at = struct.unpack_from("<I", page, 0x228)[0]
    assert memory.read(line_at, 14) == b"console=ttyS0\0"
    initrd_at, initrd_size = struct.unpack_from("<II", page, 0x218)
    assert initrd_size == len(initrd)
    assert initrd_at % 4096 == 0
    assert memory.read(initrd_at, initrd_size) == initrd
    assert initrd_at + initrd_size <= 64 * MIB
    assert page[0x1E8] == 4
    assert struct.unpack_from("<QQI", page, 0x2D0 + 20 * 3) == (0x100000, 63 * MIB, 1)
    assert memory.read(0x100000, 0x400) == b"\x90" * 0x400


def test_kernel_that_cannot_move_is_loaded_where_it_wants(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage(relocatable=0))
    assert vcpu.regs.rip == 0x1000200


def test_initrd_stays_below_the_address_the_kernel_can_reach(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage(initrd_addr_max=0x1FFFFFF), b"x" * 5000)
    at = struct.unpack("<I", memory.read(vcpu.regs.rsi + 0x218, 4))[0]
    assert at + 5000 <= 0x2000000
    assert at == 0x2000000 - 0x2000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 0x201}, r"boot protocol 2.01: expected 2.02"),
        ({"setup_sects": 200}, "truncated"),
        ({"syssize": 0x10000}, "truncated"),
        ({"init_size": 0x10000000}, r"needs memory up to 0x11000000 \(272 MiB\), there are 64 MiB"),
        ({"pref_address": 1 << 40}, "does not fit"),
        ({"cmdline_size": 4}, "command line has 5 bytes: this kernel takes 4"),
    ],
)
def test_unusable_kernels_are_refused_in_one_line(memory: GuestMemory, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(memory, make_bzimage(**fields))
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(memory: GuestMemory) -> None:
    image = make_bzimage()
    for length in (0x206, 0x230, 0x264, 1024, 2048, 2048 + 0x200, len(image) - 100):
        with pytest.raises(ImageError, match="truncated"):
            load(memory, image[:length])


def test_initrd_larger_than_memory_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match=r"initrd of 42991616 bytes does not fit.*64 MiB"):
        load(memory, make_bzimage(), bytes(41 * MIB))


def test_recognition() -> None:
    assert bzimage.is_bzimage(Image("kernel", make_bzimage()))
    assert not bzimage.is_bzimage(Image("kernel", b"\x7fELF" + bytes(1000)))
    assert not bzimage.is_bzimage(Image("kernel", b""))
