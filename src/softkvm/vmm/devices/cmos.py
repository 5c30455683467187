# SPDX-License-Identifier: Apache-2.0
"""The MC146818 real-time clock and the CMOS memory of a PC, at ports 0x70 and 0x71.

Source: Motorola MC146818A data sheet (registers A to D, alarm, periodic and update-ended interrupts, update cycle); the
memory-size bytes are the PC AT's and the ones that firmware for virtual machines agreed on.

The clock follows the host's wall clock plus an offset that the guest changes by setting the time. Interrupt flags are
computed from the time that passed, so nothing runs while no interrupt is enabled.
"""

import threading
import time
from calendar import timegm
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.timer import Timer

CMOS_PORT: Final = 0x70
RTC_IRQ: Final = 8
MEMORY_SIZE: Final = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR = range(6, 10)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(10, 14)
SHUTDOWN_STATUS: Final = 0x0F
EQUIPMENT: Final = 0x14
BASE_MEMORY: Final = 0x15
EXTENDED_MEMORY: Final = 0x17
EXTENDED_MEMORY_2: Final = 0x30
CENTURY: Final = 0x32
MEMORY_ABOVE_16M: Final = 0x34
MEMORY_ABOVE_4G: Final = 0x5B

A_UIP: Final = 0x80  # update in progress
A_DIVIDER: Final = 0x70
A_DIVIDER_32KHZ: Final = 0x20
A_RATE: Final = 0x0F

B_SET: Final = 0x80
B_PIE: Final = 0x40
B_AIE: Final = 0x20
B_UIE: Final = 0x10
B_BINARY: Final = 0x04
B_24H: Final = 0x02

C_IRQF: Final = 0x80
C_PF: Final = 0x40
C_AF: Final = 0x20
C_UF: Final = 0x10

D_VALID: Final = 0x80  # the battery is good

_NS: Final = 1_000_000_000
_DAY_S: Final = 86_400
_UIP_NS: Final = 244_000  # the update starts this long after UIP rises (data sheet, table 6)
_DONT_CARE: Final = 0xC0
_TIME_REGISTERS: Final = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY)
_ALARM_REGISTERS: Final = (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)


