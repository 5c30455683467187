# SPDX-License-Identifier: Apache-2.0
"""State of a VM and of its vCPUs, as far as every architecture has it (``struct kvm``, ``struct kvm_vcpu``).

It is data: what happens to it is in the modules that take it. An architecture adds its own
(:mod:`softkvm.kvm.x86.state`). Other threads change a vCPU only through requests: they set a bit in ``requests`` first
and wake the vCPU second, so that no wake-up is lost.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.kvm.coalesced_mmio import RING_OFFSET, CoalescedRing
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.ioctl import uninterrupted
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.memfd import map_file, map_over, mapping_address, sealed_memfd
from softkvm.kvm.memory.attributes import PrivateFrames
from softkvm.kvm.memory.dirty_ring import RING_OFFSET as DIRTY_RING_OFFSET
from softkvm.kvm.memory.dirty_ring import DirtyRing
from softkvm.kvm.memory.guest_memfd import GuestMemfds
from softkvm.kvm.memory.host_mappings import HostMappings
from softkvm.kvm.memory.memslots import Memslots
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.memory.regions import HostRegions
from softkvm.kvm.requests import KVM_REQ_SIGNAL, KVM_REQ_TASK_WORK
from softkvm.kvm.signals import watch_python_handlers

if TYPE_CHECKING:
    from softkvm.cputime import CpuClock
    from softkvm.kvm.memory.mmu import Mmu
    from softkvm.kvm.params import Params
    from softkvm.kvm.tlb import RemoteTlbs

OUTSIDE_GUEST_MODE: Final = 0
IN_GUEST_MODE: Final = 1
BLOCKING: Final = 2

#: The run page, the page of port data, and the page of coalesced MMIO.
VCPU_MMAP_SIZE: Final = 3 * PAGE_SIZE

#: Buckets of the histograms of halts.
HALT_POLL_HIST_COUNT: Final = 32

#: The virtual machines of this process that are there (``vm_list``); for tracing and live statistics.
VM_LIST: Final[weakref.WeakSet[VmState]] = weakref.WeakSet()

_LOG_BURST: Final = 10
_LOG_INTERVAL_S: Final = 5.0


def _histogram() -> list[int]:
    return [0] * HALT_POLL_HIST_COUNT


class VmState:
    """One virtual machine: memory, buses, vCPUs."""

    mmu: Mmu
    remote_tlbs: RemoteTlbs
    #: The first frame number that no slot may reach.
    max_gfn: int

    def __init__(self, params: Params) -> None:
        watch_python_handlers()
        self.params = params
        self.machine = _softcpu.Machine()

        # Memory. slots_lock serialises changes of the slots, mmu_lock those of the nested tables.
        self.slots_lock = threading.RLock()
        self.mmu_lock = threading.RLock()
        self.memslots = Memslots()
        self.regions = HostRegions(self.machine)
        self.host_mappings = HostMappings()
        self.guest_memfds = GuestMemfds()
        #: Frames with KVM_MEMORY_ATTRIBUTE_PRIVATE; None in VMs that can't have any.
        self.private_frames: PrivateFrames | None = None
        self.manual_dirty_log_protect = 0
        self.dirty_ring_size = 0  # KVM_CAP_DIRTY_LOG_RING: bytes of each vCPU's ring; 0: bitmaps

        # Devices in KVM
        self.pio_bus = IoBus()
        self.mmio_bus = IoBus()
        self.coalesced = CoalescedRing()

        # vCPUs. The list is replaced, never changed: readers take no lock.
        self.lock = threading.RLock()
        self.vcpus: Sequence[VcpuState] = ()
        self.vcpu_by_id: dict[int, Any] = {}
        self.max_halt_poll_ns: int | None = None  # KVM_CAP_HALT_POLL; None: the module parameter
        self.closed = False
        #: This is a child, and the VM that of the process that it was forked from.
        self.inherited = False

        # Statistics
        self.stat_remote_tlb_flush = 0
        self.stat_remote_tlb_flush_requests = 0
        self.stat_remote_tlb_flush_skipped = 0
        self.stat_remote_tlb_flush_ranged = 0
        self.stat_remote_tlb_flush_full = 0
        self.stat_remote_tlb_flush_failed = 0

        #: What its statistics call it: the process that made it.
        self.stats_id = f"kvm-{os.getpid()}"

        self._log_window_start = 0.0
        self._log_count = 0
        VM_LIST.add(self)

    def running_vcpu(self) -> VcpuState | None:
        """Return the vCPU that the calling thread runs, or is in a request of (``kvm_get_running_vcpu``)."""
        return next((vcpu for vcpu in self.vcpus if vcpu.cpu.held), None)

    @abstractmethod
    def host_unmapped(self, hva: int, size: int) -> None:
        """Tell that the process's memory at ``hva`` is another or none now."""

    @abstractmethod
    def find_slow_memory(self) -> None:
        """Look for slots whose memory has a userfaultfd."""

    @abstractmethod
    def find_awaited_memory(self) -> None:
        """Look for the same, for KVM's own accesses; at a vCPU's first entry."""

    @abstractmethod
    def finish_zap(self) -> None:
        """Flush after a zap, keep what was dirty in the dirty log, free the tables; with ``mmu_lock`` held."""

    def make_all_cpus_request(self, request: int) -> None:
        """Set a request in every vCPU and kick those that run; doesn't wait."""
        for vcpu in self.vcpus:
            vcpu.make_request(request)
            vcpu.vcpu_kick()

    def log_limited(self, logger: logging.Logger, message: str, *args: object) -> None:
        """Log what a guest can provoke: at most ten lines in five seconds."""
        now = time.monotonic()
        if now - self._log_window_start > _LOG_INTERVAL_S:
            self._log_window_start = now
            self._log_count = 0
        self._log_count += 1
        if self._log_count <= _LOG_BURST:
            logger.info(message, *args)


