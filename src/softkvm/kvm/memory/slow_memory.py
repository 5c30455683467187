# SPDX-License-Identifier: Apache-2.0
"""Memory whose pages may take long to come when they are touched: what get_user_pages() waits for in the kernel.

That is memory with a userfaultfd (post-copy migration, snapshots that are loaded on demand), or files on something
slow. The silicon touches memory as any code of the process does, so its thread would sleep within the guest, deaf to
kicks. Ranges that are known to be slow are therefore mapped page by page, when a page is there; a vCPU that touches
another one waits outside of its guest, or does something else meanwhile (:mod:`.async_pf`).

Memory with a userfaultfd is found by itself when a guest asks for asynchronous page faults; any other a VMM names
(``vm.set_slow_memory``). Where there is none, nothing of this is looked at.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from typing import Final

from softkvm.kvm import procfs
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p)
#: What the link of a userfaultfd's descriptor says, and /proc/PID/smaps of memory that has one for missing pages.
_USERFAULTFD: Final = "anon_inode:[userfaultfd]"
_MISSING: Final = b"um"


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


def is_resident(hva: int, size: int) -> bool:
    """Tell whether all pages of a range are in memory; those that are not mapped aren't."""
    pages = ctypes.create_string_buffer(size >> PAGE_SHIFT)
    if _libc.mincore(hva, size, pages):
        return False
    return all(page & 1 for page in pages.raw)


def with_userfaultfd() -> list[tuple[int, int]]:
    """Return the process's memory that has a userfaultfd for missing pages, [start, end) each."""
    if not any(_is_userfaultfd(fd) for fd in os.listdir("/proc/self/fd")):
        return []
    found, span = [], (0, 0)
    for line in procfs.read_own("smaps").splitlines():
        name, _, rest = line.partition(b" ")
        if name == b"VmFlags:":
            if _MISSING in rest.split():
                found.append(span)
        elif not name.endswith(b":"):
            first, last = name.split(b"-")
            span = int(first, 16), int(last, 16)
    return found


def _is_userfaultfd(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _USERFAULTFD
    except OSError:  # it was the listing's own
        return False


def page_of(hva: int) -> int:
    """Return the address of the page that a byte is in."""
    return hva & -PAGE_SIZE
