# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from tests.support.machines import RecordingVcpu

from softkvm.vmm.boot import layout, multiboot
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Module
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory

MEMORY = 64 * MIB


def kludge(flags: int = 0, *, at: int = 16, load: int = 0x200000, size: int = 64, bss: int = 0) -> bytes:
    """An image that is not ELF: bytes 0, 1, 2, ... with a header that says where they go."""
    flags |= multiboot.AOUT_KLUDGE
    image = bytearray(range(size))
    fields = (multiboot.HEADER_MAGIC, flags, -(multiboot.HEADER_MAGIC + flags) & 0xFFFFFFFF)
    struct.pack_into("<8I", image, at, *fields, load + at, load, load + size, bss, load + 4)
    return bytes(image)


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(MEMORY)


def load(
    memory: GuestMemory, image: bytes, text: bytes = b"name args", modules: tuple[tuple[bytes, bytes], ...] = ()
) -> RecordingVcpu:
    vcpu = RecordingVcpu()
    files = [Module(Image("module", contents), line) for contents, line in modules]
    multiboot.load(vcpu, memory, Image("kernel", image), text, files)  # type: ignore[arg-type]
    return vcpu


def words(memory: GuestMemory, gpa: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", memory.read(gpa, 4 * count))


def test_state_at_entry_is_flat_protected_mode(memory: GuestMemory) -> None:
    vcpu = load(memory, kludge())
    assert vcpu.regs.rax == 0x2BADB002
    assert vcpu.regs.rip == 0x200004
    assert vcpu.sregs.cr0 & (1 << 31 | 1) == 1
    assert (vcpu.sregs.cs.base, vcpu.sregs.cs.limit, vcpu.sregs.cs.db) == (0, 0xFFFFFFFF, 1)
    assert not vcpu.regs.rflags & (1 << 9 | 1 << 17)


def test_image_lies_where_its_header_says_with_a_zeroed_bss(memory: GuestMemory) -> None:
    memory.write(0x200040, b"\xff" * 64)
    load(memory, kludge(bss=0x200060))
    assert memory.read(0x200000, 16) == bytes(range(16))
    assert memory.read(0x200040, 0x40) == bytes(0x20) + b"\xff" * 0x20


def test_information_structure(memory: GuestMemory) -> None:
    vcpu = load(memory, kludge(), b"program one two", ((b"first", b"a=b"), (b"second", b"")))
    info = words(memory, vcpu.regs.rbx, 29)
    assert info[0] == 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12
    assert info[1:3] == (639, 63 * 1024)
    assert memory.read(info[4], 16) == b"program one two\0"
    assert info[5] == 2
    start, end, text, _ = words(memory, info[6], 4)
    assert memory.read(start, end - start) == b"first"
    assert memory.read(text, 4) == b"a=b\0"
    assert start % 4096 == 0
    start, end, _, _ = words(memory, info[6] + 16, 4)
    assert memory.read(start, end - start) == b"second"
    assert memory.read(info[16], 8) == b"softkvm\0"


def test_memory_map_is_that_of_the_machine(memory: GuestMemory) -> None:
    vcpu = load(memory, kludge())
    length, at = words(memory, vcpu.regs.rbx + 44, 2)
    entries = [struct.unpack("<IQQI", memory.read(at + i, 24)) for i in range(0, length, 24)]
    assert [entry[1:] for entry in entries] == layout.memory_map(memory)
    assert {entry[0] for entry in entries} == {20}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\0" * 64, "no Multiboot header"),
        (kludge(1 << 5), "requires flags 0x20"),
        (kludge(load=MEMORY - 16), "does not fit"),
        (kludge(load=layout.COMMAND_LINE), "overlaps the loader's command line"),
        (kludge(load=0x9FC00), "overlaps the loader's firmware"),
        (kludge()[:50], "is truncated"),
        (struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF), "expected an ELF file"),
    ],
)
def test_what_cannot_be_loaded_is_refused(memory: GuestMemory, image: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(memory, image)


def test_long_command_line_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match="command line has 70000 bytes"):
        load(memory, kludge(), b"x" * 70000)


def test_module_that_does_not_fit_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match="does not fit"):
        load(memory, kludge(), modules=((bytes(MEMORY), b""),))


def test_header_beyond_the_first_8_kib_or_unaligned_is_none() -> None:
    assert multiboot.find_header(Image("kernel", kludge()))
    assert multiboot.find_header(Image("kernel", b"\0" * 8192 + kludge())) is None
    assert multiboot.find_header(Image("kernel", b"\0" + kludge())) is None


def test_elf_entry_is_virtual_and_jumped_to_at_its_physical_address(memory: GuestMemory) -> None:
    """As of kernels linked for the upper half: GNU Mach's e_entry was 0xC1000000, loaded at 0x1000000."""
    segments = ((0x400000, 0x400000, 16), (0xC0500000, 0x500000, 32))
    table = b"".join(struct.pack("<8I", 1, 0x100, vaddr, paddr, size, size, 7, 4096) for vaddr, paddr, size in segments)
    header = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0xC0500010, 52, 0, 0, 52, 32, 2, 40, 0, 0)
    magic = struct.pack("<III", multiboot.HEADER_MAGIC, 0, -multiboot.HEADER_MAGIC & 0xFFFFFFFF)
    image = (header + table + magic).ljust(0x100, b"\0") + bytes(64)
    assert load(memory, image).regs.rip == 0x500010
    outside = image[:24] + struct.pack("<I", 0x600000) + image[28:]
    with pytest.raises(ImageError, match="entry point lies in none of its segments"):
        load(memory, outside)


def test_screen_is_offered_to_an_image_that_asks_for_a_video_mode(memory: GuestMemory) -> None:
    vcpu = load(memory, kludge(multiboot.VIDEO_MODE))
    info = memory.read(vcpu.regs.rbx, 116)
    assert struct.unpack_from("<QIIIBB", info, 88) == (0xB8000, 160, 80, 25, 16, 2), "EGA text, section 3.3"
    assert struct.unpack_from("<I", info, 64)[0] == struct.unpack_from("<I", memory.read(vcpu.regs.rbx + 64, 4))[0]
    assert memory.read(struct.unpack_from("<I", info, 64)[0], 8) == b"softkvm\0"


def test_many_modules_have_their_own_command_lines(memory: GuestMemory) -> None:
    modules = tuple((bytes([index]) * 10, b"module%d a=%d" % (index, index)) for index in range(20))
    vcpu = load(memory, kludge(), b"kernel", modules)
    count, at = words(memory, vcpu.regs.rbx + 20, 2)
    assert count == 20
    for index in range(count):
        start, end, text, _ = words(memory, at + 16 * index, 4)
        assert memory.read(start, end - start) == bytes([index]) * 10
        line = b"module%d a=%d\0" % (index, index)
        assert memory.read(text, len(line)) == line


def test_command_lines_of_modules_are_bounded(memory: GuestMemory) -> None:
    with pytest.raises(ImageError, match="command lines of kernel and modules have"):
        load(memory, kludge(), modules=((b"a", b"x" * 40000), (b"b", b"y" * 40000)))
