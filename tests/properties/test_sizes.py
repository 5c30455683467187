# SPDX-License-Identifier: Apache-2.0
"""Lengths that somebody else gives: each kind of array at its edges, and requests whose headers say anything at all."""

from __future__ import annotations

import ctypes
import errno
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts.sizes_table import load, table

from softkvm import abi
from softkvm.abi.arguments import Argument, SignalMask
from softkvm.abi.sizes import SIZE_MAX, Size, os_error

SIZES = load()
DOCS = Path(__file__).parents[2] / "docs" / "sizes.md"
COUNTS = st.one_of(
    st.integers(0, 70_000), st.integers(0, (1 << 32) - 1), st.sampled_from([(1 << 31) - 1, 1 << 31, (1 << 32) - 1])
)
#: Requests that take a counted table.
TABLES = {
    name: request.argument
    for file in abi.File
    for name, request in abi.requests_of(file).items()
    if request.argument is not None
    and (hasattr(request.argument, "read_rows") or "Msrs" in type(request.argument).__name__)
}


class Client:
    """A client's memory in which every header says the same length; remembers how much was read."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.most = 0

    def read(self, address: int, size: int) -> bytes:
        self.most = max(self.most, size)
        assert size <= 1 << 24, "nobody reads that much before it has looked at the length"
        return (self.header if not address else bytes(16))[:size].ljust(size, b"\0")

    def write(self, address: int, data: Any) -> None:
        """Nobody looks."""


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_length_is_checked_at_its_edges(size: Size) -> None:
    for count in {size.least, min(size.least + 1, size.most), size.most}:
        assert size.allows(count)
        assert size.check(count) == count
        assert size.bytes(count) == count * size.element <= SIZE_MAX
        assert size.cut(count) == count
    for count in (size.least - 1, size.most + 1, 1 << 70):
        assert not size.allows(count)
        assert size.cut(count) <= size.most
        if size.raises is None:
            continue
        with pytest.raises(Exception, match=str(count)) as caught:
            size.check(count)
        assert type(caught.value) is type(size.raises(""))
        if size.code is not None:
            assert isinstance(caught.value, OSError) and caught.value.errno == size.code
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_an_elements_number_is_below_the_limit(size: Size) -> None:
    assert size.index(size.most - 1) == size.most - 1
    for number in (-1, size.most, 1 << 70):
        with pytest.raises(Exception, match=f"{number}, expected below {size.most}"):
            size.index(number)


def test_a_size_that_overflows_cannot_be_defined() -> None:
    for most, element, least in ((1 << 60, 16, 0), (5, 0, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="are no size"):
            Size("too much", most, errno.E2BIG, element=element, least=least, where=__name__)
    assert not any(size.name == "too much" for size in SIZES)
    assert str(os_error(errno.E2BIG)("x=9, expected at most 8")).endswith("x=9, expected at most 8")


def test_every_size_has_a_name_of_its_own() -> None:
    names = [size.name for size in SIZES]
    assert len(set(names)) == len(names)


def test_the_page_is_up_to_date() -> None:
    assert DOCS.read_text() == "\n".join(table()) + "\n"


@pytest.mark.parametrize("name", TABLES)
@given(count=COUNTS, rest=st.binary(max_size=16))
def test_whatever_a_header_says_no_more_is_read_than_the_limit(name: str, count: int, rest: bytes) -> None:
    argument = TABLES[name]
    assert isinstance(argument, Argument)
    client = Client(struct.pack("<I", count) + rest)
    result: Any
    try:
        (result,) = argument.take(client, 0)
    except OSError as refused:
        result = refused
    if isinstance(result, OSError):
        assert result.errno in (errno.E2BIG, errno.EINVAL)
        assert client.most <= ctypes.sizeof(argument.structure or ctypes.c_uint64), "only the header"
    else:
        assert len(result) == count


@given(length=COUNTS)
def test_a_signal_set_has_the_kernels_size(length: int) -> None:
    client = Client(struct.pack("<I", length))
    argument = SignalMask(abi.kvm_signal_mask)
    if length == 8:
        assert len(argument.take(client, 1)[0]) == 8
    else:
        with pytest.raises(OSError) as caught:
            argument.take(client, 1)
        assert caught.value.errno == errno.EINVAL
