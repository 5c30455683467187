# SPDX-License-Identifier: Apache-2.0
"""Free page hinting: the host asks a guest which of its pages are free, and takes those that are so still.

The device sets a command ID; the driver allocates all the memory that is free, block by block, names the blocks, and
lets go of them when the device says that it is done (VIRTIO 1.3, 5.5.6.5). A guest that needs memory meanwhile takes
blocks back without telling. So a block is given back only in a moment when the machine stands, and if one of two things
is true of it then: nobody has written to it since the command began, for which memory is logged as a migration does it;
or it holds nothing but zeroes, as with a guest that clears what it allocates (Linux's init_on_alloc), whose allocation
is the write. In either case nobody can tell the difference: a driver expects nothing of a hinted page's contents. With
page poisoning it would, and then no command is given.

The array of blocks is bounded; what a guest names beyond that it keeps.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from softkvm.abi.sizes import Size
from softkvm.vmm.errors import StateError
from softkvm.vmm.host_memory import is_zero, merged
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory
from softkvm.vmm.snapshot.dirty import DirtyPages
from softkvm.vmm.virtio.ids import VIRTQ_DESC_F_WRITE
from softkvm.vmm.virtio.queue import Chain, Queue

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine


class HintedBalloon(Protocol):
    """The device, as far as hinting needs it."""

    reclaimed: dict[str, int]

    @property
    def poisoned(self) -> bool:
        """Whether the guest fills free pages with something."""

    def negotiated(self, feature: int) -> bool:
        """Whether the driver has taken a feature."""

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the device's worker."""

    def config_changed(self) -> None:
        """Tell the driver of new fields."""


VIRTIO_BALLOON_F_FREE_PAGE_HINT: Final = 3

CMD_ID_STOP: Final = 0
CMD_ID_DONE: Final = 1
CMD_ID_MIN: Final = 2
_CMD_IDS: Final = (1 << 32) - CMD_ID_MIN

BLOCKS: Final = Size(
    "blocks of free pages that a guest names at once",
    1 << 16,
    None,
    element=16,
    giver="guest",
    effect="the guest keeps the rest",
    where=__name__,
)
_BATCH: Final = 16  # blocks for which the machine is stopped once more: a guest's clearing them takes memory
PATIENCE_S: Final = 30.0
"""How long a driver may take to name its free pages."""


