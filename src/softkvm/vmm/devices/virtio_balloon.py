# SPDX-License-Identifier: Apache-2.0
"""The balloon device: memory that a guest gives up, and memory that it does not use at the moment, go to the host.

Three ways lead there. The host asks the guest to *inflate* the balloon: the guest takes pages from itself, and has them
back when the balloon is smaller. By free page *reporting* the guest tells of free pages while it runs, some seconds
after they became free, and takes them back without asking. By free page *hinting* it tells of all of them at once, when
the host wants to know (:mod:`softkvm.vmm.devices.balloon_hints`).

What comes is given back at once, a buffer's pages in one batch (:meth:`GuestMemory.discard_ranges`), and only then is
the buffer the driver's again. It is not while memory is kept for an assigned device, or pinned; and not what was
reported or hinted by a guest that fills free pages with another value than zero (page poisoning), and looks for it.

Source: VIRTIO 1.3, section 5.5. Which queue is which when features are missing: 5.5.2 gives every queue a number of its
own; drivers of Linux before 6.11 count the queues that there are. A device knows by which queues are ready.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.balloon_hints import VIRTIO_BALLOON_F_FREE_PAGE_HINT, Hinting, whole_pages
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.host_memory import merged
from softkvm.vmm.memory import MIB, PAGE_SIZE
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import VIRTIO_ID_BALLOON, bit
from softkvm.vmm.virtio.queue import Chain, Queue, QueueError
from softkvm.vmm.virtio.worker import Timer

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

# feature bits (5.5.3)
VIRTIO_BALLOON_F_MUST_TELL_HOST: Final = 0
VIRTIO_BALLOON_F_STATS_VQ: Final = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM: Final = 2
VIRTIO_BALLOON_F_PAGE_POISON: Final = 4
VIRTIO_BALLOON_F_PAGE_REPORTING: Final = 5

# the queues, by their numbers (5.5.2)
INFLATE, DEFLATE, STATS, FREE_PAGES, REPORTING = range(5)
_QUEUE_SIZE: Final = 128  # Linux does without reporting where there are fewer than 32
_OPTIONAL_QUEUES: Final = {
    STATS: VIRTIO_BALLOON_F_STATS_VQ,
    FREE_PAGES: VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    REPORTING: VIRTIO_BALLOON_F_PAGE_REPORTING,
}

# the configuration (5.5.4)
_CONFIG: Final = struct.Struct("<4I")
_NUM_PAGES, _ACTUAL, _FREE_PAGE_HINT_CMD_ID, _POISON_VAL = 0, 4, 8, 12

_PFN_SHIFT: Final = 12
_PFNS: Final = Size(
    "page numbers in a balloon's buffer",
    1 << 16,
    QueueError,
    element=4,
    giver="guest",
    effect="NEEDS_RESET",
    where=__name__,
)
_STATISTIC: Final = struct.Struct("<HQ")
_STATISTICS: Final = Size(
    "statistics in a balloon's buffer",
    64,
    None,
    element=_STATISTIC.size,
    giver="guest",
    effect="the rest is ignored",
    where=__name__,
)

STATISTIC_NAMES: Final = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
)
"""What the tags of statistics mean, from 0 (5.5.6.3): bytes, or how often."""

MAX_STATS_SECONDS: Final = 86400


class Balloon(VirtioDevice):
    """The device. Its methods for the host's side may be called from any thread."""

    type = VIRTIO_ID_BALLOON
    name = "balloon"
    queue_sizes = (_QUEUE_SIZE,) * 5

    def __init__(
        self,
        *,
        reporting: bool = False,
        hinting: Hinting | None = None,
        deflate_on_oom: bool = False,
        stats_s: int = 0,
    ) -> None:
        super().__init__()
        self.features = bit(VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_PAGE_POISON)
        self.features |= bit(VIRTIO_BALLOON_F_DEFLATE_ON_OOM) if deflate_on_oom else 0
        self.features |= bit(VIRTIO_BALLOON_F_PAGE_REPORTING) if reporting else 0
        self.features |= bit(VIRTIO_BALLOON_F_FREE_PAGE_HINT) if hinting else 0
        self.stats_s = stats_s
        self.hinting = hinting
        if hinting is not None:
            hinting.balloon = self
        self.reclaimed = dict.fromkeys(("inflated", "reported", "hinted"), 0)
        """Bytes that the host has got so far, by the way they came."""
        self._target = 0
        self._actual = 0
        self._poison = 0
        self._roles: dict[int, int] = {}
        self._statistics: dict[str, int] = {}
        self._changed = threading.Condition()
        self._asked = 0  # for statistics
        self._answered = 0
        self._waiting: Chain | None = None  # the buffer that the driver gets back to fill it with new statistics
        self._timer: Timer | None = None

    # -- the host's side

    @property
    def target(self) -> int:
        """Bytes that the balloon is to have."""
        return self._target << _PFN_SHIFT

    @property
    def size(self) -> int:
        """Bytes that it has, as the guest says."""
        return self._actual << _PFN_SHIFT

    def set_target(self, size: int) -> None:
        """Ask the guest for a balloon of *size* bytes; ConfigError for more than its memory, or no whole page."""
        if size % PAGE_SIZE or not 0 <= size <= self.memory.size:
            raise ConfigError(
                f"balloon of {size} bytes: expected a multiple of {PAGE_SIZE} up to the guest's {self.memory.size}"
            )
        self._target = size >> _PFN_SHIFT
        self.config_changed()

    def statistics(self, timeout_s: float = 0) -> dict[str, int]:
        """Return what the guest said last of its memory, or says within *timeout_s* when it is asked now.

        Empty without a driver that does.
        """
        with self._changed:
            self._asked += 1
            asked = self._asked
        if timeout_s:
            self.call(self._poll)
        with self._changed:
            self._changed.wait_for(lambda: self._answered >= asked, timeout_s)
            return dict(self._statistics)

    # -- the driver's side

    def activate(self) -> None:
        """Find out which queue is which; begin to ask for statistics."""
        there = [queue for queue, feature in _OPTIONAL_QUEUES.items() if self.negotiated(feature)]
        wanted = [INFLATE, DEFLATE, *there]
        ready = [queue.index for queue in self.queues if queue.ready]
        counted = list(range(len(wanted)))
        self._roles = dict(zip(counted if ready == counted else wanted, wanted, strict=True))
        if not self.negotiated(VIRTIO_BALLOON_F_PAGE_POISON):
            self._poison = 0
        if self.stats_s and self._timer is None:
            self._timer = self.worker.call_later(self.stats_s, self._period)

    def reset(self) -> None:
        """The driver's pages are its own again, and what it said of itself is void."""
        self._actual = self._poison = 0
        self._waiting = None
        self._roles = {}
        self._statistics = {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.hinting is not None:
            self.hinting.reset()

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the configuration space."""
        command = self.hinting.command_id if self.hinting is not None else 0
        config = _CONFIG.pack(self._target, self._actual, command, self._poison)
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how large the balloon is, or what it fills free pages with."""
        config = bytearray(_CONFIG.pack(0, self._actual, 0, self._poison))
        config[offset : offset + len(data)] = data
        _, self._actual, _, self._poison = _CONFIG.unpack(config[: _CONFIG.size])

    def notified(self, index: int) -> None:
        """Take what the driver has put into a queue."""
        queue, role = self.queues[index], self._roles.get(index)
        if role == INFLATE:
            self._inflate(queue)
        elif role == DEFLATE:
            self._deflate(queue)
        elif role == STATS:
            self._take_statistics(queue)
        elif role == FREE_PAGES and self.hinting is not None:
            self.hinting.notified(queue)
        elif role == REPORTING:
            self._take_reports(queue)

    @property
    def poisoned(self) -> bool:
        """Whether the guest expects something in free pages that zeroes would break."""
        return self._poison != 0

    def _inflate(self, queue: Queue) -> None:
        for chain in queue.drain():
            size = _PFNS.bytes(chain.readable_size // 4)
            pages = memoryview(chain.read(size)).cast("I")
            ranges = merged((page << _PFN_SHIFT, PAGE_SIZE) for page in pages)
            self.reclaimed["inflated"] += self.memory.discard_ranges(self._of_ram(ranges))
            queue.push(chain, 0)

    def _deflate(self, queue: Queue) -> None:
        """The guest uses its pages again: they get memory when they are touched."""
        for chain in queue.drain():
            queue.push(chain, 0)

    def _take_reports(self, queue: Queue) -> None:
        for chain in queue.drain():
            if not self.poisoned:
                ranges = self._of_ram(whole_pages(chain))
                self.reclaimed["reported"] += self.memory.discard_ranges(ranges)
            queue.push(chain, 0)

    def _of_ram(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts of (start, size) that are RAM: a driver may name other pages, and nothing happens to them."""
        parts = []
        for start, size in ranges:
            for ram in self.memory.ranges:
                first, last = max(start, ram.start), min(start + size, ram.end)
                if first < last:
                    parts.append((first, last - first))
        return parts

    # -- statistics

    def _take_statistics(self, queue: Queue) -> None:
        for chain in queue.drain():
            count = _STATISTICS.cut(chain.readable_size // _STATISTIC.size)
            found = {
                STATISTIC_NAMES[tag]: value
                for tag, value in _STATISTIC.iter_unpack(chain.read(count * _STATISTIC.size))
                if tag < len(STATISTIC_NAMES) and value != (1 << 64) - 1  # what the driver does not know
            }
            if self._waiting is not None:  # there is to be one; the older is of no use any more
                queue.push(self._waiting, 0)
            self._waiting = chain
            with self._changed:
                self._statistics = found
                self._answered = self._asked
                self._changed.notify_all()

    def _poll(self) -> None:
        """Give the driver its buffer back: it fills it anew."""
        chain, self._waiting = self._waiting, None
        for index, role in self._roles.items():
            queue = self.queues[index]
            if role == STATS and chain is not None and queue.ready:  # or the driver has taken the queue away
                queue.push(chain, 0)
                queue.flush()

    def _period(self) -> None:
        self._timer = self.worker.call_later(self.stats_s, self._period)
        with self._changed:
            self._asked += 1
        self._poll()

    # -- state

    def save(self) -> dict[str, Any]:
        """The sizes, what the driver said, and the buffer for statistics."""
        return {
            "target": self._target,
            "actual": self._actual,
            "poison": self._poison,
            "statistics": dict(self._statistics),
            "waiting": None if self._waiting is None else self._waiting.save(),
            "last_command_id": None if self.hinting is None else self.hinting.last_id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._target, self._actual, self._poison = state["target"], state["actual"], state["poison"]
        self._statistics = dict(state["statistics"])
        if state["waiting"] is not None:
            self._waiting = self.queues[STATS].chain(state["waiting"])
        if self.hinting is not None:
            self.hinting.last_id = state["last_command_id"]  # who asked has gone with the machine


@dataclass(frozen=True, slots=True)
class BalloonSpec:
    """``--balloon``: the bytes that the guest is to give up at first, and what else is offered to it."""

    size: int = 0
    reporting: bool = False
    hinting: bool = False
    deflate_on_oom: bool = False
    stats_s: int = 0
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> Balloon:
        """Make the device; ConfigError if it is to be larger than the guest's memory."""
        device = Balloon(
            reporting=self.reporting,
            hinting=Hinting(machine) if self.hinting else None,
            deflate_on_oom=self.deflate_on_oom,
            stats_s=self.stats_s,
        )
        self.placement.add(machine, device)
        if self.size > machine.memory.size:
            raise ConfigError(
                f"--balloon: {self.size // MIB} MiB are more than the guest's {machine.memory.size // MIB} MiB"
            )
        device.set_target(self.size)
        return device


_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(\d{1,12})(?:([KMGT])(?:i?B)?)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that ``64M``, ``1G`` or ``64`` (MiB) name; ValueError if that is no size of whole pages."""
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * _UNITS[(match[2] or "M").upper()] if match else 1
    if size % PAGE_SIZE:
        raise ValueError(f"{text}: expected a size such as 64M or 1G, a multiple of 4K")
    return size


def parse(text: str) -> BalloonSpec:
    """Read ``--balloon``'s text: ``[SIZE][,reporting][,hinting][,stats=SECONDS][,deflate-on-oom]``."""
    words = Words.of("--balloon", text, first=False)
    sizes = [word for word in words.flags if word[:1].isdigit()]
    if len(sizes) > 1:
        raise words.error("one size is enough")
    for word in sizes:
        words.flags.remove(word)
    try:
        size = parse_size(sizes[0]) if sizes else 0
    except ValueError as error:
        raise words.error(str(error)) from None
    spec = BalloonSpec(
        size=size,
        reporting=words.flag("reporting"),
        hinting=words.flag("hinting"),
        deflate_on_oom=words.flag("deflate-on-oom"),
        stats_s=words.number("stats", 1, MAX_STATS_SECONDS, 0),
        placement=words.placement(),
    )
    words.end()
    return spec
