# SPDX-License-Identifier: Apache-2.0
"""ELF executables: the segments to load and the PVH entry point.

Sources: System V ABI (program headers), Xen's ``xen/include/public/elfnote.h`` (XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import io
from typing import NamedTuple, cast

from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from softkvm.vmm.errors import ImageError

ELF_MAGIC = b"\x7fELF"
XEN_ELFNOTE_PHYS32_ENTRY = 18
MACHINES = ("EM_X86_64", "EM_386")


class Segment(NamedTuple):
    """*data* goes to guest physical *address*; zeroes follow up to *size* bytes."""

    address: int
    size: int
    data: memoryview


class Executable(NamedTuple):
    """What a loader needs of an ELF file; *pvh_entry* is None without the PVH note."""

    segments: list[Segment]
    entry: int
    pvh_entry: int | None


def is_elf(image: bytes) -> bool:
    """Tell whether *image* begins as an ELF file does."""
    return image[:4] == ELF_MAGIC


def parse(image: bytes) -> Executable:
    """Return the loadable parts of *image*; ImageError if it is no complete x86 executable."""
    try:
        return _parse(image)
    except ImageError:
        raise
    except Exception as error:
        # the library raises whatever its parser stumbles over; for us all of it means one thing
        raise ImageError(f"kernel is a damaged ELF file of {len(image)} bytes: its headers cannot be read") from error


def _parse(image: bytes) -> Executable:
    elf = ELFFile(io.BytesIO(image))
    machine = elf["e_machine"]
    if machine not in MACHINES:
        raise ImageError(f"kernel is for {elf.get_machine_arch()}: expected x86-64")
    if elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise ImageError(f"ELF file is of type {elf['e_type']}: expected an executable (ET_EXEC)")
    segments = []
    pvh_entry = None
    for segment in elf.iter_segments():
        if segment["p_type"] == "PT_LOAD" and segment["p_memsz"]:
            start, length = segment["p_offset"], segment["p_filesz"]
            if start + length > len(image):
                raise ImageError(
                    f"kernel is truncated: a segment ends at byte {start + length} of the file, which has {len(image)}"
                )
            data = memoryview(image)[start : start + length]
            segments.append(Segment(segment["p_paddr"], max(segment["p_memsz"], length), data))
        elif isinstance(segment, NoteSegment):
            for note in segment.iter_notes():
                if note["n_name"] == "Xen" and cast(int, note["n_type"]) == XEN_ELFNOTE_PHYS32_ENTRY:
                    pvh_entry = int.from_bytes(note["n_descdata"][:8], "little")
    if not segments:
        raise ImageError("ELF file has no loadable segment")
    return Executable(segments, elf["e_entry"], pvh_entry)
