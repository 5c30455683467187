# SPDX-License-Identifier: Apache-2.0
"""Linux kernel images by Linux's boot protocol, 2.02 and later, through any of their entries.

The 64-bit entry has the kernel's zero page (``struct boot_params``) made here; so has the 32-bit one. Through the
real-mode entry the kernel's own setup code makes it, with BIOS calls (``bios``).

Source: ``Documentation/arch/x86/boot.rst`` (the setup header, field by field; "Loading The Rest of The Kernel",
"32-bit Boot Protocol", "64-bit Boot Protocol") and ``Documentation/arch/x86/zero-page.rst``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.cpustate import enter_long_mode, enter_protected_mode, enter_real_mode
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.boot.placement import Module, place_module
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import KIB, MIB, PAGE_SIZE, GuestMemory

# offsets in the file and, for the header, in the zero page too
SETUP_SECTS = 0x1F1
VID_MODE = 0x1FA
BOOT_FLAG = 0x1FE
JUMP = 0x200
HEADER_MAGIC = 0x202
VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
HEAP_END_PTR = 0x224
CMD_LINE_PTR = 0x228
HEADER_END_MAX = 0x290  # of struct setup_header in the zero page

# zero page only
EXT_MEM_K = 0x002
ACPI_RSDP_ADDR = 0x070
ALT_MEM_K = 0x1E0
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0
E820_MAX = 128

SECTOR = 512
LOADED_HIGH = 1 << 0
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7
XLF_KERNEL_64 = 1 << 0
LOADER_UNDEFINED = 0xFF
ENTRY_64 = 0x200
ENTRY_REAL_SEGMENTS = 0x20  # from the setup code's segment
MIN_VERSION = 0x202
PROTOCOL_32 = 0x207  # of the first kernels (2.6.24) whose documentation has the 32-bit entry
UNKNOWN_INIT_SIZE = 3  # times the compressed size: what GRUB takes where the header does not say

# field: offset, size, the first version that has it, its value before
_FIELDS = {
    "syssize": (0x1F4, 4, 0x204, 0),
    "loadflags": (LOADFLAGS, 1, 0x200, 0),
    "code32_start": (CODE32_START, 4, 0x200, 0),
    "initrd_addr_max": (0x22C, 4, 0x203, 0x37FFFFFF),
    "kernel_alignment": (0x230, 4, 0x205, 0),
    "relocatable_kernel": (0x234, 1, 0x205, 0),
    "xloadflags": (0x236, 2, 0x20C, 0),
    "cmdline_size": (0x238, 4, 0x206, 255),
    "pref_address": (0x258, 8, 0x20A, 0),
    "init_size": (0x260, 4, 0x20A, 0),
}

VIDEO_MODES = {"normal": 0xFFFF, "ext": 0xFFFE, "ask": 0xFFFD}


class Entry(Enum):
    """The ways into a kernel."""

    LONG = "64"
    PROTECTED = "32"
    REAL = "16"
    PVH = "pvh"
    """That of the ELF kernel inside, without the boot protocol (:mod:`.payload`, :mod:`.pvh`)."""


class Header(NamedTuple):
    """What the loader needs of the setup header."""

    setup_size: int
    version: int
    loadflags: int
    code32_start: int
    relocatable: bool
    alignment: int
    preferred: int
    init_size: int
    initrd_max: int
    command_line_max: int
    xloadflags: int
    end: int

    @property
    def protocol(self) -> str:
        """The version as people write it."""
        return f"{self.version >> 8}.{self.version & 0xFF:02}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that the kernel has, the best first."""
        high = bool(self.loadflags & LOADED_HIGH)
        # Loaders that jump to the 32-bit code are told by its address that there is one: iPXE's is 0.
        protected = high and self.version >= PROTOCOL_32 and bool(self.code32_start)
        found = ((Entry.LONG, high and self.xloadflags & XLF_KERNEL_64), (Entry.PROTECTED, protected))
        return (*(entry for entry, there in found if there), Entry.REAL)


