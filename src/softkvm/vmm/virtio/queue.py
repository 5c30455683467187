# SPDX-License-Identifier: Apache-2.0
"""Virtqueues: what a device sees of them, whatever their format (VIRTIO 1.3, section 2.6).

A device takes buffers in batches::

    for chain in queue.drain():
        data = chain.read()
        chain.write(answer)
        queue.push(chain)

Segments of a :class:`Chain` are views of guest memory. A driver may change them at any time: what is looked at twice
is copied first. Indices are read and written in one access each. x86 keeps the order of loads and of stores; where a
load must not pass a store before it, there is :func:`barrier`.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.virtio.ids import (
    QUEUE_SIZE_MAX,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from softkvm.vmm.memory import GuestMemory

DESCRIPTOR: Final = 16
BATCHES: Final = 16
"""How many times :meth:`Queue.drain` looks for more before it lets others have the thread."""


class QueueError(Exception):
    """The driver has done what no driver may: the device needs a reset."""


CHAIN_LENGTH: Final = Size(
    "segments of a virtqueue's buffer", QUEUE_SIZE_MAX, QueueError, giver="guest", effect="NEEDS_RESET", where=__name__
)
CHAIN_BYTES: Final = Size(
    "bytes of a virtqueue's buffer", (1 << 32) - 1, QueueError, giver="guest", effect="NEEDS_RESET", where=__name__
)

_fence = threading.Lock()


def barrier() -> None:
    """Let no later load be done before the stores so far: a locked instruction, which a lock's way in is."""
    with _fence:
        pass


#: Guest physical address, length, flags (VIRTQ_DESC_F_WRITE).
Descriptor = tuple[int, int, int]


class Chain:
    """One buffer of the driver's: what the device may read, and behind that what it may write."""

    __slots__ = ("_at", "_left", "_read_at", "count", "descriptors", "head", "readable", "writable", "written")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        descriptors: list[Descriptor],
        count: int = 1,
    ) -> None:
        self.head = head
        """What names the buffer towards the driver."""
        self.readable = readable
        """Device-readable segments, in order."""
        self.writable = writable
        """Device-writable segments, in order."""
        self.descriptors = descriptors
        """Guest physical address, length and flags of each segment."""
        self.count = count
        """Places of the ring that it takes."""
        self.written = 0
        """Bytes that :meth:`write` has stored."""
        self._read_at = (0, 0)  # segment, and the offset in it
        self._at = 0  # the writable segment
        self._left = 0  # the offset in it

    @property
    def readable_size(self) -> int:
        """Bytes of all readable segments."""
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        """Bytes of all writable segments."""
        return sum(map(len, self.writable))

    def read(self, size: int = -1) -> bytes:
        """Return a copy of the next *size* readable bytes, all that are left by default; fewer at the end."""
        segment, offset = self._read_at
        readable = self.readable
        if segment == len(readable):
            return b""
        first = readable[segment]
        if 0 <= size <= len(first) - offset:
            self._read_at = (segment, offset + size) if size < len(first) - offset else (segment + 1, 0)
            return bytes(first[offset : offset + size])
        if size < 0:
            self._read_at = len(readable), 0
            if segment == len(readable) - 1:
                return bytes(first[offset:])
            return b"".join([first[offset:], *readable[segment + 1 :]])
        pieces = []
        while size and segment < len(readable):
            piece = readable[segment][offset : offset + size]
            pieces.append(piece)
            size -= len(piece)
            offset += len(piece)
            if offset == len(readable[segment]):
                segment, offset = segment + 1, 0
        self._read_at = segment, offset
        return b"".join(pieces)

    def rest(self) -> list[memoryview]:
        """Take the readable segments that :meth:`read` has left, as they are in memory."""
        segment, offset = self._read_at
        self._read_at = len(self.readable), 0
        if not offset:
            return self.readable[segment:]
        return [self.readable[segment][offset:], *self.readable[segment + 1 :]]

    def write(self, data: Buffer) -> int:
        """Store *data* behind what has been written; return how many bytes there was room for."""
        source = memoryview(data).cast("B")
        done, size = 0, len(source)
        while done < size and self._at < len(self.writable):
            segment = self.writable[self._at]
            room = len(segment) - self._left
            piece = min(room, size - done)
            segment[self._left : self._left + piece] = source[done : done + piece]
            done += piece
            if piece == room:
                self._at, self._left = self._at + 1, 0
            else:
                self._left += piece
        self.written += done
        return done

    def save(self) -> dict[str, Any]:
        """What :meth:`Queue.chain` makes the chain of again: for a device that keeps some over a snapshot."""
        return {"head": self.head, "count": self.count, "descriptors": [list(part) for part in self.descriptors]}

    def skip(self, size: int) -> None:
        """Count *size* bytes as written that the device has stored in :attr:`writable` by itself, in order."""
        self.written += size
        while size and self._at < len(self.writable):
            piece = min(size, len(self.writable[self._at]) - self._left)
            size -= piece
            self._left += piece
            if self._left == len(self.writable[self._at]):
                self._at, self._left = self._at + 1, 0


