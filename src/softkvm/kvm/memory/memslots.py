# SPDX-License-Identifier: Apache-2.0
"""Memory slots: the guest-physical address space (KVM API, KVM_SET_USER_MEMORY_REGION).

A :class:`Memslots` is an immutable snapshot that readers use without a lock; a change builds a new one
with the next generation and publishes it with one assignment, which is what SRCU does for the kernel.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G, PG_LEVEL_4K, hpage_gfn_mask

if TYPE_CHECKING:
    from softkvm.abi import kvm_userspace_memory_region, kvm_userspace_memory_region2
    from softkvm.kvm.memory.guest_memfd import Binding

KVM_USER_MEM_SLOTS: Final = 32764
KVM_ADDRESS_SPACE_NUM: Final = 1
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1
SLOTS: Final = Size("memory slots of a VM", KVM_USER_MEM_SLOTS, errno.EINVAL, where=__name__)
#: Pages of a slot, of which the dirty log has a bit each.
SLOT_PAGES: Final = Size(
    "pages of kvm_userspace_memory_region.memory_size",
    KVM_MEM_MAX_NR_PAGES,
    errno.EINVAL,
    element=PAGE_SIZE,
    where=__name__,
)
#: End of the user half of the host's address space: what access_ok() accepts.
TASK_SIZE_MAX: Final = (1 << 47) - PAGE_SIZE


_CHUNK_SLOTS: Final = 128
_CHUNK_SHIFT: Final = 7
_NO_SLOTS: Final[Mapping[int, Any]] = {}


class MemoryChange(Enum):
    """What a KVM_SET_USER_MEMORY_REGION does to its slot (``enum kvm_mr_change``)."""

    CREATE = auto()
    DELETE = auto()
    MOVE = auto()
    FLAGS_ONLY = auto()
    NOTHING = auto()


class DirtyReport:
    """What a KVM_GET_DIRTY_LOG takes out of a slot's bitmap; ``delivered`` once the caller has it for certain."""

    __slots__ = ("delivered", "log")

    def __init__(self, log: bytes) -> None:
        self.log = log
        self.delivered = False


