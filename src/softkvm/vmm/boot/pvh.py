# SPDX-License-Identifier: Apache-2.0
"""Direct boot of an ELF kernel through the PVH entry point.

Sources: Xen's ``docs/misc/pvh.pandoc`` (state at entry) and ``xen/include/public/arch-x86/hvm/start_info.h``
(``hvm_start_info``, ``hvm_modlist_entry``, ``hvm_memmap_table_entry``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from softkvm import abi, api
from softkvm.abi.sizes import Size
from softkvm.vmm.boot import elf, layout
from softkvm.vmm.boot.cpustate import enter_protected_mode
from softkvm.vmm.boot.image import Deadline, Image
from softkvm.vmm.boot.placement import Module, Strings, load_modules, load_segments
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import GuestMemory

START_MAGIC = 0x336EC578
START_VERSION = 1
START_INFO = struct.Struct("<IIIIQQQQII")
MODULE = struct.Struct("<QQQQ")
MEMORY_MAP_ENTRY = struct.Struct("<QQII")
_ROOM = layout.ZERO_PAGE - layout.PVH_START_INFO - START_INFO.size
_MODULES = Size(
    "modules of a PVH kernel",
    _ROOM // MODULE.size,
    None,
    element=MODULE.size,
    effect="ImageError",
    where=__name__,
)


def load(
    vcpu: api.Vcpu,
    memory: GuestMemory,
    image: Image,
    modules: Sequence[Module],
    command_line: bytes,
    rsdp: int,
    deadline: Deadline | None = None,
) -> None:
    """Load an ELF kernel and put *vcpu* at its PVH entry, with EBX at the start info.

    The first of *modules* is Linux's initial RAM disk. *command_line* is without its final NUL, *rsdp* the address of
    ACPI's root pointer. Raises ImageError if the file has no PVH entry or does not fit.
    """
    executable = elf.parse(image)
    entry = executable.pvh_entry
    if entry is None:
        raise ImageError("ELF file has no PVH entry point: expected the note XEN_ELFNOTE_PHYS32_ENTRY (CONFIG_PVH)")
    for segment in executable.segments:
        if segment.address < layout.HIGH_MEMORY:
            raise ImageError(
                f"ELF segment at {segment.address:#x}: expected physical addresses from {layout.HIGH_MEMORY:#x}"
            )
    strings = Strings(command_line, modules)
    kernel_end = load_segments(memory, image, executable.segments, deadline=deadline)
    if not any(segment.address <= entry < segment.end for segment in executable.segments):
        raise ImageError(f"kernel's PVH entry point {entry:#x} lies in none of its segments")
    memory.write(layout.COMMAND_LINE, strings.data)
    places = load_modules(memory, modules, kernel_end, deadline=deadline)

    table = b""
    for module, address, text in zip(modules, places, strings.addresses[1:], strict=True):
        table += MODULE.pack(address, module.image.size, text if module.command_line else 0, 0)
    entries = layout.memory_map(memory)
    modules_at = layout.PVH_START_INFO + START_INFO.size
    map_at = modules_at + len(table)
    start_info = START_INFO.pack(
        *(START_MAGIC, START_VERSION, 0),
        *(len(modules), modules_at if modules else 0),
        *(layout.COMMAND_LINE, rsdp),
        *(map_at, len(entries), 0),
    )
    table += b"".join(MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in entries)
    if not _MODULES.allows(len(modules), room=(_ROOM - MEMORY_MAP_ENTRY.size * len(entries)) // MODULE.size):
        raise ImageError(f"{len(modules)} modules: their table does not fit below {layout.ZERO_PAGE:#x}")
    memory.write(layout.PVH_START_INFO, start_info + table)
    regs = abi.kvm_regs(rip=entry, rbx=layout.PVH_START_INFO, rsp=layout.BOOT_STACK)
    enter_protected_mode(vcpu, memory, regs)
