# SPDX-License-Identifier: Apache-2.0
"""Wait queues: who is told of an event, in which order, and who may have it for himself (``kernel/sched/wait.c``).

| waiter | place | woken |
|---|---|---|
| priority | the head | first; takes the event, and nobody behind sees it, or lets it pass |
| ordinary | behind those | each time |
| exclusive | the tail | one at a time |
"""

from __future__ import annotations

import enum
import errno
import threading
from collections.abc import Callable
from typing import Final

from softkvm.kvm.errors import kvm_error


class Wait(enum.Flag):
    """How an entry waits (``WQ_FLAG_*``)."""

    ORDINARY = 0
    EXCLUSIVE = 1
    PRIORITY = 32


class WaitEntry:
    """A waiter: ``function`` is called with how much came, on the thread of who brings it; no lock is held.

    An exclusive waiter returns whether that has woken it, a priority one whether it has taken what came.
    """

    __slots__ = ("flags", "function")

    def __init__(self, function: Callable[[int], bool]) -> None:
        self.function = function
        self.flags = Wait.ORDINARY


class WaitQueue:
    """Waiters in the order that they are woken in (``struct wait_queue_head``)."""

    __slots__ = ("_entries", "_lock")

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        #: Replaced, never changed: whoever wakes takes no lock.
        self._entries: tuple[WaitEntry, ...] = ()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: WaitEntry) -> None:
        """Wait (``add_wait_queue``): behind those with priority, before all others."""
        with self._lock:
            entry.flags = Wait.ORDINARY
            self._insert(entry, self._with_priority())

    def add_exclusive(self, entry: WaitEntry) -> None:
        """Wait for one's turn (``add_wait_queue_exclusive``): at the tail."""
        with self._lock:
            entry.flags = Wait.EXCLUSIVE
            self._insert(entry, len(self._entries))

    def add_priority(self, entry: WaitEntry) -> None:
        """Wait before all others (``add_wait_queue_priority_exclusive``); EBUSY if somebody does already."""
        with self._lock:
            if self._with_priority():
                raise kvm_error(errno.EBUSY, "somebody waits with priority already")
            entry.flags = Wait.EXCLUSIVE | Wait.PRIORITY
            self._insert(entry, 0)

    def _with_priority(self) -> int:
        return sum(1 for entry in self._entries if entry.flags & Wait.PRIORITY)

    def _insert(self, entry: WaitEntry, at: int) -> None:
        self._entries = (*self._entries[:at], entry, *self._entries[at:])

    def remove(self, entry: WaitEntry) -> None:
        """Wait no more; a call that is under way may still come."""
        with self._lock:
            self._entries = tuple(other for other in self._entries if other is not entry)

    def clear(self) -> None:
        """Let nobody wait."""
        self._entries = ()

    def offer(self, count: int) -> bool:
        """Offer what comes to those with priority; whether one has taken it, and there is nothing to be woken for."""
        return any(entry.function(count) for entry in self._entries if entry.flags & Wait.PRIORITY)

    def wake_up(self, count: int, exclusive: int = 1) -> None:
        """Wake all others, ``exclusive`` of those that wait so; 0: all (``__wake_up``)."""
        for entry in self._entries:
            if entry.flags & Wait.PRIORITY:
                continue
            woken = entry.function(count)
            if woken and entry.flags & Wait.EXCLUSIVE:
                exclusive -= 1
                if not exclusive:
                    return
