# SPDX-License-Identifier: Apache-2.0
"""Lengths that somebody else gives: each kind of array at its edges, and requests whose headers say anything at all."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts.sizes_table import load, table
from tests.support.api_calls import errno_of
from tests.support.conformance import MEMORY_SIZE, Guest
from tests.support.machines import KVMS

from softkvm import abi
from softkvm.abi.arguments import Argument, SignalMask
from softkvm.abi.sizes import SIZE_MAX, Size, os_error
from softkvm.client import program
from softkvm.devkvm import stats
from softkvm.vmm.devices.fw_cfg import FwCfg

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
def test_there_may_be_less_room_but_never_more(size: Size) -> None:
    room = size.least + (size.most - size.least) // 2
    assert size.allows(room, room=room) and not size.allows(room + 1, room=room)
    assert not size.allows(size.most + 1, room=SIZE_MAX + 1), "no room is more than the limit"
    assert size.bytes(room, room=room) == room * size.element
    with pytest.raises(Exception, match=f"{room + 1}, expected at most {room}"):
        size.check(room + 1, room=room)


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


#: Lengths of 64 bits, most of them near an end.
LENGTHS = st.one_of(
    st.integers(0, 200),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([(1 << bits) + n for bits in (12, 31, 32, 63) for n in (-4096, -1, 0, 1)]),
    st.integers(0, 8).map(lambda n: (1 << 64) - 1 - n),
    st.integers(1, 8).map(lambda n: (1 << 64) - 4096 * n),
)
PAGES = MEMORY_SIZE // 4096


@given(action=st.integers(0, 2), count=COUNTS, flags=st.integers(0, 2), rest=st.binary(max_size=8))
def test_a_filters_events_are_counted_before_they_are_read(action: int, count: int, flags: int, rest: bytes) -> None:
    client = Client(struct.pack("<4I", action, count, 0, flags) + rest)
    argument = abi.KVM_SET_PMU_EVENT_FILTER.argument
    assert argument is not None
    wrong = action > abi.KVM_PMU_EVENT_DENY or flags > abi.KVM_PMU_EVENT_FLAG_MASKED_EVENTS
    error = errno_of(lambda: argument.take(client, 0))
    expected = errno.EINVAL if wrong else errno.E2BIG if count > abi.KVM_PMU_EVENT_FILTER_MAX_EVENTS else 0
    assert error == expected
    assert client.most == max(ctypes.sizeof(abi.kvm_pmu_event_filter), 0 if error else 8 * count)


@settings(max_examples=50)
@given(size=COUNTS)
def test_a_nested_state_is_as_long_as_its_header_at_least(size: int) -> None:
    with KVMS["soft"]() as kvm, Guest(kvm) as guest:
        given, state = guest.cpu.get_nested_state(), guest.cpu.get_nested_state()
        given.size = size
        assert errno_of(lambda: guest.cpu.set_nested_state(given)) == (errno.EINVAL if size < 128 else 0)
    argument = abi.KVM_GET_NESTED_STATE.argument
    assert argument is not None
    room = Room(size)
    assert errno_of(lambda: argument.give(room, 0, state)) == (errno.E2BIG if size < state.size else 0)


class Room:
    """A client's memory in which the one number that is read is how much room there is."""

    def __init__(self, room: int) -> None:
        self.room = room

    def read(self, address: int, size: int) -> bytes:
        return self.room.to_bytes(size, "little")

    def write(self, address: int, data: Any) -> None:
        """Nobody looks."""


@settings(max_examples=50)
@given(first=st.integers(0, PAGES + 70), count=COUNTS, have=st.integers(0, 64))
def test_no_more_of_the_log_is_cleared_than_the_slot_has(first: int, count: int, have: int) -> None:
    with KVMS["soft"]() as kvm, Guest(kvm) as guest:
        guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        error = errno_of(lambda: guest.vm.clear_dirty_log(0, first, count, bytes(have)))
    left = PAGES - first
    if first & 63 or left < 0 or count > left or (count < left and count & 63):
        assert error == errno.EINVAL
    else:
        assert error == (errno.EFAULT if have < abi.dirty_bitmap_bytes(count) else 0)


@settings(max_examples=50)
@given(start=LENGTHS, size=LENGTHS)
def test_a_range_of_guest_memory_neither_is_empty_nor_wraps(start: int, size: int) -> None:
    bad = (start | size) & 0xFFF or not size or start + size > SIZE_MAX
    with KVMS["soft"]() as kvm, kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM) as vm, vm.create_vcpu(0) as cpu:
        attributes = abi.kvm_memory_attributes(address=start, size=size, attributes=abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        assert errno_of(lambda: vm.set_memory_attributes(attributes)) == (errno.EINVAL if bad else 0)
        wanted = abi.kvm_pre_fault_memory(gpa=start, size=size)
        assert errno_of(lambda: cpu.pre_fault_memory(wanted)) == (errno.EINVAL if bad else errno.ENOENT)


@given(names=COUNTS, count=COUNTS, at=COUNTS, rest=st.binary(max_size=200))
def test_statistics_whose_header_says_anything_are_read_or_refused(
    names: int, count: int, at: int, rest: bytes
) -> None:
    header = abi.kvm_stats_header(name_size=names, num_desc=count, desc_offset=at, data_offset=at)
    file = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.write(file, bytes(header) + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "ioctl_value", lambda fd, request: file)
        error = errno_of(lambda: stats.read_stats(-1))
    assert error in ((errno.EINVAL,) if names > 4096 or count > 4096 else (0, errno.EINVAL))


@given(
    offset=LENGTHS,
    size=st.integers(0, 0xFFFF) | st.just(56),
    count=st.integers(0, 0xFFFF),
    kind=st.integers(0, 4),
    start=LENGTHS,
    length=LENGTHS,
)
def test_a_client_whose_headers_say_anything_is_looked_at_all_the_same(
    tmp_path_factory: pytest.TempPathFactory, offset: int, size: int, count: int, kind: int, start: int, length: int
) -> None:
    head = struct.pack("<4sB11xHHIQQQIHHH", b"\x7fELF", 2, 2, 62, 1, 0, offset, 0, 0, 64, size, count).ljust(64, b"\0")
    path = tmp_path_factory.getbasetemp() / "client"
    path.write_bytes(head + struct.pack("<IIQQQQQQ", kind, 0, start, 0, 0, length, 0, 0))
    found = program.read(str(path))
    if size != 56 or count > 1170:
        assert found == program.Program(), "the kernel executes no such thing"
    elif offset != 64 or kind != 3 or not count:
        assert not found.interpreter


@given(items=st.dictionaries(st.integers(0, 0xFFFF), st.binary(max_size=8), max_size=3), number=st.integers(0, 0xFFFF))
def test_what_lies_behind_an_item_of_fw_cfg_reads_as_zeroes(items: dict[int, bytes], number: int) -> None:
    device = FwCfg(items)
    device.write(0, 2, number)
    assert bytes(device.read(1, 1) for _ in range(12)) == items.get(number, b"").ljust(12, b"\0")
    device.restore({"selected": number, "position": 0xFFFF_FFFF})
    assert [device.read(1, 1) for _ in range(3)] == [0, 0, 0]
    assert device.save()["position"] == 0xFFFF_FFFF, "it does not begin anew"
