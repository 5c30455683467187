# SPDX-License-Identifier: Apache-2.0
"""Where the parts of an image go in guest memory: segments of a kernel, and modules (initial RAM disks) above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softkvm.abi.sizes import Size
from softkvm.vmm.boot import layout
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, PAGE_SIZE, GuestMemory


class Segment(NamedTuple):
    """*file_size* bytes at *offset* of the image go to guest physical *address*; zeroes follow up to *size* bytes."""

    address: int
    size: int
    offset: int
    file_size: int

    @property
    def end(self) -> int:
        """The first address after the segment."""
        return self.address + self.size


class Reserved(NamedTuple):
    """Addresses from *start* to *end* that a kernel must leave alone: *what* lies there."""

    start: int
    end: int
    what: str


class Module(NamedTuple):
    """A file for the kernel, and its command line."""

    image: Image
    command_line: bytes = b""


_COMMAND_LINES = Size(
    "bytes of a guest's command lines", layout.COMMAND_LINE_MAX, ImageError, effect="ImageError", where=__name__
)

#: As large as fields of 32 bits say, and no larger than the memory that the kernel leaves.
_MODULE = Size("bytes of an initial RAM disk", 0xFFFFFFFF, None, effect="ImageError", where=__name__)


class Strings:
    """The command lines, the kernel's first, as they lie in memory from ``layout.COMMAND_LINE`` on."""

    def __init__(self, command_line: bytes, modules: Sequence[Module]) -> None:
        self.data = b""
        self.addresses = []
        for text in (command_line, *(module.command_line for module in modules)):
            self.addresses.append(layout.COMMAND_LINE + len(self.data))
            self.data += text + b"\0"
            if not _COMMAND_LINES.allows(len(self.data)):
                of = "command line has" if text is command_line else "command lines of kernel and modules have"
                raise ImageError(f"{of} {len(self.data) - 1} bytes: at most {layout.COMMAND_LINE_MAX - 1}")


def load_segments(
    memory: GuestMemory,
    image: Image,
    segments: Sequence[Segment],
    reserved: Sequence[Reserved] = (),
    deadline: Deadline | None = None,
) -> int:
    """Load *segments* of *image*; return the first address behind all of them.

    Raises ImageError, before anything is read, if one does not fit, touches what is *reserved* or overlaps another:
    so no byte of memory is written twice.
    """
    end = 0
    for segment in sorted(segments):
        if segment.end > memory.end_below_4g:
            raise ImageError(
                f"kernel does not fit: a segment ends at {segment.end:#x}, there are {memory.size // MIB} MiB"
            )
        for start, stop, what in reserved:
            if segment.address < stop and start < segment.end:
                raise ImageError(
                    f"kernel's segment at {segment.address:#x} to {segment.end:#x} overlaps the loader's {what}"
                )
        if segment.address < end:
            raise ImageError(
                f"kernel's segment at {segment.address:#x} to {segment.end:#x} overlaps another, which ends at {end:#x}"
            )
        end = segment.end
    for segment in segments:
        target = memory.slice(segment.address, segment.size)
        image.copy_to(target[: segment.file_size], segment.offset, deadline)
        memory.clear(segment.address + segment.file_size, segment.size - segment.file_size)
    return end


def place_module(memory: GuestMemory, size: int, kernel_end: int, highest: int, name: str = "initrd") -> int:
    """Return the page-aligned address for *size* bytes as high as *highest* and the RAM allow; ImageError if none."""
    end = min(memory.end_below_4g, highest + 1)
    address = (end - size) & -PAGE_SIZE
    if not _MODULE.allows(size, room=end - kernel_end) or address < kernel_end:
        raise ImageError(
            f"{name} of {size} bytes does not fit: the kernel needs the memory below {kernel_end:#x}, "
            f"RAM for it ends at {end:#x} ({memory.size // MIB} MiB)"
        )
    return address


def load_modules(
    memory: GuestMemory,
    modules: Sequence[Module],
    kernel_end: int,
    highest: int = 0xFFFFFFFF,
    deadline: Deadline | None = None,
) -> list[int]:
    """Load *modules* page-aligned, each below the one before, from *highest* downwards; return their addresses."""
    places = []
    for module in modules:
        places.append(place_module(memory, module.image.size, kernel_end, highest, module.image.name))
        highest = places[-1] - 1
    for module, address in zip(modules, places, strict=True):
        module.image.copy_to(memory.slice(address, module.image.size), 0, deadline)
    return places
