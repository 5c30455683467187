# SPDX-License-Identifier: Apache-2.0
"""BTF, by hand and damaged (Linux, Documentation/bpf/btf.rst); a kernel's own is in test_kernel.py."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.linux.btf import Btf, Kind
from softkvm.vmm.linux.errors import KernelError

STRINGS = b"\0int\0list_head\0next\0prev\0flags\0color\0RED\0BLUE\0u32\0task\0big\0TOP\0"


def at(name: bytes) -> int:
    """Where a string is."""
    return STRINGS.index(b"\0" + name + b"\0") + 1


def record(name: bytes, kind: Kind, third: int, *rest: int, count: int = 0, flag: bool = False) -> bytes:
    """A type's record."""
    words = (at(name) if name else 0, kind << 24 | count | flag << 31, third, *rest)
    return b"".join(struct.pack("<I", word & 0xFFFFFFFF) for word in words)


#: 1 int, 2 struct list_head, 3 pointer to it, 4 enum, 5 u32, 6 const u32, 7 struct task, 8 int[3], 9 union, 10 enum64
TYPES = b"".join(
    (
        record(b"int", Kind.INT, 4, 1 << 24 | 32),
        record(b"list_head", Kind.STRUCT, 16, at(b"next"), 3, 0, at(b"prev"), 3, 64, count=2),
        record(b"", Kind.PTR, 2),
        record(b"color", Kind.ENUM, 4, at(b"RED"), -1, at(b"BLUE"), 7, count=2, flag=True),
        record(b"u32", Kind.TYPEDEF, 1),
        record(b"", Kind.CONST, 5),
        record(b"task", Kind.STRUCT, 32, 0, 9, 0, at(b"flags"), 6, 3 << 24 | 130, count=2, flag=True),
        record(b"", Kind.ARRAY, 0, 1, 1, 3),
        record(b"", Kind.UNION, 16, at(b"prev"), 2, 0, count=1),
        record(b"big", Kind.ENUM64, 8, at(b"TOP"), 0, 1 << 31, count=1),
    )
)


def btf(types: bytes = TYPES, strings: bytes = STRINGS) -> bytes:
    """A section of BTF."""
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def test_types_are_what_the_records_say() -> None:
    types = Btf(btf())
    assert len(types) == 11
    number = types.type(1)
    assert (number.kind, number.name, number.size, number.signed, number.bits) == (Kind.INT, "int", 4, True, 32)
    assert types.type(4).enumerators == (("RED", -1), ("BLUE", 7))
    assert types.type(10).enumerators == (("TOP", 1 << 63),)
    assert types.size(types.type(8)) == 12
    assert types.size(types.type(3)) == 8
    assert types.resolve(types.type(6)) is number
    assert types.type(0).kind is Kind.VOID
    with pytest.raises(KernelError, match="no type 11"):
        types.type(11)


def test_members_of_anonymous_structures_are_members_and_bit_fields_have_a_size() -> None:
    types = Btf(btf())
    task = types.named("struct task")
    assert types.offset("struct task", "prev.prev") == 8
    assert types.member(task, "flags")[1:] == (130, 3)
    with pytest.raises(KernelError, match="struct task has no member 'pid'"):
        types.member(task, "pid")


@pytest.mark.parametrize(
    ("text", "size", "spelt"),
    [
        ("int", 4, "int"),
        ("u32", 4, "u32"),
        ("const u32", 4, "u32"),
        ("struct list_head", 16, "struct list_head"),
        ("struct list_head *", 8, "struct list_head *"),
        ("struct list_head **", 8, "struct list_head **"),
        ("int [2][3]", 24, "int [3] [2]"),
        ("void *", 8, "void *"),
        ("enum color", 4, "enum color"),
        ("enum big", 8, "enum big"),
    ],
)
def test_types_are_named_as_c_has_it(text: str, size: int, spelt: str) -> None:
    types = Btf(btf())
    assert types.size(types.named(text)) == size
    assert types.spell(types.named(text)) == spelt


@pytest.mark.parametrize("text", ["struct nothing", "int int", "", "*", "struct", "[3]", "int[x]", "int[-1]"])
def test_what_names_no_type_is_one_line(text: str) -> None:
    with pytest.raises(KernelError):
        Btf(btf()).named(text)


def test_a_modules_types_go_on_from_the_kernels() -> None:
    kernel = Btf(btf())
    strings = b"\0own\0"
    own = len(STRINGS) + 1
    types = struct.pack("<III", own, Kind.STRUCT << 24 | 1, 16) + struct.pack("<III", at(b"next"), 3, 0)
    module = Btf(btf(types, strings), kernel)
    assert len(module) == 12
    assert module.offset("struct own", "next") == 0
    assert module.named("struct list_head") is kernel.named("struct list_head")
    assert module.spell(module.type(11)) == "struct own"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 24,
        btf()[:-1],
        btf(TYPES[:-4]),
        btf(record(b"int", Kind(19), 8, count=3)),
        struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 1 << 31, 0, 1),
        btf(b"\0" * 12),
    ],
)
def test_what_is_no_btf_is_refused_with_the_reason(data: bytes) -> None:
    with pytest.raises(KernelError):
        types = Btf(data)
        types.type(len(types) - 1)


def test_types_that_refer_to_themselves_are_refused() -> None:
    types = Btf(btf(record(b"u32", Kind.TYPEDEF, 1) + record(b"", Kind.ARRAY, 0, 2, 1, 1)))
    with pytest.raises(KernelError, match="itself"):
        types.size(types.type(1))
    with pytest.raises(KernelError, match="itself"):
        types.size(types.type(2))
    inner = Btf(btf(record(b"task", Kind.STRUCT, 8, 0, 1, 0, count=1)))
    with pytest.raises(KernelError, match="no member"):
        inner.member(inner.type(1), "x")


@given(st.binary(min_size=1, max_size=200), st.integers(0, len(btf())))
def test_damage_is_found_or_harmless(data: bytes, where: int) -> None:
    damaged = bytearray(btf())
    damaged[where : where + len(data)] = data
    try:
        types = Btf(bytes(damaged))
        for number in range(min(len(types), 50)):
            types.size(types.type(number))
        types.member(types.named("struct task"), "prev")
    except KernelError:
        pass