def is_bzimage(image: Image) -> bool:
    """Tell whether *image* has Linux's setup header."""
    head = image.read(0, VERSION)
    return head[HEADER_MAGIC:VERSION] == b"HdrS" and head[BOOT_FLAG:JUMP] == b"\x55\xaa"


def parse_header(image: Image) -> Header:
    """Return the header's fields; ImageError says what is wrong with the kernel."""
    head = image.read(0, HEADER_END_MAX)

    def number(offset: int, size: int) -> int:
        return int.from_bytes(head[offset : offset + size], "little")

    if len(head) < CMD_LINE_PTR + 4:
        raise ImageError(f"kernel is truncated: {image.size} bytes do not hold a setup header")
    version = number(VERSION, 2)
    if version < MIN_VERSION:
        raise ImageError(f"boot protocol {version >> 8}.{version & 0xFF:02}: expected 2.02 or newer")
    end = HEADER_MAGIC + head[JUMP + 1]
    fields = {}
    for name, (offset, size, since, before) in _FIELDS.items():
        there = version >= since
        if there and offset + size > len(head):
            raise ImageError(f"kernel is truncated: {image.size} bytes do not hold a setup header")
        fields[name] = number(offset, size) if there else before
    setup_size = ((head[SETUP_SECTS] or 4) + 1) * SECTOR
    if image.size <= setup_size + ENTRY_64:
        raise ImageError(f"kernel is truncated: {image.size} bytes, the setup code alone has {setup_size}")
    system_size = fields["syssize"] * 16
    # the last paragraph need not be whole, and what is appended to a file (a signature) does not count
    if system_size and image.size < setup_size + system_size - 15:
        raise ImageError(f"kernel is truncated: {image.size} bytes, the header says {setup_size + system_size}")
    return Header(
        setup_size=setup_size,
        version=version,
        loadflags=fields["loadflags"],
        code32_start=fields["code32_start"],
        relocatable=bool(fields["relocatable_kernel"]),
        alignment=fields["kernel_alignment"],
        preferred=fields["pref_address"],
        init_size=fields["init_size"],
        initrd_max=fields["initrd_addr_max"],
        command_line_max=fields["cmdline_size"],
        xloadflags=fields["xloadflags"],
        end=min(end, HEADER_END_MAX),
    )


def choose_entry(header: Header, wanted: Entry | None) -> Entry:
    """Return the entry to take; ImageError if the kernel has not got the *wanted* one."""
    if wanted is None:
        return header.entries[0]
    if wanted not in header.entries:
        names = ", ".join(entry.value for entry in header.entries)
        raise ImageError(f"kernel of boot protocol {header.protocol} has no {wanted.value}-bit entry: it has {names}")
    return wanted


def load(
    vcpu: api.Vcpu,
    memory: GuestMemory,
    image: Image,
    modules: Sequence[Module],
    command_line: bytes,
    rsdp: int,
    *,
    entry: Entry | None = None,
    deadline: Deadline | None = None,
) -> None:
    """Load a kernel and put *vcpu* at the best of its entries, or at *entry*.

    *modules* become one initial RAM disk, one after the other; *command_line* is without its final NUL, *rsdp* the
    address of ACPI's root pointer. Raises ImageError if this is no x86 Linux kernel, or if kernel, RAM disk and
    command line do not fit into *memory*.
    """
    header = parse_header(image)
    way = choose_entry(header, entry)
    low = not header.loadflags & LOADED_HIGH
    line_at, line_room = (
        (layout.LOW_COMMAND_LINE, layout.EBDA - layout.LOW_COMMAND_LINE)
        if low
        else (
            layout.COMMAND_LINE,
            layout.COMMAND_LINE_MAX,
        )
    )
    limit = min(header.command_line_max, line_room - 1)
    if len(command_line) > limit:
        raise ImageError(f"command line has {len(command_line)} bytes: this kernel takes {limit}")
    address, runtime_end = _place_kernel(memory, header, image.size - header.setup_size, low=low)
    image.copy_to(memory.slice(address, image.size - header.setup_size), header.setup_size, deadline)
    memory.write(line_at, command_line + b"\0")
    ramdisk = _load_ramdisk(memory, header, modules, runtime_end, command_line, deadline)
    if way is Entry.REAL:
        _enter_setup(vcpu, memory, image, header, line_at, ramdisk, command_line, low=low)
        return
    _write_zero_page(memory, image, header, address, ramdisk, command_line, rsdp)
    regs = abi.kvm_regs(rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK)
    if way is Entry.LONG:
        regs.rip = address + ENTRY_64
        enter_long_mode(vcpu, memory, regs)
    else:
        regs.rip = address
        enter_protected_mode(vcpu, memory, regs)


