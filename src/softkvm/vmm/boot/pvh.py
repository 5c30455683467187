# SPDX-License-Identifier: Apache-2.0
"""Direct boot of an ELF kernel through the PVH entry point.

Sources: Xen's ``docs/misc/pvh.pandoc`` (state at entry) and ``xen/include/public/arch-x86/hvm/start_info.h``
(``hvm_start_info``, ``hvm_modlist_entry``, ``hvm_memmap_table_entry``).
"""

from __future__ import annotations

import struct

from softkvm import abi, api
from softkvm.vmm.boot import elf, layout
from softkvm.vmm.boot.bzimage import place_initrd
from softkvm.vmm.boot.cpustate import enter_protected_mode
from softkvm.vmm.errors import ImageError
from softkvm.vmm.memory import MIB, GuestMemory

START_MAGIC = 0x336EC578
START_VERSION = 1
START_INFO = struct.Struct("<IIIIQQQQII")
MODULE = struct.Struct("<QQQQ")
MEMORY_MAP_ENTRY = struct.Struct("<QQII")


def load(
    vcpu: api.Vcpu, memory: GuestMemory, image: bytes, initrd: bytes | None, command_line: bytes, rsdp: int
) -> None:
    """Load an ELF kernel and put *vcpu* at its PVH entry, with EBX at the start info.

    *command_line* is without its final NUL, *rsdp* the address of ACPI's root pointer. Raises ImageError if the
    file has no PVH entry or does not fit.
    """
    executable = elf.parse(image)
    if executable.pvh_entry is None:
        raise ImageError("ELF file has no PVH entry point: expected the note XEN_ELFNOTE_PHYS32_ENTRY (CONFIG_PVH)")
    if len(command_line) >= layout.COMMAND_LINE_MAX:
        raise ImageError(f"command line has {len(command_line)} bytes: at most {layout.COMMAND_LINE_MAX - 1}")
    kernel_end = layout.HIGH_MEMORY
    for segment in executable.segments:
        end = segment.address + segment.size
        if segment.address < layout.HIGH_MEMORY:
            raise ImageError(
                f"ELF segment at {segment.address:#x}: expected physical addresses from {layout.HIGH_MEMORY:#x}"
            )
        if end > memory.end_below_4g:
            raise ImageError(f"kernel does not fit: a segment ends at {end:#x}, there are {memory.size // MIB} MiB")
        kernel_end = max(kernel_end, end)
    for segment in executable.segments:
        target = memory.slice(segment.address, segment.size)
        target[: len(segment.data)] = segment.data
        target[len(segment.data) :] = bytes(segment.size - len(segment.data))
    memory.write(layout.COMMAND_LINE, command_line + b"\0")

    modules = b""
    if initrd:
        at = place_initrd(memory, len(initrd), kernel_end, 0xFFFFFFFF)
        memory.write(at, initrd)
        modules = MODULE.pack(at, len(initrd), 0, 0)
    entries = layout.memory_map(memory)
    modules_at = layout.PVH_START_INFO + START_INFO.size
    map_at = modules_at + len(modules)
    start_info = START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,
        1 if modules else 0,
        modules_at if modules else 0,
        layout.COMMAND_LINE,
        rsdp,
        map_at,
        len(entries),
        0,
    )
    table = b"".join(MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in entries)
    memory.write(layout.PVH_START_INFO, start_info + modules + table)
    regs = abi.kvm_regs(rip=executable.pvh_entry, rbx=layout.PVH_START_INFO, rsp=layout.BOOT_STACK)
    enter_protected_mode(vcpu, memory, regs)
