# SPDX-License-Identifier: Apache-2.0
"""The symbols of a kernel's ELF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from softkvm.vmm.linux.errors import KernelError


@dataclass(frozen=True)
class Vmlinux:
    """What a vmlinux tells; addresses are those that it was linked for."""

    symbols: list[tuple[int, str, str, str]]


def read_vmlinux(path: Path) -> Vmlinux:
    """Return what an ELF file tells; KernelError if it is none, or has no symbols, OSError if it can't be read."""
    try:
        with path.open("rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            if not isinstance(table, SymbolTableSection):
                raise KernelError(f"{path}: it has no symbols")
            symbols = [
                (int(symbol["st_value"]), "t" if symbol["st_info"]["type"] == "STT_FUNC" else "d", symbol.name, "")
                for symbol in table.iter_symbols()
                if symbol.name and symbol["st_shndx"] != "SHN_UNDEF"
            ]
    except (ELFError, KeyError, UnicodeDecodeError) as error:
        raise KernelError(f"{path}: it is no ELF file with symbols: {error}") from None
    return Vmlinux(symbols)
