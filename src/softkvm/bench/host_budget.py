# SPDX-License-Identifier: Apache-2.0
"""The memory that guests take of the host, and a limit for it: the host's own, or one that is only accounted.

A control group (version 1 or 2) limits what a process has in memory; what is more goes to the host's swap or, where
there is none, the process is killed. Who may make none, or wants to see what swap would do where the host has none, has
the accounting: :class:`SwapModel`. It takes what each guest has of the host, which is measured, and does with it what a
host does: whatever is more than the budget goes to swap, of the guest first that has not run for longest; a guest that
runs again takes its pages from there first, as a host does not know that nobody needs them. What is modelled is only
how long that takes: bytes at a given speed. Nothing is really written.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_HEADER: Final = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_RSS: Final = b"Rss:"


def resident(ranges: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Return how many bytes the host holds of each list of address ranges (start, end) of this process.

    Pages that are mapped and hold nothing but the host's zeroes are not counted (/proc/PID/smaps, Rss).
    """
    held = [0] * len(ranges)
    places = sorted((start, end, index) for index, its in enumerate(ranges) for start, end in its)
    owner: int | None = None
    for line in Path("/proc/self/smaps").read_bytes().splitlines():
        if owner is not None and line.startswith(_RSS):
            held[owner] += int(line.split()[1]) << 10
            owner = None
            continue
        header = _HEADER.match(line)
        if header:
            first, last = int(header[1], 16), int(header[2], 16)
            owner = next((index for start, end, index in places if first < end and start < last), None)
    return held


@dataclass(slots=True)
class SwapModel:
    """A host of *budget* bytes with *swap* bytes behind them, and what its guests have of either."""

    budget: int
    swap: int
    swapped: list[int] = field(default_factory=list)
    """Of each guest."""
    out: int = 0
    """Bytes that went to swap so far."""
    back: int = 0
    """Bytes that came from there."""
    full: bool = False
    """Whether there has been more than the host and its swap have: it would have killed a guest."""
    _order: list[int] = field(default_factory=list)  # guests, the one first that has not run for longest

    def begin(self, guest: int, touches: int) -> None:
        """*guest* runs now, and is to touch so many bytes: those of its pages that are out come back."""
        while len(self.swapped) <= guest:
            self.swapped.append(0)
            self._order.append(len(self._order))
        self._order.remove(guest)
        self._order.append(guest)
        needed = min(self.swapped[guest], touches)
        self.swapped[guest] -= needed
        self.back += needed

    def look(self, resident: Sequence[int]) -> int:
        """Take what each guest has of the host; return what of it is in memory when the host has made room."""
        for guest, held in enumerate(resident):
            if guest < len(self.swapped):  # what was given back is gone from swap, too
                self.swapped[guest] = min(self.swapped[guest], held)
        total = sum(resident) - sum(self.swapped)
        for guest in self._order:
            excess = total - self.budget
            if excess <= 0:
                break
            evicted = min(excess, resident[guest] - self.swapped[guest])
            self.swapped[guest] += evicted
            self.out += evicted
            total -= evicted
        self.full = self.full or sum(self.swapped) > self.swap or total > self.budget
        return total


# -- control groups


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A control group of our own, made and removed by :func:`control_group`."""

    directory: Path
    limit_file: str
    usage_file: str

    def enter(self) -> None:
        """Put this process into it."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))

    def usage(self) -> int:
        """Return how much memory its processes have, in bytes."""
        return int((self.directory / self.usage_file).read_text())

    def limit(self, size: int) -> None:
        """Let its processes have no more than *size* bytes of memory, and what is more go to the host's swap."""
        (self.directory / self.limit_file).write_text(str(size))


@contextlib.contextmanager
def control_group() -> Iterator[Cgroup | None]:
    """Make a control group that limits memory; None where this process may not."""
    made = _make()
    try:
        yield made
    finally:
        if made is not None:
            with contextlib.suppress(OSError):  # a process is in it yet
                made.directory.rmdir()


def _make() -> Cgroup | None:
    name = f"softkvm-{os.getpid()}"
    for root, relative, kind in _hierarchies():
        limit, usage = ("memory.max", "memory.current") if kind == 2 else _V1_FILES
        for parent in (root / relative.lstrip("/"), root):
            directory = parent / name
            try:
                directory.mkdir()
            except OSError:
                continue
            if os.access(directory / limit, os.W_OK):
                return Cgroup(directory, limit, usage)
            directory.rmdir()  # the controller is not passed on to it
    return None


_V1_FILES: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _hierarchies() -> Iterator[tuple[Path, str, int]]:
    """Yield mount point, this process's group and version of each hierarchy that may have memory's controller."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2":
            yield from ((Path(place), path, 2) for number, _, path in own if number == "0")
        elif kind == "cgroup" and "memory" in options.split(","):
            yield from ((Path(place), path, 1) for _, names, path in own if "memory" in names.split(","))


def swap_size() -> int:
    """Return how many bytes of swap the host has."""
    match = re.search(r"^SwapTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0