def _place_kernel(memory: GuestMemory, header: Header, size: int, *, low: bool) -> tuple[int, int]:
    """Return where the protected-mode code goes, and the end of what the kernel needs until it has set up itself."""
    if low:
        room = layout.LOW_SETUP - layout.LOW_KERNEL
        if size > room:
            raise ImageError(f"kernel of {size} bytes is to be loaded low (LOADED_HIGH is clear): at most {room} fit")
        return layout.LOW_KERNEL, layout.HIGH_MEMORY + UNKNOWN_INIT_SIZE * size
    address = layout.HIGH_MEMORY if header.relocatable else header.preferred or layout.HIGH_MEMORY
    # A relocatable kernel below its preferred address moves itself there, and needs init_size from there on.
    start = address
    if header.relocatable and header.alignment:
        start += -address % header.alignment
    runtime_end = max(start, header.preferred) + max(header.init_size or UNKNOWN_INIT_SIZE * size, size)
    if address < layout.HIGH_MEMORY:
        raise ImageError(f"kernel wants to be loaded at {address:#x}: expected {layout.HIGH_MEMORY:#x} or above")
    if runtime_end > memory.end_below_4g or address + size > memory.end_below_4g:
        raise ImageError(
            f"kernel does not fit: it needs memory up to {runtime_end:#x} ({-(-runtime_end // MIB)} MiB), "
            f"there are {memory.size // MIB} MiB"
        )
    return address, runtime_end


def _load_ramdisk(
    memory: GuestMemory,
    header: Header,
    modules: Sequence[Module],
    kernel_end: int,
    command_line: bytes,
    deadline: Deadline | None,
) -> tuple[int, int]:
    """Load *modules* as one RAM disk, each padded to 4 bytes as cpio members are; return its address and size."""
    offsets = []
    size = 0
    for module in modules:
        size = size + 3 & ~3
        offsets.append(size)
        size += module.image.size
    if not size:
        return 0, 0
    # a guest told to use less memory than there is finds its RAM disk within that ("mem=", boot.rst)
    highest = min(header.initrd_max or 0x37FFFFFF, _memory_limit(command_line) - 1)
    at = place_module(memory, size, kernel_end, highest)
    for module, offset in zip(modules, offsets, strict=True):
        end = at + offset + module.image.size
        module.image.copy_to(memory.slice(at + offset, module.image.size), 0, deadline)
        memory.clear(end, min(-end % 4, at + size - end))
    return at, size


def _fill_header(header: bytearray, ramdisk: tuple[int, int], line_at: int, command_line: bytes) -> None:
    """Write what the loader has to into the setup header at its place in *header* (boot.rst, "obligatory" fields)."""
    header[TYPE_OF_LOADER] = LOADER_UNDEFINED
    struct.pack_into("<II", header, RAMDISK_IMAGE, *ramdisk)
    struct.pack_into("<I", header, CMD_LINE_PTR, line_at)
    mode = _video_mode(command_line)
    if mode is not None:
        struct.pack_into("<H", header, VID_MODE, mode)


