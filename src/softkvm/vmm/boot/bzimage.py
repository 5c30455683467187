# SPDX-License-Identifier: Apache-2.0
"""Linux bzImage by the 64-bit boot protocol.

Source: ``Documentation/arch/x86/boot.rst`` (the setup header, field by field; "64-bit Boot Protocol") and
``Documentation/arch/x86/zero-page.rst`` (``struct boot_params``).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from softkvm import abi, api
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.cpustate import enter_long_mode
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, PAGE_SIZE, GuestMemory

# offsets in the file and, for the header, in the zero page too
SETUP_SECTS = 0x1F1
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
INITRD_ADDR_MAX = 0x22C
KERNEL_ALIGNMENT = 0x230
RELOCATABLE_KERNEL = 0x234
XLOADFLAGS = 0x236
CMDLINE_SIZE = 0x238
PREF_ADDRESS = 0x258
INIT_SIZE = 0x260

# zero page only
ACPI_RSDP_ADDR = 0x070
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0
E820_MAX = 128

LOADED_HIGH = 1 << 0
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7
XLF_KERNEL_64 = 1 << 0
LOADER_UNDEFINED = 0xFF
ENTRY_64 = 0x200
MIN_VERSION = 0x20C  # 2.12 has xloadflags


class Header(NamedTuple):
    """What the loader needs of the setup header."""

    setup_size: int
    version: int
    relocatable: bool
    alignment: int
    preferred: int
    init_size: int
    initrd_max: int
    command_line_max: int
    end: int


def is_bzimage(image: bytes) -> bool:
    """Tell whether *image* has Linux's setup header."""
    return image[HEADER_MAGIC : HEADER_MAGIC + 4] == b"HdrS" and image[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa"


def parse_header(image: bytes) -> Header:
    """Return the header's fields; ImageError says what is wrong with the kernel."""

    def number(offset: int, size: int) -> int:
        return int.from_bytes(image[offset : offset + size], "little")

    if len(image) < INIT_SIZE + 4:
        raise ImageError(f"kernel is truncated: {len(image)} bytes do not hold a setup header")
    version = number(VERSION, 2)
    if version < MIN_VERSION:
        raise ImageError(f"boot protocol {version >> 8}.{version & 0xFF:02}: expected 2.12 or newer")
    if not number(XLOADFLAGS, 2) & XLF_KERNEL_64:
        raise ImageError("kernel has no 64-bit entry point (XLF_KERNEL_64 is clear): expected an x86-64 kernel")
    if not number(LOADFLAGS, 1) & LOADED_HIGH:
        raise ImageError("kernel is a zImage (LOADED_HIGH is clear): expected a bzImage")
    setup_size = ((number(SETUP_SECTS, 1) or 4) + 1) * 512
    if len(image) <= setup_size + ENTRY_64:
        raise ImageError(f"kernel is truncated: {len(image)} bytes, the setup code alone has {setup_size}")
    syssize = number(0x1F4, 4) * 16
    if syssize and len(image) < setup_size + syssize - 15:
        raise ImageError(f"kernel is truncated: {len(image)} bytes, the header says {setup_size + syssize}")
    return Header(
        setup_size=setup_size,
        version=version,
        relocatable=bool(number(RELOCATABLE_KERNEL, 1)),
        alignment=number(KERNEL_ALIGNMENT, 4),
        preferred=number(PREF_ADDRESS, 8),
        init_size=number(INIT_SIZE, 4),
        initrd_max=number(INITRD_ADDR_MAX, 4),
        command_line_max=number(CMDLINE_SIZE, 4),
        end=0x202 + number(0x201, 1),
    )


def place_initrd(memory: GuestMemory, size: int, kernel_end: int, highest: int) -> int:
    """Return the page-aligned address for *size* bytes as high as *highest* and the RAM allow; ImageError if none."""
    end = min(memory.end_below_4g, highest + 1)
    address = (end - size) & -PAGE_SIZE
    if address < kernel_end:
        raise ImageError(
            f"initrd of {size} bytes does not fit: the kernel needs the memory below {kernel_end:#x}, "
            f"RAM for it ends at {end:#x} ({memory.size // MIB} MiB)"
        )
    return address


def load(
    vcpu: api.Vcpu, memory: GuestMemory, image: bytes, initrd: bytes | None, command_line: bytes, rsdp: int
) -> None:
    """Load a bzImage and put *vcpu* at its 64-bit entry.

    *command_line* is without its final NUL, *rsdp* the address of ACPI's root pointer. Raises ImageError if the
    kernel is no x86-64 bzImage or if kernel, initrd and command line do not fit into *memory*.
    """
    header = parse_header(image)
    limit = min(header.command_line_max, layout.COMMAND_LINE_MAX - 1)
    if len(command_line) > limit:
        raise ImageError(f"command line has {len(command_line)} bytes: this kernel takes {limit}")

    payload = memoryview(image)[header.setup_size :]
    address = layout.HIGH_MEMORY if header.relocatable else header.preferred
    # A relocatable kernel below its preferred address moves itself there, and needs init_size from there on.
    runtime_end = max(address, header.preferred) + max(header.init_size, len(payload))
    if runtime_end > memory.end_below_4g or address + len(payload) > memory.end_below_4g:
        raise ImageError(
            f"kernel does not fit: it needs memory up to {runtime_end:#x} ({-(-runtime_end // MIB)} MiB), "
            f"there are {memory.size // MIB} MiB"
        )
    memory.write(address, payload)
    memory.write(layout.COMMAND_LINE, command_line + b"\0")

    zero_page = bytearray(PAGE_SIZE)
    zero_page[SETUP_SECTS : header.end] = image[SETUP_SECTS : header.end]
    zero_page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    zero_page[LOADFLAGS] |= CAN_USE_HEAP | KEEP_SEGMENTS
    struct.pack_into("<H", zero_page, HEAP_END_PTR, 0xFE00)
    struct.pack_into("<I", zero_page, CODE32_START, address)
    struct.pack_into("<I", zero_page, CMD_LINE_PTR, layout.COMMAND_LINE)
    struct.pack_into("<Q", zero_page, ACPI_RSDP_ADDR, rsdp)
    if initrd:
        at = place_initrd(memory, len(initrd), runtime_end, header.initrd_max or 0x37FFFFFF)
        memory.write(at, initrd)
        struct.pack_into("<II", zero_page, RAMDISK_IMAGE, at, len(initrd))
    entries = layout.memory_map(memory)
    zero_page[E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", zero_page, E820_TABLE + 20 * index, *entry)
    memory.write(layout.ZERO_PAGE, zero_page)

    regs = abi.kvm_regs(rip=address + ENTRY_64, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK)
    enter_long_mode(vcpu, memory, regs)