class MemorySlot:
    """One slot: guest frames ``base_gfn`` .. ``end_gfn`` backed by host memory at ``userspace_addr``."""

    __slots__ = (
        "_dirty_lock",
        "_reports",
        "base_gfn",
        "dirty_bitmap",
        "end_gfn",
        "flags",
        "held",
        "hva_offset",
        "id",
        "max_level",
        "npages",
        "private",
        "readonly",
        "userspace_addr",
    )

    def __init__(self, slot_id: int, base_gfn: int, npages: int, flags: int, userspace_addr: int) -> None:
        self.id = slot_id
        self.base_gfn = base_gfn
        self.npages = npages
        self.end_gfn = base_gfn + npages
        self.flags = flags
        self.userspace_addr = userspace_addr
        self.readonly = bool(flags & abi.KVM_MEM_READONLY)
        #: Add to a guest-physical address to get the host virtual address.
        self.hva_offset = userspace_addr - (base_gfn << PAGE_SHIFT)
        self.max_level = self.level_at(userspace_addr)
        #: The guest's memory where frames are private.
        self.private: Binding | None = None
        self.dirty_bitmap: bytearray | None = None
        #: Keeps the memory mapped: a view of the object that owns it.
        self.held: memoryview | None = None
        self._dirty_lock = threading.Lock()
        self._reports: list[DirtyReport] = []

    def level_at(self, address: int) -> int:
        """Return the largest leaf level at which guest's addresses, and the host's from ``address`` on, are aligned."""
        level = PG_LEVEL_1G
        misalignment = self.base_gfn ^ (address >> PAGE_SHIFT)
        while level > PG_LEVEL_4K and misalignment & ~hpage_gfn_mask(level):
            level -= 1
        return level

    @property
    def private_offset(self) -> int:
        """Add to a guest-physical address to get where its private memory is."""
        assert self.private is not None
        return self.private.address - (self.base_gfn << PAGE_SHIFT)

    @property
    def private_level(self) -> int:
        """``max_level`` of private memory."""
        return PG_LEVEL_4K if self.private is None else self.level_at(self.private.address)

    def release(self) -> None:
        """Let the memory's owner unmap it; no processor may reach it any more."""
        if self.held is not None:
            self.held.release()
            self.held = None

    @property
    def dirty_logging(self) -> bool:
        """Whether KVM_MEM_LOG_DIRTY_PAGES is set."""
        return bool(self.flags & abi.KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def dirty_bitmap_bytes(self) -> int:
        """Size of the slot's dirty bitmap."""
        return abi.dirty_bitmap_bytes(self.npages)

    def mark_page_dirty(self, gfn: int) -> None:
        """Set the dirty bit of ``gfn`` if the slot is being logged."""
        bitmap = self.dirty_bitmap
        if bitmap is not None:
            relative = gfn - self.base_gfn
            with self._dirty_lock:
                bitmap[relative >> 3] |= 1 << (relative & 7)

    def exchange_dirty_bits(self, first_page: int, clear: int | None, add: int = 0, count: int = 0) -> int:
        """Or ``add`` into the bits of ``count`` pages (all if 0) from ``first_page``, clear some, return them.

        ``clear`` is the mask of bits to clear, None for all. Bit 0 is ``first_page``, a multiple of 64.
        The value returned holds the bits before clearing.
        """
        bitmap = self.dirty_bitmap
        if bitmap is None:
            return 0
        start = first_page >> 3
        stop = start + (count + 7) // 8 if count else len(bitmap)
        with self._dirty_lock:
            bits = int.from_bytes(bitmap[start:stop], "little") | add
            kept = 0 if clear is None else bits & ~clear
            bitmap[start:stop] = kept.to_bytes(stop - start, "little")
        return bits

    def report_dirty_pages(self, *, keep: bool) -> DirtyReport:
        """Return the dirty bitmap, which is cleared unless it is to be kept.

        What was taken out for others and is not delivered is in it once more: an exception may have come in between.
        """
        bitmap = self.dirty_bitmap
        assert bitmap is not None
        with self._dirty_lock:
            pending = [report for report in self._reports if not report.delivered]
            if pending:
                bits = int.from_bytes(bitmap, "little")
                for report in pending:
                    bits |= int.from_bytes(report.log, "little")
                bitmap[:] = bits.to_bytes(len(bitmap), "little")
            report = DirtyReport(bytes(bitmap))
            if keep:
                self._reports = []
            else:
                self._reports = [report]
                bitmap[:] = bytes(len(bitmap))
        return report


class _Chunk:
    """Neighbouring slots, sorted by address; never changed once a :class:`Memslots` has it."""

    __slots__ = ("bases", "slots")

    def __init__(self, slots: list[MemorySlot]) -> None:
        self.slots = slots
        self.bases = [slot.base_gfn for slot in slots]


class Memslots:
    """All slots of one address space at one generation.

    Slots lie in chunks, and so do their numbers, of which a generation shares all but one or two with the one before:
    a change costs about the square root of what there is.
    """

    __slots__ = ("_chunks", "_firsts", "_ids", "generation", "logged")

    def __init__(self, generation: int = 0) -> None:
        self._chunks: list[_Chunk] = []
        #: The first frame of each chunk.
        self._firsts: list[int] = []
        self._ids: dict[int, dict[int, MemorySlot]] = {}
        self.generation = generation
        #: How many slots have a dirty log.
        self.logged = 0

    def __iter__(self) -> Iterator[MemorySlot]:
        for chunk in self._chunks:
            yield from chunk.slots

    def by_id(self, slot_id: int) -> MemorySlot | None:
        """Return the slot with a number."""
        return self._ids.get(slot_id >> _CHUNK_SHIFT, _NO_SLOTS).get(slot_id)

    def gfn_to_memslot(self, gfn: int) -> MemorySlot | None:
        """Return the slot that holds ``gfn``."""
        index = bisect_right(self._firsts, gfn) - 1
        if index >= 0:
            chunk = self._chunks[index]
            slot = chunk.slots[bisect_right(chunk.bases, gfn) - 1]
            if gfn < slot.end_gfn:
                return slot
        return None

    def meeting(self, start: int, end: int) -> Iterator[MemorySlot]:
        """Yield the slots that hold a frame of [start, end)."""
        first = max(bisect_right(self._firsts, start) - 1, 0)
        for chunk in self._chunks[first : bisect_left(self._firsts, end)]:
            low = max(bisect_right(chunk.bases, start) - 1, 0)
            for slot in chunk.slots[low : bisect_left(chunk.bases, end)]:
                if start < slot.end_gfn:
                    yield slot

    def replaced(self, old: MemorySlot | None, new: MemorySlot | None) -> Memslots:
        """Return the next generation, with ``new`` in the place of ``old``."""
        slots = Memslots(self.generation + 1)
        slots._chunks, slots._firsts, slots._ids = self._chunks[:], self._firsts[:], dict(self._ids)
        slots.logged = self.logged
        if old is not None:
            slots._remove(old)
        if new is not None:
            slots._insert(new)
        return slots

    def emptied(self) -> Memslots:
        """Return the next generation, without a slot."""
        return Memslots(self.generation + 1)

    # --- while a generation is being made ------------------------------------------------------------

    def _numbers(self, slot: MemorySlot) -> dict[int, MemorySlot]:
        key = slot.id >> _CHUNK_SHIFT
        numbers = self._ids[key] = dict(self._ids.get(key, _NO_SLOTS))
        return numbers

    def _remove(self, slot: MemorySlot) -> None:
        del self._numbers(slot)[slot.id]
        self.logged -= slot.dirty_bitmap is not None
        index = bisect_right(self._firsts, slot.base_gfn) - 1
        self._put(index, [other for other in self._chunks[index].slots if other is not slot])

    def _insert(self, slot: MemorySlot) -> None:
        self._numbers(slot)[slot.id] = slot
        self.logged += slot.dirty_bitmap is not None
        index = max(bisect_right(self._firsts, slot.base_gfn) - 1, 0)
        slots = self._chunks[index].slots[:] if self._chunks else []
        slots.insert(bisect_right([other.base_gfn for other in slots], slot.base_gfn), slot)
        self._put(index, slots)

    def _put(self, index: int, slots: list[MemorySlot]) -> None:
        """Let ``slots`` be in the place of a chunk's: in none, in one, or in two."""
        half = len(slots) // 2
        parts = [slots] if len(slots) <= _CHUNK_SLOTS else [slots[:half], slots[half:]]
        chunks = [_Chunk(part) for part in parts if part]
        self._chunks[index : index + 1] = chunks
        self._firsts[index : index + 1] = [chunk.bases[0] for chunk in chunks]


Region: TypeAlias = "kvm_userspace_memory_region | kvm_userspace_memory_region2"

#: Flags of a slot, and those of one with memory of a guest_memfd, which can be neither logged nor read-only.
_FLAGS: Final = abi.KVM_MEM_LOG_DIRTY_PAGES | abi.KVM_MEM_READONLY
_PRIVATE_FLAGS: Final = abi.KVM_MEM_GUEST_MEMFD


def _check_fields(mem: Region, *, may_be_private: bool) -> None:
    """Raise EINVAL for fields that no slot can have."""
    private = mem.flags & abi.KVM_MEM_GUEST_MEMFD and may_be_private
    if mem.flags & ~(_PRIVATE_FLAGS if private else _FLAGS):
        expected = "KVM_MEM_GUEST_MEMFD alone" if private else "KVM_MEM_LOG_DIRTY_PAGES|KVM_MEM_READONLY"
        raise kvm_error(errno.EINVAL, f"flags={mem.flags:#x}, expected {expected}")
    if mem.slot >> 16 >= KVM_ADDRESS_SPACE_NUM:
        raise kvm_error(
            errno.EINVAL, f"slot={mem.slot:#x}: address space {mem.slot >> 16}, expected below {KVM_ADDRESS_SPACE_NUM}"
        )
    SLOTS.index(mem.slot & 0xFFFF, called="slot")
    for name in ("memory_size", "guest_phys_addr", "userspace_addr"):
        value: int = getattr(mem, name)
        if value & (PAGE_SIZE - 1):
            raise kvm_error(errno.EINVAL, f"{name}={value:#x}, expected a multiple of {PAGE_SIZE}")
    if mem.userspace_addr + mem.memory_size > TASK_SIZE_MAX:
        raise kvm_error(errno.EINVAL, f"userspace_addr={mem.userspace_addr:#x}, expected an address of this process")
    if mem.guest_phys_addr + mem.memory_size >= 1 << 64:
        raise kvm_error(errno.EINVAL, f"guest_phys_addr={mem.guest_phys_addr:#x} plus memory_size wraps around")
    SLOT_PAGES.check(mem.memory_size >> PAGE_SHIFT, called="pages of memory_size")
    if private:
        offset: int = getattr(mem, "guest_memfd_offset")  # noqa: B009 - of the larger structure, which has the flag
        if offset & (PAGE_SIZE - 1) or offset + mem.memory_size >= 1 << 64:
            raise kvm_error(errno.EINVAL, f"guest_memfd_offset={offset:#x}, expected a multiple of {PAGE_SIZE}")


def classify_change(
    slots: Memslots, mem: Region, max_gfn: int, *, may_be_private: bool = False
) -> tuple[MemoryChange, MemorySlot | None]:
    """Check ``mem`` against the rules of KVM_SET_USER_MEMORY_REGION.

    Returns the kind of change and the slot it changes. Raises ``OSError`` EINVAL for bad fields, changes
    of size, host address or KVM_MEM_READONLY, changes of a slot with a guest_memfd, and deletion of what does not
    exist; EEXIST for overlaps.
    """
    _check_fields(mem, may_be_private=may_be_private)
    old = slots.by_id(mem.slot & 0xFFFF)
    if not mem.memory_size:
        if old is None:
            raise kvm_error(errno.EINVAL, f"slot={mem.slot}, memory_size=0: there is no such slot to delete")
        return MemoryChange.DELETE, old
    base_gfn = mem.guest_phys_addr >> PAGE_SHIFT
    npages = mem.memory_size >> PAGE_SHIFT
    if old is None:
        change = MemoryChange.CREATE
    else:
        if (mem.flags | old.flags) & abi.KVM_MEM_GUEST_MEMFD:
            raise kvm_error(errno.EINVAL, f"slot={mem.slot}: a slot with a guest_memfd can only be deleted")
        if mem.userspace_addr != old.userspace_addr or npages != old.npages:
            raise kvm_error(
                errno.EINVAL, f"slot={mem.slot}: userspace_addr and memory_size of an existing slot can't change"
            )
        if (mem.flags ^ old.flags) & abi.KVM_MEM_READONLY:
            raise kvm_error(errno.EINVAL, f"slot={mem.slot}: KVM_MEM_READONLY of an existing slot can't change")
        if base_gfn != old.base_gfn:
            change = MemoryChange.MOVE
        elif mem.flags != old.flags:
            change = MemoryChange.FLAGS_ONLY
        else:
            return MemoryChange.NOTHING, old
    if change in (MemoryChange.CREATE, MemoryChange.MOVE):
        other = next((slot for slot in slots.meeting(base_gfn, base_gfn + npages) if slot is not old), None)
        if other is not None:
            raise kvm_error(
                errno.EEXIST, f"slot={mem.slot}: guest_phys_addr={mem.guest_phys_addr:#x} overlaps slot {other.id}"
            )
        if base_gfn + npages - 1 > max_gfn:
            raise kvm_error(
                errno.EINVAL, f"guest_phys_addr={mem.guest_phys_addr:#x}, expected frames up to {max_gfn:#x}"
            )
    return change, old


def new_slot(mem: Region, old: MemorySlot | None, *, initially_dirty: bool, rings: bool = False) -> MemorySlot:
    """Return the slot that ``mem`` describes; a continued dirty log keeps its bitmap. With ``rings`` there is none."""
    slot = MemorySlot(
        mem.slot & 0xFFFF,
        mem.guest_phys_addr >> PAGE_SHIFT,
        mem.memory_size >> PAGE_SHIFT,
        mem.flags,
        mem.userspace_addr,
    )
    if slot.dirty_logging and not rings:
        if old is not None and old.dirty_bitmap is not None:
            slot.dirty_bitmap = old.dirty_bitmap
            slot._dirty_lock = old._dirty_lock  # somebody may still be marking pages through the old slot
            slot._reports = old._reports
        elif initially_dirty:
            slot.dirty_bitmap = bytearray(((1 << slot.npages) - 1).to_bytes(slot.dirty_bitmap_bytes, "little"))
        else:
            slot.dirty_bitmap = bytearray(slot.dirty_bitmap_bytes)
    return slot
