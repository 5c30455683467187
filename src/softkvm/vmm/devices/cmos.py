# SPDX-License-Identifier: Apache-2.0
"""The MC146818 real-time clock and the CMOS memory of a PC, at ports 0x70 and 0x71.

Source: Motorola MC146818A data sheet (registers A to D, alarm, periodic and update-ended interrupts, update cycle); the
memory-size bytes are the PC AT's and the ones that firmware for virtual machines agreed on.

The time is in the registers: the guest may write them in any order, and they change by the clock's update cycle alone,
once a second while register B's SET is 0 and register A's divider runs. A second passes when the host's wall clock says
so. Update cycles are carried out when the guest looks, and take no time. Interrupt flags are computed from the time
that passed, so nothing runs while no interrupt is enabled.

Not of the data sheet, which asks for new time bytes then: a change of the data mode while the clock runs rewrites the
time bytes in the new mode, as in QEMU.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.rtc_calendar import (
    TIME_REGISTERS,
    Format,
    add_seconds,
    reformat,
    seconds_to_alarm,
    set_utc,
)
from softkvm.vmm.devices.timer import Timer

CMOS_PORT: Final = 0x70
RTC_IRQ: Final = 8
MEMORY_SIZE: Final = 128

REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(10, 14)
SHUTDOWN_STATUS: Final = 0x0F
EQUIPMENT: Final = 0x14
BASE_MEMORY: Final = 0x15
EXTENDED_MEMORY: Final = 0x17
EXTENDED_MEMORY_2: Final = 0x30
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
B_SQWE: Final = 0x08
B_BINARY: Final = 0x04
B_24H: Final = 0x02

C_IRQF: Final = 0x80
C_PF: Final = 0x40
C_AF: Final = 0x20
C_UF: Final = 0x10

D_VALID: Final = 0x80  # the battery is good

_NS: Final = 1_000_000_000
_HALF_SECOND_NS: Final = 500_000_000
_CRYSTAL_HZ: Final = 32_768
_UIP_NS: Final = 244_000  # the update starts this long after UIP rises (data sheet, table 6)
_CLOCKED: Final = frozenset((*TIME_REGISTERS, REGISTER_A, REGISTER_C))  # bytes that change by themselves


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
        self._memory[REGISTER_D] = D_VALID
        self._set_memory_sizes(ram_below_4g, ram_above_4g)
        self._phase_ns = 0  # a moment when the divider passed zero: update cycles are whole seconds away from it
        self._seen_ns = clock_ns()  # registers and flags are those of this moment
        self._irq_level = 0
        set_utc(self._memory, self._seen_ns // _NS, self._format)

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
            if index in _CLOCKED:
                self._advance()
            value = self._memory[index]
            if index == REGISTER_A and self._updating():
                value |= A_UIP
            if index == REGISTER_C:
                self._memory[REGISTER_C] = 0
                self._update_irq()
                self._arm()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a byte, or write the selected one."""
        value &= 0xFF
        if not offset & 1:
            self._index = value & 0x7F  # bit 7 masks NMIs on a PC; nothing here raises one
            return
        with self._lock:
            self._advance()
            index = self._index
            if index == REGISTER_A:
                self._write_register_a(value)
            elif index == REGISTER_B:
                self._write_register_b(value)
            elif index not in (REGISTER_C, REGISTER_D):
                self._memory[index] = value
            self._update_irq()
            self._arm()

    def reset(self) -> None:
        """Enable no interrupt and forget those that wait; the battery keeps the rest (data sheet, "RESET")."""
        with self._lock:
            self._advance()
            self._memory[REGISTER_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            self._memory[REGISTER_C] = 0
            self._index = REGISTER_D
            self._update_irq()
            self._arm()

    def pause(self) -> None:
        """Let the timer rest."""
        self._timer.pause()

    def resume(self) -> None:
        """Let the timer go on; what came due meanwhile comes now."""
        self._timer.resume()

    def close(self) -> None:
        """End the timer thread, if there is one."""
        self._timer.close()

    # -- time

    @property
    def _format(self) -> Format:
        return _format(self._memory[REGISTER_B])

    def _dividing(self) -> bool:
        """Whether the divider runs: with the PC's crystal at this one setting."""
        return self._memory[REGISTER_A] & A_DIVIDER == A_DIVIDER_32KHZ

    def _running(self) -> bool:
        """Whether there are update cycles."""
        return self._dividing() and not self._memory[REGISTER_B] & B_SET

    def _updating(self) -> bool:
        return self._running() and (self._seen_ns - self._phase_ns) % _NS >= _NS - _UIP_NS

    def _write_register_a(self, value: int) -> None:
        divided = self._dividing()
        self._memory[REGISTER_A] = value & ~A_UIP
        if self._dividing() and not divided:
            # the first update cycle is half a second after the divider's release (data sheet, "Divider control")
            self._phase_ns = self._seen_ns - _HALF_SECOND_NS

    def _write_register_b(self, value: int) -> None:
        old = self._memory[REGISTER_B]
        if value & B_SET:
            value &= ~B_UIE  # SET clears the update-ended interrupt enable
        elif not old & B_SET and _format(old) != _format(value):
            reformat(self._memory, _format(old), _format(value))
        self._memory[REGISTER_B] = value

    # -- interrupts

    def _period(self) -> int:
        """The periodic interrupt's period in cycles of the crystal, 0 for none (data sheet, table 5)."""
        rate = self._memory[REGISTER_A] & A_RATE
        if rate == 0:
            return 0
        return 1 << (rate + 6 if rate <= 2 else rate - 1)

    def _seconds(self, at_ns: int) -> int:
        """Seconds of the divider at a moment of the host's clock."""
        return (at_ns - self._phase_ns) // _NS

    def _cycles(self, at_ns: int) -> int:
        """Cycles of the crystal at a moment of the host's clock."""
        return (at_ns - self._phase_ns) * _CRYSTAL_HZ // _NS

    def _advance(self) -> None:
        """Carry out the update cycles since the last look, and raise the flags of everything that happened."""
        seen_ns, now_ns = self._seen_ns, self._clock_ns()
        self._seen_ns = now_ns
        if not self._dividing():
            return
        flags = 0
        period = self._period()
        if period and self._cycles(seen_ns) // period < self._cycles(now_ns) // period:
            flags |= C_PF
        passed = self._seconds(now_ns) - self._seconds(seen_ns)
        if passed and self._running():
            if passed > 0:
                flags |= C_UF
                alarm = seconds_to_alarm(self._memory, self._format)
                if alarm is not None and alarm <= passed:
                    flags |= C_AF
            add_seconds(self._memory, passed, self._format)  # backwards if the host's clock was set back
        self._memory[REGISTER_C] |= flags
        self._update_irq()

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

    @property
    def irq_level(self) -> int:
        """How the device drives its interrupt line."""
        return self._irq_level

    def _arm(self) -> None:
        """Set the timer to the next moment at which an enabled interrupt is due that is not pending yet."""
        waiting = self._memory[REGISTER_B] & ~self._memory[REGISTER_C]
        now_ns = self._seen_ns
        due: list[int] = []
        period = self._period()
        if waiting & B_PIE and period and self._dividing():
            cycles = (self._cycles(now_ns) // period + 1) * period
            due.append(self._phase_ns - (-cycles * _NS // _CRYSTAL_HZ))
        if self._running() and waiting & (B_UIE | B_AIE):
            alarm = seconds_to_alarm(self._memory, self._format) if waiting & B_AIE else None
            updates = 1 if waiting & B_UIE else alarm
            if updates is not None:
                due.append(self._phase_ns + (self._seconds(now_ns) + updates) * _NS)
        self._timer.arm(min(due) if due else None)

    def _timer_expired(self) -> None:
        with self._lock:
            self._advance()
            self._arm()

    # -- snapshots

    def save(self) -> dict[str, Any]:
        """Registers, memory, and where the divider is on the host's clock."""
        with self._lock:
            self._advance()
            return {
                "index": self._index,
                "memory": bytes(self._memory),
                "phase_ns": self._phase_ns,
                "seen_ns": self._seen_ns,
                "irq_level": self._irq_level,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the clock, which has a battery, went on meanwhile."""
        with self._lock:
            self._index = state["index"]
            self._memory = bytearray(state["memory"])
            self._phase_ns = state["phase_ns"]
            self._seen_ns = state["seen_ns"]
            self._irq_level = state["irq_level"]
            self._advance()
            self._arm()


def _format(register_b: int) -> Format:
    return Format(binary=bool(register_b & B_BINARY), hours_24=bool(register_b & B_24H))
