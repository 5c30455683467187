# SPDX-License-Identifier: Apache-2.0
"""The update cycle against Python's calendar, and against the chip's own way: byte by byte, second by second."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mc146818 import matches_alarm, tick

from softkvm.vmm.devices.rtc_calendar import (
    TIME_REGISTERS,
    Format,
    add_seconds,
    reformat,
    seconds_to_alarm,
    set_utc,
)

FORMATS = [Format(binary, hours_24) for binary in (False, True) for hours_24 in (False, True)]
BCD_24 = Format(binary=False, hours_24=True)

moments = st.datetimes(datetime(1970, 1, 1), datetime(2400, 1, 1), timezones=st.just(UTC))


def registers(moment: datetime, format: Format = BCD_24) -> bytearray:
    memory = bytearray(128)
    set_utc(memory, int(moment.timestamp()), format)
    return memory


def times(memory: bytearray) -> list[int]:
    return [memory[index] for index in TIME_REGISTERS]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        # data sheet, table 3: ranges and formats; 23:59:58 on a Sunday
        (Format(binary=False, hours_24=True), [0x58, 0x59, 0x23, 0x01, 0x28, 0x02, 0x21, 0x20]),
        (Format(binary=False, hours_24=False), [0x58, 0x59, 0x91, 0x01, 0x28, 0x02, 0x21, 0x20]),
        (Format(binary=True, hours_24=True), [58, 59, 23, 1, 28, 2, 21, 20]),
        (Format(binary=True, hours_24=False), [58, 59, 0x8B, 1, 28, 2, 21, 20]),
    ],
)
def test_formats_are_the_data_sheets(format: Format, expected: list[int]) -> None:
    assert times(registers(datetime(2021, 2, 28, 23, 59, 58, tzinfo=UTC), format)) == expected


@pytest.mark.parametrize("hour", range(24))
def test_12_hour_bytes_are_1_to_12_with_bit_7_for_pm(hour: int) -> None:
    format = Format(binary=False, hours_24=False)
    twelve, half = datetime(2021, 1, 1, hour).strftime("%I %p").split()
    byte = int(twelve, 16) | (0x80 if half == "PM" else 0)
    assert format.encode_hour(hour) == byte
    assert format.decode_hour(byte) == hour


@given(moments, st.integers(-(10**9), 10**10), st.sampled_from(FORMATS))
def test_update_cycles_keep_the_gregorian_calendar(moment: datetime, seconds: int, format: Format) -> None:
    memory = registers(moment, format)
    add_seconds(memory, seconds, format)
    expected = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(moment.timestamp()) + seconds)
    assert times(memory) == [
        format.encode(expected.second),
        format.encode(expected.minute),
        format.encode_hour(expected.hour),
        format.encode(expected.isoweekday() % 7 + 1),
        format.encode(expected.day),
        format.encode(expected.month),
        format.encode(expected.year % 100),
        format.encode(expected.year // 100),
    ]


bytes_ = st.one_of(
    st.sampled_from([0x00, 0x09, 0x12, 0x23, 0x28, 0x29, 0x31, 0x59, 0x91, 0x92, 0x99]), st.integers(0, 255)
)


@given(st.lists(bytes_, min_size=8, max_size=8), st.integers(1, 200), st.booleans(), st.sampled_from(FORMATS))
@settings(max_examples=300)
def test_many_update_cycles_are_as_one_by_one_whatever_the_bytes(
    contents: list[int], cycles: int, late: bool, format: Format
) -> None:
    memory = bytearray(128)
    for index, byte in zip(TIME_REGISTERS, contents, strict=True):
        memory[index] = byte
    if late:  # a carry all the way is near
        memory[0], memory[2], memory[4] = format.encode(50), format.encode(59), format.encode_hour(23)
    stepped = bytearray(memory)
    add_seconds(memory, cycles, format)
    for _ in range(cycles):
        tick(stepped, format)
    assert times(memory) == times(stepped)


@given(moments, st.tuples(bytes_, bytes_, bytes_), st.sampled_from(FORMATS))
def test_alarm_comes_at_the_first_second_whose_bytes_match(
    moment: datetime, alarm: tuple[int, int, int], format: Format
) -> None:
    memory = registers(moment, format)
    memory[1], memory[3], memory[5] = alarm

    wait = seconds_to_alarm(memory, format)
    if wait is None:
        # none of the bytes that the time goes through
        hours = [format.encode_hour(hour) for hour in range(24)]
        sixty = [format.encode(value) for value in range(60)]
        assert any(
            byte < 0xC0 and byte not in values for byte, values in zip(alarm, (sixty, sixty, hours), strict=True)
        )
        return
    assert 1 <= wait <= 86_400
    add_seconds(memory, wait, format)
    assert matches_alarm(memory)
    add_seconds(memory, -wait, format)
    for _ in range(min(wait - 1, 200)):
        tick(memory, format)
        assert not matches_alarm(memory)


@given(moments, st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_another_data_mode_shows_the_same_time(moment: datetime, old: Format, new: Format) -> None:
    memory = registers(moment, old)
    reformat(memory, old, new)
    assert times(memory) == times(registers(moment, new))
