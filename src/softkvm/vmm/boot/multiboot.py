# SPDX-License-Identifier: Apache-2.0
"""Multiboot 1: images with a Multiboot header, entered in 32-bit protected mode.

Source: Multiboot specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (information structure).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from softkvm import abi, api
from softkvm.vmm.boot import elf, layout
from softkvm.vmm.boot.bzimage import place_initrd
from softkvm.vmm.boot.cpustate import enter_protected_mode
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

INFO = struct.Struct("<7I4I2I3I24s")
MODULE = struct.Struct("<IIII")
MEMORY_MAP_ENTRY = struct.Struct("<IQQI")

LOADER_NAME = b"softkvm"
INFO_ADDRESS = layout.PVH_START_INFO
INFO_END = layout.ZERO_PAGE


class Header(NamedTuple):
    """The header's position in the file, its flags, and the addresses of an image that is not ELF."""

    offset: int
    flags: int
    header_address: int
    load_address: int
    load_end: int
    bss_end: int
    entry: int


def find_header(image: bytes) -> Header | None:
    """Return the Multiboot header of *image*, None if it has none."""
    magic = struct.pack("<I", HEADER_MAGIC)
    at = image.find(magic, 0, SEARCH)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(image):
            _, flags, check = struct.unpack_from("<III", image, at)
            if (HEADER_MAGIC + flags + check) & 0xFFFFFFFF == 0:
                fields = image[at + 12 : at + 32].ljust(20, b"\0")
                return Header(at, flags, *struct.unpack("<5I", fields))
        at = image.find(magic, at + 1, SEARCH)
    return None


def _segments(image: bytes, header: Header) -> tuple[list[elf.Segment], int]:
    """Return what to load and the entry point."""
    if header.flags & AOUT_KLUDGE:
        start = header.offset - (header.header_address - header.load_address)
        if not 0 <= start <= header.offset:
            raise ImageError(
                f"kernel's Multiboot header has load_addr {header.load_address:#x} and "
                f"header_addr {header.header_address:#x}: the file does not reach that far"
            )
        length = header.load_end - header.load_address if header.load_end else len(image) - start
        if length < 0 or start + length > len(image):
            raise ImageError(f"kernel is truncated: its Multiboot header asks for {length} bytes from {start}")
        size = max(length, header.bss_end - header.load_address)
        data = memoryview(image)[start : start + length]
        return [elf.Segment(header.load_address, size, data)], header.entry
    if not elf.is_elf(image):
        raise ImageError("kernel has a Multiboot header without load addresses: expected an ELF file")
    executable = elf.parse(image)
    return executable.segments, executable.entry


def load(
    vcpu: api.Vcpu, memory: GuestMemory, image: bytes, command_line: bytes, modules: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Load a Multiboot *image* and put *vcpu* at its entry point: EAX the magic, EBX the information structure.

    *command_line* is without its final NUL, and begins with the image's name as the convention is; *modules* are
    (contents, command line). Raises ImageError if the image asks for what is not there or does not fit.
    """
    header = find_header(image)
    if header is None:
        raise ImageError("kernel has no Multiboot header")
    unknown = header.flags & REQUIREMENTS & ~(PAGE_ALIGN | MEMORY_INFO)
    if unknown:
        what = "a video mode" if unknown == VIDEO_MODE else f"flags {unknown:#x}"
        raise ImageError(f"kernel's Multiboot header requires {what}: not provided")
    if len(command_line) >= layout.COMMAND_LINE_MAX:
        raise ImageError(f"command line has {len(command_line)} bytes: at most {layout.COMMAND_LINE_MAX - 1}")
    segments, entry = _segments(image, header)
    kernel_end = layout.HIGH_MEMORY
    for segment in segments:
        end = segment.address + segment.size
        if end > memory.end_below_4g:
            raise ImageError(f"kernel does not fit: a segment ends at {end:#x}, there are {memory.size // MIB} MiB")
        for start, stop, what in (
            (layout.GDT, layout.GDT + 0x100, "descriptor table"),
            (INFO_ADDRESS, INFO_END, "Multiboot information"),
            (layout.COMMAND_LINE, layout.COMMAND_LINE + len(command_line) + 1, "command line"),
            (layout.EBDA, layout.HIGH_MEMORY, "firmware"),
        ):
            if segment.address < stop and start < end:
                raise ImageError(f"kernel's segment at {segment.address:#x} to {end:#x} overlaps the loader's {what}")
        kernel_end = max(kernel_end, end)
    for segment in segments:
        target = memory.slice(segment.address, segment.size)
        target[: len(segment.data)] = segment.data
        target[len(segment.data) :] = bytes(segment.size - len(segment.data))
    memory.write(layout.COMMAND_LINE, command_line + b"\0")
    _write_info(memory, modules, kernel_end)
    enter_protected_mode(vcpu, memory, abi.kvm_regs(rip=entry, rax=LOADER_MAGIC, rbx=INFO_ADDRESS))


def _write_info(memory: GuestMemory, modules: Sequence[tuple[bytes, bytes]], kernel_end: int) -> None:
    """Write the information structure, and behind it what it points to; modules go as high as they fit."""
    at = INFO_ADDRESS + INFO.size

    def put(data: bytes) -> int:
        nonlocal at
        address = at
        if address + len(data) > INFO_END:
            raise ImageError(f"{len(modules)} modules: their table does not fit below {INFO_END:#x}")
        memory.write(address, data)
        at = (address + len(data) + 3) & ~3
        return address

    name_at = put(LOADER_NAME + b"\0")
    entries = b"".join(MEMORY_MAP_ENTRY.pack(20, *entry) for entry in layout.memory_map(memory))
    map_at = put(entries)
    table = b""
    highest = 0xFFFFFFFF
    for contents, text in modules:
        start = place_initrd(memory, len(contents), kernel_end, highest)
        memory.write(start, contents)
        highest = start - 1
        table += MODULE.pack(start, start + len(contents), put(text + b"\0"), 0)
    modules_at = put(table)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME
    memory.write(
        INFO_ADDRESS,
        INFO.pack(
            *(flags, layout.EBDA // KIB, (memory.end_below_4g - MIB) // KIB, 0),
            *(layout.COMMAND_LINE, len(modules), modules_at),
            *(0, 0, 0, 0),  # symbols
            *(len(entries), map_at),
            *(0, 0, 0),  # drives, ROM configuration
            struct.pack("<I", name_at).ljust(24, b"\0"),
        ),
    )
