# SPDX-License-Identifier: Apache-2.0
"""Intel's 6300ESB watchdog timer: a PCI function that ends a machine whose guest no longer reloads it.

Two counters run one after the other. The end of the first is a warning, which goes to an interrupt that a PC's board
has no line for: only its status is there. The end of the second is the reset. The registers for the counters take one
write each behind an unlocking sequence.

Source: Intel 6300ESB I/O Controller Hub Datasheet (300641), chapter 16: configuration registers 60h and 68h, memory
registers 0 to Ch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from softkvm.vmm.devices.pci import Bar, Function
from softkvm.vmm.devices.timer import Timer

VENDOR: Final = 0x8086
DEVICE: Final = 0x25AB
CLASS_SYSTEM_OTHER: Final = 0x088000
MEMORY_SIZE: Final = 16

WDT_CONFIG: Final = 0x60  # configuration space, 16 bits
WDT_LOCK: Final = 0x68  # configuration space, 8 bits

PRELOAD_1: Final = 0x0
PRELOAD_2: Final = 0x4
INTERRUPT_STATUS: Final = 0x8
RELOAD: Final = 0xC

CONFIG_INTERRUPT: Final = 3
CONFIG_PRESCALER_1MHZ: Final = 1 << 2
CONFIG_OUTPUT_OFF: Final = 1 << 5
_CONFIG_MASK: Final = CONFIG_INTERRUPT | CONFIG_PRESCALER_1MHZ | CONFIG_OUTPUT_OFF
INTERRUPT_IRQ: Final = 0

LOCK: Final = 1 << 0
ENABLE: Final = 1 << 1
FREE_RUNNING: Final = 1 << 2

RELOAD_NOW: Final = 1 << 8
TIMED_OUT: Final = 1 << 9

_UNLOCK: Final = (0x80, 0x86)
_PRELOAD_MASK: Final = 0xFFFFF
_CLOCK_HZ: Final = 33_000_000  # PCI's
_SHIFT_1KHZ, _SHIFT_1MHZ = 15, 5
_LEAST_NS: Final = 1_000_000  # a guest that lets it run freely through nothing must not keep a processor of the host's


class I6300Esb(Function):
    """The watchdog. ``expired()`` is called on a thread of its own when the second counter has run out."""

    def __init__(
        self, expired: Callable[[], object], address: int, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(VENDOR, DEVICE, CLASS_SYSTEM_OTHER)
        self._expired = expired
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._timer = Timer("watchdog", clock_ns, self._ran_out)
        self._preload = [_PRELOAD_MASK, _PRELOAD_MASK]
        self._status = 0
        self._unlocked = 0  # steps of the sequence that were made
        self._timed_out = False
        self._config_register = 0
        self._lock_register = 0
        self._stage = 0
        self._deadline_ns: int | None = None
        self._paused_ns: int | None = None  # what the counter has left, while the machine is paused
        self.add_bar(0, Bar(MEMORY_SIZE, _Registers(self), False, "i6300esb"), address)

    @property
    def running(self) -> bool:
        """Whether it counts: it may yet do something."""
        return self._deadline_ns is not None or self._paused_ns is not None

    def reset(self) -> None:
        """Reset the machine: all but the status that says that it was this device's doing."""
        with self._lock:
            self._run(None)
            self._paused_ns = None
            self._preload = [_PRELOAD_MASK, _PRELOAD_MASK]
            self._status = self._unlocked = self._config_register = self._lock_register = 0

    # -- configuration space

    def read(self, register: int, size: int) -> int:
        """Read the configuration space."""
        data = bytearray(super().read(register, size).to_bytes(size, "little"))
        own = {WDT_CONFIG: self._config_register & 0xFF, WDT_LOCK: self._lock_register}
        for address, value in own.items():
            if register <= address < register + size:
                data[address - register] = value
        return int.from_bytes(data, "little")

    def write(self, register: int, size: int, value: int) -> None:
        """Write the configuration space."""
        super().write(register, size, value)
        with self._lock:
            if register <= WDT_CONFIG < register + size:
                self._config_register = value >> 8 * (WDT_CONFIG - register) & _CONFIG_MASK
            if register <= WDT_LOCK < register + size and not self._lock_register & LOCK:
                was = self._lock_register
                self._lock_register = value >> 8 * (WDT_LOCK - register) & (LOCK | ENABLE | FREE_RUNNING)
                if not self._lock_register & ENABLE:
                    self._run(None)
                elif not was & ENABLE:
                    self._run(0)

    # -- memory

    def read_register(self, offset: int, size: int) -> int:
        """Read *size* bytes of the memory range at *offset*."""
        with self._lock:
            data = bytearray(MEMORY_SIZE)
            for at, value in (
                (PRELOAD_1, self._preload[0]),
                (PRELOAD_2, self._preload[1]),
                (INTERRUPT_STATUS, self._status),
                (RELOAD, TIMED_OUT if self._timed_out else 0),
            ):
                data[at : at + 4] = value.to_bytes(4, "little")
        return int.from_bytes(data[offset : offset + size], "little")

    def write_register(self, offset: int, value: int) -> None:
        """Write a register of the memory range."""
        with self._lock:
            if offset == RELOAD and self._unlocked < len(_UNLOCK) and value == _UNLOCK[self._unlocked]:
                self._unlocked += 1
            elif offset == RELOAD and value == _UNLOCK[0]:
                self._unlocked = 1
            elif offset == INTERRUPT_STATUS:
                self._status &= ~value & 1
            else:
                unlocked, self._unlocked = self._unlocked == len(_UNLOCK), 0
                if unlocked:
                    self._write_unlocked(offset, value)

    def _write_unlocked(self, offset: int, value: int) -> None:
        if offset in (PRELOAD_1, PRELOAD_2):
            self._preload[offset // 4] = value & _PRELOAD_MASK
        elif offset == RELOAD:
            if value & TIMED_OUT:
                self._timed_out = False
            if value & RELOAD_NOW and self._lock_register & ENABLE:
                self._run(0)

    # -- counting

    def _run(self, stage: int | None) -> None:
        """Let a counter begin from its preload value, or none."""
        self._stage = stage or 0
        self._deadline_ns = None
        if stage is not None:
            shift = _SHIFT_1MHZ if self._config_register & CONFIG_PRESCALER_1MHZ else _SHIFT_1KHZ
            period_ns = (self._preload[stage] << shift) * 1_000_000_000 // _CLOCK_HZ
            self._deadline_ns = self._clock_ns() + max(period_ns, _LEAST_NS)
        self._timer.arm(self._deadline_ns)

    def _ran_out(self) -> None:
        with self._lock:
            if self._deadline_ns is None or self._clock_ns() < self._deadline_ns:
                return  # it was reloaded at that very moment
            if self._stage == 0:
                if self._config_register & CONFIG_INTERRUPT == INTERRUPT_IRQ:
                    self._status |= 1
                self._run(1)
                return
            fires = not self._config_register & CONFIG_OUTPUT_OFF
            self._timed_out = self._timed_out or fires
            self._run(0 if self._lock_register & FREE_RUNNING else None)
        if fires:
            self._expired()

    def pause(self) -> None:
        """Stop counting: the guest, which stands, cannot reload."""
        with self._lock:
            if self._paused_ns is None and self._deadline_ns is not None:
                self._paused_ns = self._left_ns()
                self._deadline_ns = None
                self._timer.arm(None)

    def resume(self) -> None:
        """Count on."""
        with self._lock:
            if self._paused_ns is not None:
                self._deadline_ns = self._clock_ns() + self._paused_ns
                self._paused_ns = None
                self._timer.arm(self._deadline_ns)

    def _left_ns(self) -> int | None:
        if self._deadline_ns is None:
            return self._paused_ns
        return max(self._deadline_ns - self._clock_ns(), 0)

    def close(self) -> None:
        """End the timer's thread."""
        self._timer.close()

    def save(self) -> dict[str, Any]:
        """All registers, and the time that the counter has left."""
        with self._lock:
            return {
                **super().save(),
                "preload": list(self._preload),
                "status": self._status,
                "unlocked": self._unlocked,
                "timed_out": self._timed_out,
                "config_register": self._config_register,
                "lock_register": self._lock_register,
                "stage": self._stage,
                "left_ns": self._left_ns(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the counter goes on from there."""
        super().restore(state)
        with self._lock:
            self._preload = list(state["preload"])
            self._status = state["status"]
            self._unlocked = state["unlocked"]
            self._timed_out = self._timed_out or state["timed_out"]  # a reset brings back the state of the beginning
            self._config_register = state["config_register"]
            self._lock_register = state["lock_register"]
            self._stage = state["stage"]
            self._deadline_ns = None if state["left_ns"] is None else self._clock_ns() + state["left_ns"]
            self._timer.arm(self._deadline_ns)


class _Registers:
    """The memory range, on the bus."""

    def __init__(self, watchdog: I6300Esb) -> None:
        self._watchdog = watchdog

    def read(self, offset: int, size: int) -> int:
        return self._watchdog.read_register(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._watchdog.write_register(offset, value)
