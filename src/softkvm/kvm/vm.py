# SPDX-License-Identifier: Apache-2.0
"""A virtual machine as on every architecture: memory slots, vCPUs, eventfds, and requests to all vCPUs.

What an architecture has to provide are the methods named ``arch_*``.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi import checks
from softkvm.abi.sizes import Size
from softkvm.closing import Closing
from softkvm.kvm import stats_file, vm_caps
from softkvm.kvm.capabilities import KVM_MAX_VCPUS, VCPU_IDS
from softkvm.kvm.errors import bad_file, enomem, inherited, kvm_error, refuse_requests
from softkvm.kvm.ioctl import uninterrupted
from softkvm.kvm.irq.eventfd import Eventfds
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.memory import attributes as attributes_of
from softkvm.kvm.memory import dirty_log, dirty_ring
from softkvm.kvm.memory.collapse import Collapser
from softkvm.kvm.memory.memslots import (
    DirtyReport,
    MemoryChange,
    MemorySlot,
    Memslots,
    Region,
    classify_change,
    new_slot,
)
from softkvm.kvm.memory.pages import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.memory.slow_memory import with_range, with_userfaultfd, without_range
from softkvm.kvm.requests import KVM_REQ_VM_DEAD
from softkvm.kvm.state import VmState
from softkvm.kvm.stats import VM_STATS, scalars
from softkvm.kvm.tlb import RemoteTlbs, TlbRange
from softkvm.threads import tell_after_fork

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from softkvm.abi.arguments import Unread
    from softkvm.kvm.irq.irqchip import Irqchip
    from softkvm.kvm.params import Params
    from softkvm.kvm.vcpu import Vcpu

VCPUS: Final = Size("vCPUs of a VM", KVM_MAX_VCPUS, errno.EINVAL, where=__name__)


class Vm(VmState, Closing):
    """One virtual machine."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.eventfds = Eventfds(self)
        self.collapser = Collapser(self)
        self.remote_tlbs = RemoteTlbs(self)
        tell_after_fork(self)

    # --- what an architecture provides ---------------------------------------------------------------

    @abstractmethod
    def arch_vcpu_precreate(self, vcpu_id: int) -> None:
        """Check, with the VM's lock held, that the architecture lets such a vCPU be; EINVAL otherwise."""

    @abstractmethod
    def arch_create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Return a new vCPU, with the VM's lock held."""

    @abstractmethod
    def arch_check_extension(self, cap: int) -> int:
        """Return what KVM_CHECK_EXTENSION says."""

    @abstractmethod
    def arch_enable_cap(self, cap: int, value: int) -> None:
        """Enable a capability of the architecture; EINVAL for what cannot be enabled on a VM."""

    @abstractmethod
    def arch_irqchip(self) -> Irqchip | None:
        """Return the in-kernel interrupt chips, None without."""

    @abstractmethod
    def arch_memslots_updated(self, generation: int) -> bool:
        """A generation of memory slots is in force, with ``mmu_lock`` held; True if TLBs have to be flushed."""

    @abstractmethod
    def arch_flush_remote_tlbs(self) -> bool:
        """Have all processors forget every translation of the VM's; False if the architecture can't, all at once."""

    @abstractmethod
    def arch_flush_remote_tlbs_range(self, ranges: Sequence[TlbRange]) -> bool:
        """Have them forget those of some frames; False if it can't."""

    @abstractmethod
    def arch_destroy(self) -> None:
        """Stop what the architecture runs beside vCPUs: timers, chips."""

    # --- memory ------------------------------------------------------------------------------------

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        self._set_region(region, memory)

    def set_user_memory_region2(self, region: abi.kvm_userspace_memory_region2, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION2."""
        self._set_region(region, memory)

    def _set_region(self, region: Region, memory: Buffer | None) -> None:
        with self.slots_lock, enomem():
            self.check_open()
            held = None if memory is None else checks.memory("memory", memory)
            try:
                self._change_slot(region, held)
            except BaseException:
                if held is not None:
                    held.release()  # or the traceback would hold the memory
                raise

    def _change_slot(self, region: Region, held: memoryview | None) -> None:
        slots = self.memslots
        change, old = classify_change(slots, region, self.max_gfn, may_be_private=self.private_frames is not None)
        if change is MemoryChange.NOTHING:
            assert old is not None
            old.held = held or old.held
            return
        self.host_mappings.forget()
        new = None
        if change is not MemoryChange.DELETE:
            initially_dirty = bool(self.manual_dirty_log_protect & abi.KVM_DIRTY_LOG_INITIALLY_SET)
            rings = bool(self.dirty_ring_size)
            new = new_slot(region, old, initially_dirty=initially_dirty, rings=rings)
        if change is MemoryChange.CREATE:
            assert new is not None
            if isinstance(region, abi.kvm_userspace_memory_region2) and region.flags & abi.KVM_MEM_GUEST_MEMFD:
                new.private = self.guest_memfds.bind(region)
            self._map_host(new)
            self.find_awaited_memory()
        if new is not None:
            new.held = held or (old.held if old is not None else None)
        self._install(slots.replaced(old, new), old, new, change)
        if change is MemoryChange.DELETE:
            assert old is not None
            self._unmap_host(old)
        elif change is MemoryChange.FLAGS_ONLY:
            assert new is not None and old is not None
            if new.dirty_logging and not old.dirty_logging:
                dirty_log.start_logging(self, new)
            elif old.dirty_logging and not new.dirty_logging:
                self.collapser.note(new)

    def _map_host(self, slot: MemorySlot) -> None:
        size = slot.npages << PAGE_SHIFT
        try:
            if slot.private is not None:
                self.regions.get(slot.private.address, size, slot.id)
            self.regions.get(slot.userspace_addr, size, slot.id)
        except (ValueError, MemoryError) as problem:
            self._unmap_private(slot)
            if isinstance(problem, MemoryError):
                raise
            raise kvm_error(errno.EINVAL, f"userspace_addr={slot.userspace_addr:#x}: {problem}") from None

    def _unmap_host(self, slot: MemorySlot) -> None:
        self.regions.put(slot.userspace_addr, slot.npages << PAGE_SHIFT, slot.id)
        self._unmap_private(slot)
        slot.release()

    def _unmap_private(self, slot: MemorySlot) -> None:
        if slot.private is not None:
            self.regions.put(slot.private.address, slot.npages << PAGE_SHIFT, slot.id)
            self.guest_memfds.unbind(slot.private)

    def create_guest_memfd(self, wanted: abi.kvm_create_guest_memfd) -> int:
        """KVM_CREATE_GUEST_MEMFD."""
        with self.slots_lock:
            self.check_open()
            return self.guest_memfds.create(wanted)

    def create_device(self, type: int, flags: int) -> int:
        """KVM_CREATE_DEVICE: no architecture here has devices beside its interrupt chips; VFIO's needs hardware."""
        raise kvm_error(errno.ENODEV, f"type={type}: there are no such devices")

    def set_memory_attributes(self, attributes: abi.kvm_memory_attributes) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        frames = self.private_frames
        start, end = attributes_of.check(attributes, 0 if frames is None else abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        if frames is None:
            return
        with self.slots_lock, self.mmu_lock:
            flush = self.mmu.zap_range(start, end)
            frames.set(start, end, private=attributes_of.is_private(attributes))
            if flush:
                self.finish_zap()

    def _drop_memory(self) -> None:
        """Delete all slots: afterwards no processor reaches their memory, and its owners may unmap it."""
        with self.slots_lock:
            slots = self.memslots
            with self.mmu_lock:
                self.memslots = slots.emptied()
                self.mmu.zap_all()
                self.finish_zap()
            for slot in slots:
                self._unmap_host(slot)

    def _install(self, slots: Memslots, old: MemorySlot | None, new: MemorySlot | None, change: MemoryChange) -> None:
        """Publish a generation; mappings of what is gone go before anyone can use the new one."""
        with self.mmu_lock:
            self.memslots = slots
            flush = False
            if old is not None and change in (MemoryChange.DELETE, MemoryChange.MOVE):
                flush |= self.mmu.zap_range(old.base_gfn, old.end_gfn)
            if new is not None and change in (MemoryChange.CREATE, MemoryChange.MOVE):
                # Nothing is mapped here but MMIO SPTEs; without them large leaves are possible.
                flush |= self.mmu.zap_range(new.base_gfn, new.end_gfn)
            flush |= self.arch_memslots_updated(slots.generation)
            if flush or self.mmu.has_zapped_tables():
                self.finish_zap(old)

    @uninterrupted
    def zap_gfn_range(self, gfn: int, count: int) -> None:
        """Forget the nested mappings of some guest frames, as an MMU notifier does; they fault in again."""
        with self.mmu_lock:
            if self.mmu.zap_range(gfn, gfn + count):
                self.finish_zap()

    @uninterrupted
    def host_unmapped(self, hva: int, size: int) -> None:
        """Tell that the process's memory at ``hva`` is, or is about to be, another or none (an MMU notifier).

        No ioctl: the kernel learns this by itself (``kvm_mmu_notifier_invalidate_range_start``). When this returns no
        translation to a page of the range is in use, nor code that was decoded there: each VMRUN compares that with
        memory. A guest that touches a page again gets what the process has there then, and KVM_RUN is EFAULT if that
        is nothing. To unmap memory that a guest may be using, hold ``mmu_lock`` around this and munmap(): nothing is
        mapped anew meanwhile.

        Ranges that no slot has cost next to nothing. Native code can tell them without the interpreter
        (``machine.has_region_function``).
        """
        self._unmap([(hva, size)])

    @uninterrupted
    def host_unmapped_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the same of many ranges (address, size), for which there is one flush."""
        self._unmap(ranges)

    def _unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        used = [(hva, size, users) for hva, size in ranges if (users := self._users(hva, size))]
        if not used:
            return
        with self.mmu_lock:
            self.host_mappings.forget()
            flush = False
            for hva, size, users in used:
                first, end = hva & -PAGE_SIZE, hva + size
                for slot in (self.memslots.by_id(number) for number in users):
                    if slot is None:
                        continue
                    start = max(first, slot.userspace_addr) - slot.hva_offset
                    stop = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT)) - slot.hva_offset
                    if start < stop:
                        flush |= self.mmu.zap_range(start >> PAGE_SHIFT, -(-stop >> PAGE_SHIFT))
            if flush:
                self.finish_zap()

    def _users(self, hva: int, size: int) -> set[int]:
        """The slots that have a page of the range."""
        return self.regions.users(hva & -PAGE_SIZE, hva + size)

    @uninterrupted
    def set_slow_memory(self, hva: int, size: int, *, slow: bool = True) -> None:
        """Tell that pages of a range may be long in coming when they are touched, or no longer are (whole pages).

        No ioctl: the kernel finds out in get_user_pages(). From now on they are mapped one by one, when they are there.
        A vCPU that touches another one waits outside of its guest, where a kick reaches it; or its guest does something
        else meanwhile (KVM_CAP_ASYNC_PF). Who takes pages of such a range away tells by :meth:`host_unmapped`, before.
        Memory with a userfaultfd is found by :meth:`find_slow_memory`.
        """
        mappings = self.host_mappings
        start, end = hva & -PAGE_SIZE, hva + size + PAGE_SIZE - 1 & -PAGE_SIZE
        if slow:
            mappings.slow = with_range(mappings.slow, start, end)
            mappings.awaited = with_range(mappings.awaited, start, end)
            self.host_unmapped(start, end - start)
        else:
            mappings.slow = without_range(mappings.slow, start, end)

    @uninterrupted
    def find_slow_memory(self) -> None:
        """Look for slots whose memory has a userfaultfd: when a guest asks for asynchronous page faults."""
        known = self.host_mappings.slow
        for start, end in self._with_userfaultfd():
            if known is None or (start, end) not in known.ranges:
                self.set_slow_memory(start, end - start)

    @uninterrupted
    def find_awaited_memory(self) -> None:
        """Look for the same when a slot is set and at a vCPU's first KVM_RUN: KVM's own accesses wait aside then.

        Guests wait in theirs. A kick rouses them, and so does who waits for them.
        """
        for start, end in self._with_userfaultfd():
            self.host_mappings.awaited = with_range(self.host_mappings.awaited, start, end)

    def _with_userfaultfd(self) -> list[tuple[int, int]]:
        return [(start, end) for start, end in with_userfaultfd() if self.regions.users(start, end)]

    def finish_zap(self, old: MemorySlot | None = None) -> None:
        """Flush after a zap, keep what was dirty in the dirty log, free the tables; with ``mmu_lock`` held.

        ``old`` is a slot that has just been replaced: its log goes on in its successor's.
        """
        self.flush_dirty_tlbs()

        def mark_dirty(gfn: int, count: int) -> None:
            for slot in (*self.memslots.meeting(gfn, gfn + count), *((old,) if old else ())):
                for page in range(max(gfn, slot.base_gfn), min(gfn + count, slot.end_gfn)):
                    slot.mark_page_dirty(page)

        logged = self.memslots.logged or (old is not None and old.dirty_bitmap is not None)
        self.mmu.free_zapped(mark_dirty if logged else None)

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG.

        Whatever a signal's handler raises, no bit is lost: the interpreter runs handlers behind calls, not between the
        mark and the return.
        """
        report = self._report_dirty_log(slot)
        report.delivered = True
        return report.log

    @uninterrupted
    def _report_dirty_log(self, slot: int) -> DirtyReport:
        assert abi.KVM_GET_DIRTY_LOG.argument is not None
        return dirty_log.get_dirty_log(self, *abi.KVM_GET_DIRTY_LOG.argument.accept(("slot",), (slot,)))

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes | Unread) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        dirty_log.clear_dirty_log(self, slot, first_page, num_pages, bitmap)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS."""
        return dirty_ring.reset(self)

    # --- requests to all vCPUs ---------------------------------------------------------------------

    def flush_remote_tlbs(self) -> None:
        """Make sure that no processor uses a translation made before; returns when that is so."""
        self.remote_tlbs.flush_all()

    def flush_remote_tlbs_range(self, gfn: int, pages: int) -> None:
        """The same for translations of some frames."""
        self.remote_tlbs.flush_ranges((TlbRange(gfn, pages),))

    def flush_dirty_tlbs(self) -> None:
        """The same for what has changed in the tables (``mmu.tlbs_dirty``), unless that has been flushed already."""
        self.remote_tlbs.flush_dirty()

    # --- vCPUs ---------------------------------------------------------------------------------------

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU: EINVAL for an id out of range or too many vCPUs, EEXIST for a used one."""
        with self.lock, enomem():
            self.check_open()
            VCPU_IDS.index(id, called="id")
            VCPUS.check(len(self.vcpus) + 1, called="vCPUs")
            self.arch_vcpu_precreate(id)
            if id in self.vcpu_by_id:
                raise kvm_error(errno.EEXIST, f"id={id} exists")
            vcpu = self.arch_create_vcpu(id)
            self.vcpu_by_id[id] = vcpu
            self.vcpus = [*self.vcpus, vcpu]
            return vcpu

    # --- interrupts and eventfds ---------------------------------------------------------------------

    def irqchip(self) -> Irqchip:
        """Return the in-kernel chips; ENXIO without."""
        chips = self.arch_irqchip()
        if chips is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel irqchip")
        return chips

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        if type(irq) is not int or type(level) is not int or (irq | level) >> 32:  # the way of devices: checked here
            assert abi.KVM_IRQ_LINE.argument is not None
            irq, level = abi.KVM_IRQ_LINE.argument.accept(("irq", "level"), (irq, level))
        self.irqchip().set_gsi(irq, level)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD."""
        self.eventfds.irqfd(fd, gsi, flags, resamplefd)

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""
        self.eventfds.ioeventfd(fd, addr, len, datamatch, flags)

    # --- coalesced MMIO ------------------------------------------------------------------------------

    def register_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO: EINVAL for a ``pio`` that is neither 0 nor 1, ENOSPC for too many zones."""
        bus = self._bus(pio)
        with self.slots_lock:
            self.check_open()
            self.coalesced.register(bus, addr, size, pio)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that holds the range; EINVAL for a bad ``pio``."""
        bus = self._bus(pio)
        with self.slots_lock:
            self.coalesced.unregister(bus, addr, size)

    def _bus(self, pio: int) -> IoBus:
        if pio not in (0, 1):
            raise kvm_error(errno.EINVAL, f"pio={pio}, expected 0 or 1")
        return self.pio_bus if pio else self.mmio_bus

    # --- capabilities --------------------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on a VM."""
        return self.arch_check_extension(cap)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a VM (KVM API section 7)."""
        value = args[0] if args else 0
        if not vm_caps.enable_cap(self, cap, value):
            self.arch_enable_cap(cap, value)

    # --- logging, life -------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Counters with the names of KVM's binary statistics."""
        return scalars(VM_STATS, self)

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: the values are those of now; :meth:`refresh_stats_fd` brings them up to date."""
        return stats_file.create(self.stats_id, VM_STATS, self)

    @uninterrupted
    def refresh_stats_fd(self, fd: int) -> None:
        """Write the values of now into the file of a :meth:`get_stats_fd`, before somebody reads it.

        No ioctl: a read of the kernel's file has them by itself.
        """
        stats_file.refresh(fd, VM_STATS, self)

    @uninterrupted
    def close(self) -> None:
        """End the VM: every KVM_RUN returns, the chips' timers stop, memory is let go, requests are EBADF."""
        if self.inherited:
            self._close_inherited()
            return
        with self.lock:
            if self.closed:
                return
            self.closed = True
        refuse_requests(self, abi.File.VM)
        self.make_all_cpus_request(KVM_REQ_VM_DEAD)
        for vcpu in self.vcpus:
            vcpu.end_timers()
        self.eventfds.close()
        self.arch_destroy()
        self.coalesced.close_fd()
        self._drop_memory()

    def check_open(self) -> None:
        """Raise EBADF for a request that another thread's close has overtaken; under the lock that it waited for."""
        if self.closed:
            bad_file()

    def after_fork(self) -> None:
        """In a child the VM is its parent's: every request but the close is EIO."""
        self.inherited = True
        if not self.closed:
            refuse_requests(self, abi.File.VM, inherited)
        for vcpu in self.vcpus:
            if not vcpu.closed:
                refuse_requests(vcpu, abi.File.VCPU, inherited)

    def _close_inherited(self) -> None:
        """Give back what a child has of the VM: descriptors, and its hold on memory. Nothing that the parent sees."""
        if not self.closed:
            self.closed = True
            refuse_requests(self, abi.File.VM)
            self.eventfds.close_inherited()
            self.coalesced.close_fd()
            for slot in self.memslots:
                slot.release()

    def __repr__(self) -> str:
        size = sum(slot.npages for slot in self.memslots) << 12
        chips = "in-kernel chips" if self.arch_irqchip() is not None else "no chips"
        state = "closed" if self.closed else f"{len(self.vcpus)} vCPUs, {size >> 10} KiB of memory, {chips}"
        return f"<softkvm.kvm.Vm: {state}>"