def _write_zero_page(
    memory: GuestMemory,
    image: Image,
    header: Header,
    address: int,
    ramdisk: tuple[int, int],
    command_line: bytes,
    rsdp: int,
) -> None:
    """Write ``struct boot_params`` as the setup code would have."""
    page = bytearray(PAGE_SIZE)
    page[SETUP_SECTS : header.end] = image.read(SETUP_SECTS, header.end - SETUP_SECTS)
    _fill_header(page, ramdisk, layout.COMMAND_LINE, command_line)
    page[LOADFLAGS] |= CAN_USE_HEAP | KEEP_SEGMENTS
    struct.pack_into("<H", page, HEAP_END_PTR, 0xFE00)
    struct.pack_into("<I", page, CODE32_START, address)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp)
    high_kib = (memory.end_below_4g - layout.HIGH_MEMORY) // KIB
    struct.pack_into("<H", page, EXT_MEM_K, min(high_kib, 0xFC00))
    struct.pack_into("<I", page, ALT_MEM_K, high_kib)
    entries = layout.memory_map(memory)
    page[E820_ENTRIES] = _E820.check(len(entries))
    for index, row in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *row)
    memory.write(layout.ZERO_PAGE, page)


#: Where the setup code's heap ends, from its beginning (boot.rst).
_LOW_HEAP_END, _HIGH_HEAP_END = 0x9800, 0xE000


def _setup_size(name: str, most: int) -> Size:
    def raises(message: str) -> ImageError:
        return ImageError(f"kernel does not fit: {message}")

    return Size(name, most, raises, giver="file", effect="ImageError", where=__name__)


_LOW_SETUP = _setup_size("bytes of a kernel's setup code, loaded low", _LOW_HEAP_END - SECTOR)
_HIGH_SETUP = _setup_size("bytes of a kernel's setup code, loaded high", _HIGH_HEAP_END - SECTOR)
#: What the zero page has room for (E820_MAX_ENTRIES_ZEROPAGE).
_E820 = Size("entries of a guest's memory map", 128, ImageError, element=20, effect="ImageError", where=__name__)


def _enter_setup(
    vcpu: api.Vcpu,
    memory: GuestMemory,
    image: Image,
    header: Header,
    line_at: int,
    ramdisk: tuple[int, int],
    command_line: bytes,
    *,
    low: bool,
) -> None:
    """Load the real-mode setup code and put *vcpu* at its entry (boot.rst, "Running the Kernel")."""
    base, heap_end = (layout.LOW_SETUP, _LOW_HEAP_END) if low else (layout.HIGH_SETUP, _HIGH_HEAP_END)
    (_LOW_SETUP if low else _HIGH_SETUP).check(header.setup_size, called="bytes of setup code")
    setup = bytearray(image.read(0, header.setup_size))
    _fill_header(setup, ramdisk, line_at, command_line)
    setup[LOADFLAGS] |= CAN_USE_HEAP
    struct.pack_into("<H", setup, HEAP_END_PTR, heap_end - 0x200)
    memory.write(base, setup)
    segment = base >> 4
    enter_real_mode(vcpu, segment, abi.kvm_regs(rip=0, rsp=heap_end), code_segment=segment + ENTRY_REAL_SEGMENTS)


def _option(command_line: bytes, name: bytes) -> bytes | None:
    """Return the value of the last option *name* on the command line."""
    found = re.findall(rb"(?:^|\s)" + name + rb"=(\S+)", command_line)
    return found[-1] if found else None


def _number(text: bytes) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def _video_mode(command_line: bytes) -> int | None:
    """Return what ``vga=`` asks for, as the field vid_mode has it (boot.rst, "Special Command Line Options")."""
    value = _option(command_line, b"vga")
    if value is None:
        return None
    mode = VIDEO_MODES.get(value.decode("latin-1"), _number(value))
    return mode if mode is not None and 0 <= mode <= 0xFFFF else None


def _memory_limit(command_line: bytes) -> int:
    """Return what ``mem=`` sets as the end of memory, or 4 GiB."""
    value = _option(command_line, b"mem") or b""
    match = re.fullmatch(rb"(0[xX][0-9a-fA-F]{1,12}|\d{1,12})([kKmMgG]?)", value)
    limit = (_number(match[1]) or 0) << {b"": 0, b"K": 10, b"M": 20, b"G": 30}[match[2].upper()] if match else 0
    return min(limit, 1 << 32) or 1 << 32