@dataclass(eq=False, repr=False, slots=True, weakref_slot=True)
class VcpuState:
    """One virtual processor: its requests, the page shared with userspace, what it waits for, counters.

    Every exit takes dozens of these, so each has its slot. Subclasses, plugins among them, may add what they like.
    """

    vm: VmState
    vcpu_id: int
    cpu: _softcpu.Cpu
    closed: bool = field(default=False, init=False)

    # The pages shared with userspace
    _shared_fd: int = field(init=False)
    _close_shared_fd: Callable[[], object] = field(init=False)
    _mapping: mmap.mmap = field(init=False)
    _shared: memoryview = field(init=False)
    dirty_ring: DirtyRing | None = field(init=False)
    run_b: memoryview = field(init=False)
    run_w: memoryview = field(init=False)
    run_d: memoryview = field(init=False)
    run_q: memoryview = field(init=False)

    # Execution
    request_lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    requests: int = field(default=0, init=False)
    mode: int = field(default=OUTSIDE_GUEST_MODE, init=False)
    running: bool = field(default=False, init=False)
    #: The architecture has something to do each time KVM_RUN begins.
    run_begins: bool = field(default=True, init=False)
    #: The way into KVM_RUN.
    entrance: _softcpu.Run = field(init=False)
    mp_state: int = field(default=abi.KVM_MP_STATE_RUNNABLE, init=False)
    task_work: list[Callable[[], None]] = field(default_factory=list, init=False)
    #: Its CPU time, from the first question for it on.
    accounted: CpuClock | None = field(default=None, init=False)
    #: How long the vCPU waits awake when it halts, and whether it does so now (:mod:`.halt_poll`).
    halt_poll_ns: int = field(default=0, init=False)
    halt_polling: bool = field(default=False, init=False)

    # Exits to userspace
    #: Called with the vCPU at the next KVM_RUN; returns 1 to go on, 0 for another exit.
    complete_userspace_io: Callable[[Any], int] | None = field(default=None, init=False)
    #: Userspace wants registers stored in the run page or taken from it (kvm_valid_regs, kvm_dirty_regs).
    syncs_regs: bool = field(default=False, init=False)
    pio_bus: IoBus = field(init=False)
    mmio_bus: IoBus = field(init=False)
    #: Frame of the last MMIO access and the memory slots it was found under.
    mmio_gfn: int = field(default=-1, init=False)
    mmio_slots: Memslots | None = field(default=None, init=False)

    # Statistics
    exit_counts: dict[int, int] = field(default_factory=dict, init=False)
    stat_mmio_exits: int = field(default=0, init=False)
    stat_halt_exits: int = field(default=0, init=False)
    stat_halt_wakeup: int = field(default=0, init=False)
    stat_halt_attempted_poll: int = field(default=0, init=False)
    stat_halt_successful_poll: int = field(default=0, init=False)
    stat_halt_poll_success_ns: int = field(default=0, init=False)
    stat_halt_poll_fail_ns: int = field(default=0, init=False)
    stat_halt_wait_ns: int = field(default=0, init=False)
    stat_halt_poll_success_hist: list[int] = field(default_factory=_histogram, init=False)
    stat_halt_poll_fail_hist: list[int] = field(default_factory=_histogram, init=False)
    stat_halt_wait_hist: list[int] = field(default_factory=_histogram, init=False)
    stat_signal_exits: int = field(default=0, init=False)
    stat_pf_taken: int = field(default=0, init=False)
    stat_tlb_flush: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        ring_size = self.vm.dirty_ring_size
        size = DIRTY_RING_OFFSET + ring_size if ring_size else VCPU_MMAP_SIZE
        self._shared_fd = sealed_memfd(f"kvm-vcpu:{self.vcpu_id}", size)
        self._close_shared_fd = weakref.finalize(self, _softcpu.close_own_descriptor, self._shared_fd)
        self._mapping = map_file(self._shared_fd, VCPU_MMAP_SIZE)
        map_over(mapping_address(self._mapping) + RING_OFFSET, PAGE_SIZE, self.vm.coalesced.fd)
        self._shared = memoryview(self._mapping)
        self.dirty_ring = DirtyRing(self._shared_fd, ring_size) if ring_size else None
        self.run_b = self._shared
        self.run_w = self._shared.cast("H")
        self.run_d = self._shared.cast("I")
        self.run_q = self._shared.cast("Q")
        self.pio_bus = self.vm.pio_bus
        self.mmio_bus = self.vm.mmio_bus

    @property
    def shared_fd(self) -> int:
        """The descriptor of the shared pages, for mmap() by others; -1 once the vCPU is closed.

        The ring of coalesced writes is another file's page: see :meth:`shared_fd_mapped`.
        """
        if self._shared_fd >= 0:
            self.vm.coalesced.watch(self, self._shared_fd)
        return self._shared_fd

    @uninterrupted
    def shared_fd_mapped(
        self,
        address: int,
        size: int,
        offset: int = 0,
        protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
        *,
        shared: bool = True,
    ) -> None:
        """Tell that mmap() of :attr:`shared_fd` has given ``address``: what is not in the file is mapped over that.

        No ioctl: the device's mmap() does it by itself. That is the ring of coalesced MMIO, which is one page for the
        whole VM. Who doesn't tell has it from the next KVM_REGISTER_COALESCED_MMIO or the vCPU's first KVM_RUN on,
        whichever comes last, if the mapping is there by then.

        Raises EINVAL where the device's mmap() does: a ring of dirty pages is neither code nor anybody's own copy.
        """
        ring = range(DIRTY_RING_OFFSET, DIRTY_RING_OFFSET + self.vm.dirty_ring_size)
        if (offset in ring or offset + size - 1 in ring) and (not shared or protection & mmap.PROT_EXEC):
            raise kvm_error(errno.EINVAL, "a ring of dirty pages is mapped MAP_SHARED, without PROT_EXEC")
        self.vm.coalesced.mapped(self, address, size, offset, protection)

    def close_shared_fd(self) -> None:
        """Close the descriptor of the shared pages; who has mapped them keeps them."""
        self._shared_fd = -1
        self._close_shared_fd()

    # --- requests ----------------------------------------------------------------------------------

    def make_request(self, request: int) -> None:
        """Set request bits; the caller kicks if the vCPU may be running."""
        with self.request_lock:
            self.requests |= request

    def take_request(self, request: int) -> bool:
        """Clear request bits; True if any was set."""
        with self.request_lock:
            taken = self.requests & request
            self.requests &= ~request
        return bool(taken)

    def vcpu_kick(self, sender: VcpuState | None = None) -> None:
        """Make the vCPU look at its requests: out of guest mode, or awake (``kvm_vcpu_kick``).

        On the thread of another vCPU in KVM_RUN, ``sender``, it goes out when that leaves the interpreter: soon.
        """
        if self.mode != OUTSIDE_GUEST_MODE:
            if sender is None or not sender.running:
                self.cpu.kick()
            else:
                sender.cpu.kick_at_entry(self.cpu)

    def kick(self) -> None:
        """End KVM_RUN with EINTR, as a signal to a real vCPU's thread does. No lock is taken: signal handlers may."""
        self.cpu.interrupt()

    def check_interrupt(self) -> None:
        """Let KVM_RUN end if that is what the processor's kick was for; on the vCPU's thread."""
        if self.cpu.interrupted:
            self.make_request(KVM_REQ_SIGNAL)

    @uninterrupted
    def call_soon(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the vCPU's own thread before it enters the guest again (task work)."""
        with self.request_lock:
            self.task_work.append(work)
            self.requests |= KVM_REQ_TASK_WORK
        self.vcpu_kick()

    def end_timers(self) -> None:
        """Have no timer of the vCPU's expire any more."""
        self.cpu.set_timer(0)
        if self.accounted is not None:
            self.accounted.close()

    # --- exits -------------------------------------------------------------------------------------

    def memory_fault(self, gfn: int, why: str, *, private: bool = False) -> OSError:
        """Describe a fault that KVM can't resolve (KVM_EXIT_MEMORY_FAULT); return what KVM_RUN raises, EFAULT."""
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_MEMORY_FAULT
        self.run_q[run_page.MEMORY_FAULT_FLAGS_Q] = abi.KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
        self.run_q[run_page.MEMORY_FAULT_GPA_Q] = gfn << PAGE_SHIFT
        self.run_q[run_page.MEMORY_FAULT_SIZE_Q] = PAGE_SIZE
        return kvm_error(errno.EFAULT, f"gpa={gfn << PAGE_SHIFT:#x}: {why}")

    def internal_error(self, suberror: int, data: Sequence[int]) -> None:
        """Describe a KVM_EXIT_INTERNAL_ERROR with ``data``."""
        self.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_INTERNAL_ERROR
        self.run_d[run_page.INTERNAL_SUBERROR_D] = suberror
        self.run_d[run_page.INTERNAL_NDATA_D] = len(data)
        for n, value in enumerate(data):
            self.run_q[run_page.INTERNAL_DATA_Q + n] = value
