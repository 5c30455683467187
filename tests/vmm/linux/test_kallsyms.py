# SPDX-License-Identifier: Apache-2.0
"""kallsyms and vmcoreinfo by hand (Linux, ``scripts/kallsyms.c``); a kernel's own are in test_kernel.py."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.debug.paging import MemoryFault, PageTables
from softkvm.vmm.linux import vmcoreinfo
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kallsyms import Symbols, read_kallsyms, read_system_map
from softkvm.vmm.linux.vmcoreinfo import parse
from softkvm.vmm.memory import GuestMemory

PLACES = {name: 0x1000 * n for n, name in enumerate(
    ("num_syms", "offsets", "relative_base", "names", "token_table", "token_index"), 1)}  # fmt: skip
TEXT = "OSRELEASE=6.9\nKERNELOFFSET=1000000\n" + "".join(f"SYMBOL(kallsyms_{n})={at:x}\n" for n, at in PLACES.items())


def image(names: list[bytes], offsets: list[int], base: int) -> bytes:
    """Memory with a table of symbols, whose tokens are the bytes themselves."""
    memory = bytearray(0x8000)

    def put(name: str, data: bytes) -> None:
        memory[PLACES[name] : PLACES[name] + len(data)] = data

    put("num_syms", struct.pack("<I", len(names)))
    put("offsets", struct.pack(f"<{len(offsets)}i", *offsets))
    put("relative_base", struct.pack("<Q", base))
    sizes = [
        bytes([len(name)]) if len(name) < 128 else bytes([len(name) & 0x7F | 0x80, len(name) >> 7]) for name in names
    ]
    put("names", b"".join(size + name for size, name in zip(sizes, names, strict=True)))
    put("token_table", b"".join(bytes([n or 1, 0]) for n in range(256)))
    put("token_index", struct.pack("<256H", *range(0, 512, 2)))
    return bytes(memory)


def reading(memory: bytes, address: int, size: int) -> bytes:
    """Memory as a kernel reads it."""
    if not 0 <= address <= address + size <= len(memory):
        raise MemoryFault(address, "beyond")
    return memory[address : address + size]


def test_symbols_have_names_of_any_length_and_addresses_below_the_base() -> None:
    long = b"t" + b"x" * 300
    memory = image([b"Astart", b"Tmain", long], [16, -1, -0x101], 0xFFFFFFFF81000000)
    symbols = read_kallsyms(parse(TEXT.encode()), lambda at, size: reading(memory, at, size))
    assert symbols == [
        (16, "A", "start", ""),
        (0xFFFFFFFF81000000, "T", "main", ""),
        (0xFFFFFFFF81000100, "t", "x" * 300, ""),
    ]


def test_offsets_of_newer_kernels_are_above_the_base() -> None:
    memory = image([b"Ta", b"Tb", b"Tc"], [0, 0x1000, -0x80000000], 0xFFFFFFFF00000000)
    symbols = read_kallsyms(parse(TEXT.encode()), lambda at, size: reading(memory, at, size))
    assert [address for address, *_ in symbols] == [0xFFFFFFFF00000000, 0xFFFFFFFF00001000, 0xFFFFFFFF80000000]


def test_a_kernel_that_does_not_name_its_tables_is_refused_with_what_helps() -> None:
    with pytest.raises(KernelError, match=r"kallsyms_names: it is older than 6.0.*System.map"):
        read_kallsyms(parse(b"OSRELEASE=5.10\n"), lambda at, size: b"")


@given(st.binary(min_size=1, max_size=64), st.integers(0x1000, 0x6800))
def test_damage_is_found_or_harmless(data: bytes, where: int) -> None:
    memory = bytearray(image([b"Tmain", b"Tother"], [-1, -5], 0xFFFFFFFF81000000))
    memory[where : where + len(data)] = data
    try:
        read_kallsyms(parse(TEXT.encode()), lambda at, size: reading(bytes(memory), at, size))
    except (KernelError, MemoryFault):
        pass


def test_an_address_is_in_the_symbol_before_it() -> None:
    symbols = Symbols(
        [(0x200, "t", "b", ""), (0x100, "t", "a", ""), (0x200, "t", "b_alias", ""), (0x300, "t", "a", "")]
    )
    found = symbols.at(0x1FF)
    assert found is not None and (found[0].name, found[0].size, found[1]) == ("a", 0x100, 0xFF)
    found = symbols.at(0x200)
    assert found is not None and (found[0].name, found[1]) == ("b", 0)
    assert symbols.at(0xFF) is None
    assert symbols.at(0x300 + 0x10001) is None
    assert symbols["a"] == 0x100
    assert [symbol.address for symbol in symbols.named("a")] == [0x100, 0x300]
    assert symbols.find("c") is None and "c" not in symbols
    with pytest.raises(KeyError):
        symbols["c"]


def test_a_system_map_is_read_and_what_is_none_is_not() -> None:
    assert read_system_map(b"ffffffff81000000 T _text\n0000000000000000 A x\n") == [
        (0xFFFFFFFF81000000, "T", "_text", ""),
        (0, "A", "x", ""),
    ]
    with pytest.raises(KernelError, match="no line of an address"):
        read_system_map(b"\x7fELF\n")


def test_vmcoreinfo_has_symbols_numbers_and_values() -> None:
    info = parse(
        TEXT.encode() + b"NUMBER(phys_base)=-4096\nOFFSET(a.b)=3\nSIZE(x)=8\nLENGTH(y)=2\nNUMBER(z)=q\nrubbish\n"
    )
    assert (info.release, info.offset) == ("6.9", 0x1000000)
    assert (info.numbers, info.offsets, info.sizes, info.lengths) == (
        {"phys_base": -4096},
        {"a.b": 3},
        {"x": 8},
        {"y": 2},
    )


def test_memory_without_a_kernel_has_none_whatever_it_claims() -> None:
    memory = GuestMemory(4 << 20)
    try:
        with pytest.raises(KernelError, match="no vmcoreinfo"):
            vmcoreinfo.find(memory)
        memory.write(0x5000, b"OSRELEASE=6.1\nSYMBOL(swapper_pg_dir)=ffffffff80100000\nNUMBER(phys_base)=0\n")
        memory.write(0x9000, b"OSRELEASE=6.1\nSYMBOL(swapper_pg_dir)=0\nNUMBER(phys_base)=0\nSYMBOL(init_uts_ns)=0\n")
        with pytest.raises(KernelError, match="no vmcoreinfo"):
            vmcoreinfo.find(memory)
    finally:
        memory.close()


def test_page_tables_are_walked_to_pages_of_every_size() -> None:
    memory = GuestMemory(16 << 20)
    try:

        def entry(table: int, index: int, value: int) -> None:
            memory.write(table + 8 * index, value.to_bytes(8, "little"))

        entry(0x1000, 511, 0x2003)
        entry(0x2000, 510, 0x3003)
        entry(0x2000, 511, 1 << 30 | 0x83)
        entry(0x3000, 0, 0x200000 | 0x83)
        entry(0x3000, 1, 0x4003)
        entry(0x4000, 5, 0x8000000000006003)
        entry(0x4000, 6, 0x7FFFFFF000003)
        tables = PageTables(memory, 0x1000)
        base = 0xFFFFFFFF80000000
        assert tables.translate(base + 0x12345) == 0x212345
        assert tables.translate(base + 0x200000 + 0x5123) == 0x6123
        assert tables.translate(base + (1 << 30) + 0x1234567) == (1 << 30) + 0x1234567
        for bad in (base + 0x200000, base + 0x400000, 0, 0x0000800000000000, 0xFFFF7FFFFFFFFFFF):
            with pytest.raises(MemoryFault):
                tables.translate(bad)
        with pytest.raises(MemoryFault, match="no RAM"):
            tables.read(base + 0x206000, 4)
        tables.write(base + 0x205FFE, b"ab")
        assert memory.read(0x6FFE, 2) == tables.read(base + 0x205FFE, 2) == b"ab"
        with pytest.raises(MemoryFault):
            tables.write(base + 0x205FFE, b"xyz")
        assert memory.read(0x6FFE, 2) == b"ab", "nothing is written by halves"
    finally:
        memory.close()
