# SPDX-License-Identifier: Apache-2.0
"""Host memory that the machine's processors may reach, counted per user.

Several memory slots may name the same host addresses (KVM allows it, and clients alias ROMs and
double-mapped RAM that way), while :class:`softkvm._softcpu.Machine` knows each address once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm._softcpu import Machine


class HostRegions:
    """The machine's regions, each with the number of memory slots that touch it.

    The caller serialises calls (``slots_lock``).
    """

    __slots__ = ("_end", "_machine", "_starts", "_users")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._starts: list[int] = []
        self._end: dict[int, int] = {}
        self._users: dict[int, int] = {}

    def _touching(self, start: int, end: int) -> list[int]:
        """Return the starts of the regions that meet [start, end)."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        return [s for s in self._starts[first:last] if self._end[s] > start]

    def get(self, hva: int, size: int) -> None:
        """Make [hva, hva + size) reachable; raises what the machine refuses it with, and changes nothing then."""
        end = hva + size
        users = self._touching(hva, end)
        gaps = []
        cursor = hva
        for start in users:
            if cursor < start:
                gaps.append((cursor, start))
            cursor = self._end[start]
        if cursor < end:
            gaps.append((cursor, end))
        added = []
        try:
            for gap_start, gap_end in gaps:
                self._machine.add_region(gap_start, gap_end - gap_start)
                added.append(gap_start)
        except (ValueError, MemoryError):
            for start in added:
                self._machine.remove_region(start)
            raise
        for gap_start, gap_end in gaps:
            insort(self._starts, gap_start)
            self._end[gap_start] = gap_end
            self._users[gap_start] = 0
        for start in self._touching(hva, end):
            self._users[start] += 1

    def put(self, hva: int, size: int) -> None:
        """Undo one :meth:`get` of the same range; no nested leaf may name the range any more."""
        for start in self._touching(hva, hva + size):
            self._users[start] -= 1
            if not self._users[start]:
                self._machine.remove_region(start)
                del self._starts[bisect_left(self._starts, start)]
                del self._end[start], self._users[start]
