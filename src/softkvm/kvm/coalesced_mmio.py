# SPDX-License-Identifier: Apache-2.0
"""Coalesced MMIO and port writes: collected in a ring for userspace, without an exit (KVM API 4.116; coalesced_mmio.c).

The ring is one page of the VM, and every vCPU's shared pages end with it, so it may be emptied through any of them. A
vCPU's pages are a file of their own, however, whose third page is another one; who maps ``shared_fd`` gets the ring in
its place as soon as KVM knows of the mapping: it is told (``Vcpu.shared_fd_mapped``), or finds it among the process's
mappings when a zone is registered, and before the first write into the ring after a vCPU has begun to run. Until every
vCPU whose descriptor has been asked for is through with that, writes leave for userspace, as they do with a full ring.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any, Final, Protocol

from softkvm import _softcpu, abi
from softkvm.abi.sizes import Size
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.memfd import map_file, map_over, mappings_of, sealed_memfd
from softkvm.kvm.memory.pages import PAGE_SIZE

#: Where the ring is in a vCPU's shared pages.
RING_OFFSET: Final = abi.KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE

_HEADER: Final = ctypes.sizeof(abi.kvm_coalesced_mmio_ring)
_ENTRY: Final = ctypes.sizeof(abi.kvm_coalesced_mmio)
KVM_COALESCED_MMIO_MAX: Final = (PAGE_SIZE - _HEADER) // _ENTRY
RING_ENTRIES: Final = Size(
    "indexes in the ring of coalesced MMIO",
    KVM_COALESCED_MMIO_MAX,
    None,
    element=_ENTRY,
    effect="the write is an exit",
    where=__name__,
)
# In doublewords: the header's fields, then those of an entry.
_FIRST_D: Final = 0
_LAST_D: Final = 1


class Vcpu(Protocol):
    """A vCPU, as far as it matters here."""

    running: bool
    closed: bool
    exit_counts: dict[int, Any]


class CoalescedZone:
    """A range of addresses whose writes go into the ring (``struct kvm_coalesced_mmio_dev``)."""

    __slots__ = ("_ring", "addr", "pio", "size")

    def __init__(self, ring: CoalescedRing, addr: int, size: int, pio: int) -> None:
        self._ring = ring
        self.addr = addr
        self.size = size
        self.pio = pio

    def holds(self, addr: int, size: int) -> bool:
        """Tell whether all of [addr, addr + size) is in the zone."""
        return self.addr <= addr and addr + size <= min(self.addr + self.size, 1 << 64)

    def io_read(self, address: int, size: int) -> int | None:
        """No read is the zone's."""
        return None

    def io_write(self, address: int, size: int, value: int) -> bool:
        """Append the write to the ring; False if there is no room."""
        return self._ring.append(address, size, value, self.pio)


class CoalescedRing:
    """The ring of a VM, and its zones."""

    def __init__(self) -> None:
        self.fd = sealed_memfd("kvm-coalesced-mmio", PAGE_SIZE)
        self._close_fd = weakref.finalize(self, _softcpu.close_own_descriptor, self.fd)
        self._page = memoryview(map_file(self.fd, PAGE_SIZE))
        self._d = self._page.cast("I")
        self._q = self._page.cast("Q")
        self._lock = threading.RLock()
        self._zones: list[tuple[IoBus, CoalescedZone]] = []
        #: vCPUs that others may have mapped the pages of, without KVM's knowing yet, and their files' inodes.
        self._unseen: dict[Vcpu, int] = {}

    # --- zones: the caller serialises (slots_lock) -----------------------------------------------------

    def register(self, bus: IoBus, addr: int, size: int, pio: int) -> None:
        """Let writes to a range go into the ring; ENOSPC if the bus has no room for it."""
        zone = CoalescedZone(self, addr, size, pio)
        bus.add(addr, size, zone)
        self._zones.append((bus, zone))
        with self._lock:
            self._find_mappings()

    def unregister(self, bus: IoBus, addr: int, size: int) -> None:
        """Forget the zones that hold all of a range; it is no error if there are none."""
        for known in self._zones[:]:
            if known[0] is bus and known[1].holds(addr, size):
                bus.remove(known[1])
                self._zones.remove(known)

    # --- mappings ------------------------------------------------------------------------------------

    def watch(self, vcpu: Vcpu, fd: int) -> None:
        """The descriptor of a vCPU's pages is given out: somebody may map them."""
        with self._lock:
            self._unseen[vcpu] = os.fstat(fd).st_ino

    def mapped(self, vcpu: Vcpu, address: int, size: int, offset: int, protection: int) -> None:
        """The vCPU's file is mapped at ``address``, from ``offset`` on: put the ring in its place there."""
        with self._lock:
            if offset <= RING_OFFSET < offset + size:
                map_over(address + RING_OFFSET - offset, PAGE_SIZE, self.fd, protection)
            self._unseen.pop(vcpu, None)

    def _find_mappings(self) -> None:
        if self._unseen:
            for address, protection in mappings_of(set(self._unseen.values()), RING_OFFSET):
                map_over(address, PAGE_SIZE, self.fd, protection)

    def _all_seen(self) -> bool:
        """Look for mappings of vCPUs that run by now; False while some don't, as theirs may be yet to come."""
        if not all(vcpu.running or vcpu.exit_counts or vcpu.closed for vcpu in self._unseen):
            return False
        self._find_mappings()
        self._unseen.clear()
        return True

    # --- writes --------------------------------------------------------------------------------------

    def append(self, address: int, size: int, value: int, pio: int) -> bool:
        """Append a write; False if there is no room for it, or nobody would see it."""
        with self._lock:
            if self._unseen and not self._all_seen():
                return False
            d = self._d
            last = d[_LAST_D]
            if not RING_ENTRIES.allows(last + 1):  # userspace may write anything there
                return False
            after = (last + 1) % KVM_COALESCED_MMIO_MAX
            if after == d[_FIRST_D]:
                return False
            at = _HEADER + last * _ENTRY
            self._q[at >> 3] = address
            self._q[(at >> 3) + 1] = size | pio << 32
            self._q[(at >> 3) + 2] = value
            d[_LAST_D] = after  # behind the entry
            return True

    def close_fd(self) -> None:
        """Close the descriptor; mappings stay."""
        self._close_fd()
