# SPDX-License-Identifier: Apache-2.0
"""bzImages made for the purpose; fields and offsets are those of Linux's boot protocol document."""

import struct
from collections.abc import Iterator

import pytest
from tests.support.machines import RecordingVcpu

from softkvm.vmm.boot import bzimage
from softkvm.vmm.boot.bzimage import Entry
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
        "code32_start": 0x100000,
        "vid_mode": 0xFFFF,
        "jump": 0x6A,
    } | fields
    image = bytearray(4 * 512 + len(payload))
    for offset, format, name in (
        (0x1F1, "<B", "setup_sects"),
        (0x1F4, "<I", "syssize"),
        (0x1FA, "<H", "vid_mode"),
        (0x206, "<H", "version"),
        (0x211, "<B", "loadflags"),
        (0x214, "<I", "code32_start"),
        (0x22C, "<I", "initrd_addr_max"),
        (0x230, "<I", "kernel_alignment"),
        (0x234, "<B", "relocatable"),
        (0x236, "<H", "xloadflags"),
        (0x238, "<I", "cmdline_size"),
        (0x258, "<Q", "pref_address"),
        (0x260, "<I", "init_size"),
    ):
        struct.pack_into(format, image, offset, values[name])
    image[0x1FE:0x202] = b"\x55\xaa\xeb" + bytes([values["jump"]])  # the header ends there, counted from 0x202
    image[0x202:0x206] = b"HdrS"
    image[4 * 512 :] = payload
    return bytes(image)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


def load(
    memory: GuestMemory,
    image: bytes,
    *initrds: bytes,
    line: bytes = b"quiet",
    entry: Entry | None = None,
) -> RecordingVcpu:
    vcpu = RecordingVcpu()
    modules = [Module(Image("initrd", initrd)) for initrd in initrds]
    bzimage.load(vcpu, memory, Image("kernel", image), modules, line, RSDP, entry=entry)  # type: ignore[arg-type]
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
    vcpu = load(memory, make_bzimage(), initrd, line=b"console=ttyS0")
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


@pytest.mark.parametrize(
    ("fields", "entry"),
    [
        ({}, Entry.LONG),
        ({"xloadflags": 0}, Entry.PROTECTED),
        ({"version": 0x20B}, Entry.PROTECTED),  # xloadflags came with 2.12: before, it is not looked at
        ({"version": 0x207}, Entry.PROTECTED),
        ({"version": 0x207, "code32_start": 0}, Entry.REAL),  # iPXE
        ({"version": 0x206}, Entry.REAL),
        ({"version": 0x202}, Entry.REAL),
        ({"loadflags": 0}, Entry.REAL),  # a zImage
    ],
)
def test_best_entry_that_the_header_promises_is_taken(
    memory: GuestMemory, fields: dict[str, int], entry: Entry
) -> None:
    vcpu = load(memory, make_bzimage(**fields))
    taken = {
        (1, 0): Entry.LONG,
        (0, 1): Entry.PROTECTED,
        (0, 0): Entry.REAL,
    }[vcpu.sregs.cs.l, vcpu.sregs.cs.db]
    assert taken is entry


def test_entry_can_be_chosen_among_those_there(memory: GuestMemory) -> None:
    assert load(memory, make_bzimage(), entry=Entry.REAL).sregs.cs.selector == 0x1020
    with pytest.raises(ImageError, match=r"kernel of boot protocol 2.11 has no 64-bit entry: it has 32, 16"):
        load(memory, make_bzimage(version=0x20B), entry=Entry.LONG)


def test_entry_state_of_the_32_bit_protocol(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage(), entry=Entry.PROTECTED)
    regs, sregs = vcpu.regs, vcpu.sregs
    assert regs.rip == 0x100000
    assert regs.rsi == 0x7000
    assert (regs.rbp, regs.rdi, regs.rbx) == (0, 0, 0)
    assert regs.rflags == 2, "interrupts are disabled"
    assert sregs.cr0 & 0x80000001 == 1, "protection on, paging off"
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit, sregs.cs.type) == (0x10, 0, 0xFFFFFFFF, 0xB)
    for name in ("ds", "es", "ss"):
        segment = getattr(sregs, name)
        assert (segment.selector, segment.base, segment.limit, segment.type) == (0x18, 0, 0xFFFFFFFF, 0x3)
    assert memory.read(0x7000 + 0x202, 4) == b"HdrS"


