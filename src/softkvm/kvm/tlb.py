# SPDX-License-Identifier: Apache-2.0
"""Remote TLB flushes: what changes in a VM's tables is forgotten by its processors before anybody relies on that.

The tables' owner notes each range of frames whose translations it has taken away (:class:`TlbsDirty`), behind the
change; whoever needs the change to be in force has that flushed (``flush_dirty_tlbs``). So a flush that somebody else
has done already is skipped, and one that is needed is of ranges. An architecture has a pair of callbacks for that, for
all and for ranges (``kvm_arch_flush_remote_tlbs``, ``kvm_arch_flush_remote_tlbs_range``). After one has failed there is
one flush of everything by request: each vCPU leaves its guest for it (``kvm_make_all_cpus_request``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm.kvm.requests import KVM_REQ_TLB_FLUSH
from softkvm.kvm.state import IN_GUEST_MODE, VcpuState

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

#: More ranges than that are flushed as everything: to look for them costs more than to fill the TLBs again.
MAX_RANGES: Final = 128


class TlbRange(NamedTuple):
    """Frames to forget (``struct kvm_tlb_range``): the first, and how many."""

    start_gfn: int
    pages: int


class TlbsDirty:
    """Frames whose translations were changed and may still be in a TLB (the kernel's ``tlbs_dirty`` was a count).

    Added behind the change, with ``mmu_lock`` held or not: both methods are safe beside each other.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int]] = deque()

    def add(self, start: int, end: int) -> None:
        """Note that translations of the frames [start, end) have changed."""
        self._ranges.append((start, end))

    def take(self) -> list[TlbRange]:
        """Return what is noted, in order and joined, and forget it: the caller flushes it."""
        found = []
        try:
            while True:
                found.append(self._ranges.popleft())
        except IndexError:
            pass
        found.sort()
        joined: list[TlbRange] = []
        for start, end in found:
            if joined and start <= joined[-1].start_gfn + joined[-1].pages:
                last = joined[-1]
                joined[-1] = last._replace(pages=max(last.pages, end - last.start_gfn))
            else:
                joined.append(TlbRange(start, end - start))
        return joined

    def __bool__(self) -> bool:
        return bool(self._ranges)


class RemoteTlbs:
    """The TLBs of a VM's processors, as who changes its tables sees them."""

    __slots__ = ("_vm", "lock")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        #: Held until a flush is done: who finds nothing to flush knows that it has been.
        self.lock = threading.RLock()

    def flush_all(self) -> None:
        """Have every processor forget everything (``kvm_flush_remote_tlbs``)."""
        vm = self._vm
        vm.stat_remote_tlb_flush_requests += 1
        with self.lock:
            vm.mmu.tlbs_dirty.take()
            self._flush(None)

    def flush_ranges(self, ranges: Sequence[TlbRange]) -> None:
        """Have every processor forget some frames (``kvm_flush_remote_tlbs_range``)."""
        self._vm.stat_remote_tlb_flush_requests += 1
        with self.lock:
            self._flush(ranges)

    def flush_dirty(self) -> None:
        """Have every processor forget what has changed; nothing to do if somebody has seen to that meanwhile."""
        vm = self._vm
        vm.stat_remote_tlb_flush_requests += 1
        with self.lock:
            ranges = vm.mmu.tlbs_dirty.take()
            if ranges:
                self._flush(ranges)
            else:
                vm.stat_remote_tlb_flush_skipped += 1

    def _flush(self, ranges: Sequence[TlbRange] | None) -> None:
        vm = self._vm
        if ranges is not None and len(ranges) > MAX_RANGES:
            ranges = None
        done = vm.arch_flush_remote_tlbs() if ranges is None else vm.arch_flush_remote_tlbs_range(ranges)
        if not done:
            vm.stat_remote_tlb_flush_failed += 1
            ranges = None
            done = request_flush(vm.vcpus)
        if ranges is None:
            vm.stat_remote_tlb_flush_full += 1
        else:
            vm.stat_remote_tlb_flush_ranged += 1
        vm.stat_remote_tlb_flush += done


def request_flush(vcpus: Iterable[VcpuState]) -> bool:
    """Make sure that none of these uses a translation made before; returns when that is so: whether any was waited for.

    A vCPU outside of guest mode flushes before its next entry; one inside is kicked and waited for.
    """
    waiting = []
    for vcpu in vcpus:
        seen = vcpu.stat_tlb_flush  # before the request: one that is answered at once must not be waited for
        vcpu.make_request(KVM_REQ_TLB_FLUSH)
        if vcpu.mode == IN_GUEST_MODE:
            vcpu.cpu.kick()
            waiting.append((vcpu, seen))
    for vcpu, seen in waiting:
        # A vCPU that left guest mode meanwhile has flushed, or will before it enters again.
        while vcpu.mode == IN_GUEST_MODE and vcpu.stat_tlb_flush == seen:
            time.sleep(0)
    return bool(waiting)
