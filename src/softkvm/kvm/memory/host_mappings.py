# SPDX-License-Identifier: Apache-2.0
"""Which host memory the process can reach: what get_user_pages() finds out for the kernel.

A memory slot may name addresses that are not mapped, or not yet; KVM_RUN fails with EFAULT when the guest
touches them. Leaves are made only for memory that is mapped at that moment.
"""

from __future__ import annotations

import fcntl
import os
import struct
from bisect import bisect_left, bisect_right
from enum import Enum, auto
from typing import Final, TypeAlias

from softkvm.kvm import procfs
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.memory.slow_memory import SlowMemory

NO_ACCESS: Final = 0
READ: Final = 1
READ_WRITE: Final = 2


#: Starts, ends and accesses of mappings, in order and apart.
_Map: TypeAlias = "tuple[list[int], list[int], list[int]]"
#: So many are kept; looked for again, they cost a system call each.
_MOST_KNOWN: Final = 512

# The mapping at an address, from /proc/PID/maps: linux/fs.h, since Linux 6.11.
_PROCMAP_QUERY: Final = 0xC068_6611
_QUERY: Final = struct.Struct("=3Q 3Q 56x")
_VMA_READABLE, _VMA_WRITABLE = 1, 2


class Backing(Enum):
    """What memory of the process is, as far as it can be given back."""

    #: None, or not writable.
    NONE = auto()
    #: The process's own, of no file: zeroes when it is new.
    ANONYMOUS = auto()
    #: A shared mapping: a memfd's, or a file's.
    SHARED = auto()
    #: A private mapping of a file, or several kinds.
    OTHER = auto()


class HostMappings:
    """The process's mappings, as far as they were asked for; the host is when an address is not among the known ones.

    Memory that is unmapped after the guest has touched it is noticed when the guest touches it again and nothing else
    has its place, or when ``Vm.host_unmapped`` is told: there are no MMU notifiers. That is why a slot holds its
    memory's owner, if it is told who that is.
    """

    __slots__ = ("_map", "awaited", "slow")

    def __init__(self) -> None:
        #: Memory of which pages may be long in coming, and which is mapped page by page for that; None: there is none.
        self.slow: SlowMemory | None = None
        #: That, and memory with a userfaultfd: KVM's own accesses wait without the interpreter's lock.
        self.awaited: SlowMemory | None = None
        self.forget()

    def forget(self) -> None:
        """Look again at the next question; called when memory slots change."""
        #: One object, as vCPUs look into it without a lock.
        self._map: _Map = ([], [], [])

    def access(self, hva: int, size: int, wanted: int = READ_WRITE) -> int:
        """Tell what the process may do with all of [hva, hva + size): NO_ACCESS, READ or READ_WRITE.

        What is known is believed if it gives ``wanted``: NO_ACCESS asks for that alone. NO_ACCESS, too, for more than a
        page of slow memory that isn't all there.
        """
        if self.slow is not None and size > PAGE_SIZE and not self.slow.is_there(hva, size):
            return NO_ACCESS  # page by page, where there is one
        found = _lookup(self._map, hva, hva + size)
        if found < wanted:
            found = self._look(hva, hva + size)
        return found

    def _look(self, start: int, end: int) -> int:
        """Ask the host for the mappings of [start, end), up to one without access. More than are kept are none."""
        maps = procfs.open_own("maps")
        try:
            known, at, found = self._map, start, READ_WRITE
            for _ in range(_MOST_KNOWN):
                mapping = _query(maps, at)
                if mapping is None:
                    return NO_ACCESS
                self._map = known = _with_mapping(known, mapping)
                found = min(found, mapping[2])
                at = mapping[1]
                if at >= end or found == NO_ACCESS:
                    return found
            return NO_ACCESS
        except OSError:
            # An older host (ENOTTY), or a sandbox that does not let the request through (EPERM, ENOSYS).
            self._map = _read_mappings()
            return _lookup(self._map, start, end)
        finally:
            os.close(maps)

    def backing(self, hva: int, size: int) -> Backing:
        """Tell what all of [hva, hva + size) is, as of now."""
        kinds = set()
        for line in procfs.read_own("maps").splitlines():
            span, permissions, _, _, inode = line.split(None, 5)[:5]
            first, last = (int(part, 16) for part in span.split(b"-"))
            if last <= hva:
                continue
            if first > hva or permissions[1:2] != b"w":
                return Backing.NONE
            if permissions[3:4] == b"s":
                kinds.add(Backing.SHARED)
            else:
                kinds.add(Backing.ANONYMOUS if inode == b"0" else Backing.OTHER)
            size -= last - hva
            hva = last
            if size <= 0:
                return kinds.pop() if len(kinds) == 1 else Backing.OTHER
        return Backing.NONE


def _query(maps: int, address: int) -> tuple[int, int, int] | None:
    """Return start, end and access of the mapping that has an address; OSError where the host tells of none."""
    query = bytearray(_QUERY.pack(_QUERY.size, 0, address, 0, 0, 0))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except FileNotFoundError:
        return None
    _, _, _, start, end, flags = _QUERY.unpack(query)
    return start, end, NO_ACCESS if not flags & _VMA_READABLE else 1 + bool(flags & _VMA_WRITABLE)


def _with_mapping(known: _Map, mapping: tuple[int, int, int]) -> _Map:
    """Return what is known and one mapping; what it meets was true before it came."""
    starts, ends, accesses = known if len(known[0]) < _MOST_KNOWN else ([], [], [])
    start, end, access = mapping
    first, last = bisect_right(ends, start), bisect_left(starts, end)
    return (
        [*starts[:first], start, *starts[last:]],
        [*ends[:first], end, *ends[last:]],
        [*accesses[:first], access, *accesses[last:]],
    )


def _lookup(mappings: _Map, start: int, end: int) -> int:
    """Return the least access that the mappings give to a byte of [start, end)."""
    starts, ends, accesses = mappings
    index = bisect_right(starts, start) - 1
    access = READ_WRITE
    while index >= 0:
        if ends[index] <= start:
            break
        access = min(access, accesses[index])
        start = ends[index]
        if start >= end:
            return access
        index += 1
        if index == len(starts) or starts[index] != start:
            break
    return NO_ACCESS


def _read_mappings() -> _Map:
    """Read the process's mappings."""
    starts, ends, accesses = [], [], []
    for line in procfs.read_own("maps").splitlines():
        span, permissions = line.split(b" ", 2)[:2]
        first, last = span.split(b"-")
        starts.append(int(first, 16))
        ends.append(int(last, 16))
        accesses.append(NO_ACCESS if permissions[:1] != b"r" else 1 + (permissions[1:2] == b"w"))
    return starts, ends, accesses