def test_entry_state_of_the_real_mode_protocol(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage(), b"ramdisk", line=b"auto", entry=Entry.REAL)
    sregs = vcpu.sregs
    base = sregs.ds.base
    for name in ("ds", "es", "ss"):
        assert getattr(sregs, name).selector == base >> 4
    assert (sregs.cs.selector, vcpu.regs.rip) == ((base >> 4) + 0x20, 0)
    assert not vcpu.regs.rflags & 0x200
    setup = memory.read(base, 4 * 512)
    assert setup[0x210] == 0xFF
    assert setup[0x211] & 0x81 == 0x81, "loaded high, heap usable"
    assert struct.unpack_from("<H", setup, 0x224)[0] == vcpu.regs.rsp - 0x200, "heap_end_ptr"
    line_at, ramdisk_at, ramdisk_size = (struct.unpack_from("<I", setup, at)[0] for at in (0x228, 0x218, 0x21C))
    assert base + vcpu.regs.rsp <= line_at < 0xA0000, "behind the heap, before the end of conventional memory"
    assert memory.read(line_at, 5) == b"auto\0"
    assert memory.read(ramdisk_at, ramdisk_size) == b"ramdisk"
    assert memory.read(0x100000, 4) == b"\x90" * 4


def test_kernel_that_is_loaded_low_lies_at_10000_below_its_setup_code(memory: GuestMemory) -> None:
    vcpu = load(memory, make_bzimage(loadflags=0, version=0x202), line=b"auto")
    assert vcpu.sregs.ds.base == 0x90000
    assert memory.read(0x10000, 0x400) == b"\x90" * 0x400
    line_at = struct.unpack("<I", memory.read(0x90000 + 0x228, 4))[0]
    assert 0x90000 + vcpu.regs.rsp <= line_at < 0x9FC00
    assert memory.read(line_at, 5) == b"auto\0"
    big = make_bzimage(loadflags=0, version=0x202) + bytes(0x80000)
    with pytest.raises(ImageError, match="is to be loaded low"):
        load(memory, big)


def test_fields_that_a_version_has_not_got_are_not_read(memory: GuestMemory) -> None:
    """iPXE has code where later protocols have preferred address and size."""
    vcpu = load(memory, make_bzimage(version=0x207, pref_address=1 << 50, init_size=1 << 31), b"x" * 100)
    assert vcpu.regs.rip == 0x100000
    old = make_bzimage(version=0x202, initrd_addr_max=0)
    vcpu = load(memory, old, b"x" * 100)
    assert struct.unpack("<I", memory.read(vcpu.sregs.ds.base + 0x218, 4))[0] + 100 <= 64 * MIB
    with pytest.raises(ImageError, match="command line has 256 bytes: this kernel takes 255"):
        load(memory, old, line=b"x" * 256)


def test_several_ramdisks_follow_each_other_padded_to_4_bytes(memory: GuestMemory) -> None:
    memory.write(63 * MIB, b"\xff" * MIB)
    vcpu = load(memory, make_bzimage(), b"first", b"second!", b"3")
    at, size = struct.unpack("<II", memory.read(vcpu.regs.rsi + 0x218, 8))
    assert memory.read(at, size) == b"first\0\0\0second!\0" + b"3"


def test_header_that_claims_to_be_longer_than_its_place_is_cut(memory: GuestMemory) -> None:
    image = bytearray(make_bzimage(jump=0xFF))
    image[0x290:0x300] = b"\xee" * 0x70
    page = load(memory, bytes(image)).regs.rsi
    assert memory.read(page + 0x290, 0x40) == bytes(0x40), "edd_mbr_sig_buffer"
    assert memory.read(page + 0x2D0, 20) == struct.pack("<QQI", 0, 0x9FC00, 1), "e820_table"


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        (b"quiet", 0x1234),
        (b"vga=normal", 0xFFFF),
        (b"vga=ext quiet", 0xFFFE),
        (b"quiet vga=ask", 0xFFFD),
        (b"vga=0x317", 0x317),
        (b"vga=791", 791),
        (b"vga=many", 0x1234),
    ],
)
def test_video_mode_of_the_command_line_goes_to_the_header(memory: GuestMemory, line: bytes, mode: int) -> None:
    page = load(memory, make_bzimage(vid_mode=0x1234), line=line).regs.rsi
    assert struct.unpack("<H", memory.read(page + 0x1FA, 2))[0] == mode


def test_ramdisk_stays_below_what_mem_leaves(memory: GuestMemory) -> None:
    page = load(memory, make_bzimage(), b"x" * 5000, line=b"mem=48M").regs.rsi
    at = struct.unpack("<I", memory.read(page + 0x218, 4))[0]
    assert at + 5000 <= 48 * MIB
    assert at + 5000 > 47 * MIB


def test_recognition() -> None:
    assert bzimage.is_bzimage(Image("kernel", make_bzimage()))
    assert not bzimage.is_bzimage(Image("kernel", b"\x7fELF" + bytes(1000)))
    assert not bzimage.is_bzimage(Image("kernel", b""))
