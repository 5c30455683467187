# SPDX-License-Identifier: Apache-2.0
"""The high precision event timer: a 64-bit counter at 100 MHz, three comparators.

Source: IA-PC HPET specification 1.0a, section 2.3 (registers). Interrupts are delivered by line; there is no FSB
(message) delivery. Legacy replacement (comparator 0 drives IRQ 0, comparator 1 IRQ 8) needs that the machine's other
timers are silent, as an operating system sees to.
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
_CONFIG_WRITABLE: Final = LEVEL | INT_ENABLE | PERIODIC | SET_VALUE | MODE_32 | ROUTE_MASK

REVISION: Final = 1
VENDOR: Final = 0x8086
LEGACY_CAPABLE: Final = 1 << 15
COUNTER_64: Final = 1 << 13
BLOCK_ID: Final = VENDOR << 16 | LEGACY_CAPABLE | COUNTER_64 | (COMPARATORS - 1) << 8 | REVISION
ROUTES: Final = 1 << 2 | 0xFF << 16  # the lines that a comparator may drive: 2 and 16 to 23

_MASK_64: Final = (1 << 64) - 1
_MASK_32: Final = (1 << 32) - 1
_LEGACY_LINES: Final = {0: 0, 1: 8}
_PIN_LINES: Final = {2: 0}  # the IOAPIC's pin 2 is IRQ 0's
_FS_PER_NS: Final = 1_000_000


class _Comparator:
    """One comparator: its configuration, the value it waits for, and the period that it adds to it."""

    __slots__ = ("config", "level", "period", "value")

    def __init__(self) -> None:
        self.config = PERIODIC_CAPABLE | SIZE_64
        self.value = _MASK_64
        self.period = 0
        self.level = 0

    @property
    def mask(self) -> int:
        return _MASK_32 if self.config & MODE_32 else _MASK_64


class Hpet:
    """``set_irq(line, level)`` drives an interrupt line (a GSI); ``clock_ns`` does not go backwards."""

    def __init__(
        self,
        set_irq: Callable[[int, int], object] | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._set_irq = set_irq
        self._clock_ns = clock_ns
        self._lock = threading.RLock()
        self._config = 0
        self._status = 0
        self._offset = 0  # counter = clock + offset while it runs
        self._stopped_at = 0  # the counter's value while it stands
        self._comparators = [_Comparator() for _ in range(COMPARATORS)]
        self._timer = Timer("hpet", clock_ns, self._expired)
        self._armed = False

    # -- the bus's side

    def read(self, offset: int, size: int) -> int:
        """Read 4 or 8 bytes of a register."""
        if offset == COUNTER and size == 8 and not self._armed and self._config & ENABLE:
            return self._clock_ns() // PERIOD_NS + self._offset & _MASK_64  # the one that guests read often
        with self._lock:
            value = self._read_register(offset & ~7)
        return value >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 4 or 8 bytes of a register."""
        shift = 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        with self._lock:
            register = offset & ~7
            whole = self._read_register(register) & ~mask & _MASK_64 | value << shift & mask
            self._write_register(register, whole)
            self._arm()

    def _read_register(self, register: int) -> int:
        if register == CAPABILITIES:
            return PERIOD_NS * _FS_PER_NS << 32 | BLOCK_ID
        if register == CONFIGURATION:
            return self._config
        if register == INTERRUPT_STATUS:
            return self._status
        if register == COUNTER:
            return self._counter()
        index, part = divmod(register - COMPARATOR_0, COMPARATOR_STRIDE)
        if 0 <= index < COMPARATORS:
            comparator = self._comparators[index]
            if part == COMPARATOR_CONFIG:
                return ROUTES << 32 | comparator.config
            if part == COMPARATOR_VALUE:
                return comparator.value
        return 0

    def _write_register(self, register: int, value: int) -> None:
        if register == CONFIGURATION:
            self._configure(value & (ENABLE | LEGACY))
        elif register == INTERRUPT_STATUS:
            self._status &= ~value  # write one to clear
            for index, comparator in enumerate(self._comparators):
                if comparator.level and not self._status >> index & 1:
                    self._drive(index, comparator, 0)
        elif register == COUNTER:
            if self._config & ENABLE:
                self._offset = value - self._clock_ns() // PERIOD_NS
            else:
                self._stopped_at = value
        else:
            index, part = divmod(register - COMPARATOR_0, COMPARATOR_STRIDE)
            if 0 <= index < COMPARATORS:
                self._write_comparator(self._comparators[index], part, value)

    def _write_comparator(self, comparator: _Comparator, part: int, value: int) -> None:
        if part == COMPARATOR_CONFIG:
            comparator.config = comparator.config & ~_CONFIG_WRITABLE | value & _CONFIG_WRITABLE
            comparator.value &= comparator.mask
        elif part == COMPARATOR_VALUE:
            value &= comparator.mask
            if not comparator.config & PERIODIC or comparator.config & SET_VALUE:
                comparator.value = value
            if comparator.config & PERIODIC and not comparator.config & SET_VALUE:
                comparator.period = value
            comparator.config &= ~SET_VALUE

    # -- time

    def _counter(self) -> int:
        if not self._config & ENABLE:
            return self._stopped_at
        return self._clock_ns() // PERIOD_NS + self._offset & _MASK_64

    def _configure(self, value: int) -> None:
        """Write the general configuration; starting and stopping keep the counter's value."""
        if (self._config ^ value) & ENABLE:
            if value & ENABLE:
                self._offset = self._stopped_at - self._clock_ns() // PERIOD_NS
            else:
                self._stopped_at = self._counter()
        self._config = value

    def _arm(self) -> None:
        """Set the timer to the first comparator that will match."""
        waits = [wait for comparator in self._comparators if (wait := self._ticks_left(comparator)) is not None]
        self._armed = bool(waits)
        self._timer.arm(self._clock_ns() + min(waits) * PERIOD_NS if waits else None)

    def _ticks_left(self, comparator: _Comparator) -> int | None:
        if not self._config & ENABLE or not comparator.config & INT_ENABLE:
            return None
        return (comparator.value - self._counter()) & comparator.mask

    def _expired(self) -> None:
        with self._lock:
            now = self._counter()
            for index, comparator in enumerate(self._comparators):
                if not self._config & ENABLE or not comparator.config & INT_ENABLE:
                    continue
                # passed within half of the counter's range: a match, not a long wait
                if (now - comparator.value) & comparator.mask <= comparator.mask >> 1:
                    self._match(index, comparator, now)
            self._arm()

    def _match(self, index: int, comparator: _Comparator, now: int) -> None:
        if comparator.config & PERIODIC and comparator.period:
            missed = (now - comparator.value & comparator.mask) // comparator.period
            comparator.value = comparator.value + (missed + 1) * comparator.period & comparator.mask
        if comparator.config & LEVEL:
            self._status |= 1 << index
            self._drive(index, comparator, 1)
        else:
            self._drive(index, comparator, 1)
            self._drive(index, comparator, 0)

    def _drive(self, index: int, comparator: _Comparator, level: int) -> None:
        comparator.level = level
        pin = (comparator.config & ROUTE_MASK) >> ROUTE_SHIFT
        if self._set_irq is None:
            return
        if self._config & LEGACY and index in _LEGACY_LINES:
            self._set_irq(_LEGACY_LINES[index], level)
        elif ROUTES >> pin & 1:
            self._set_irq(_PIN_LINES.get(pin, pin), level)

    def close(self) -> None:
        """End the timer thread, if there is one."""
        self._timer.close()

    def save(self) -> dict[str, Any]:
        """The registers."""
        with self._lock:
            return {
                "config": self._config,
                "status": self._status,
                "counter": self._counter(),
                "comparators": [(c.config, c.value, c.period, c.level) for c in self._comparators],
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the counter goes on from its saved value."""
        with self._lock:
            self._config = state["config"]
            self._status = state["status"]
            self._stopped_at = state["counter"]
            self._offset = self._stopped_at - self._clock_ns() // PERIOD_NS
            for comparator, saved in zip(self._comparators, state["comparators"], strict=True):
                comparator.config, comparator.value, comparator.period, comparator.level = saved
            self._arm()
