# SPDX-License-Identifier: Apache-2.0
"""vmcoreinfo: a page of text in which a kernel tells crash dump tools where its things are.

Source: Linux, Documentation/admin-guide/kdump/vmcoreinfo.rst. Since Linux 6.0 it names the tables of kallsyms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from softkvm.vmm.debug.paging import MemoryFault, PageTables
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

START_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
_BEGINS: Final = b"OSRELEASE="
_LINE: Final = re.compile(r"(?:(SYMBOL|SIZE|OFFSET|LENGTH|NUMBER)\(([\w.]+)\)|(\w[\w-]*))=(.*)")
_PAGEMAP_CHUNK: Final = 1 << 16
_PRESENT: Final = 0b11 << 62  # in memory, or swapped


@dataclass
class Vmcoreinfo:
    """What the kernel tells, by kind and name."""

    text: bytes
    values: dict[str, str] = field(default_factory=dict)
    """Lines without a kind: OSRELEASE, BUILD-ID, KERNELOFFSET, …"""
    symbols: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    @property
    def release(self) -> str:
        """The kernel's release, as ``uname -r`` says it."""
        return self.values.get("OSRELEASE", "")

    @property
    def offset(self) -> int:
        """How far KASLR has moved the kernel."""
        return int(self.values.get("KERNELOFFSET", "0"), 16)

    def page_tables(self, memory: GuestMemory) -> PageTables:
        """Return the kernel's own address space; KernelError if the text does not say where it is."""
        try:
            root = self.symbols["swapper_pg_dir"] - START_KERNEL_MAP + self.numbers["phys_base"]
        except KeyError as error:
            raise KernelError(f"vmcoreinfo has no {error}: it is no kernel's of x86-64") from None
        levels = 5 if self.numbers.get("pgtable_l5_enabled") else 4
        return PageTables(memory, root, levels, self.numbers.get("sme_mask", 0))


def parse(text: bytes) -> Vmcoreinfo:
    """Return what the lines of *text* say; what is none is left out."""
    info = Vmcoreinfo(text)
    kinds = {"SIZE": info.sizes, "OFFSET": info.offsets, "LENGTH": info.lengths, "NUMBER": info.numbers}
    for line in text.decode("ascii", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        kind, name, plain, value = match.groups()
        try:
            if plain:
                info.values[plain] = value
            elif kind == "SYMBOL":
                info.symbols[name] = int(value, 16)
            else:
                kinds[kind][name] = int(value, 0)
        except ValueError:
            continue
    return info


def _resident(memory: GuestMemory) -> Iterator[int]:
    """Yield the guest-physical addresses of pages that are in memory: to read others would make the host have them."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for ram in memory.ranges:
            count = (ram.end - ram.start) // PAGE_SIZE
            for first in range(0, count, _PAGEMAP_CHUNK):
                wanted = min(_PAGEMAP_CHUNK, count - first)
                entries = os.pread(pagemap.fileno(), 8 * wanted, (ram.hva // PAGE_SIZE + first) * 8)
                view = memoryview(entries).cast("Q")
                for n, entry in enumerate(view):
                    if entry & _PRESENT:
                        yield ram.start + (first + n) * PAGE_SIZE


def _all(memory: GuestMemory) -> Iterator[int]:
    for ram in memory.ranges:
        yield from range(ram.start, ram.end, PAGE_SIZE)


def _candidates(memory: GuestMemory) -> Iterator[Vmcoreinfo]:
    view, size = memory.view, len(_BEGINS)
    seen = set()
    for pages in (_resident, _all):  # pages of a file may not be mapped yet
        try:
            for gpa in pages(memory):
                ram = memory.ranges[0] if gpa < memory.ranges[0].end else memory.ranges[-1]
                at = ram.offset + gpa - ram.start
                if bytes(view[at : at + size]) == _BEGINS and gpa not in seen:
                    seen.add(gpa)
                    yield parse(bytes(view[at : at + PAGE_SIZE]).partition(b"\0")[0])
        except OSError:
            continue


def find(memory: GuestMemory) -> tuple[Vmcoreinfo, PageTables]:
    """Return the vmcoreinfo of the kernel in *memory*, and its address space; KernelError if there is none (yet).

    The page is one of the kernel's heap, so it is looked for; and there may be copies, of other kernels too. The right
    one is where its tables lead to a kernel of the same release.
    """
    for info in _candidates(memory):
        try:
            tables = info.page_tables(memory)
            uts = tables.read(info.symbols["init_uts_ns"] + info.offsets.get("uts_namespace.name", 0), 6 * 65)
        except (KernelError, MemoryFault, KeyError):
            continue
        if uts[2 * 65 : 3 * 65].partition(b"\0")[0].decode("ascii", "replace") == info.release:
            return info, tables
    raise KernelError("no vmcoreinfo in guest memory: no Linux with CONFIG_VMCORE_INFO has booted (so far)")
