# SPDX-License-Identifier: Apache-2.0
"""Packed virtqueues (VIRTIO 1.3, section 2.8): one ring, in which either side overwrites what the other has done.

A descriptor is available, or used, by its two flags and the wrap counter of whoever looks at it. Of a batch of used
descriptors the first one's flags are written last: the driver sees all or none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from softkvm.vmm.virtio.ids import (
    QUEUE_SIZE_MAX,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
    VIRTQ_DESC_F_AVAIL,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
)
from softkvm.vmm.virtio.queue import DESCRIPTOR, Chain, Descriptor, Queue, QueueError, barrier, gather

if TYPE_CHECKING:
    from softkvm.vmm.memory import GuestMemory

PACKED_DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, id, flags
_FLAGS_W: Final = 7  # of a descriptor's 16-bit words
_WORDS: Final = 8
_BOTH: Final = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED


class PackedQueue(Queue):
    """A packed virtqueue: ring, the driver's event suppression and the device's at these guest physical addresses."""

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        addresses: tuple[int, int, int],
        *,
        event_idx: bool,
        indirect: bool,
        interrupt: Callable[[], None],
    ) -> None:
        super().__init__(memory, index, size, event_idx=event_idx, indirect=indirect, interrupt=interrupt)
        if not 0 < size <= QUEUE_SIZE_MAX:
            raise QueueError(f"queue {index}: its size {size} is not from 1 to {QUEUE_SIZE_MAX}")
        ring, driver, device = addresses
        for name, address, alignment in (
            ("ring", ring, 16),
            ("driver's events", driver, 4),
            ("device's events", device, 4),
        ):
            if address % alignment:
                raise QueueError(f"queue {index}: {name} at {address:#x}, no multiple of {alignment}")
        try:
            self._ring = memory.slice(ring, DESCRIPTOR * size)
            self._driver = memory.slice(driver, 4).cast("I")
            self._device = memory.slice(device, 4).cast("I")
        except IndexError as error:
            raise QueueError(f"queue {index}: a ring at {error}") from None
        self._words = self._ring.cast("H")
        self._ring_address = ring
        self._device_address = device
        self._next, self._wrap = 0, 1
        self._used, self._used_wrap = 0, 1
        self._held: tuple[int, int] | None = None  # the first used descriptor that isn't shown, and its flags
        self._untold = 0  # descriptors pushed since the last flush

    def pop(self) -> Chain | None:
        """Take the next available buffer."""
        at, wrap, size = self._next, self._wrap, self.size
        if not self.available():
            return None
        found: list[Descriptor] = []
        count = 0
        while True:
            address, length, identifier, flags = PACKED_DESCRIPTOR.unpack_from(self._ring, at * DESCRIPTOR)
            count += 1
            at += 1
            if at == size:
                at, wrap = 0, wrap ^ 1
            if flags & VIRTQ_DESC_F_INDIRECT:
                if flags & VIRTQ_DESC_F_NEXT:
                    raise QueueError(f"queue {self.index}: an indirect descriptor that goes on")
                found += self._indirect_table(address, length)
                break
            found.append((address, length, flags))
            if not flags & VIRTQ_DESC_F_NEXT:
                break
            if count == size:
                raise QueueError(f"queue {self.index}: a chain of more descriptors than the queue has")
        chain = gather(self, identifier, found, count)
        self._next, self._wrap = at, wrap
        return chain

    def _indirect_table(self, address: int, length: int) -> list[Descriptor]:
        """Return the descriptors of an indirect table, which are in a row (2.8.8)."""
        table = self.indirect_table(address, length)
        found = [(at, size, flags) for at, size, _, flags in PACKED_DESCRIPTOR.iter_unpack(table)]
        if any(flags & VIRTQ_DESC_F_INDIRECT for _, _, flags in found):
            raise QueueError(f"queue {self.index}: an indirect descriptor in an indirect table")
        return found

    def unpop(self, chain: Chain) -> None:
        """Put back what was popped last."""
        self._next -= chain.count
        if self._next < 0:
            self._next, self._wrap = self._next + self.size, self._wrap ^ 1

    def push(self, chain: Chain, written: int | None = None) -> None:
        """Write a used descriptor; the batch's first isn't one until :meth:`flush`."""
        if written is None:
            written = chain.written
        at = self._used
        flags = (VIRTQ_DESC_F_WRITE if written else 0) | (_BOTH if self._used_wrap else 0)
        struct.pack_into("<IH", self._ring, at * DESCRIPTOR + 8, written, chain.head)
        if self._held is None:
            self._held = at, flags
        else:
            self._words[at * _WORDS + _FLAGS_W] = flags
        self._untold += chain.count
        self._used = at + chain.count
        if self._used >= self.size:
            self._used, self._used_wrap = self._used - self.size, self._used_wrap ^ 1
        if self.memory.logging:
            self.mark(chain, written)
            self.memory.mark_written(self._ring_address + at * DESCRIPTOR, DESCRIPTOR)

    def show(self) -> None:
        """Make the batch's first descriptor a used one."""
        if self._held is None:
            return
        at, flags = self._held
        self._held = None
        self._words[at * _WORDS + _FLAGS_W] = flags
        if self.memory.logging:
            self.memory.mark_written(self._ring_address + at * DESCRIPTOR, DESCRIPTOR)

    def flush(self) -> None:
        """Show the batch; interrupt if the driver's event suppression lets us (2.8.10)."""
        if not self._untold:
            return
        self.show()
        count, self._untold = self._untold, 0
        barrier()
        events = self._driver[0]
        kind = events >> 16 & 3
        if kind == RING_EVENT_FLAGS_DESC and self.event_idx:
            event = events & 0x7FFF
            if events >> 15 & 1 != self._used_wrap:
                event -= self.size
            wanted = (self._used - event - 1 & 0xFFFF) < count
        else:
            wanted = kind != RING_EVENT_FLAGS_DISABLE
        if wanted:
            self._interrupt()

    def available(self) -> bool:
        """Look at the next descriptor's flags."""
        flags = self._words[self._next * _WORDS + _FLAGS_W]
        return flags & _BOTH == (VIRTQ_DESC_F_AVAIL if self._wrap else VIRTQ_DESC_F_USED)

    def disable_notifications(self) -> None:
        """Write the device's event suppression."""
        self._set_events(RING_EVENT_FLAGS_DISABLE << 16)

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next buffer, or of any."""
        if self.event_idx:
            self._set_events(RING_EVENT_FLAGS_DESC << 16 | self._wrap << 15 | self._next)
        else:
            self._set_events(RING_EVENT_FLAGS_ENABLE << 16)
        barrier()
        return self.available()

    def _set_events(self, value: int) -> None:
        self._device[0] = value
        if self.memory.logging:
            self.memory.mark_written(self._device_address, 4)

    def save(self) -> dict[str, Any]:
        """Both places, with their wrap counters."""
        self.flush()
        return {"next": self._next, "wrap": self._wrap, "used": self._used, "used_wrap": self._used_wrap}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over both places."""
        self._next, self._wrap = state["next"] % self.size, state["wrap"] & 1
        self._used, self._used_wrap = state["used"] % self.size, state["used_wrap"] & 1