class Cmos:
    """Ports 0x70 (offset 0, index) and 0x71 (offset 1, data).

    ``ram_below_4g`` and ``ram_above_4g`` are the bytes of guest RAM on either side of the hole, for the memory-size
    bytes. ``clock_ns`` is the wall clock in nanoseconds since 1970 UTC.
    """

    def __init__(
        self,
        ram_below_4g: int = 0,
        ram_above_4g: int = 0,
        set_irq: Callable[[int], object] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._set_irq = set_irq
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._timer = Timer("rtc", clock_ns, self._timer_expired)
        self._index = REGISTER_D
        self._memory = bytearray(MEMORY_SIZE)
        self._memory[REGISTER_A] = A_DIVIDER_32KHZ | 0x06
        self._memory[REGISTER_B] = B_24H
        self._set_memory_sizes(ram_below_4g, ram_above_4g)
        self._offset_ns = 0
        self._frozen_ns = 0  # the time shown while B.SET stops the clock
        self._seen_ns = clock_ns()  # flags are computed up to here
        self._irq_level = 0

    def _set_memory_sizes(self, below_4g: int, above_4g: int) -> None:
        def store(index: int, size: int, value: int) -> None:
            value = max(0, min(value, (1 << 8 * size) - 1))
            self._memory[index : index + size] = value.to_bytes(size, "little")

        self._memory[EQUIPMENT] = 0x02  # a coprocessor; no floppy, no display
        store(BASE_MEMORY, 2, min(640, below_4g >> 10))
        store(EXTENDED_MEMORY, 2, (below_4g >> 10) - 1024)
        store(EXTENDED_MEMORY_2, 2, (below_4g >> 10) - 1024)
        store(MEMORY_ABOVE_16M, 2, (below_4g - (16 << 20)) >> 16)
        store(MEMORY_ABOVE_4G, 3, above_4g >> 16)

    # -- the bus's side

    def read(self, offset: int, size: int = 1) -> int:
        """The index port reads as all ones, as on a PC; the data port is the indexed byte."""
        if not offset & 1:
            return 0xFF
        with self._lock:
            index = self._index
            if index in _TIME_REGISTERS:
                return self._time_bytes(self._now_ns())[index]
            if index == REGISTER_A:
                return self._memory[REGISTER_A] | (A_UIP if self._updating() else 0)
            if index == REGISTER_C:
                self._advance()
                value = self._memory[REGISTER_C]
                self._memory[REGISTER_C] = 0
                self._update_irq()
                return value
            if index == REGISTER_D:
                return D_VALID
            return self._memory[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a byte, or write the selected one."""
        value &= 0xFF
        if not offset & 1:
            self._index = value & 0x7F  # bit 7 masks NMIs on a PC; nothing here raises one
            return
        with self._lock:
            self._advance()
            index = self._index
            if index in _TIME_REGISTERS:
                self._set_time(index, value)
            elif index == REGISTER_A:
                self._memory[REGISTER_A] = value & ~A_UIP
            elif index == REGISTER_B:
                self._write_register_b(value)
            elif index not in (REGISTER_C, REGISTER_D):
                self._memory[index] = value
            self._update_irq()
            self._arm()

    def close(self) -> None:
        """End the timer thread, if there is one."""
        self._timer.close()

    # -- time

    def _now_ns(self) -> int:
        return self._frozen_ns if self._memory[REGISTER_B] & B_SET else self._clock_ns() + self._offset_ns

    def _running(self) -> bool:
        return not self._memory[REGISTER_B] & B_SET and self._memory[REGISTER_A] & A_DIVIDER == A_DIVIDER_32KHZ

    def _updating(self) -> bool:
        return self._running() and self._now_ns() % _NS >= _NS - _UIP_NS

    def _encode(self, value: int) -> int:
        return value if self._memory[REGISTER_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._memory[REGISTER_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self._memory[REGISTER_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._memory[REGISTER_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _time_bytes(self, now_ns: int) -> dict[int, int]:
        t = time.gmtime(now_ns // _NS)
        return {
            SECONDS: self._encode(t.tm_sec),
            MINUTES: self._encode(t.tm_min),
            HOURS: self._encode_hour(t.tm_hour),
            DAY_OF_WEEK: self._encode((t.tm_wday + 1) % 7 + 1),  # Sunday is 1
            DAY_OF_MONTH: self._encode(t.tm_mday),
            MONTH: self._encode(t.tm_mon),
            YEAR: self._encode(t.tm_year % 100),
            CENTURY: self._encode(t.tm_year // 100),
        }

    def _set_time(self, index: int, value: int) -> None:
        """Change one register of the running or stopped clock; a date that does not exist counts on from its month."""
        now_ns = self._now_ns()
        bytes_ = self._time_bytes(now_ns)
        bytes_[index] = value
        year = self._decode(bytes_[CENTURY]) * 100 + self._decode(bytes_[YEAR])
        month = min(max(self._decode(bytes_[MONTH]), 1), 12)
        seconds = timegm(
            (
                min(max(year, 1970), 9998),
                month,
                self._decode(bytes_[DAY_OF_MONTH]),
                self._decode_hour(bytes_[HOURS]),
                self._decode(bytes_[MINUTES]),
                self._decode(bytes_[SECONDS]),
            )
        )
        new_ns = max(0, seconds) * _NS + now_ns % _NS
        if self._memory[REGISTER_B] & B_SET:
            self._frozen_ns = new_ns
        else:
            self._offset_ns += new_ns - now_ns
            self._seen_ns = new_ns

    def _write_register_b(self, value: int) -> None:
        was_set = self._memory[REGISTER_B] & B_SET
        if value & B_SET:
            value &= ~B_UIE  # SET clears the update-ended interrupt enable
            if not was_set:
                self._frozen_ns = self._now_ns()
        elif was_set:
            # Register-wise setting lost the fraction's meaning: the clock goes on from the second's start.
            self._offset_ns = self._frozen_ns // _NS * _NS - self._clock_ns()
            self._seen_ns = self._frozen_ns // _NS * _NS
        self._memory[REGISTER_B] = value

    # -- interrupts

    def _period_ns(self) -> int:
        """The periodic interrupt's period in units of 1/32768 s, 0 for none (data sheet, table 5)."""
        rate = self._memory[REGISTER_A] & A_RATE
        if rate == 0:
            return 0
        return 1 << (rate + 6 if rate <= 2 else rate - 1)

    def _next_alarm_s(self, after_s: int) -> int | None:
        """The first second later than ``after_s`` that matches the alarm registers."""

        def candidates(index: int, count: int, decode: Callable[[int], int]) -> range:
            value = self._memory[index]
            if value >= _DONT_CARE:
                return range(count)
            value = decode(value)
            return range(value, value + 1) if value < count else range(0)

        hours = candidates(HOURS_ALARM, 24, self._decode_hour)
        minutes = candidates(MINUTES_ALARM, 60, self._decode)
        seconds = candidates(SECONDS_ALARM, 60, self._decode)
        midnight_s = after_s - after_s % _DAY_S
        for day_s in (midnight_s, midnight_s + _DAY_S):
            for hour in hours:
                if day_s + hour * 3600 + 3599 <= after_s:
                    continue
                for minute in minutes:
                    start_s = day_s + hour * 3600 + minute * 60
                    if start_s + 59 <= after_s:
                        continue
                    for second in seconds:
                        if start_s + second > after_s:
                            return start_s + second
        return None

    def _advance(self) -> None:
        """Raise the flags of everything that happened since the last look."""
        now_ns = self._now_ns()
        seen_ns, self._seen_ns = self._seen_ns, now_ns
        if not self._running() or now_ns <= seen_ns:
            return
        flags = 0
        period = self._period_ns()
        if period and seen_ns * 32768 // _NS // period != now_ns * 32768 // _NS // period:
            flags |= C_PF
        if seen_ns // _NS != now_ns // _NS:
            flags |= C_UF
            alarm_s = self._next_alarm_s(seen_ns // _NS)
            if alarm_s is not None and alarm_s <= now_ns // _NS:
                flags |= C_AF
        self._memory[REGISTER_C] |= flags

    def _update_irq(self) -> None:
        # The enable bits of B and the flags of C have the same places.
        pending = self._memory[REGISTER_C] & self._memory[REGISTER_B] & (C_PF | C_AF | C_UF)
        if pending:
            self._memory[REGISTER_C] |= C_IRQF
        else:
            self._memory[REGISTER_C] &= ~C_IRQF
        level = int(bool(pending))
        if level != self._irq_level:
            self._irq_level = level
            if self._set_irq is not None:
                self._set_irq(level)

    def _arm(self) -> None:
        """Set the timer to the next moment at which an enabled interrupt is due."""
        enabled = self._memory[REGISTER_B]
        if not self._running() or not enabled & (B_PIE | B_AIE | B_UIE):
            self._timer.arm(None)
            return
        now_ns = self._now_ns()
        due: list[int] = []
        period = self._period_ns()
        if enabled & B_PIE and period:
            tick = (now_ns * 32768 // _NS // period + 1) * period
            due.append(-(-tick * _NS // 32768))
        if enabled & B_UIE:
            due.append((now_ns // _NS + 1) * _NS)
        if enabled & B_AIE:
            alarm_s = self._next_alarm_s(now_ns // _NS)
            if alarm_s is not None:
                due.append(alarm_s * _NS)
        self._timer.arm(min(due) - self._offset_ns if due else None)

    def _timer_expired(self) -> None:
        with self._lock:
            self._advance()
            self._update_irq()
            self._arm()

    # -- snapshots

    def save(self) -> dict[str, Any]:
        """Registers, memory and the offset from the host's clock."""
        with self._lock:
            self._advance()
            return {
                "index": self._index,
                "memory": bytes(self._memory),
                "offset_ns": self._offset_ns,
                "frozen_ns": self._frozen_ns,
                "seen_ns": self._seen_ns,
                "irq_level": self._irq_level,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the clock keeps its distance from the host's wall clock."""
        with self._lock:
            self._index = state["index"]
            self._memory = bytearray(state["memory"])
            self._offset_ns = state["offset_ns"]
            self._frozen_ns = state["frozen_ns"]
            self._seen_ns = state["seen_ns"]
            self._irq_level = state["irq_level"]
            self._arm()