class Hinting:
    """What the host asks of *machine*'s guest; ``balloon`` is the device that asks."""

    balloon: HintedBalloon

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.command_id = CMD_ID_DONE
        """What the configuration space shows."""
        self.last_id = CMD_ID_MIN - 1
        """Of the command that was given last: the next has another."""
        self._named_id = CMD_ID_STOP  # whose blocks the driver is naming
        self._blocks: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._active = False
        self._complete = False  # the driver has named all
        self._gone = False  # it has been reset since

    def reclaim(self, timeout_s: float = PATIENCE_S) -> int:
        """Ask the guest for its free pages, give them to the host, return how many bytes it has taken.

        From any thread but the machine's own. StateError if it cannot be: no driver that hints, memory that is kept or
        poisoned, a log that somebody else has begun, a driver that does not answer in time.
        """
        with self._changed:
            if self._active:
                raise StateError("free pages are being asked for already")
            self._active = True
            self._complete = self._gone = False
        try:
            log = self._begin()
            try:
                self.balloon.call(self._command)
                return self._take_all(log, timeout_s)
            finally:
                log.stop()
                self.balloon.call(self._done)
        finally:
            self._active = False

    def _begin(self) -> DirtyPages:
        """Look whether it can be, and log memory from now on."""
        balloon, memory = self.balloon, self._machine.memory
        if not balloon.negotiated(VIRTIO_BALLOON_F_FREE_PAGE_HINT):
            raise StateError("the guest has no driver that tells of free pages (free page hinting)")
        if memory.kept_for:
            raise StateError(f"free pages stay the guest's: {memory.kept_for}")
        if memory.fd >= 0:
            raise StateError("free pages stay the guest's: other processes have its memory, and write without a log")
        if balloon.poisoned:
            raise StateError("free pages stay the guest's: it looks at what it fills them with (page poisoning)")
        log = DirtyPages(self._machine.vm, memory)
        log.start()
        return log

    def _command(self) -> None:
        """Give the command: on the worker."""
        self._blocks = []
        self.last_id = self.command_id = CMD_ID_MIN + (self.last_id + 1 - CMD_ID_MIN) % _CMD_IDS
        self.balloon.config_changed()

    def _done(self) -> None:
        """Let the driver have its pages: on the worker."""
        self.command_id = CMD_ID_DONE
        self._named_id = CMD_ID_STOP
        self._blocks = []
        self.balloon.config_changed()

    def _take_all(self, log: DirtyPages, timeout_s: float) -> int:
        """Give back what the driver names, until it has named all."""
        deadline = time.monotonic() + timeout_s
        given, complete = 0, False
        written: list[tuple[int, int]] = []
        while not complete:
            with self._changed:
                if not self._changed.wait_for(self._worth_a_stop, deadline - time.monotonic()):
                    raise StateError(f"the guest's driver has not named its free pages within {timeout_s:g} s")
            with self._machine.pausing.still():
                if self._gone:
                    raise StateError("the guest's driver has been reset")
                complete = self._complete
                blocks, self._blocks = self._blocks, []
                written = merged([*written, *log.take()])
                given += self._take(blocks, written)
        self.balloon.reclaimed["hinted"] += given
        return given

    def _worth_a_stop(self) -> bool:
        return self._complete or self._gone or len(self._blocks) >= _BATCH

    def _take(self, blocks: list[tuple[int, int]], written: list[tuple[int, int]]) -> int:
        """Give back what may be; *written* are offsets into the memory."""
        memory = self._machine.memory
        free = unwritten(blocks, _addresses(memory, written))
        rest = set(blocks).difference(free)
        free += [block for block in rest if is_zero(memory.address_of(*block), block[1])]
        return memory.discard_ranges(free)

    # -- the driver's side, on the worker

    def notified(self, queue: Queue) -> None:
        """Take command IDs and blocks of free pages."""
        for chain in queue.drain():
            if chain.readable_size:
                self._take_id(chain)
            elif self._named_id == self.command_id and BLOCKS.allows(len(self._blocks) + 1):
                self._blocks += (block for block in whole_pages(chain) if self._is_ram(block))
            queue.push(chain, 0)
        if len(self._blocks) >= _BATCH:
            with self._changed:
                self._changed.notify_all()

    def _is_ram(self, block: tuple[int, int]) -> bool:
        start, size = block
        return any(ram.start <= start and start + size <= ram.end for ram in self._machine.memory.ranges)

    def _take_id(self, chain: Chain) -> None:
        named, self._named_id = self._named_id, int.from_bytes(chain.read(4), "little")
        if self._named_id == CMD_ID_STOP and named == self.command_id:
            with self._changed:
                self._complete = True
                self._changed.notify_all()

    def reset(self) -> None:
        """The driver's pages are its own again."""
        self.command_id, self._named_id = CMD_ID_DONE, CMD_ID_STOP
        self._blocks = []
        with self._changed:
            self._gone = True
            self._changed.notify_all()


def _addresses(memory: GuestMemory, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where in guest physical memory ranges of *memory* by their offsets are."""
    found = []
    for start, size in offsets:
        for ram in memory.ranges:
            first = max(start, ram.offset)
            last = min(start + size, ram.offset + ram.end - ram.start)
            if first < last:
                found.append((first - ram.offset + ram.start, last - first))
    return found


def unwritten(blocks: list[tuple[int, int]], written: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return those of *blocks* of which nothing is *written*: (start, size), the latter in order and apart."""
    starts = [start for start, _ in written]
    free = []
    for start, size in blocks:
        index = bisect_left(starts, start + size) - 1  # the last that begins before the block's end
        if index < 0 or sum(written[index]) <= start:
            free.append((start, size))
    return free


def whole_pages(chain: Chain) -> list[tuple[int, int]]:
    """Return the whole pages (start, size) in the device-writable segments of *chain*."""
    pages = []
    for address, length, flags in chain.descriptors:
        start, end = -(-address // PAGE_SIZE) * PAGE_SIZE, (address + length) // PAGE_SIZE * PAGE_SIZE
        if flags & VIRTQ_DESC_F_WRITE and start < end:
            pages.append((start, end - start))
    return pages
