# SPDX-License-Identifier: Apache-2.0
"""Rings of dirty pages, one for each vCPU (KVM API 8.29, KVM_CAP_DIRTY_LOG_RING; ``virt/kvm/dirty_ring.c``).

The pages of logged slots are write-protected. A vCPU's first write to one faults, and puts it into the ring of the
vCPU; so do writes that KVM does for it. Userspace collects the entries from the mapping at KVM_DIRTY_LOG_PAGE_OFFSET,
marks them, and asks for KVM_RESET_DIRTY_RINGS, which protects the pages again. A ring that is nearly full ends KVM_RUN.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import TYPE_CHECKING, Final, Protocol

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memfd import map_file
from softkvm.kvm.memory.memslots import KVM_ADDRESS_SPACE_NUM, KVM_USER_MEM_SLOTS
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.requests import KVM_REQ_DIRTY_RING_SOFT_FULL

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from softkvm.kvm.memory.memslots import MemorySlot
    from softkvm.kvm.vm import Vm

_ENTRY: Final = ctypes.sizeof(abi.kvm_dirty_gfn)
#: Where the ring is in a vCPU's file.
RING_OFFSET: Final = abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
KVM_DIRTY_RING_MAX_ENTRIES: Final = 65536
#: What KVM_CHECK_EXTENSION says: the most bytes of a ring.
KVM_DIRTY_RING_MAX_BYTES: Final = KVM_DIRTY_RING_MAX_ENTRIES * _ENTRY
RING_BYTES: Final = Size("bytes of a ring of dirty pages", KVM_DIRTY_RING_MAX_BYTES, errno.E2BIG, where=__name__)
#: Entries that stay free when KVM_RUN ends for a full ring: what one exit's handling may need.
KVM_DIRTY_RING_RSVD_ENTRIES: Final = 64


def check_size(size: int) -> None:
    """EINVAL for bytes that are no power of two, or too few; E2BIG for too many."""
    if not size or size & (size - 1) or size < max(PAGE_SIZE, KVM_DIRTY_RING_RSVD_ENTRIES * _ENTRY):
        raise kvm_error(errno.EINVAL, f"args[0]={size}, expected a power of two, at least {PAGE_SIZE} bytes")
    RING_BYTES.check(size, called="args[0]")


class DirtyRing:
    """The ring of a vCPU, in the file that it shares with userspace."""

    __slots__ = ("_d", "_dirty_index", "_lock", "_mapping", "_mask", "_q", "_reset_index", "_soft_limit", "_waiting")

    def __init__(self, fd: int, size: int) -> None:
        self._mapping = map_file(fd, size, RING_OFFSET)
        view = memoryview(self._mapping)
        self._d, self._q = view.cast("I"), view.cast("Q")
        entries = size // _ENTRY
        self._mask = entries - 1
        self._soft_limit = entries - KVM_DIRTY_RING_RSVD_ENTRIES
        #: Both only grow: entries that were pushed, and that were reset.
        self._dirty_index = self._reset_index = 0
        self._lock = threading.Lock()
        #: What had no room, as nobody collects while KVM writes by itself.
        self._waiting: list[tuple[int, int]] = []

    @property
    def indices(self) -> tuple[int, int]:
        """How many entries have been pushed, and reset."""
        return self._dirty_index, self._reset_index

    def soft_full(self) -> bool:
        """Tell whether the vCPU may not run before a reset."""
        return self._dirty_index - self._reset_index >= self._soft_limit

    def push(self, slot: int, offset: int) -> None:
        """Append a page: the slot's number, with its address space in bits 31:16, and the page in the slot."""
        with self._lock:
            self._push(slot, offset)

    def _push(self, slot: int, offset: int) -> None:
        if self._dirty_index - self._reset_index > self._mask:
            self._waiting.append((slot, offset))
            return
        at = (self._dirty_index & self._mask) * _ENTRY
        self._d[(at >> 2) + 1] = slot
        self._q[(at >> 3) + 1] = offset
        self._d[at >> 2] = abi.KVM_DIRTY_GFN_F_DIRTY  # behind what it says is there
        self._dirty_index += 1

    def take_collected(self) -> list[tuple[int, int]]:
        """Take the entries that userspace has collected, up to the first that it hasn't: slots and pages."""
        taken = []
        with self._lock:
            while self._reset_index < self._dirty_index:
                at = (self._reset_index & self._mask) * _ENTRY
                if not self._d[at >> 2] & abi.KVM_DIRTY_GFN_F_RESET:
                    break
                taken.append((self._d[(at >> 2) + 1], self._q[(at >> 3) + 1]))
                self._d[at >> 2] = 0
                self._reset_index += 1
            waiting, self._waiting = self._waiting, []
            for slot, offset in waiting:
                self._push(slot, offset)
        return taken


class HasRing(Protocol):
    """A vCPU, as far as it matters here."""

    dirty_ring: DirtyRing | None

    def make_request(self, request: int) -> None:
        """Set request bits."""


class HasRings(Protocol):
    """A VM, as far as it matters here."""

    @property
    def vcpus(self) -> Sequence[HasRing]: ...

    def running_vcpu(self) -> HasRing | None:
        """Return the vCPU that the calling thread is in a request of."""


def mark_page_dirty(vm: HasRings, slot: MemorySlot, gfn: int, vcpu: HasRing | None = None) -> None:
    """Put a page of a logged slot into the ring of ``vcpu``, by default the one that the thread works for.

    What KVM writes for none (the kernel warns of that, and forgets it) goes to the first vCPU's.
    """
    vcpu = vcpu or vm.running_vcpu() or next(iter(vm.vcpus), None)
    if vcpu is None or vcpu.dirty_ring is None or not slot.dirty_logging:
        return
    vcpu.dirty_ring.push(slot.id, gfn - slot.base_gfn)
    if vcpu.dirty_ring.soft_full():
        vcpu.make_request(KVM_REQ_DIRTY_RING_SOFT_FULL)


def reset(vm: Vm) -> int:
    """KVM_RESET_DIRTY_RINGS: protect what userspace has collected; returns how many entries that were.

    EINVAL without rings.
    """
    if not vm.dirty_ring_size:
        raise kvm_error(errno.EINVAL, "KVM_CAP_DIRTY_LOG_RING is not enabled")
    count = 0
    with vm.slots_lock:
        vm.check_open()
        for vcpu in vm.vcpus:
            if vcpu.dirty_ring is not None:
                taken = vcpu.dirty_ring.take_collected()
                count += len(taken)
                _protect(vm, taken)
        if count:
            vm.flush_dirty_tlbs()
    return count


def _protect(vm: Vm, pages: Iterable[tuple[int, int]]) -> None:
    """Write-protect pages again. Userspace may have written anything into the entries: what isn't there is passed over.

    Neighbours go together.
    """
    with vm.mmu_lock:
        for number, first, last in _runs(pages):
            slot_id = number & 0xFFFF
            if number >> 16 >= KVM_ADDRESS_SPACE_NUM or slot_id >= KVM_USER_MEM_SLOTS:
                continue
            slot = vm.memslots.by_id(slot_id)
            if slot is not None and last < slot.npages:
                vm.mmu.write_protect(slot.base_gfn + first, slot.base_gfn + last + 1)


def _runs(pages: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Yield (slot, first page, last page) for pages that follow one another."""
    slot, first, last = -1, 0, 0
    for number, offset in pages:
        if number == slot and offset == last + 1:
            last = offset
            continue
        if slot >= 0:
            yield slot, first, last
        slot, first, last = number, offset, offset
    if slot >= 0:
        yield slot, first, last
