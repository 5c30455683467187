# SPDX-License-Identifier: Apache-2.0
"""ELF executables: the segments to load, the entry point, the PVH entry point.

Only the headers are read here; every offset and size in them is checked against the file.

Sources: System V ABI, chapters 4 (ELF header) and 5 (program header, note section); Xen's
``xen/include/public/elfnote.h`` (XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from softkvm.abi.sizes import Size
from softkvm.vmm.boot.image import Image
from softkvm.vmm.boot.placement import Segment
from softkvm.vmm.errors import ImageError

ELF_MAGIC = b"\x7fELF"
XEN_ELFNOTE_PHYS32_ENTRY = 18

ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_NOTE = 1, 4
EM_386, EM_X86_64 = 3, 62
PN_XNUM = 0xFFFF  # more headers than the field can count

_TYPES = {0: "ET_NONE", 1: "ET_REL", ET_EXEC: "ET_EXEC", ET_DYN: "ET_DYN", 4: "ET_CORE"}
_MACHINES = {
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "IBM S/390",
    40: "ARM",
    50: "IA-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
_NOTES = Size(
    "bytes of an ELF file's notes", 1 << 16, None, giver="file", effect="later ones aren't read", where=__name__
)
#: More program headers than the field can count are PN_XNUM.
_PROGRAM_HEADERS = Size(
    "program headers of an ELF file",
    PN_XNUM - 1,
    lambda message: ImageError(f"kernel is an ELF file of which {message}"),
    element=56,
    giver="file",
    effect="ImageError",
    where=__name__,
)
_NOTE = struct.Struct("<III")

# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
_HEADERS = {ELFCLASS32: struct.Struct("<HHIIIIIHHH"), ELFCLASS64: struct.Struct("<HHIQQQIHHH")}
_IDENT = 16


class ProgramHeader(NamedTuple):
    """An entry of the program header table."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int


class Executable(NamedTuple):
    """What a loader needs of an ELF file.

    *entry* is e_entry as a physical address, None if no segment holds it; *pvh_entry* is None without the PVH note.
    """

    segments: list[Segment]
    entry: int | None
    pvh_entry: int | None


def is_elf(image: Image) -> bool:
    """Tell whether *image* begins as an ELF file does."""
    return image.read(0, 4) == ELF_MAGIC


def parse(image: Image) -> Executable:
    """Return the loadable parts of *image*; ImageError if it is no complete x86 executable."""
    headers, e_entry = _headers(image)
    segments = []
    entry = pvh_entry = None
    for header in headers:
        if header.type == PT_LOAD and header.memory_size:
            end = header.offset + header.file_size
            if end > image.size:
                raise ImageError(
                    f"kernel is truncated: a segment ends at byte {end} of the file, which has {image.size}"
                )
            if header.file_size > header.memory_size:
                raise ImageError(
                    f"kernel is a damaged ELF file: a segment has {header.file_size} bytes in the file "
                    f"and {header.memory_size} in memory"
                )
            segments.append(Segment(header.paddr, header.memory_size, header.offset, header.file_size))
            if entry is None and header.vaddr <= e_entry < header.vaddr + header.memory_size:
                entry = e_entry - header.vaddr + header.paddr
        elif header.type == PT_NOTE and pvh_entry is None:
            pvh_entry = _pvh_entry(image.read(header.offset, _NOTES.cut(header.file_size)))
    if not segments:
        raise ImageError("ELF file has no loadable segment")
    return Executable(segments, entry, pvh_entry)


def _headers(image: Image) -> tuple[list[ProgramHeader], int]:
    """Return the program headers and e_entry."""
    ident = image.read(0, _IDENT)
    layout = _HEADERS.get(ident[4]) if len(ident) == _IDENT and ident[5] == ELFDATA2LSB else None
    data = image.read(_IDENT, layout.size) if layout else b""
    if layout is None or len(data) < layout.size:
        if len(ident) == _IDENT and ident[4] in _HEADERS and ident[5] == 2:
            raise ImageError("kernel is a big-endian ELF file: expected x86-64")
        raise ImageError(f"kernel is a damaged ELF file of {image.size} bytes: its headers cannot be read")
    type, machine, _, entry, offset, _, _, _, entry_size, count = layout.unpack(data)
    if machine not in (EM_386, EM_X86_64):
        raise ImageError(f"kernel is for {_MACHINES.get(machine, f'ELF machine {machine}')}: expected x86-64")
    if type not in (ET_EXEC, ET_DYN):
        raise ImageError(f"ELF file is of type {_TYPES.get(type, type)}: expected an executable (ET_EXEC)")
    wide = ident[4] == ELFCLASS64
    expected = 56 if wide else 32
    if entry_size != expected and count:
        raise ImageError(f"kernel is a damaged ELF file: program headers of {entry_size} bytes, expected {expected}")
    _PROGRAM_HEADERS.check(count, called="e_phnum")
    table = image.read(offset, count * expected)
    if len(table) < count * expected:
        raise ImageError(f"kernel is a damaged ELF file of {image.size} bytes: its headers cannot be read")
    if wide:
        rows = struct.iter_unpack("<IIQQQQQQ", table)
        return [ProgramHeader(t, o, v, p, f, m) for t, _, o, v, p, f, m, _ in rows], entry
    rows = struct.iter_unpack("<8I", table)
    return [ProgramHeader(t, o, v, p, f, m) for t, o, v, p, f, m, _, _ in rows], entry


def _pvh_entry(notes: bytes) -> int | None:
    """Return the descriptor of the note XEN_ELFNOTE_PHYS32_ENTRY."""
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, type = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        descriptor_at = name_at + (name_size + 3 & ~3)
        if notes[name_at : name_at + name_size].rstrip(b"\0") == b"Xen" and type == XEN_ELFNOTE_PHYS32_ENTRY:
            if descriptor_at + size > len(notes) or not 4 <= size <= 8:
                raise ImageError(f"kernel is a damaged ELF file: its PVH note has {size} bytes, expected 4 or 8")
            return int.from_bytes(notes[descriptor_at : descriptor_at + size], "little")
        at = descriptor_at + (size + 3 & ~3)
    return None
