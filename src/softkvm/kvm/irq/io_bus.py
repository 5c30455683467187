# SPDX-License-Identifier: Apache-2.0
"""Buses of in-kernel devices: port I/O, MMIO and fast MMIO (``struct kvm_io_bus`` of the kernel).

The device's methods get the access's address, so one object may sit at several places. The kernel's limit of their
number (NR_IOBUS_DEVS) leaves out ioeventfds: what userspace has many of beside these are zones of coalesced writes.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from typing import Final, Protocol

from softkvm.abi.sizes import Size

#: Look-ups remembered per bus; addresses come from the guest, so the memo is bounded.
_MEMO_ENTRIES: Final = 4096

#: The most ranges of a bus that count.
NR_IOBUS_DEVS: Final = 1000
BUS_RANGES: Final = Size("ranges of devices on a bus", NR_IOBUS_DEVS, errno.ENOSPC, where=__name__)


class IoDevice(Protocol):
    """What sits on a bus. Methods may be called by any vCPU thread."""

    def io_read(self, address: int, size: int) -> int | None:
        """Return the value read, or None if the access isn't this device's after all."""

    def io_write(self, address: int, size: int, value: int) -> bool:
        """Take the write; False if it isn't this device's after all."""


class _Table:
    """One immutable state of a bus, with a memo of look-ups."""

    __slots__ = ("memo", "ranges", "starts")

    def __init__(self, ranges: list[tuple[int, int, IoDevice, bool]]) -> None:
        self.ranges = ranges
        self.starts = [r[0] for r in ranges]
        self.memo: dict[int, tuple[IoDevice, ...]] = {}

    def devices(self, address: int, size: int) -> tuple[IoDevice, ...]:
        """Return the devices whose range holds the whole access."""
        key = address << 8 | size
        found = self.memo.get(key)
        if found is None:
            found = tuple(
                device
                for start, end, device, _ in self.ranges[: bisect_right(self.starts, address)]
                if start <= address and address + size <= end
            )
            if len(self.memo) < _MEMO_ENTRIES:
                self.memo[key] = found
        return found


class IoBus:
    """Address ranges and the devices behind them; a look-up takes no lock."""

    __slots__ = ("_lock", "table")

    def __init__(self) -> None:
        #: The current state; hot paths look into its memo themselves.
        self.table = _Table([])
        self._lock = threading.Lock()

    def add(self, start: int, length: int, device: IoDevice, *, counts: bool = True) -> None:
        """Register ``device`` for [start, start + length); ENOSPC for one too many of those that count."""
        with self._lock:
            ranges = self.table.ranges
            if counts:
                BUS_RANGES.check(sum(r[3] for r in ranges) + 1, called="ranges on a bus")
            self.table = _Table(sorted([*ranges, (start, start + length, device, counts)], key=lambda r: r[0]))

    def remove(self, device: IoDevice, start: int | None = None) -> None:
        """Unregister ``device`` everywhere, or only the range that begins at ``start``."""
        with self._lock:
            self.table = _Table(
                [r for r in self.table.ranges if r[2] is not device or (start is not None and r[0] != start)]
            )

    def devices(self, address: int, size: int) -> tuple[IoDevice, ...]:
        """Return the devices whose range holds the whole access."""
        return self.table.devices(address, size)

    def read(self, address: int, size: int) -> int | None:
        """Return what a device read at ``address``, None if no device answers."""
        for device in self.table.devices(address, size):
            value = device.io_read(address, size)
            if value is not None:
                return value
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Write to the first device that takes it; False if none does."""
        for device in self.table.devices(address, size):  # noqa: SIM110 - the quick form
            if device.io_write(address, size, value):
                return True
        return False
