# SPDX-License-Identifier: Apache-2.0
"""The MC146818's registers, expected values from its data sheet."""

import itertools
import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mc146818 import Chip

from softkvm.vmm.devices.cmos import Cmos

NS = 1_000_000_000
# 2021-02-28 23:59:58 UTC, a Sunday
START_NS = timegm((2021, 2, 28, 23, 59, 58)) * NS
A, B, C, D = 10, 11, 12, 13


class Clock:
    def __init__(self, now_ns: int = START_NS) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cmos(clock: Clock) -> Iterator[Cmos]:
    chip = Cmos(clock_ns=clock)
    yield chip
    chip.close()


def get(cmos: Cmos, index: int) -> int:
    cmos.write(0, 1, index)
    return cmos.read(1)


def put(cmos: Cmos, index: int, value: int) -> None:
    cmos.write(0, 1, index)
    cmos.write(1, 1, value)


def test_time_is_bcd_24_hours_and_sunday_is_1(cmos: Cmos) -> None:
    assert [get(cmos, i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [
        0x58, 0x59, 0x23, 0x01, 0x28, 0x02, 0x21, 0x20,
    ]  # fmt: skip


def test_the_clock_carries_into_the_next_month(cmos: Cmos, clock: Clock) -> None:
    clock.now_ns += 2 * NS
    assert [get(cmos, i) for i in (0, 2, 4, 6, 7, 8)] == [0, 0, 0, 2, 1, 3]


def test_binary_and_12_hour_modes(cmos: Cmos) -> None:
    put(cmos, B, 0x06)
    assert [get(cmos, i) for i in (0, 2, 4)] == [58, 59, 23]
    put(cmos, B, 0x00)
    assert get(cmos, 4) == 0x91  # 11 pm
    put(cmos, 4, 0x12)  # 12 am
    put(cmos, B, 0x02)
    assert get(cmos, 4) == 0x00


def test_register_d_says_the_battery_is_good(cmos: Cmos) -> None:
    assert get(cmos, D) == 0x80


def test_update_in_progress_rises_244_us_before_the_second(cmos: Cmos, clock: Clock) -> None:
    assert get(cmos, A) == 0x26
    clock.now_ns += NS - 244_000
    assert get(cmos, A) == 0xA6
    clock.now_ns += 244_000
    assert get(cmos, A) == 0x26


def test_setting_the_time_as_linux_does(cmos: Cmos, clock: Clock) -> None:
    put(cmos, B, 0x82)
    put(cmos, A, 0x76)
    for index, value in ((9, 0x30), (8, 0x12), (7, 0x31), (4, 0x01), (2, 0x02), (0, 0x03), (0x32, 0x20)):
        put(cmos, index, value)
    clock.now_ns += 5 * NS  # stopped meanwhile
    put(cmos, B, 0x02)
    put(cmos, A, 0x26)
    assert [get(cmos, i) for i in (0x32, 9, 8, 7, 4, 2, 0)] == [0x20, 0x30, 0x12, 0x31, 0x01, 0x02, 0x03]
    clock.now_ns += NS
    assert get(cmos, 0) == 0x04


def test_flags_show_in_c_without_interrupts_and_reading_clears_them(cmos: Cmos, clock: Clock) -> None:
    get(cmos, C)
    clock.now_ns += NS
    assert get(cmos, C) == 0x50  # update ended and periodic, IRQF only with an enabled one
    assert get(cmos, C) == 0x00


@pytest.mark.parametrize(("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_rates(cmos: Cmos, clock: Clock, rate: int, hz: int) -> None:
    put(cmos, A, 0x20 | rate)
    get(cmos, C)
    clock.now_ns += NS // hz - 1000
    first = get(cmos, C) & 0x40
    clock.now_ns += 2000
    assert (first, get(cmos, C) & 0x40) == (0, 0x40)


def test_rate_0_has_no_periodic_flag(cmos: Cmos, clock: Clock) -> None:
    put(cmos, A, 0x20)
    get(cmos, C)
    clock.now_ns += 10 * NS
    assert get(cmos, C) & 0x40 == 0


@pytest.mark.parametrize(
    ("alarm", "after_s"),
    [
        ((0x00, 0x00, 0x00), 2),
        ((0x59, 0x59, 0x23), 1),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0x30, 0xC0, 0xC0), 32),
        ((0x57, 0x59, 0x23), 86_399),
    ],
)
def test_alarm_matches_with_dont_care_codes(
    cmos: Cmos, clock: Clock, alarm: tuple[int, int, int], after_s: int
) -> None:
    for index, value in zip((1, 3, 5), alarm, strict=True):
        put(cmos, index, value)
    get(cmos, C)
    clock.now_ns += (after_s - 1) * NS
    assert get(cmos, C) & 0x20 == 0
    clock.now_ns += NS
    assert get(cmos, C) & 0x20 == 0x20


def test_an_alarm_that_cannot_match_never_comes(cmos: Cmos, clock: Clock) -> None:
    put(cmos, 1, 0x79)
    clock.now_ns += 200_000 * NS
    assert get(cmos, C) & 0x20 == 0


def test_memory_size_bytes() -> None:
    cmos = Cmos(ram_below_4g=3 << 30, ram_above_4g=5 << 30)
    assert get(cmos, 0x15) | get(cmos, 0x16) << 8 == 640
    assert get(cmos, 0x17) | get(cmos, 0x18) << 8 == 0xFFFF
    small = Cmos(ram_below_4g=24 << 20)
    for low, high in ((0x17, 0x18), (0x30, 0x31)):  # KiB above the first MiB, in two places
        assert get(small, low) | get(small, high) << 8 == 23 << 10
    assert (get(cmos, 0x34) | get(cmos, 0x35) << 8) << 16 == (3 << 30) - (16 << 20)
    assert (get(cmos, 0x5B) | get(cmos, 0x5C) << 8 | get(cmos, 0x5D) << 16) << 16 == 5 << 30


def test_nmi_mask_bit_is_no_part_of_the_index(cmos: Cmos) -> None:
    put(cmos, 0x80 | 0x40, 0x5A)
    assert get(cmos, 0x40) == 0x5A


def test_set_makes_plain_storage_of_the_time_bytes(cmos: Cmos, clock: Clock) -> None:
    put(cmos, B, 0x82)
    for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
        for value in (0x00, 0x31, 0x99, 0xFF):
            put(cmos, index, value)
            clock.now_ns += 10 * NS
            assert get(cmos, index) == value


@pytest.mark.parametrize("order", list(itertools.permutations((7, 8, 9))))
def test_a_date_is_what_was_written_in_whatever_order(cmos: Cmos, clock: Clock, order: tuple[int, int, int]) -> None:
    """On the 31st, one after the other: no state in between is a date that exists."""
    clock.now_ns = timegm((2026, 1, 31, 12, 0, 0)) * NS
    put(cmos, B, 0x82)
    for index in order:
        put(cmos, index, {7: 0x29, 8: 0x02, 9: 0x28}[index])
    put(cmos, B, 0x02)
    assert [get(cmos, i) for i in (9, 8, 7)] == [0x28, 0x02, 0x29]
    clock.now_ns += 86_400 * NS
    assert [get(cmos, i) for i in (9, 8, 7)] == [0x28, 0x03, 0x01]


def test_set_stops_updates_but_not_the_divider(cmos: Cmos, clock: Clock) -> None:
    """Data sheet, "SET": an update cycle is inhibited; the next one after it comes with its second."""
    clock.now_ns += NS // 4
    put(cmos, A, 0x26)
    put(cmos, B, 0x82)
    get(cmos, C)
    clock.now_ns += 10 * NS
    assert get(cmos, C) == 0x40  # periodic only
    assert get(cmos, A) == 0x26
    put(cmos, B, 0x02)
    assert get(cmos, 0) == 0x58
    clock.now_ns += NS // 4 * 3
    assert get(cmos, 0) == 0x59


def test_released_divider_updates_first_after_half_a_second(cmos: Cmos, clock: Clock) -> None:
    clock.now_ns += NS // 3
    put(cmos, A, 0x76)
    get(cmos, C)
    clock.now_ns += 5 * NS
    assert get(cmos, 0) == 0x58
    assert get(cmos, C) & 0x50 == 0
    put(cmos, A, 0x26)
    clock.now_ns += NS // 2 - 1
    assert get(cmos, 0) == 0x58
    clock.now_ns += 1
    assert get(cmos, 0) == 0x59


def test_set_clears_the_update_ended_interrupt_enable(cmos: Cmos) -> None:
    put(cmos, B, 0xF2)
    assert get(cmos, B) == 0xE2


def test_clock_that_the_host_sets_back_goes_back(cmos: Cmos, clock: Clock) -> None:
    get(cmos, C)
    clock.now_ns -= 3600 * NS
    assert [get(cmos, i) for i in (4, 2, 0)] == [0x22, 0x59, 0x58]
    assert get(cmos, C) == 0


def test_rate_may_change_while_the_divider_runs(cmos: Cmos, clock: Clock) -> None:
    clock.now_ns += NS // 3
    put(cmos, A, 0x2F)
    clock.now_ns += NS // 3 * 2
    assert get(cmos, 0) == 0x58
    clock.now_ns += 1
    assert get(cmos, 0) == 0x59  # at the full second, as before


def test_data_mode_that_changes_under_set_leaves_the_bytes(cmos: Cmos) -> None:
    put(cmos, B, 0x82)
    put(cmos, 0, 0x45)
    put(cmos, B, 0x86)
    assert get(cmos, 0) == 0x45
    put(cmos, B, 0x82)
    put(cmos, 0, 45)  # in the mode that SET is left with
    put(cmos, B, 0x06)
    assert get(cmos, 0) == 45


def test_update_in_progress_is_not_shown_where_no_update_comes(cmos: Cmos, clock: Clock) -> None:
    clock.now_ns += NS - 1000
    put(cmos, B, 0x82)
    assert get(cmos, A) == 0x26
    put(cmos, B, 0x02)
    assert get(cmos, A) == 0xA6
    put(cmos, A, 0x76)
    assert get(cmos, A) == 0x76


@pytest.fixture
def armed(cmos: Cmos, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What the timer was set to."""
    deadlines: list[int | None] = []
    monkeypatch.setattr(cmos._timer, "arm", deadlines.append)
    return deadlines


@pytest.mark.parametrize("rate", range(3, 16))
def test_timer_expires_when_the_periodic_flag_is_due_and_not_before(
    cmos: Cmos, clock: Clock, armed: list[int | None], rate: int
) -> None:
    clock.now_ns += 12_345_678
    put(cmos, A, 0x20 | rate)
    put(cmos, B, 0x42)
    get(cmos, C)
    for _ in range(5):
        deadline = armed[-1]
        assert deadline is not None
        clock.now_ns = deadline - 1
        assert get(cmos, C) == 0
        clock.now_ns = deadline
        assert get(cmos, C) & 0xC0 == 0xC0


def test_timer_rests_while_an_interrupt_is_pending_or_none_can_come(
    cmos: Cmos, clock: Clock, armed: list[int | None]
) -> None:
    put(cmos, B, 0x42)
    assert armed[-1] is not None
    clock.now_ns += NS
    cmos._timer_expired()
    assert armed[-1] is None  # nobody has read the flag
    get(cmos, C)
    assert armed[-1] is not None
    put(cmos, A, 0x76)  # the divider stands
    assert armed[-1] is None
    put(cmos, B, 0x32)
    assert armed[-1] is None


@dataclass
class Wait:
    ns: int


@dataclass
class Read:
    index: int


@dataclass
class Write:
    index: int
    value: int


REGISTERS = [*range(14), 0x32]
steps = st.one_of(
    st.builds(Wait, st.one_of(st.integers(0, 2 * NS), st.sampled_from([1, NS - 244_000, NS // 2, NS, 70 * NS]))),
    st.builds(Read, st.sampled_from(REGISTERS)),
    st.builds(
        Write,
        st.sampled_from(REGISTERS),
        st.one_of(st.sampled_from([0x00, 0x12, 0x23, 0x26, 0x31, 0x58, 0x59, 0x82, 0xFF]), st.integers(0, 255)),
    ),
)


@given(st.lists(steps, max_size=60))
def test_it_is_the_chip_of_the_data_sheet(program: list[Wait | Read | Write]) -> None:
    clock = Clock()
    levels = [0]
    cmos = Cmos(clock_ns=clock, set_irq=levels.append)
    cmos.close()  # no thread: the flags are looked at when the program does
    chip = Chip(bytes(get(cmos, index) for index in range(128)), clock.now_ns)
    for step in program:
        if isinstance(step, Wait):
            clock.now_ns += step.ns
            chip.wait(step.ns)
        elif isinstance(step, Write):
            index, value = step.index, step.value
            if index == B and (value ^ chip.memory[B]) & 0x06:
                value |= 0x80  # the mode may change while the bytes are set anew
            put(cmos, index, value)
            chip.write(index, value)
        else:
            got, expected = get(cmos, step.index), chip.read(step.index)
            if step.index == C and not is_time(chip):
                got, expected = got & 0x50, expected & 0x50  # whether that matches an alarm is nobody's business
                chip.memory[B] &= ~0x20
                put(cmos, B, chip.memory[B])
            assert got == expected, step
    if is_time(chip):
        get(cmos, 0)  # look
        assert levels[-1] == chip.irq


def is_time(chip: Chip) -> bool:
    format = chip.format
    return all(
        chip.memory[index] in {encode(value) for value in range(count)}
        for index, count, encode in ((0, 60, format.encode), (2, 60, format.encode), (4, 24, format.encode_hour))
    )


def test_update_ended_interrupt_arrives_on_its_own() -> None:
    levels: list[int] = []
    cmos = Cmos(set_irq=levels.append)
    put(cmos, B, 0x12)
    deadline = time.monotonic() + 5
    while not levels and time.monotonic() < deadline:
        time.sleep(0.01)
    assert levels == [1]
    assert get(cmos, C) & 0x90 == 0x90
    assert levels == [1, 0]
    cmos.close()


def test_save_and_restore_keep_the_time(cmos: Cmos, clock: Clock) -> None:
    put(cmos, B, 0x06)
    put(cmos, 4, 7)
    put(cmos, 0x50, 0x99)
    other = Cmos(clock_ns=clock)
    other.restore(cmos.save())
    assert (get(other, 4), get(other, 0x50)) == (7, 0x99)
