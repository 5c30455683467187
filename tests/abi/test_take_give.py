# SPDX-License-Identifier: Apache-2.0
"""The two directions of a request's argument agree: what one side packs the other takes, and the same for results."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import abi
from softkvm.abi.arguments import Argument, Gives, Nothing, Number, Takes, Unread, Value


class Memory:
    """This process's memory, for what the tests keep alive themselves."""

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def write(self, address: int, data: Any) -> None:
        data = bytes(data)
        ctypes.memmove(address, data, len(data))


MEMORY = Memory()
REQUESTS = {
    f"{file.name}.{name}": request
    for file in abi.File
    for name, request in abi.requests_of(file).items()
    if request.argument is not None
}


def third(packed: Any) -> int:
    """What ioctl() gets for what pack() returns."""
    return packed if isinstance(packed, int) else ctypes.addressof(packed)


def content(data: st.DataObject, structure: Any) -> bytes:
    """Draw the bytes of a structure; a pattern repeats in large ones."""
    size = ctypes.sizeof(structure)
    pattern = data.draw(st.binary(min_size=min(size, 61), max_size=min(size, 61)))
    return (pattern * (size // len(pattern) + 1))[:size]


def of(kind: type[Argument]) -> list[str]:
    return [name for name, request in REQUESTS.items() if type(request.argument) is kind]


@pytest.mark.parametrize("name", of(Takes))
@given(data=st.data())
def test_a_structure_that_is_packed_is_taken(name: str, data: st.DataObject) -> None:
    argument = REQUESTS[name].argument
    assert argument is not None
    if issubclass(argument.structure, ctypes.Structure):
        given: Any = argument.structure.from_buffer_copy(content(data, argument.structure))
    else:
        given = data.draw(st.integers(0, 2 ** (8 * ctypes.sizeof(argument.structure)) - 1))
    packed = argument.pack(given)
    (taken,) = argument.take(MEMORY, third(packed))
    assert bytes(taken) == bytes(given) if isinstance(given, ctypes.Structure) else taken == given


@pytest.mark.parametrize("name", of(Gives))
@given(data=st.data())
def test_a_structure_that_is_given_is_unpacked(name: str, data: st.DataObject) -> None:
    argument = REQUESTS[name].argument
    assert argument is not None
    packed = argument.pack()
    assert argument.take(MEMORY, third(packed)) == ()
    result = argument.structure.from_buffer_copy(content(data, argument.structure))
    given = result if isinstance(result, ctypes.Structure) else result.value
    assert argument.give(MEMORY, third(packed), given) == 0
    back = argument.unpack(packed, 0)
    assert bytes(back) == bytes(given) if isinstance(given, ctypes.Structure) else back == given


@pytest.mark.parametrize("name", [*of(Nothing), *of(Value), *of(Number)])
def test_numbers_and_nothing(name: str) -> None:
    argument = REQUESTS[name].argument
    assert argument is not None
    args = (7,) if isinstance(argument, Number) else ()
    packed = argument.pack(*args)
    assert tuple(argument.take(MEMORY, third(packed))) == args
    result = 11 if isinstance(argument, Value) else None
    assert argument.unpack(packed, argument.give(MEMORY, third(packed), result)) == result


u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
s32 = st.integers(-(2**31), 2**31 - 1)
#: The arguments of requests that have an Argument of their own.
OWN = {
    "KVM_IRQ_LINE": st.tuples(u32, u32),
    "KVM_IRQFD": st.tuples(u32, u32, u32, u32),
    # a datamatch sets its flag
    "KVM_IOEVENTFD": st.tuples(s32, u64, u32, st.none(), st.just(0)) | st.tuples(s32, u64, u32, u64, st.just(1)),
    "KVM_CLEAR_DIRTY_LOG": st.integers(1, 500).flatmap(
        lambda n: st.tuples(u32, u64, st.just(n), st.binary(min_size=(n + 63) // 64 * 8, max_size=(n + 63) // 64 * 8))
    ),
    "KVM_SET_SIGNAL_MASK": st.tuples(st.none() | st.binary(min_size=8, max_size=8)),
    "KVM_ENABLE_CAP": st.tuples(u32, u64, u64, u64, u64),
    "KVM_GET_MSRS": st.tuples(st.lists(u32, max_size=100)),
    "KVM_SET_MSRS": st.tuples(st.lists(st.tuples(u32, u64), max_size=100)),
}


@pytest.mark.parametrize("name", OWN)
@given(data=st.data())
def test_arguments_of_their_own(name: str, data: st.DataObject) -> None:
    argument = getattr(abi, name).argument
    args = data.draw(OWN[name])
    packed = argument.pack(*args)

    def plain(value: Any) -> Any:
        if isinstance(value, Unread):
            assert len(value) == len(bytes(value))
            return bytes(value)
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    assert plain(argument.take(MEMORY, third(packed))) == plain(args)


@given(st.lists(st.tuples(u32, u32, u32), max_size=40), st.integers(0, 60))
def test_tables_of_cpuid_fit_or_are_e2big(rows: list[tuple[int, int, int]], room: int) -> None:
    entries = [abi.kvm_cpuid_entry2(function=f, eax=a, edx=d) for f, a, d in rows]
    takes, gives = abi.KVM_SET_CPUID2.argument, abi.KVM_GET_CPUID2.argument
    assert takes is not None and gives is not None
    (taken,) = takes.take(MEMORY, third(kept := takes.pack(entries)))
    assert [bytes(row) for row in taken] == [bytes(row) for row in entries] and kept is not None
    table = gives.pack()
    table.nent = room
    if len(entries) > room:
        with pytest.raises(OSError) as caught:
            gives.give(MEMORY, third(table), entries)
        assert caught.value.errno == errno.E2BIG
        return
    gives.give(MEMORY, third(table), entries)
    assert [bytes(row) for row in gives.unpack(table, 0)] == [bytes(row) for row in entries]


@given(st.lists(u64, max_size=20), st.integers(0, 20))
def test_values_of_msrs(values: list[int], more: int) -> None:
    argument = abi.KVM_GET_MSRS.argument
    assert argument is not None
    packed = argument.pack(list(range(len(values) + more)))
    assert argument.unpack(packed, argument.give(MEMORY, third(packed), values)) == values
