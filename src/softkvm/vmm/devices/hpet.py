# SPDX-License-Identifier: Apache-2.0
"""The high precision event timer: a 64-bit counter at 100 MHz, three comparators.

Source: IA-PC HPET specification 1.0a, section 2.3 (registers), 2.4 (theory of operation). Interrupts are delivered by
line; there is no FSB (message) delivery.

With legacy replacement comparator 0 drives IRQ 0 and comparator 1 IRQ 8, in place of the i8254 and the real-time clock,
whose output goes through here for that (section 2.4.2.1).

What the specification leaves open: a one-shot in 32-bit mode interrupts again each time when the counter's lower half
comes by. The first value written under Tn_VAL_SET_CNF is the period, too, until another one is written, as on most
chipsets; a half of the comparator that was not written under it still may be, when software has 32-bit accesses only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.timer import Timer

HPET_ADDRESS: Final = 0xFED00000
HPET_SIZE: Final = 1024
PERIOD_NS: Final = 10
COMPARATORS: Final = 3

# registers
CAPABILITIES: Final = 0x000
CONFIGURATION: Final = 0x010
INTERRUPT_STATUS: Final = 0x020
COUNTER: Final = 0x0F0
COMPARATOR_0: Final = 0x100
COMPARATOR_STRIDE: Final = 0x20
COMPARATOR_CONFIG: Final = 0x00
COMPARATOR_VALUE: Final = 0x08

ENABLE: Final = 1 << 0
LEGACY: Final = 1 << 1

LEVEL: Final = 1 << 1
INT_ENABLE: Final = 1 << 2
PERIODIC: Final = 1 << 3
PERIODIC_CAPABLE: Final = 1 << 4
SIZE_64: Final = 1 << 5
SET_VALUE: Final = 1 << 6
MODE_32: Final = 1 << 8
ROUTE_SHIFT: Final = 9
ROUTE_MASK: Final = 0x1F << ROUTE_SHIFT
_CONFIG_WRITABLE: Final = LEVEL | INT_ENABLE | PERIODIC | SET_VALUE | MODE_32

REVISION: Final = 1
VENDOR: Final = 0x8086
LEGACY_CAPABLE: Final = 1 << 15
COUNTER_64: Final = 1 << 13
BLOCK_ID: Final = VENDOR << 16 | LEGACY_CAPABLE | COUNTER_64 | (COMPARATORS - 1) << 8 | REVISION
ROUTES: Final = 1 << 2 | 0xFF << 16  # the lines that a comparator may drive: 2 and 16 to 23
MIN_PERIOD_NS: Final = 100_000
"""Periodic interrupts come no faster than this, so that no guest makes the host do nothing else."""
MIN_PERIOD_TICKS: Final = MIN_PERIOD_NS // PERIOD_NS

_MASK_64: Final = (1 << 64) - 1
_MASK_32: Final = (1 << 32) - 1
_LEGACY_LINES: Final = {0: 0, 1: 8}
_RTC_LINE: Final = 8
_PIN_LINES: Final = {2: 0}  # the IOAPIC's pin 2 is IRQ 0's
_FS_PER_NS: Final = 1_000_000


class _Comparator:
    """One comparator: its configuration, the value it waits for, and the period that it adds to it."""

    __slots__ = ("config", "due", "period", "provisional", "settable", "value")

    def __init__(self) -> None:
        self.config = PERIODIC_CAPABLE | SIZE_64
        self.value = _MASK_64
        self.period = 0  # the value last written
        self.provisional = False  # the period was written with the value: the next write replaces all of it
        self.settable = 0  # bits of the value that Tn_VAL_SET_CNF lets through
        self.due = 0  # what the counter will be at the next match, counted on beyond its 64 bits

    @property
    def mask(self) -> int:
        return _MASK_32 if self.config & MODE_32 else _MASK_64

    @property
    def periodic(self) -> bool:
        return bool(self.config & PERIODIC)

    def wait_from(self, count: int) -> None:
        """Find the first match from *count* on."""
        self.due = count + (self.value - count & self.mask)

    def pass_to(self, count: int) -> bool:
        """Let the counter get to *count*; return whether it has matched on its way."""
        if self.due > count:
            return False
        step = self.period if self.periodic and self.period else self.mask + 1
        steps = ((count - self.due) // step + 1) * step
        self.due += steps
        self.value = self.value + steps & self.mask
        return True

    def configure(self, value: int, bits: int) -> None:
        """Write those *bits* of the configuration."""
        route = (value & ROUTE_MASK) >> ROUTE_SHIFT
        if bits & ROUTE_MASK and ROUTES >> route & 1:
            self.config = self.config & ~ROUTE_MASK | value & ROUTE_MASK
        bits &= _CONFIG_WRITABLE
        self.config = self.config & ~bits | value & bits
        if bits & SET_VALUE:
            self.settable = _MASK_64 if value & SET_VALUE else 0
        self.value &= self.mask
        self.period &= self.mask

    def write(self, value: int, bits: int) -> None:
        """Write those *bits* of the comparator register: the value, the period or both."""
        bits &= self.mask
        if self.periodic:
            direct = bits & self.settable
            if self.provisional and not direct:
                self.period = 0
            self.provisional = bool(direct)
            self.settable &= ~bits
            self.config &= ~SET_VALUE
        else:
            direct = bits
        self.value = self.value & ~direct | value & direct
        self.period = self.period & ~bits | value & bits


class Hpet:
    """``set_irq(line, level)`` drives an interrupt line (a GSI); ``clock_ns`` does not go backwards.

    ``replace_pit(on)`` tells that comparator 0 drives IRQ 0 from now on, or no more. ``rtc_irq`` is where the
    real-time clock's output goes: it reaches IRQ 8 unless comparator 1 drives that.
    """

    def __init__(
        self,
        set_irq: Callable[[int, int], object] | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        replace_pit: Callable[[bool], object] | None = None,
    ) -> None:
        self._set_irq = set_irq or (lambda line, level: None)
        self._clock_ns = clock_ns
        self._replace_pit = replace_pit
        self._lock = threading.RLock()
        self._config = 0
        self._status = 0
        self._offset = 0  # counter = clock + offset while it runs
        self._stopped_at = 0  # the counter's value while it stands
        self._comparators = [_Comparator() for _ in range(COMPARATORS)]
        self._asserted: frozenset[int] = frozenset()  # lines that level-triggered interrupts hold
        self._rtc_level = 0
        self._timer = Timer("hpet", clock_ns, self._expired)
        self._paced_ns = 0  # periodic interrupts wait until then

    # -- the bus's side

    def read(self, offset: int, size: int) -> int:
        """Read 4 or 8 bytes of a register."""
        shift = 8 * (offset & 7)
        mask = (1 << 8 * size) - 1
        if offset & ~7 == COUNTER and self._config & ENABLE:  # the one that guests read often
            return self._clock_ns() // PERIOD_NS + self._offset >> shift & mask
        with self._lock:
            self._advance()
            return self._read_register(offset & ~7) >> shift & mask

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 4 or 8 bytes of a register; other accesses are none (section 2.3.2)."""
        if size not in (4, 8) or offset % size:
            return
        shift = 8 * (offset & 7)
        with self._lock:
            self._advance()
            self._write_register(offset & ~7, value << shift, (1 << 8 * size) - 1 << shift)
            self._update_lines()
            self._arm()

    def rtc_irq(self, level: int) -> None:
        """Take the level of the real-time clock's interrupt output."""
        with self._lock:
            self._rtc_level = level
            if not self._replaces():
                self._set_irq(_RTC_LINE, level)

    def _read_register(self, register: int) -> int:
        if register == CAPABILITIES:
            return PERIOD_NS * _FS_PER_NS << 32 | BLOCK_ID
        if register == CONFIGURATION:
            return self._config
        if register == INTERRUPT_STATUS:
            return self._status
        if register == COUNTER:
            return self._count() & _MASK_64
        index, part = divmod(register - COMPARATOR_0, COMPARATOR_STRIDE)
        if 0 <= index < COMPARATORS:
            comparator = self._comparators[index]
            if part == COMPARATOR_CONFIG:
                return ROUTES << 32 | comparator.config
            if part == COMPARATOR_VALUE:
                return comparator.value
        return 0

    def _write_register(self, register: int, value: int, bits: int) -> None:
        """Write those *bits* of a register."""
        if register == CONFIGURATION:
            self._configure(self._config & ~bits | value & bits & (ENABLE | LEGACY))
        elif register == INTERRUPT_STATUS:
            self._status &= ~(value & bits)  # write one to clear
        elif register == COUNTER:
            self._set_count(self._count() & ~bits & _MASK_64 | value & bits)
        else:
            index, part = divmod(register - COMPARATOR_0, COMPARATOR_STRIDE)
            if not 0 <= index < COMPARATORS:
                return
            comparator = self._comparators[index]
            before = comparator.value, comparator.mask
            if part == COMPARATOR_CONFIG:
                comparator.configure(value, bits)
            elif part == COMPARATOR_VALUE:
                comparator.write(value, bits)
            if before != (comparator.value, comparator.mask):
                comparator.wait_from(self._count())

    # -- the counter

    def _count(self) -> int:
        """The counter, counted on beyond its 64 bits while it runs."""
        if not self._config & ENABLE:
            return self._stopped_at
        return self._clock_ns() // PERIOD_NS + self._offset

    def _set_count(self, value: int) -> None:
        self._stopped_at = value
        self._offset = value - self._clock_ns() // PERIOD_NS
        for comparator in self._comparators:
            comparator.wait_from(value)

    def _configure(self, value: int) -> None:
        """Write the general configuration; starting and stopping keep the counter's value."""
        count = self._count() & _MASK_64
        changed = self._config ^ value
        replaced = self._replaces()
        self._config = value
        if changed & ENABLE:
            self._set_count(count)
        if self._replaces() != replaced:
            if self._replace_pit is not None:
                self._replace_pit(not replaced)
            if self._rtc_level:
                self._set_irq(_RTC_LINE, int(replaced))

    # -- interrupts

    def _replaces(self) -> bool:
        """Whether the legacy replacement route is in force (section 2.3.5: both bits)."""
        return self._config & (ENABLE | LEGACY) == ENABLE | LEGACY

    def _line(self, index: int) -> int | None:
        """The line that comparator *index* drives, None for none."""
        if index in _LEGACY_LINES and self._replaces():
            return _LEGACY_LINES[index]
        pin = (self._comparators[index].config & ROUTE_MASK) >> ROUTE_SHIFT
        return _PIN_LINES.get(pin, pin) if ROUTES >> pin & 1 else None

    def _advance(self) -> None:
        """Carry out the matches up to now."""
        if not self._config & ENABLE:
            return
        count = self._count()
        for index, comparator in enumerate(self._comparators):
            if not comparator.pass_to(count):
                continue
            if comparator.config & LEVEL:
                self._status |= 1 << index
            elif comparator.config & INT_ENABLE:
                line = self._line(index)
                if line is not None and line not in self._asserted:
                    self._set_irq(line, 1)
                    self._set_irq(line, 0)
        self._update_lines()

    def _level(self, index: int) -> bool:
        """Whether comparator *index* holds its line."""
        level = LEVEL | INT_ENABLE
        config = self._comparators[index].config
        return bool(self._config & ENABLE and config & level == level and self._status >> index & 1)

    def _held_lines(self) -> frozenset[int]:
        lines = (self._line(index) for index in range(COMPARATORS) if self._level(index))
        return frozenset(line for line in lines if line is not None)

    def _update_lines(self) -> None:
        """Drive the lines of level-triggered interrupts."""
        asserted, self._asserted = self._asserted, self._held_lines()
        for line in asserted - self._asserted:
            self._set_irq(line, 0)
        for line in self._asserted - asserted:
            self._set_irq(line, 1)

    def _arm(self) -> None:
        """Set the timer to the first match that makes an interrupt."""
        deadlines = []
        if self._config & ENABLE:
            for index, comparator in enumerate(self._comparators):
                if comparator.config & INT_ENABLE and not self._level(index):
                    deadline_ns = (comparator.due - self._offset) * PERIOD_NS
                    deadlines.append(max(deadline_ns, self._paced_ns) if comparator.periodic else deadline_ns)
        self._timer.arm(min(deadlines, default=None))

    def _expired(self) -> None:
        with self._lock:
            self._advance()
            self._paced_ns = self._clock_ns() + MIN_PERIOD_NS
            self._arm()

    def reset(self) -> None:
        """Stop, and give the lines back (section 2.3.5: all enables are 0 after a reset)."""
        with self._lock:
            if self._replaces() and self._replace_pit is not None:
                self._replace_pit(False)
            for line in self._asserted:
                self._set_irq(line, 0)
            self._config = self._status = self._paced_ns = 0
            self._comparators = [_Comparator() for _ in range(COMPARATORS)]
            self._asserted = frozenset()
            self._set_count(0)
            self._arm()

    def drive_lines(self) -> None:
        """Drive the lines as the state says: the chips that they lead to don't know of it."""
        with self._lock:
            if not self._replaces():
                self._set_irq(_RTC_LINE, self._rtc_level)
            for line in self._asserted:
                self._set_irq(line, 1)

    def pause(self) -> None:
        """Let the timer rest."""
        self._timer.pause()

    def resume(self) -> None:
        """Let the timer go on; what came due meanwhile comes now."""
        self._timer.resume()

    def close(self) -> None:
        """End the timer thread, if there is one."""
        self._timer.close()

    # -- snapshots

    _SAVED: Final = ("config", "value", "period", "provisional", "settable")

    def save(self) -> dict[str, Any]:
        """The registers, and the level of the real-time clock's interrupt."""
        with self._lock:
            self._advance()
            return {
                "config": self._config,
                "status": self._status,
                "counter": self._count() & _MASK_64,
                "comparators": [[getattr(c, name) for name in self._SAVED] for c in self._comparators],
                "rtc_level": self._rtc_level,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the counter goes on from its saved value.

        No line is driven: the chips that they lead to, the PIT among them, have their own snapshots.
        """
        with self._lock:
            self._config = state["config"]
            self._status = state["status"]
            self._rtc_level = state["rtc_level"]
            for comparator, saved in zip(self._comparators, state["comparators"], strict=True):
                for name, value in zip(self._SAVED, saved, strict=True):
                    setattr(comparator, name, value)
            self._set_count(state["counter"])
            self._asserted = self._held_lines()
            self._arm()
