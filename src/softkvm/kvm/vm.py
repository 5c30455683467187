# SPDX-License-Identifier: Apache-2.0
"""A virtual machine: memory slots, nested tables, vCPUs, interrupt chips, and requests to all of them."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from softkvm import _softcpu, abi
from softkvm.kvm import capabilities
from softkvm.kvm.errors import kvm_error, refuse_requests
from softkvm.kvm.irq.eventfd import Eventfds
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.memory import dirty_log
from softkvm.kvm.memory.host_mappings import HostMappings
from softkvm.kvm.memory.memslots import MemoryChange, MemorySlot, Memslots, classify_change, new_slot
from softkvm.kvm.memory.regions import HostRegions
from softkvm.kvm.params import Params
from softkvm.kvm.requests import KVM_REQ_CLOCK_UPDATE, KVM_REQ_IOAPIC_EOI_EXIT, KVM_REQ_TLB_FLUSH, KVM_REQ_VM_DEAD
from softkvm.kvm.stats import vm_stats
from softkvm.kvm.vcpu_ioctls import VcpuIoctls
from softkvm.kvm.vcpu_state import IN_GUEST_MODE, VcpuState
from softkvm.kvm.x86 import vm_caps
from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
from softkvm.kvm.x86.mmu.tdp_mmu import TdpMmu
from softkvm.kvm.x86.msr_filter import MsrFilter
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.tsc import TscSynchronizer

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

#: Routes of one VM, and so the most pins that userspace's IOAPICs can have.
KVM_MAX_IRQ_ROUTES: Final = 4096
#: The physical TSC ticks once per nanosecond.
TSC_KHZ: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000
_LOG_BURST: Final = 10
_LOG_INTERVAL_S: Final = 5.0


class Vm:
    """One virtual machine (implements :class:`softkvm.api.Vm`)."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.machine = _softcpu.Machine()
        self.maxphyaddr = (_softcpu.cpuid(0x8000_0008, 0)[0] & 0xFF) or 48
        self.max_gfn = (1 << (min(self.maxphyaddr, 48) - 12)) - 1
        #: Serialises changes of memory slots.
        self.slots_lock = threading.RLock()
        #: Serialises changes of the nested tables.
        self.mmu_lock = threading.RLock()
        self.memslots = Memslots()
        self.regions = HostRegions(self.machine)
        self.host_mappings = HostMappings()
        self.mmu = TdpMmu(self.machine, params.max_huge_page_level, self.host_mappings)
        self.iopm = self.machine.alloc_page(3)
        memoryview(self.iopm).cast("B")[:] = b"\xff" * self.iopm.size
        self.pio_bus = IoBus()
        self.mmio_bus = IoBus()
        self.lock = threading.RLock()
        self.vcpus: list[VcpuIoctls] = []
        self._vcpu_by_id: dict[int, VcpuIoctls] = {}
        self.chips: KernelIrqchip | None = None
        self.split_irqchip = False
        self.bsp_vcpu_id = 0
        self.eventfds = Eventfds(self)
        self._closed = False

        # Options (KVM_ENABLE_CAP)
        self.quirks_disabled = 0
        self.manual_dirty_log_protect = 0
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.exit_on_emulation_error = False
        self.disable_hlt_exits = False
        self.max_halt_poll_ns: int | None = None  # KVM_CAP_HALT_POLL; None: the module parameter
        self.user_space_msr_mask = 0
        self.x2apic_api = 0
        self.msr_filter: MsrFilter | None = None
        self.guest_can_read_msr_platform_info = True

        # Time
        self.default_tsc_khz = TSC_KHZ
        self.kvmclock_offset = -_softcpu.clock_ns()
        self.wall_clock_msr = 0
        self.boot_vcpu_runs_old_kvmclock = False
        self.tsc = TscSynchronizer()

        self.stat_remote_tlb_flush = 0
        self.stat_remote_tlb_flush_requests = 0
        self._log_window_start = 0.0
        self._log_count = 0

    # --- quirks ------------------------------------------------------------------------------------

    def has_quirk(self, quirk: int) -> bool:
        """Tell whether a deviation from the architecture that old userspace relies on is in force."""
        return not self.quirks_disabled & quirk

    @property
    def cd_nw_cleared_quirk(self) -> bool:
        """KVM_X86_QUIRK_CD_NW_CLEARED."""
        return self.has_quirk(abi.KVM_X86_QUIRK_CD_NW_CLEARED)

    @property
    def fix_hypercall_quirk(self) -> bool:
        """KVM_X86_QUIRK_FIX_HYPERCALL_INSN."""
        return self.has_quirk(abi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)

    # --- memory ------------------------------------------------------------------------------------

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: Buffer | None = None) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        with self.slots_lock:
            slots = self.memslots
            change, old = classify_change(slots, region, self.max_gfn)
            held = memoryview(memory) if memory is not None else None
            if change is MemoryChange.NOTHING:
                assert old is not None
                old.held = held or old.held
                return
            self.host_mappings.forget()
            new = None
            if change is not MemoryChange.DELETE:
                initially_dirty = bool(self.manual_dirty_log_protect & abi.KVM_DIRTY_LOG_INITIALLY_SET)
                new = new_slot(region, old, initially_dirty=initially_dirty)
            if change is MemoryChange.CREATE:
                assert new is not None
                self._map_host(new)
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
                    dirty_log.stop_logging(self, new)

    def _map_host(self, slot: MemorySlot) -> None:
        try:
            self.regions.get(slot.userspace_addr, slot.npages << 12)
        except ValueError as problem:
            raise kvm_error(errno.EINVAL, f"userspace_addr={slot.userspace_addr:#x}: {problem}") from None

    def _unmap_host(self, slot: MemorySlot) -> None:
        self.regions.put(slot.userspace_addr, slot.npages << 12)
        slot.release()

    def _drop_memory(self) -> None:
        """Delete all slots: afterwards no processor reaches their memory, and its owners may unmap it."""
        with self.slots_lock:
            slots = self.memslots
            with self.mmu_lock:
                self.memslots = Memslots((), slots.generation + 1)
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
            if slots.generation & 0x3FFFF == 0:
                flush |= self.mmu.zap_all()  # MMIO SPTEs of the generation 2**18 before would look valid
            if flush or self.mmu.has_zapped_tables():
                self.finish_zap(old)

    def zap_gfn_range(self, gfn: int, count: int) -> None:
        """Forget the nested mappings of some guest frames, as an MMU notifier does; they fault in again."""
        with self.mmu_lock:
            if self.mmu.zap_range(gfn, gfn + count):
                self.finish_zap()

    def finish_zap(self, old: MemorySlot | None = None) -> None:
        """Flush after a zap, keep what was dirty in the dirty log, free the tables; with ``mmu_lock`` held.

        ``old`` is a slot that has just been replaced: its log goes on in its successor's.
        """
        self.flush_remote_tlbs()
        logged = [slot for slot in (*self.memslots, *((old,) if old else ())) if slot.dirty_bitmap is not None]

        def mark_dirty(gfn: int, count: int) -> None:
            for slot in logged:
                for page in range(max(gfn, slot.base_gfn), min(gfn + count, slot.end_gfn)):
                    slot.mark_page_dirty(page)

        self.mmu.free_zapped(mark_dirty if logged else None)

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG."""
        return dirty_log.get_dirty_log(self, slot)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        dirty_log.clear_dirty_log(self, slot, first_page, num_pages, bitmap)

    # --- requests to all vCPUs ---------------------------------------------------------------------

    def make_all_cpus_request(self, request: int) -> None:
        """Set a request in every vCPU and kick those that run; doesn't wait."""
        for vcpu in self.vcpus:
            vcpu.make_request(request)
            vcpu.vcpu_kick()

    def flush_remote_tlbs(self) -> None:
        """Make sure that no processor uses a translation made before; returns when that is so.

        A vCPU outside of guest mode flushes before its next entry; one inside is kicked and waited for.
        """
        self.stat_remote_tlb_flush_requests += 1
        waiting = []
        for vcpu in self.vcpus:
            vcpu.make_request(KVM_REQ_TLB_FLUSH)
            if vcpu.mode == IN_GUEST_MODE:
                vcpu.cpu.kick()
                waiting.append((vcpu, vcpu.stat_tlb_flush))
        if waiting:
            self.stat_remote_tlb_flush += 1
        for vcpu, seen in waiting:
            # A vCPU that left guest mode meanwhile has flushed, or will before it enters again.
            while vcpu.mode == IN_GUEST_MODE and vcpu.stat_tlb_flush == seen:
                time.sleep(0)

    # --- vCPUs -------------------------------------------------------------------------------------

    def create_vcpu(self, id: int) -> VcpuIoctls:
        """KVM_CREATE_VCPU: EINVAL for an id out of range or too many vCPUs, EEXIST for a used one."""
        with self.lock:
            if not 0 <= id < capabilities.KVM_MAX_VCPU_IDS or len(self.vcpus) >= capabilities.KVM_MAX_VCPUS:
                raise kvm_error(errno.EINVAL, f"id={id}, expected below {capabilities.KVM_MAX_VCPU_IDS}")
            if id in self._vcpu_by_id:
                raise kvm_error(errno.EEXIST, f"id={id} exists")
            vcpu = VcpuIoctls(self, id)
            vcpu.set_tsc_offset(self.tsc.offset)
            self._vcpu_by_id[id] = vcpu
            self.vcpus = [*self.vcpus, vcpu]
            return vcpu

    def vcpu_by_apic_id(self, apic_id: int) -> VcpuIoctls | None:
        """Return the vCPU with an APIC id."""
        return self._vcpu_by_id.get(apic_id)

    def vcpu_closed(self, vcpu: VcpuState) -> None:
        """A vCPU's file is closed; its number stays taken (KVM destroys vCPUs with the VM)."""

    # --- interrupt chips ---------------------------------------------------------------------------

    def irqchip(self) -> KernelIrqchip:
        """Return the in-kernel chips; ENXIO without."""
        if self.chips is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel irqchip")
        return self.chips

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: EEXIST if there is one, EINVAL after the first vCPU."""
        with self.lock:
            if self.chips is not None:
                raise kvm_error(errno.EEXIST, "the irqchip exists")
            if self.vcpus:
                raise kvm_error(errno.EINVAL, "vCPUs exist: the irqchip has to come first")
            chips = KernelIrqchip(_softcpu.clock_ns)
            self.apply_options(chips)
            chips.attach(self.pio_bus, self.mmio_bus)
            self.chips = chips

    def create_split_irqchip(self, pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: local APICs only; *pins* GSIs are those of userspace's IOAPICs.

        EINVAL for too many pins, EEXIST if there is an irqchip or a vCPU.
        """
        with self.lock:
            if pins > KVM_MAX_IRQ_ROUTES:
                raise kvm_error(errno.EINVAL, f"args[0]={pins}, expected at most {KVM_MAX_IRQ_ROUTES} IOAPIC pins")
            if self.chips is not None or self.vcpus:
                raise kvm_error(errno.EEXIST, "an irqchip or vCPUs exist: the irqchip has to come first")
            chips = KernelIrqchip(_softcpu.clock_ns, split=True, reserved_pins=pins, eoi_exit=self._ioapic_eoi_exit)
            self.apply_options(chips)
            self.chips = chips
            self.split_irqchip = True

    def _ioapic_eoi_exit(self, vcpu_id: int, vector: int) -> None:
        """An EOI that userspace's IOAPIC waits for: KVM_EXIT_IOAPIC_EOI from that vCPU."""
        vcpu = self._vcpu_by_id[vcpu_id]
        vcpu.pending_ioapic_eoi = vector
        vcpu.make_request(KVM_REQ_IOAPIC_EOI_EXIT)

    def apply_options(self, chips: KernelIrqchip) -> None:
        """Tell *chips* the boot processor and which options and quirks are in force."""
        apic_map = chips.apic_map
        apic_map.bsp_vcpu_id = self.bsp_vcpu_id
        apic_map.lint0_reenabled = self.has_quirk(abi.KVM_X86_QUIRK_LINT0_REENABLED)
        apic_map.mmio_hole = self.has_quirk(abi.KVM_X86_QUIRK_LAPIC_MMIO_HOLE)
        apic_map.x2apic_format = bool(self.x2apic_api & abi.KVM_X2APIC_API_USE_32BIT_IDS)
        apic_map.x2apic_broadcast_quirk_disabled = bool(self.x2apic_api & abi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2."""
        with self.lock:
            if self.chips is None:
                raise kvm_error(errno.ENOENT, "there is no in-kernel irqchip")
            self.chips.create_pit(flags, self.pio_bus)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self.irqchip().set_irq(irq, level)

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return self.irqchip().set_irq(irq, level)

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        return self.irqchip().get_irqchip(chip_id)

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self.irqchip().set_irqchip(chip)

    def get_pit2(self) -> abi.kvm_pit_state2:
        """KVM_GET_PIT2."""
        pit = self.irqchip().pit
        if pit is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel PIT")
        return pit.get_state()

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        pit = self.irqchip().pit
        if pit is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel PIT")
        pit.set_state(state)

    def reinject_control(self, pit_reinject: int) -> None:
        """KVM_REINJECT_CONTROL."""
        pit = self.irqchip().pit
        if pit is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel PIT")
        pit.set_reinject(bool(pit_reinject))

    def set_gsi_routing(self, entries: Sequence[abi.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING."""
        if self.chips is None:
            raise kvm_error(errno.EINVAL, "there is no in-kernel irqchip")
        self.chips.routing.set_routing(entries)

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        """KVM_SIGNAL_MSI."""
        if self.chips is None:
            raise kvm_error(errno.EINVAL, "there is no in-kernel irqchip")
        return self.chips.routing.signal_msi(msi)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD."""
        self.eventfds.irqfd(fd, gsi, flags, resamplefd)

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""
        self.eventfds.ioeventfd(fd, addr, len, datamatch, flags)

    # --- the rest of the API -----------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on a VM."""
        return capabilities.check_extension(cap)

    def x86_set_msr_filter(self, flags: int, ranges: Sequence[abi.MsrFilterRange]) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        msr_filter = MsrFilter(flags, ranges)
        with self.lock:
            self.msr_filter = msr_filter
            for vcpu in self.vcpus:
                vcpu.call_soon(partial(vcpu.set_msr_filter, msr_filter))

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: checked and otherwise without effect, as on AMD processors."""
        if address > 0xFFFF_FFFF - 3 * 4096 + 1:
            raise kvm_error(errno.EINVAL, f"address={address:#x}, expected three pages below 4 GiB")

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: EINVAL after the first vCPU; without effect on AMD."""
        if self.vcpus:
            raise kvm_error(errno.EINVAL, "vCPUs exist: the identity map's address can't change")

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: EBUSY after the first vCPU."""
        with self.lock:
            if self.vcpus:
                raise kvm_error(errno.EBUSY, "vCPUs exist: the boot processor can't change")
            self.bsp_vcpu_id = id
            if self.chips is not None:
                self.apply_options(self.chips)

    def get_clock(self) -> abi.kvm_clock_data:
        """KVM_GET_CLOCK."""
        return kvmclock.get_clock(self)

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """KVM_SET_CLOCK."""
        kvmclock.set_clock(self, clock)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a VM (KVM API section 7)."""
        vm_caps.enable_cap(self, cap, args[0] if args else 0)

    # --- time --------------------------------------------------------------------------------------

    def update_masterclock(self) -> None:
        """Let every vCPU rewrite its time structure."""
        self.make_all_cpus_request(KVM_REQ_CLOCK_UPDATE)

    # --- logging, life -----------------------------------------------------------------------------

    def log_limited(self, logger: logging.Logger, message: str, *args: object) -> None:
        """Log what a guest can provoke: at most ten lines in five seconds."""
        now = time.monotonic()
        if now - self._log_window_start > _LOG_INTERVAL_S:
            self._log_window_start = now
            self._log_count = 0
        self._log_count += 1
        if self._log_count <= _LOG_BURST:
            logger.info(message, *args)

    def log_invalid_vmcb(self, vcpu: VcpuState) -> None:
        """Log the fields that make VMRUN refuse a VMCB."""
        q = vcpu.q
        self.log_limited(
            log,
            "vcpu%d: VMRUN failed: cr0=%#x cr3=%#x cr4=%#x efer=%#x rip=%#x event_inj=%#x",
            vcpu.vcpu_id,
            q[V.CR0],
            q[V.CR3],
            q[V.CR4],
            q[V.EFER],
            q[V.RIP],
            q[V.EVENT_INJ],
        )

    def stats(self) -> dict[str, int]:
        """Counters with the names of KVM's binary statistics."""
        return vm_stats(self)

    def close(self) -> None:
        """End the VM: every KVM_RUN returns, the chips' timers stop, memory is let go, requests are EBADF."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
        refuse_requests(self, abi.File.VM)
        self.make_all_cpus_request(KVM_REQ_VM_DEAD)
        for vcpu in self.vcpus:
            vcpu.cpu.set_timer(0)
        self.eventfds.close()
        if self.chips is not None:
            self.chips.close()
        self._drop_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
