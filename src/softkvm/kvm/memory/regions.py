# SPDX-License-Identifier: Apache-2.0
"""Host memory that the machine's processors may reach, with its users.

Several memory slots may name the same host addresses (KVM allows it, and clients alias ROMs and
double-mapped RAM that way), while :class:`softkvm._softcpu.Machine` knows each address once.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm._softcpu import Machine


class HostRegions:
    """The machine's regions, each with the numbers of the memory slots that touch it.

    The caller serialises changes (``slots_lock``).
    """

    __slots__ = ("_end", "_lock", "_machine", "_starts", "_users")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._starts: list[int] = []
        self._end: dict[int, int] = {}
        self._users: dict[int, set[int]] = {}
        #: What is known is changed under it, and read by those that are not serialised.
        self._lock = threading.Lock()

    def _touching(self, start: int, end: int) -> list[int]:
        """Return the starts of the regions that meet [start, end)."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        return [s for s in self._starts[first:last] if self._end[s] > start]

    def get(self, hva: int, size: int, user: int) -> None:
        """Make [hva, hva + size) reachable for a slot; raises what the machine refuses, and changes nothing then."""
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
        with self._lock:
            for gap_start, gap_end in gaps:
                insort(self._starts, gap_start)
                self._end[gap_start] = gap_end
                self._users[gap_start] = set()
            for start in self._touching(hva, end):
                self._users[start].add(user)

    def put(self, hva: int, size: int, user: int) -> None:
        """Undo the :meth:`get` of a slot; no nested leaf may name its range any more."""
        with self._lock:
            unused = []
            for start in self._touching(hva, hva + size):
                self._users[start].discard(user)
                if not self._users[start]:
                    unused.append(start)
                    del self._starts[bisect_left(self._starts, start)]
                    del self._end[start], self._users[start]
        for start in unused:
            self._machine.remove_region(start)

    def users(self, start: int, end: int) -> set[int]:
        """Return the numbers of the slots that may have a byte of [start, end); any thread may ask."""
        if not self._machine.has_region(start, end - start):
            return set()
        with self._lock:
            return set().union(*(self._users[region] for region in self._touching(start, end)))