class Queue(ABC):
    """A virtqueue that a driver has made ready; ``interrupt()`` tells the driver of used buffers."""

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        *,
        event_idx: bool,
        indirect: bool,
        interrupt: Callable[[], None],
    ) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.ready = True
        self.event_idx = event_idx
        self.indirect = indirect
        self._interrupt = interrupt
        self.again: Callable[[], None] = lambda: None
        """Has the device notified of the queue once more."""

    # -- what a device uses

    @abstractmethod
    def pop(self) -> Chain | None:
        """Take the next available buffer, if there is one. QueueError for what a driver must never do."""

    @abstractmethod
    def unpop(self, chain: Chain) -> None:
        """Put the buffer back that was popped last."""

    def chain(self, state: dict[str, Any]) -> Chain:
        """Return the buffer again whose ``save()`` has given *state*: for a device that keeps some over a snapshot."""
        return gather(self, state["head"], [tuple(part) for part in state["descriptors"]], state["count"])

    @abstractmethod
    def push(self, chain: Chain, written: int | None = None) -> None:
        """Put a buffer into the used ring with the bytes written, by default ``chain.written``. See :meth:`flush`."""

    @abstractmethod
    def show(self) -> None:
        """Show the driver what was pushed; whether it wants an interrupt for it is :meth:`flush`'s to look at later."""

    @abstractmethod
    def flush(self) -> None:
        """Show the driver what was pushed, and interrupt it if it wants that: once per batch."""

    @abstractmethod
    def available(self) -> bool:
        """Whether :meth:`pop` would find a buffer."""

    @abstractmethod
    def disable_notifications(self) -> None:
        """Ask the driver for no notifications until they are enabled: a hint."""

    @abstractmethod
    def enable_notifications(self) -> bool:
        """Ask the driver for notifications again. True: more has come meanwhile, for which there may be none."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """The device's place in the rings."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""

    def drain(self, *, interrupt: bool = True) -> Iterator[Chain]:
        """Yield available buffers until there are none, without notifications meanwhile; flush after each batch.

        Without *interrupt* batches are shown only, and the caller flushes when it likes.
        A driver that is always quicker doesn't keep the thread for ever: the device is notified again, then.
        """
        if not self.ready:
            return
        for _ in range(BATCHES):
            self.disable_notifications()
            for _ in range(self.size):
                chain = self.pop()
                if chain is None:
                    break
                yield chain
            if interrupt:
                self.flush()
            else:
                self.show()
            if not self.enable_notifications():
                return
        self.again()

    # -- for the formats

    def segment(self, address: int, length: int) -> memoryview:
        """Return the memory of a descriptor."""
        if not length:
            raise QueueError(f"queue {self.index}: a descriptor of 0 bytes")
        try:
            return self.memory.slice(address, length)
        except IndexError as error:
            raise QueueError(f"queue {self.index}: a buffer at {error}") from None

    def indirect_table(self, address: int, length: int) -> bytes:
        """Return a copy of an indirect table."""
        if not self.indirect:
            raise QueueError(f"queue {self.index}: an indirect descriptor, which was not negotiated")
        if not length or length % DESCRIPTOR:
            raise QueueError(f"queue {self.index}: an indirect table of {length} bytes")
        CHAIN_LENGTH.check(length // DESCRIPTOR)
        return bytes(self.segment(address, length))

    def mark(self, chain: Chain, written: int) -> None:
        """Tell the log of written memory what the device has stored."""
        for address, length, flags in chain.descriptors:
            if written <= 0:
                break
            if flags & VIRTQ_DESC_F_WRITE:
                self.memory.mark_written(address, min(written, length))
                written -= length


class NoQueue(Queue):
    """A queue that the driver has not made ready."""

    def __init__(self, memory: GuestMemory, index: int) -> None:
        super().__init__(memory, index, 0, event_idx=False, indirect=False, interrupt=lambda: None)
        self.ready = False

    def pop(self) -> Chain | None:
        """None."""
        return None

    def unpop(self, chain: Chain) -> None:
        """Nothing."""

    def push(self, chain: Chain, written: int | None = None) -> None:
        """There is no buffer to give back: QueueError."""
        raise QueueError(f"queue {self.index} is not ready")

    def show(self) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def available(self) -> bool:
        """False."""
        return False

    def disable_notifications(self) -> None:
        """Nothing."""

    def enable_notifications(self) -> bool:
        """False."""
        return False

    def save(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


SPLIT_DESCRIPTOR: Final = struct.Struct("<QIHH")


def gather(queue: Queue, head: int, descriptors: list[Descriptor], count: int = 1) -> Chain:
    """Make a chain of descriptors."""
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    total = 0
    segment = queue.segment
    for address, length, flags in descriptors:
        total += length
        if flags & VIRTQ_DESC_F_WRITE:
            writable.append(segment(address, length))
        elif writable:
            raise QueueError(f"queue {queue.index}: a device-readable descriptor behind a device-writable one")
        else:
            readable.append(segment(address, length))
    if total > CHAIN_BYTES.most:
        CHAIN_BYTES.check(total)
    return Chain(head, readable, writable, descriptors, count)


class SplitQueue(Queue):
    """A split virtqueue (2.7): descriptor table, available and used ring at these guest physical addresses."""

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
        table, available, used = addresses
        if size & size - 1 or not 0 < size <= QUEUE_SIZE_MAX:
            raise QueueError(f"queue {index}: its size {size} is no power of two up to {QUEUE_SIZE_MAX}")
        for name, address, alignment in (
            ("descriptors", table, 16),
            ("available ring", available, 2),
            ("used ring", used, 4),
        ):
            if address % alignment:
                raise QueueError(f"queue {index}: {name} at {address:#x}, no multiple of {alignment}")
        try:
            self._table = memory.slice(table, DESCRIPTOR * size)
            self._avail = memory.slice(available, 6 + 2 * size).cast("H")
            whole = memory.slice(used, 6 + 8 * size)
        except IndexError as error:
            raise QueueError(f"queue {index}: a ring at {error}") from None
        self._used = whole.cast("H")
        self._elements = whole[4 : 4 + 8 * size].cast("I")
        self._used_address = used
        self._mask = size - 1
        self._used_event = 2 + size  # in the available ring, behind its entries
        self._avail_event = 2 + 4 * size
        self._next = 0  # of the available ring: what pop takes
        self._seen = 0  # its index, when last looked at
        self._pushed = 0  # of the used ring
        self._told = 0  # of which the driver has been told, if it wanted that

    def pop(self) -> Chain | None:
        """Take the next available buffer."""
        position = self._next
        if position == self._seen and not self.available():
            return None
        head = self._avail[2 + (position & self._mask)]
        chain = gather(self, head, self._descriptors(head))
        self._next = position + 1 & 0xFFFF
        return chain

    def unpop(self, chain: Chain) -> None:
        """Put back what was popped last."""
        self._next = self._next - 1 & 0xFFFF

    def _descriptors(self, at: int) -> list[Descriptor]:
        """Return the descriptors of the chain that begins at *at*."""
        table, size = self._table, self.size
        unpack = SPLIT_DESCRIPTOR.unpack_from
        found: list[Descriptor] = []
        while at < size:
            address, length, flags, following = unpack(table, at * DESCRIPTOR)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if flags & VIRTQ_DESC_F_NEXT:
                    raise QueueError(f"queue {self.index}: an indirect descriptor that goes on")
                found += self._indirect_table(address, length)
                return found
            found.append((address, length, flags))
            if not flags & VIRTQ_DESC_F_NEXT:
                return found
            if len(found) == size:
                raise QueueError(f"queue {self.index}: a chain of more descriptors than the queue has")
            at = following
        raise QueueError(f"queue {self.index}: descriptor {at} of {size}")

    def _indirect_table(self, address: int, length: int) -> list[Descriptor]:
        """Return the descriptors of an indirect table (2.7.5.3)."""
        table = self.indirect_table(address, length)
        count, at = len(table) // DESCRIPTOR, 0
        found: list[Descriptor] = []
        while at < count:
            segment, size, flags, following = SPLIT_DESCRIPTOR.unpack_from(table, at * DESCRIPTOR)
            if flags & VIRTQ_DESC_F_INDIRECT:
                raise QueueError(f"queue {self.index}: an indirect descriptor in an indirect table")
            found.append((segment, size, flags))
            if not flags & VIRTQ_DESC_F_NEXT:
                return found
            if len(found) == count:
                raise QueueError(f"queue {self.index}: a chain of more descriptors than its indirect table has")
            at = following
        raise QueueError(f"queue {self.index}: descriptor {at} of {count} in an indirect table")

    def push(self, chain: Chain, written: int | None = None) -> None:
        """Put a buffer into the used ring."""
        if written is None:
            written = chain.written
        position = self._pushed
        at = 2 * (position & self._mask)
        self._elements[at] = chain.head
        self._elements[at + 1] = written
        self._pushed = position + 1 & 0xFFFF
        if self.memory.logging:
            self.mark(chain, written)
            self.memory.mark_written(self._used_address + 4 + 4 * at, 8)

    def show(self) -> None:
        """Publish the used index."""
        self._used[1] = self._pushed
        if self.memory.logging:
            self.memory.mark_written(self._used_address, 4)

    def flush(self) -> None:
        """Publish the used index; interrupt unless the driver wants none (2.7.7, 2.7.10)."""
        new, old = self._pushed, self._told
        if new == old:
            return
        self.show()
        self._told = new
        barrier()
        if self.event_idx:
            if new - self._avail[self._used_event] - 1 & 0xFFFF < (new - old & 0xFFFF):
                self._interrupt()
        elif not self._avail[0] & 1:
            self._interrupt()

    def available(self) -> bool:
        """Look at the available index."""
        index = self._avail[1]
        if index - self._next & 0xFFFF > self.size:
            raise QueueError(f"queue {self.index}: available index {index}, {self._next} taken, of {self.size}")
        self._seen = index
        return index != self._next

    def disable_notifications(self) -> None:
        """Set the flag; with event index the place stays, which says the same."""
        if not self.event_idx:
            self._set_used(0, 1)

    def enable_notifications(self) -> bool:
        """Clear the flag, or ask for the next buffer's notification."""
        if self.event_idx:
            self._set_used(self._avail_event, self._next)
        else:
            self._set_used(0, 0)
        barrier()
        return self.available()

    def _set_used(self, at: int, value: int) -> None:
        self._used[at] = value
        if self.memory.logging:
            self.memory.mark_written(self._used_address + 2 * at, 2)

    def save(self) -> dict[str, Any]:
        """The indices; what was pushed is shown before."""
        self.flush()
        return {"next": self._next, "used": self._pushed}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the indices."""
        self._next = self._seen = state["next"] & 0xFFFF
        self._pushed = self._told = state["used"] & 0xFFFF
