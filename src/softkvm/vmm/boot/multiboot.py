# SPDX-License-Identifier: Apache-2.0
"""Multiboot 1: images with a Multiboot header, entered in 32-bit protected mode.

Source: Multiboot specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (information structure).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.boot import elf, layout
from softkvm.vmm.boot.cpustate import enter_protected_mode
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.boot.placement import Module, Reserved, Segment, Strings, load_modules, load_segments
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import KIB, MIB, GuestMemory

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002  # in EAX at entry
SEARCH = 8192  # the header lies in the first 8 KiB

# header flags: what the image asks for
PAGE_ALIGN = 1 << 0
MEMORY_INFO = 1 << 1
VIDEO_MODE = 1 << 2
REQUIREMENTS = 0xFFFF  # unknown ones among these must be refused
AOUT_KLUDGE = 1 << 16

# information flags: what the loader tells
INFO_MEMORY = 1 << 0
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9
INFO_FRAMEBUFFER = 1 << 12

# to mods_addr; symbols; memory map; drives, ROM configuration; loader name, APM table; VBE; frame buffer
INFO = struct.Struct("<7I 4I 2I 3I 2I 2I4H QIIIBB6x")
MODULE = struct.Struct("<IIII")
MEMORY_MAP_ENTRY = struct.Struct("<IQQI")
FRAMEBUFFER_EGA_TEXT = 2

LOADER_NAME = b"softkvm"
INFO_ADDRESS = layout.PVH_START_INFO
INFO_END = layout.ZERO_PAGE
_MODULES = Size(
    "modules of a Multiboot kernel",
    (INFO_END - INFO_ADDRESS - INFO.size) // MODULE.size,
    None,
    element=MODULE.size,
    effect="ImageError",
    where=__name__,
)


class Header(NamedTuple):
    """The header's position in the file, its flags, and the addresses of an image that is not ELF."""

    offset: int
    flags: int
    header_address: int
    load_address: int
    load_end: int
    bss_end: int
    entry: int


def find_header(image: Image) -> Header | None:
    """Return the Multiboot header of *image*, None if it has none."""
    magic = struct.pack("<I", HEADER_MAGIC)
    head = image.read(0, SEARCH)
    at = head.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(head):
            _, flags, check = struct.unpack_from("<III", head, at)
            if (HEADER_MAGIC + flags + check) & 0xFFFFFFFF == 0:
                fields = image.read(at + 12, 20).ljust(20, b"\0")
                return Header(at, flags, *struct.unpack("<5I", fields))
        at = head.find(magic, at + 1)
    return None


def _segments(image: Image, header: Header) -> tuple[list[Segment], int]:
    """Return what to load and the entry point."""
    if header.flags & AOUT_KLUDGE:
        return _kludge(image, header)
    if not elf.is_elf(image):
        raise ImageError("kernel has a Multiboot header without load addresses: expected an ELF file")
    executable = elf.parse(image)
    if executable.entry is None:
        raise ImageError("kernel's entry point lies in none of its segments")
    return executable.segments, executable.entry


def _kludge(image: Image, header: Header) -> tuple[list[Segment], int]:
    """Return what the address fields of the header (3.1.3) say to load, and the entry point."""
    start = header.offset - (header.header_address - header.load_address)
    if not 0 <= start <= header.offset:
        raise ImageError(
            f"kernel's Multiboot header has load_addr {header.load_address:#x} and "
            f"header_addr {header.header_address:#x}: the file does not reach that far"
        )
    length = header.load_end - header.load_address if header.load_end else image.size - start
    if length < 0 or start + length > image.size:
        raise ImageError(f"kernel is truncated: its Multiboot header asks for {length} bytes from {start}")
    size = max(length, header.bss_end - header.load_address)
    if not header.load_address <= header.entry < header.load_address + size:
        raise ImageError(f"kernel's entry point {header.entry:#x} lies outside of what its Multiboot header loads")
    return [Segment(header.load_address, size, start, length)], header.entry


def load(
    vcpu: api.Vcpu,
    memory: GuestMemory,
    image: Image,
    command_line: bytes,
    modules: Sequence[Module] = (),
    deadline: Deadline | None = None,
) -> None:
    """Load a Multiboot *image* and put *vcpu* at its entry point: EAX the magic, EBX the information structure.

    *command_line* is without its final NUL, and begins with the image's name as the convention is. Raises ImageError
    if the image asks for what is not there or does not fit.
    """
    header = find_header(image)
    if header is None:
        raise ImageError("kernel has no Multiboot header")
    unknown = header.flags & REQUIREMENTS & ~(PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE)
    if unknown:
        raise ImageError(f"kernel's Multiboot header requires flags {unknown:#x}: not provided")
    strings = Strings(command_line, modules)
    segments, entry = _segments(image, header)
    reserved = (
        Reserved(0, layout.GDT + 0x100, "interrupt vectors, BIOS data and descriptor table"),
        Reserved(INFO_ADDRESS, INFO_END, "Multiboot information"),
        Reserved(layout.COMMAND_LINE, layout.COMMAND_LINE + len(strings.data), "command line"),
        Reserved(layout.EBDA, layout.HIGH_MEMORY, "firmware"),
    )
    kernel_end = max(layout.HIGH_MEMORY, load_segments(memory, image, segments, reserved, deadline))
    memory.write(layout.COMMAND_LINE, strings.data)
    places = load_modules(memory, modules, kernel_end, deadline=deadline)
    _write_info(memory, modules, places, strings.addresses)
    enter_protected_mode(vcpu, memory, abi.kvm_regs(rip=entry, rax=LOADER_MAGIC, rbx=INFO_ADDRESS))


def _write_info(memory: GuestMemory, modules: Sequence[Module], places: Sequence[int], strings: Sequence[int]) -> None:
    """Write the information structure, and behind it what it points to."""
    at = INFO_ADDRESS + INFO.size
    full = f"{len(modules)} modules: their table does not fit below {INFO_END:#x}"

    def put(data: bytes) -> int:
        nonlocal at
        address = at
        if address + len(data) > INFO_END:
            raise ImageError(full)
        memory.write(address, data)
        at = (address + len(data) + 3) & ~3
        return address

    name_at = put(LOADER_NAME + b"\0")
    entries = b"".join(MEMORY_MAP_ENTRY.pack(20, *entry) for entry in layout.memory_map(memory))
    map_at = put(entries)
    if not _MODULES.allows(len(modules), room=(INFO_END - at) // MODULE.size):
        raise ImageError(full)
    table = b""
    for module, start, text in zip(modules, places, strings[1:], strict=True):
        table += MODULE.pack(start, start + module.image.size, text, 0)
    modules_at = put(table)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME | INFO_FRAMEBUFFER
    memory.write(
        INFO_ADDRESS,
        INFO.pack(
            *(flags, layout.EBDA // KIB, (memory.end_below_4g - MIB) // KIB, 0),
            *(strings[0], len(modules), modules_at),
            *(0, 0, 0, 0),  # symbols
            *(len(entries), map_at),
            *(0, 0, 0),  # drives, ROM configuration
            *(name_at, 0),
            *(0, 0, 0, 0, 0, 0),  # VBE: there is no such BIOS
            *(layout.TEXT_SCREEN, 2 * layout.TEXT_COLUMNS, layout.TEXT_COLUMNS, layout.TEXT_ROWS),
            *(16, FRAMEBUFFER_EGA_TEXT),
        ),
    )
