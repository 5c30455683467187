# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

from elftools.elf.elffile import ELFFile

from softkvm.unittests.symbols import Symbols


def entry_of(path: Path) -> int:
    with path.open("rb") as file:
        return int(ELFFile(file)["e_entry"])


def test_address_has_the_name_and_the_offset(suite: Path) -> None:
    program = suite / "x86" / "probe.flat"
    symbols = Symbols.of(program)
    entry = entry_of(program)
    assert symbols.name(entry) == "start"
    assert symbols.name(entry + 3) == "start+0x3"
    assert symbols.name(0) == ""
    assert symbols.name(1 << 40) == ""


def test_elf_file_beside_the_image_goes_first(suite: Path) -> None:
    program = suite / "x86" / "probe.flat"
    entry = entry_of(program)
    shutil.copy(program, program.with_suffix(".elf"))
    program.write_bytes(b"no ELF file")
    assert Symbols.of(program).name(entry) == "start"


def test_file_without_symbols_costs_the_names_only(tmp_path: Path) -> None:
    path = tmp_path / "x.flat"
    path.write_bytes(b"\x7fELFgarbage")
    assert Symbols.of(path).name(0x400000) == ""
    assert Symbols(None).name(0x400000) == ""
