# SPDX-License-Identifier: Apache-2.0
"""A real-time clock that is simulated, second by second, as the MC146818A's data sheet tells it: slow and plain."""

import calendar

from softkvm.vmm.devices.rtc_calendar import Format

NS = 1_000_000_000
CENTURY = 0x32
TIME = (0, 2, 4, 6, 7, 8, 9, CENTURY)
A, B, C, D = 10, 11, 12, 13


def tick(memory: bytearray, format: Format) -> None:
    """One update cycle: increment; at the end of its range a byte starts anew and carries."""

    def count(index: int, first: int, last: int) -> bool:
        value = format.decode(memory[index])
        memory[index] = format.encode(first if value >= last else value + 1)
        return value >= last

    if not count(0, 0, 59) or not count(2, 0, 59):
        return
    hour = format.decode_hour(memory[4])
    memory[4] = format.encode_hour(0 if hour >= 23 else hour + 1)
    if hour < 23:
        return
    count(6, 1, 7)
    month = min(format.decode(memory[8]), 12)
    year = min(format.decode(memory[CENTURY]), 99) * 100 + min(format.decode(memory[9]), 99)
    if not count(7, 1, calendar.monthrange(2000 + year % 400, month)[1] if month else 31) or not count(8, 1, 12):
        return
    if count(9, 0, 99):
        count(CENTURY, 0, 99)


def matches_alarm(memory: bytearray) -> bool:
    """Each alarm byte equals its time byte, or has both most significant bits set ("don't care")."""
    return all(memory[index + 1] >= 0xC0 or memory[index + 1] == memory[index] for index in (0, 2, 4))


class Chip:
    """The chip at *now_ns*, with whole seconds where *now_ns* is a multiple of one."""

    def __init__(self, memory: bytes, now_ns: int) -> None:
        self.memory = bytearray(memory)
        self.now_ns = now_ns
        self.phase_ns = 0

    @property
    def format(self) -> Format:
        return Format(binary=bool(self.memory[B] & 4), hours_24=bool(self.memory[B] & 2))

    @property
    def divides(self) -> bool:
        return self.memory[A] & 0x70 == 0x20

    @property
    def updates(self) -> bool:
        return self.divides and not self.memory[B] & 0x80

    @property
    def irq(self) -> int:
        return int(bool(self.memory[C] & self.memory[B] & 0x70))

    def wait(self, ns: int) -> None:
        start, self.now_ns = self.now_ns - self.phase_ns, self.now_ns + ns
        end = self.now_ns - self.phase_ns
        rate = self.memory[A] & 15
        if self.divides and rate:
            hz = {1: 256, 2: 128}.get(rate, 65_536 >> rate)  # table 5, time base 32.768 kHz
            if start * hz // NS != end * hz // NS:
                self.memory[C] |= 0x40
        if self.updates:
            for _ in range(end // NS - start // NS):
                tick(self.memory, self.format)
                self.memory[C] |= 0x10 | (0x20 if matches_alarm(self.memory) else 0)

    def read(self, index: int) -> int:
        value = self.memory[index]
        if index == A and self.updates and (self.now_ns - self.phase_ns) % NS >= NS - 244_000:
            return value | 0x80
        if index == C:
            self.memory[C] = 0
            return value & 0x70 | (0x80 if value & self.memory[B] & 0x70 else 0)
        return value

    def write(self, index: int, value: int) -> None:
        if index == A:
            stood = not self.divides
            self.memory[A] = value & 0x7F
            if stood and self.divides:
                self.phase_ns = self.now_ns - NS // 2  # "the first update cycle begins one-half second later"
        elif index == B:
            self.memory[B] = value & ~0x10 if value & 0x80 else value
        elif index not in (C, D):
            self.memory[index] = value
