# SPDX-License-Identifier: Apache-2.0
"""From an address in a test program to a symbol of its ELF file."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

_CODE_TYPES = ("STT_FUNC", "STT_NOTYPE")
_FAR = 0x10000  # a symbol without a size says nothing about an address this far behind it


class Symbols:
    """The code symbols of an ELF file; empty if the file has none or is no ELF file."""

    def __init__(self, path: Path | None) -> None:
        self._starts: list[int] = []
        self._symbols: list[tuple[int, str]] = []
        if path is not None:
            try:
                self._read(path)
            except Exception:  # a damaged file costs the names, not the run
                self._starts, self._symbols = [], []

    @classmethod
    def of(cls, image: Path) -> Symbols:
        """Return the symbols of *image*: of the ELF file beside it if there is one, else of itself."""
        beside = image.with_suffix(".elf")
        return cls(beside if beside.is_file() else image)

    def _read(self, path: Path) -> None:
        found: dict[int, tuple[int, str]] = {}
        with path.open("rb") as file:
            elf = ELFFile(file)
            code = {
                index
                for index, section in enumerate(elf.iter_sections())
                if section["sh_flags"] & 4  # SHF_EXECINSTR
            }
            for section in elf.iter_sections():
                if not isinstance(section, SymbolTableSection):
                    continue
                for symbol in section.iter_symbols():
                    if symbol["st_info"]["type"] in _CODE_TYPES and symbol["st_shndx"] in code and symbol.name:
                        known = found.get(symbol["st_value"])
                        if known is None or known[0] < symbol["st_size"]:
                            found[symbol["st_value"]] = (symbol["st_size"], symbol.name)
        self._starts = sorted(found)
        self._symbols = [found[start] for start in self._starts]

    def name(self, address: int) -> str:
        """Return ``function+0x12`` for *address*, an empty string if no symbol is near."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return ""
        offset = address - self._starts[index]
        size, name = self._symbols[index]
        if offset >= (size or _FAR):
            return ""
        return f"{name}+{offset:#x}" if offset else name
