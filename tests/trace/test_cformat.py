# SPDX-License-Identifier: Apache-2.0
"""Print formats and filters: what printf() of C and the kernel's helpers make of the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.trace.cformat import FormatError, compile_filter, compile_format

FIELDS = ("a", "b", "data")


@pytest.mark.parametrize(
    ("print_fmt", "values", "text"),
    [
        ('"vcpu %u, rip 0x%lx", REC->a, REC->b', (3, 0xFFFF_FFFF_8100_0000, b""), "vcpu 3, rip 0xffffffff81000000"),
        ('"%016llx|%08x|%#x|%#010x"', None, None),
        ('"%#x|%#x|%#010x|%#06x", REC->a, REC->b, REC->a, REC->b', (0, 0x2F, b""), "0|0x2f|0000000000|0x002f"),
        ('"%d %lld %u", REC->a, REC->b, REC->a', (0xFFFF_FFFF, 1 << 63, b""), f"-1 {-(1 << 63)} {0xFFFF_FFFF}"),
        ('"%s", REC->a ? "on" : "off"', (0, 0, b""), "off"),
        ('"%s%s", !REC->a ? "" : " (", REC->a == 2 ? "two" : "other"', (2, 0, b""), " (two"),
        ('"%u", REC->a - REC->b', (1, 2, b""), "4294967295"),
        ('"%x", (u8)(REC->a >> 8)', (0x12345, 0, b""), "23"),
        ('"%s", (REC->a & (1<<11)) ? "logical" : "physical"', (0x800, 0, b""), "logical"),
        ('"%s", __print_symbolic(REC->a, { 1, "one" }, { 0x2, "t" "wo" })', (2, 0, b""), "two"),
        ('"%s", __print_symbolic(REC->a, { 1, "one" })', (0x10, 0, b""), "0x10"),
        ('"%s", __print_symbolic(REC->a, { })', (11, 0, b""), "0xb"),
        ('"%s", __print_flags(REC->a, "|", { 1, "A" }, { 4, "C" })', (0x15, 0, b""), "A|C|0x10"),
        ('"%s", __print_hex(REC->data, REC->a)', (2, 0, b"\x0f\xa2\x90"), "0f a2"),
        ('"%-4u|%4s|100%%", REC->a, "x"', (7, 0, b""), "7   |   x|100%"),
        ('"%c%hhx", REC->a, REC->b', (65, 0x1FF, b""), "Aff"),
    ],
)
def test_format_prints_as_c_does(print_fmt: str, values: tuple[object, ...] | None, text: str | None) -> None:
    if values is None:
        with pytest.raises(FormatError, match="more conversions than arguments"):
            compile_format(print_fmt, FIELDS)
        return
    assert compile_format(print_fmt, FIELDS)(values) == text


@pytest.mark.parametrize(
    "print_fmt",
    [
        "",
        '"%u", REC->nothing',
        '"%u", __import__("os")',
        '"%u", (REC->a',
        '"%u", REC->a; REC->b',
        '"%u" REC->a',
        '"x", REC->a',
        '"%s", __print_symbolic(REC->a, { 1 })',
        '"%u", REC->a ?',
        '"%u", ().__class__',
    ],
)
def test_what_is_no_format_is_refused(print_fmt: str) -> None:
    with pytest.raises(FormatError):
        compile_format(print_fmt, FIELDS)


@given(st.text(alphabet='"%udxs,()REC->ab01?: |&<{}', max_size=40))
def test_any_text_is_a_format_or_is_refused(text: str) -> None:
    try:
        printer = compile_format(text, FIELDS)
    except (FormatError, SyntaxError, RecursionError):
        return
    assert isinstance(printer((1, 1, b"")), str)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a == 3", True),
        ("a==0x3 && b < 2", False),
        ("a != 3 || b >= 5", True),
        ("a & 1", True),
        ("!(a & 4) && (b == 5)", True),
        ("a > b", False),
    ],
)
def test_filter_is_a_condition_on_fields(condition: str, expected: bool) -> None:
    assert bool(compile_filter(condition, FIELDS)((3, 5, b""))) is expected


@pytest.mark.parametrize("condition", ["", "a ==", "c == 1", "a == 1)", "a = 1", "print(1)"])
def test_what_is_no_filter_is_refused(condition: str) -> None:
    with pytest.raises(FormatError):
        compile_filter(condition, FIELDS)
