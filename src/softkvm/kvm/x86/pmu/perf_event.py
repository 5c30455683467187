# SPDX-License-Identifier: Apache-2.0
"""Events of the processor that KVM counts in a guest, as the kernel's perf has them.

The silicon has sixteen counters, whose registers are in the register block (the crate's ``x86/pmu``): while a guest
runs they count what it does, and only that. An event takes one of them. Nothing has to be done when the guest is
entered or left: counts are in the block, and an overflow is an NMI.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from softkvm._softcpu import REGISTER_OFFSETS as _AT

#: Counters of the silicon.
COUNTERS: Final = 16
#: Bits of a counter.
WIDTH: Final = 48
_TOP: Final = 1 << WIDTH
_MASK: Final = _TOP - 1

PMC_ENABLE_Q: Final = _AT["pmc_enable"] // 8
PMC_STATUS_Q: Final = _AT["pmc_status"] // 8
_SELECT_Q: Final = _AT["pmc_select"] // 8
_COUNT_Q: Final = _AT["pmc_count"] // 8


class HostCounters:
    """The counters of one processor; ``rq`` are the quadwords of its register block."""

    __slots__ = ("events", "rq")

    def __init__(self, rq: memoryview) -> None:
        self.rq = rq
        self.events: list[PerfEvent | None] = [None] * COUNTERS

    def take_overflows(self) -> None:
        """Tell the events of overflows that there have been (the handler of the NMI)."""
        status = self.rq[PMC_STATUS_Q]
        self.rq[PMC_STATUS_Q] = 0
        while status:
            low = status & -status
            status ^= low
            event = self.events[low.bit_length() - 1]
            if event is not None:
                event.overflow()


class PerfEvent:
    """An event that is counted, until :meth:`release`; ENOSPC if the counters are all in use.

    ``select`` is what the counter's PERF_CTL holds (APM vol. 2, 13.2.1): with its Int bit, the guest is left at each
    overflow and ``overflow`` called at once, else when somebody asks for overflows. It is one when ``period`` events
    have been counted since :meth:`enable`, or :meth:`set_period`, and then each 2**48.
    """

    __slots__ = ("_bit", "_counters", "_slot", "_start", "overflow")

    def __init__(self, counters: HostCounters, overflow: Callable[[], None]) -> None:
        try:
            self._slot = counters.events.index(None)
        except ValueError:
            raise OSError(errno.ENOSPC, f"all {COUNTERS} counters are in use") from None
        counters.events[self._slot] = self
        self._counters = counters
        self._bit = 1 << self._slot
        self._start = 0
        self.overflow = overflow

    def enable(self, select: int, period: int) -> None:
        """Count from now on."""
        rq = self._counters.rq
        rq[_SELECT_Q + self._slot] = select
        self.set_period(period)
        rq[PMC_ENABLE_Q] |= self._bit

    def set_period(self, period: int) -> None:
        """Have the next overflow behind ``period`` events; :meth:`read` counts from here."""
        self._start = _TOP - period
        self._counters.rq[_COUNT_Q + self._slot] = self._start & _MASK

    def read(self) -> int:
        """Return how many there have been."""
        return self._counters.rq[_COUNT_Q + self._slot] - self._start & _MASK

    def pause(self) -> int:
        """Stop counting; returns how many there have been. Overflows that nobody has been told of are told of now."""
        rq = self._counters.rq
        rq[PMC_ENABLE_Q] &= ~self._bit
        count = self.read()
        self.check_overflow()
        return count

    def check_overflow(self) -> None:
        """Tell of an overflow that was no NMI."""
        rq = self._counters.rq
        if rq[PMC_STATUS_Q] & self._bit:
            rq[PMC_STATUS_Q] &= ~self._bit
            self.overflow()

    def add(self) -> None:
        """Count one that KVM has made happen in the guest's place."""
        rq = self._counters.rq
        count = rq[_COUNT_Q + self._slot] + 1
        rq[_COUNT_Q + self._slot] = count & _MASK
        if count > _MASK:
            self.overflow()

    def release(self) -> None:
        """Give the counter back."""
        self._counters.rq[PMC_ENABLE_Q] &= ~self._bit
        self._counters.rq[PMC_STATUS_Q] &= ~self._bit
        self._counters.events[self._slot] = None
