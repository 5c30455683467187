# SPDX-License-Identifier: Apache-2.0
"""What a real-time clock's update cycle does to its time and calendar bytes, any number of times at once.

Source: Motorola MC146818A data sheet, "Time, Calendar and Alarm Locations" (table 3: ranges and formats), "Update
Cycle" (increment, overflow, comparison with the alarm bytes). The bytes are plain storage: a program may leave there
what is no time. The data sheet does not say what becomes of such a byte; here it is left alone until a carry reaches
it, and then it overflows like the largest value of its range. Leap years are those of the Gregorian calendar, with the
century of byte 0x32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence, Sequence
from datetime import date, timedelta
from typing import Final, NamedTuple

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR = range(6, 10)
CENTURY: Final = 0x32
TIME_REGISTERS: Final = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY)

DAY_S: Final = 86_400
_PM: Final = 0x80
_DONT_CARE: Final = 0xC0  # an alarm byte with both highest bits matches every time
_ERA_YEARS: Final = 400  # after which the Gregorian calendar repeats
_ERA_START: Final = 2000


class Format(NamedTuple):
    """The data modes that register B chooses: DM and 24/12."""

    binary: bool
    hours_24: bool

    def encode(self, value: int) -> int:
        """Return the byte for *value*, 0 to 99."""
        return value if self.binary else value // 10 << 4 | value % 10

    def decode(self, byte: int) -> int:
        """Return what *byte* counts; more than 99 for what is none of the format's."""
        return byte if self.binary else (byte >> 4) * 10 + (byte & 0x0F)

    def encode_hour(self, hour: int) -> int:
        """Return the byte for *hour*, 0 to 23."""
        if self.hours_24:
            return self.encode(hour)
        return self.encode(hour % 12 or 12) | (_PM if hour >= 12 else 0)

    def decode_hour(self, byte: int) -> int:
        """Return the hour that *byte* means, more than 23 for none."""
        if self.hours_24:
            return self.decode(byte)
        hour = self.decode(byte & ~_PM)
        if not 1 <= hour <= 12:
            return 12 + 11 if byte & _PM else 11
        return hour % 12 + (12 if byte & _PM else 0)


def set_utc(registers: MutableSequence[int], unix_s: int, format: Format) -> None:
    """Store the time that is *unix_s* seconds after 1970 in UTC."""
    t = time.gmtime(unix_s)
    encode = format.encode
    registers[SECONDS] = encode(t.tm_sec)
    registers[MINUTES] = encode(t.tm_min)
    registers[HOURS] = format.encode_hour(t.tm_hour)
    registers[DAY_OF_WEEK] = encode((t.tm_wday + 1) % 7 + 1)  # Sunday is 1
    registers[DAY_OF_MONTH] = encode(t.tm_mday)
    registers[MONTH] = encode(t.tm_mon)
    registers[YEAR] = encode(t.tm_year % 100)
    registers[CENTURY] = encode(t.tm_year // 100 % 100)


def reformat(registers: MutableSequence[int], old: Format, new: Format) -> None:
    """Rewrite the time and calendar bytes, which are in format *old*, in format *new*."""
    for index in TIME_REGISTERS:
        if index == HOURS:
            registers[index] = new.encode_hour(min(old.decode_hour(registers[index]), 23))
        else:
            registers[index] = new.encode(min(old.decode(registers[index]), 99))


def add_seconds(registers: MutableSequence[int], seconds: int, format: Format) -> None:
    """Carry out *seconds* update cycles; less than none takes as many back."""
    carry = seconds
    for index, size, decode, encode in (
        (SECONDS, 60, format.decode, format.encode),
        (MINUTES, 60, format.decode, format.encode),
        (HOURS, 24, format.decode_hour, format.encode_hour),
    ):
        if not carry:
            return
        carry, value = divmod(min(decode(registers[index]), size - 1) + carry, size)
        registers[index] = encode(value)
    if carry:
        _add_days(registers, carry, format)


def _add_days(registers: MutableSequence[int], days: int, format: Format) -> None:
    decode, encode = format.decode, format.encode
    weekday = min(decode(registers[DAY_OF_WEEK]), 7)
    registers[DAY_OF_WEEK] = encode((weekday - 1 + days) % 7 + 1)

    year = min(decode(registers[CENTURY]), 99) * 100 + min(decode(registers[YEAR]), 99)
    month = min(decode(registers[MONTH]), 12)
    before = 0 if month else 1  # month 0 is the one before January
    start = date(_ERA_START + (year - before) % _ERA_YEARS, month or 12, 1)
    day = min(decode(registers[DAY_OF_MONTH]), _days_in_month(start))
    end = start + timedelta(day - 1 + days)

    # a byte that no carry reaches stays as it is
    registers[DAY_OF_MONTH] = encode(end.day)
    if (end.year, end.month) == (start.year, start.month):
        return
    registers[MONTH] = encode(end.month)
    new_year = year - before + end.year - start.year
    if new_year != year:
        registers[YEAR] = encode(new_year % 100)
    if new_year // 100 != year // 100:
        registers[CENTURY] = encode(new_year // 100 % 100)


def _days_in_month(first: date) -> int:
    return ((first + timedelta(31)).replace(day=1) - first).days


def seconds_to_alarm(registers: Sequence[int], format: Format) -> int | None:
    """Return how many update cycles it takes until the time matches the alarm bytes, None if it never does."""
    hours = _matching(registers[HOURS_ALARM], 24, format.encode_hour)
    minutes = _matching(registers[MINUTES_ALARM], 60, format.encode)
    seconds = _matching(registers[SECONDS_ALARM], 60, format.encode)
    now = (
        min(format.decode_hour(registers[HOURS]), 23) * 3600
        + min(format.decode(registers[MINUTES]), 59) * 60
        + min(format.decode(registers[SECONDS]), 59)
    )
    for day in (0, DAY_S):
        for hour in hours:
            if day + hour * 3600 + 3599 <= now:
                continue
            for minute in minutes:
                start = day + hour * 3600 + minute * 60
                if start + 59 <= now:
                    continue
                for second in seconds:
                    if start + second > now:
                        return start + second - now
    return None


def _matching(alarm: int, count: int, encode: Callable[[int], int]) -> list[int]:
    """Return the values below *count* that an alarm byte stands for: the bytes are compared, not what they mean."""
    return [value for value in range(count) if alarm >= _DONT_CARE or encode(value) == alarm]
