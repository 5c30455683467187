# SPDX-License-Identifier: Apache-2.0
"""Memory whose pages may take long to come when they are touched: what get_user_pages() waits for in the kernel.

That is memory with a userfaultfd (post-copy migration, snapshots that are loaded on demand), or files on something
slow. The silicon touches memory as any code of the process does, so its thread sleeps within the guest. At a
userfaultfd's page it is roused by a kick that ends KVM_RUN, and by whoever waits for the processor: the VM's end, a
change of slots, the dirty log (``cpu/src/mem/lost/sleepers.rs``). But the guest could do something else meanwhile, if
it has asked for that (:mod:`.async_pf`), and nobody rouses who waits for a file. Ranges that are known to be slow are
therefore mapped page by page, when a page is there; a vCPU that touches another one waits outside of its guest. That
has its price: an exit, a thread that waits, and another exit, for each page.

Memory with a userfaultfd is found by itself when a guest asks for asynchronous page faults; any other a VMM names
(``vm.set_slow_memory``). KVM itself does not touch a missing page with the interpreter's lock, which who provides it
may need: for that, memory with a userfaultfd is found when a slot is set and at each vCPU's first KVM_RUN
(``vm.find_awaited_memory``). Where there is none, nothing of this is looked at.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import Final

from softkvm.kvm import procfs
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE

#: What the link of a userfaultfd's descriptor says, and /proc/PID/smaps of memory that has one for pages that are
#: missing, or in the file and not mapped.
_USERFAULTFD: Final = "anon_inode:[userfaultfd]"
_MISSING_OR_MINOR: Final = frozenset((b"um", b"ui"))
#: Bytes of an entry of /proc/PID/pagemap, and its bit for a page that is mapped, from its last byte.
_ENTRY_BYTES: Final = 8
_PRESENT: Final = 1 << 7


class SlowMemory:
    """Ranges of the process's memory, and whether their pages are there. Replaced, never changed."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        self._starts = [start for start, _ in joined]
        self._ends = [end for _, end in joined]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges, [start, end) each, in order and apart."""
        return list(zip(self._starts, self._ends, strict=True))

    def with_range(self, start: int, end: int) -> SlowMemory:
        """Return these and one more."""
        return SlowMemory([*self.ranges, (start, end)])

    def without_range(self, start: int, end: int) -> SlowMemory:
        """Return these but for what is in one."""
        kept = [(low, min(high, start)) for low, high in self.ranges if low < start]
        return SlowMemory(kept + [(max(low, end), high) for low, high in self.ranges if high > end])

    def has(self, hva: int, size: int) -> bool:
        """Tell whether a byte of [hva, hva + size) may be slow to come."""
        index = bisect_right(self._starts, hva + size - 1) - 1
        return index >= 0 and self._ends[index] > hva

    def is_there(self, hva: int, size: int) -> bool:
        """Tell whether touching [hva, hva + size), whole pages, takes no longer than usual."""
        return not self.has(hva, size) or is_resident(hva, size)


def with_range(known: SlowMemory | None, start: int, end: int) -> SlowMemory:
    """Return what is known and one range more."""
    return (known or SlowMemory([])).with_range(start, end)


def without_range(known: SlowMemory | None, start: int, end: int) -> SlowMemory | None:
    """Return what is known but for what is in a range; None if that was all."""
    left = (known or SlowMemory([])).without_range(start, end)
    return left if left.ranges else None


def is_resident(hva: int, size: int) -> bool:
    """Tell whether all pages of a range, whole ones, are mapped: touching them waits for nobody.

    A page that is only in its file is not: with a userfaultfd for such (minor faults) it waits for who maps it.
    """
    fd = procfs.open_own("pagemap")
    try:
        entries = os.pread(fd, (size >> PAGE_SHIFT) * _ENTRY_BYTES, (hva >> PAGE_SHIFT) * _ENTRY_BYTES)
    finally:
        os.close(fd)
    states = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES]
    return len(states) == size >> PAGE_SHIFT and all(state & _PRESENT for state in states)


def with_userfaultfd() -> list[tuple[int, int]]:
    """Return the process's memory with a userfaultfd for pages that are missing or not mapped, [start, end) each."""
    if not _has_userfaultfd():
        return []
    found, span = [], (0, 0)
    for line in procfs.read_own("smaps").splitlines():
        name, _, rest = line.partition(b" ")
        if name == b"VmFlags:":
            if not _MISSING_OR_MINOR.isdisjoint(rest.split()):
                found.append(span)
        elif not name.endswith(b":"):
            first, last = name.split(b"-")
            span = int(first, 16), int(last, 16)
    return found


def _has_userfaultfd() -> bool:
    directory = procfs.open_own("fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return any(_is_userfaultfd(name, directory) for name in os.listdir(directory))
    finally:
        os.close(directory)


def _is_userfaultfd(name: str, directory: int) -> bool:
    try:
        return os.readlink(name, dir_fd=directory) == _USERFAULTFD
    except OSError:  # closed meanwhile
        return False


def page_of(hva: int) -> int:
    """Return the address of the page that a byte is in."""
    return hva & -PAGE_SIZE
