# SPDX-License-Identifier: Apache-2.0
"""Which pages of a machine's memory have changed, whoever wrote them.

The guest's writes and KVM's are in KVM's dirty log (KVM_GET_DIRTY_LOG; with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 a page
is watched again only when it has been taken, by KVM_CLEAR_DIRTY_LOG), devices' in what they have told the memory of
(:meth:`softkvm.vmm.memory.GuestMemory.mark_written`). All of them are offsets into the memory here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from softkvm import abi, api
from softkvm.vmm.errors import StateError
from softkvm.vmm.host_memory import merged
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

Ranges = list[tuple[int, int]]
"""(offset, size) of whole pages, in order and apart from each other."""

_CLEAR_PAGES: Final = 1 << 18
"""Pages that one request watches again: KVM holds its lock for so long."""

_BYTES: Final = re.compile(rb"\xff+|[^\0\xff]")


def _runs(byte: int) -> list[tuple[int, int]]:
    """Return (first bit, count) of the runs of ones in *byte*."""
    runs: list[tuple[int, int]] = []
    for bit in range(8):
        if not byte >> bit & 1:
            continue
        if runs and sum(runs[-1]) == bit:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((bit, 1))
    return runs


_RUNS: Final = [_runs(byte) for byte in range(256)]


def bitmap_ranges(bitmap: bytes, offset: int) -> Ranges:
    """Return the ranges of memory whose pages *bitmap* names, LSB first; its bit 0 is the page at *offset*."""
    found: list[tuple[int, int]] = []
    for match in _BYTES.finditer(bitmap):
        start, length = match.start(), match.end() - match.start()
        byte = bitmap[start]
        if byte == 0xFF:
            found.append((offset + start * 8 * PAGE_SIZE, length * 8 * PAGE_SIZE))
        else:
            found += [(offset + (start * 8 + bit) * PAGE_SIZE, count * PAGE_SIZE) for bit, count in _RUNS[byte]]
    return merged(found)


def whole_pages(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return *ranges* widened to whole pages."""
    return merged(
        (start & -PAGE_SIZE, (start + size + PAGE_SIZE - 1 & -PAGE_SIZE) - (start & -PAGE_SIZE))
        for start, size in ranges
        if size
    )


def total(ranges: Ranges) -> int:
    """Return how many bytes *ranges* have."""
    return sum(size for _, size in ranges)


class DirtyPages:
    """The changes of *memory*, which *vm* has, from :meth:`start` on."""

    def __init__(self, vm: api.Vm, memory: GuestMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._manual = False
        self.active = False

    def start(self) -> None:
        """Watch; OSError as KVM says, StateError if somebody does. What is written from the call on is found."""
        if self._memory.logging:
            raise StateError("memory is being watched already: for a snapshot, a migration or free pages")
        offered = self._vm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        self._manual = bool(offered & abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        if self._manual:
            self._vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        self._memory.take_written()
        self._memory.logging = True
        try:
            self._memory.set_flags(self._vm, abi.KVM_MEM_LOG_DIRTY_PAGES)
        except OSError:
            self.stop()
            raise
        self.active = True

    def take(self) -> Ranges:
        """Return the pages that have changed since the last call, or the start; they are watched again before that."""
        found: Ranges = []
        for slot, size, offset in self._memory.slots():
            bitmap = self._vm.get_dirty_log(slot)
            if not any(bitmap):
                continue
            if self._manual:
                self._watch_again(slot, size // PAGE_SIZE, bitmap)
            found += bitmap_ranges(bitmap, offset)
        return whole_pages(found + self._memory.take_written())

    def _watch_again(self, slot: int, pages: int, bitmap: bytes) -> None:
        for first in range(0, pages, _CLEAR_PAGES):
            count = min(_CLEAR_PAGES, pages - first)
            part = bitmap[first // 8 : abi.dirty_bitmap_bytes(first + count)]
            if any(part):
                self._vm.clear_dirty_log(slot, first, count, part)

    def stop(self) -> None:
        """Watch no more: KVM gives the guest its large pages back (KVM clears KVM_MEM_LOG_DIRTY_PAGES)."""
        self.active = False
        self._memory.logging = False
        self._memory.set_flags(self._vm, 0)
        self._memory.take_written()
