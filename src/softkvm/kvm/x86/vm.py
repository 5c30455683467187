# SPDX-License-Identifier: Apache-2.0
"""A virtual machine of x86: chips, TSC and clock, quirks and options."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from functools import partial
from typing import Final

from softkvm import _softcpu, abi
from softkvm.abi.sizes import Size
from softkvm.kvm import vm
from softkvm.kvm.capabilities import KVM_MAX_IRQ_ROUTES, KVM_MAX_VCPU_IDS
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.ioctl import serve, uninterrupted
from softkvm.kvm.irq.irqchip import Irqchip
from softkvm.kvm.memory.attributes import PrivateFrames
from softkvm.kvm.params import Params
from softkvm.kvm.tlb import TlbRange
from softkvm.kvm.x86 import tsc, vm_caps
from softkvm.kvm.x86.avic_vcpu import AvicVcpu
from softkvm.kvm.x86.capabilities import OF_PRIVATE_MEMORY, check_extension
from softkvm.kvm.x86.hyperv import connections, synic
from softkvm.kvm.x86.irqchip.i8254 import Pit
from softkvm.kvm.x86.irqchip.kernel import KernelIrqchip
from softkvm.kvm.x86.mmu.root_tdp import flush_remote_tlbs_range
from softkvm.kvm.x86.mmu.spte import MMIO_SPTE_GEN_MASK
from softkvm.kvm.x86.mmu.tdp_mmu import TdpMmu
from softkvm.kvm.x86.msr_filter import MsrFilter
from softkvm.kvm.x86.paravirt import kvmclock, steal_time
from softkvm.kvm.x86.pmu.event_filter import PmuEventFilter
from softkvm.kvm.x86.pmu.pmu import filter_changed
from softkvm.kvm.x86.requests import KVM_REQ_CLOCK_UPDATE, KVM_REQ_IOAPIC_EOI_EXIT
from softkvm.kvm.x86.state import VmState
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm.avic import Avic
from softkvm.kvm.x86.tsc import TscSynchronizer
from softkvm.kvm.x86.vcpu_ioctls import VcpuIoctls
from softkvm.kvm.x86.xen import attributes as xen_attributes
from softkvm.kvm.x86.xen import evtchn, hypercall_page, timer_queue, upcall

#: Limits of what shadow page tables may take.
KVM_MIN_ALLOC_MMU_PAGES: Final = 64
KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO: Final = 50

IOAPIC_PINS: Final = Size("pins of userspace's IOAPICs", KVM_MAX_IRQ_ROUTES, errno.EINVAL, where=__name__)


class Vm(VmState, vm.Vm):
    """One virtual machine of x86 (implements :class:`softkvm.api.Vm`)."""

    def __init__(self, params: Params, type: int = abi.KVM_X86_DEFAULT_VM) -> None:
        super().__init__(params)
        if type == abi.KVM_X86_SW_PROTECTED_VM:
            self.private_frames = PrivateFrames()
        self.mmu = TdpMmu(
            self.machine,
            params.max_huge_page_level,
            self.host_mappings,
            params.pte_prefetch_num,
            self.private_frames,
        )
        self.tsc = TscSynchronizer()

    # --- what virtual machines of all architectures ask for ------------------------------------------

    def arch_vcpu_precreate(self, vcpu_id: int) -> None:
        """EINVAL for an id that KVM_CAP_MAX_VCPU_ID excludes; without one, every id may be from now on."""
        self.max_vcpu_ids = self.max_vcpu_ids or KVM_MAX_VCPU_IDS
        if vcpu_id >= self.max_vcpu_ids:
            raise kvm_error(errno.EINVAL, f"id={vcpu_id}, expected below {self.max_vcpu_ids} (KVM_CAP_MAX_VCPU_ID)")

    def arch_create_vcpu(self, vcpu_id: int) -> VcpuIoctls:
        """A vCPU whose APIC id is ``vcpu_id``."""
        return VcpuIoctls(self, vcpu_id) if self.avic is None else AvicVcpu(self, vcpu_id)

    def create_vcpu(self, id: int) -> VcpuIoctls:
        """KVM_CREATE_VCPU: EINVAL for an id out of range or too many vCPUs, EEXIST for a used one."""
        created = super().create_vcpu(id)
        assert isinstance(created, VcpuIoctls)
        return created

    def arch_check_extension(self, cap: int) -> int:
        """The table of :mod:`.capabilities`; private memory in VMs that have it."""
        if cap in OF_PRIVATE_MEMORY and self.private_frames is None:
            return 0
        if cap == abi.KVM_CAP_PMU_CAPABILITY and not self.params.enable_pmu:
            return 0
        return check_extension(cap)

    def arch_enable_cap(self, cap: int, value: int) -> None:
        """The table of :mod:`.vm_caps`."""
        vm_caps.enable_cap(self, cap, value)

    def arch_irqchip(self) -> Irqchip | None:
        """PICs and IOAPIC, or the local APICs alone."""
        return self.chips

    def arch_memslots_updated(self, generation: int) -> bool:
        """MMIO SPTEs hold some bits of the generation: when those wrap, old ones would look valid.

        What a guest of Xen's could not be told of may have its memory now.
        """
        if self.xen.config.msr:
            evtchn.memory_has_come(self)
        return not generation & MMIO_SPTE_GEN_MASK and self.mmu.zap_all()

    def arch_flush_remote_tlbs(self) -> bool:
        """Flush every root, as :mod:`.mmu.root_tdp` has it."""
        return flush_remote_tlbs_range(self, None)

    def arch_flush_remote_tlbs_range(self, ranges: Sequence[TlbRange]) -> bool:
        """The same for some frames."""
        return flush_remote_tlbs_range(self, ranges)

    def arch_destroy(self) -> None:
        """Stop the chips' timers, and Xen's; let eventfds go."""
        if self.chips is not None:
            self.chips.close()
        self.hyperv.connections = {}
        timer_queue.close(self)
        self.xen.send_ports = {}

    # --- interrupt chips -----------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: EEXIST if there is one, EINVAL after the first vCPU."""
        with self.lock:
            self.check_open()
            if self.chips is not None:
                raise kvm_error(errno.EEXIST, "the irqchip exists")
            if self.vcpus:
                raise kvm_error(errno.EINVAL, "vCPUs exist: the irqchip has to come first")
            chips = KernelIrqchip(_softcpu.clock_ns, min_timer_period_us=self.params.min_timer_period_us)
            self.apply_options(chips)
            chips.attach(self.pio_bus, self.mmio_bus)
            if self.early_pit is not None:
                chips.create_pit(self.early_pit, self.pio_bus)
            self._install_chips(chips)

    def create_split_irqchip(self, pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: local APICs only; *pins* GSIs are those of userspace's IOAPICs.

        EINVAL for too many pins, EEXIST if there is an irqchip or a vCPU.
        """
        with self.lock:
            self.check_open()
            IOAPIC_PINS.check(pins, called="args[0]")
            if self.chips is not None or self.vcpus:
                raise kvm_error(errno.EEXIST, "an irqchip or vCPUs exist: the irqchip has to come first")
            chips = KernelIrqchip(
                _softcpu.clock_ns,
                split=True,
                reserved_pins=pins,
                eoi_exit=self._ioapic_eoi_exit,
                min_timer_period_us=self.params.min_timer_period_us,
            )
            self.apply_options(chips)
            self._install_chips(chips)
            self.split_irqchip = True

    def _install_chips(self, chips: KernelIrqchip) -> None:
        """Let the VM have *chips*; GSIs may be routed to SynICs."""
        chips.routing.set_sint = partial(synic.set_sint, self)
        chips.routing.on_change.append(partial(synic.routing_changed, self))
        chips.routing.evtchn_target = partial(evtchn.route, self)
        self.chips = chips
        upcall.install(self)
        if self.params.avic:
            self.avic = Avic(self)
            chips.apic_map.on_change = self.avic.recalculate

    def _ioapic_eoi_exit(self, vcpu_id: int, vector: int) -> None:
        """An EOI that userspace's IOAPIC waits for: KVM_EXIT_IOAPIC_EOI from that vCPU."""
        vcpu = self.vcpu_by_id[vcpu_id]
        assert isinstance(vcpu, VcpuIoctls)
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
        """KVM_CREATE_PIT2: EEXIST for a second one, ENOENT with chips that have no PIC, or with vCPUs and no chips.

        It may come before the irqchip: kernels before 6.9 have it so, and kvmtool asked in that order before 2024.
        Later kernels have ENOENT for that.
        """
        with self.lock:
            self.check_open()
            if self.chips is not None:
                self.chips.create_pit(flags, self.pio_bus)
            elif self.vcpus:
                raise kvm_error(errno.ENOENT, "there is no in-kernel irqchip")
            elif self.early_pit is not None:
                raise kvm_error(errno.EEXIST, "the PIT exists")
            else:
                self.early_pit = flags

    def create_pit(self) -> None:
        """KVM_CREATE_PIT."""
        self.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)

    def kernel_irqchip(self) -> KernelIrqchip:
        """Return the in-kernel chips; ENXIO without."""
        if self.chips is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel irqchip")
        return self.chips

    def _pit(self) -> Pit:
        pit = self.kernel_irqchip().pit
        if pit is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel PIT")
        return pit

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return self.kernel_irqchip().set_gsi(irq, level)

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        return self.kernel_irqchip().get_irqchip(chip_id)

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self.kernel_irqchip().set_irqchip(chip)

    def get_pit(self) -> abi.kvm_pit_state:
        """KVM_GET_PIT."""
        return abi.kvm_pit_state(channels=self._pit().get_state().channels)

    def set_pit(self, state: abi.kvm_pit_state) -> None:
        """KVM_SET_PIT."""
        self._pit().set_channels(state)

    def get_pit2(self) -> abi.kvm_pit_state2:
        """KVM_GET_PIT2."""
        return self._pit().get_state()

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        self._pit().set_state(state)

    def reinject_control(self, pit_reinject: int) -> None:
        """KVM_REINJECT_CONTROL."""
        self._pit().set_reinject(bool(pit_reinject))

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

    def hyperv_eventfd(self, conn_id: int, fd: int, flags: int = 0) -> None:
        """KVM_HYPERV_EVENTFD."""
        connections.hyperv_eventfd(self, conn_id, fd, flags)

    # --- Xen's interfaces ----------------------------------------------------------------------------

    def xen_hvm_config(self, config: abi.kvm_xen_hvm_config) -> None:
        """KVM_XEN_HVM_CONFIG."""
        hypercall_page.check_config(config)
        with self.lock, self.xen.lock:
            old, self.xen.config = self.xen.config, type(config).from_buffer_copy(config)
            if bool(old.msr) != bool(config.msr):
                for vcpu in self.vcpus:
                    steal_time.account(vcpu)
                    vcpu.call_soon(vcpu.choose_exit_handlers)
        if (old.flags ^ config.flags) & abi.KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE:
            self.make_all_cpus_request(KVM_REQ_CLOCK_UPDATE)

    def xen_hvm_set_attr(self, attr: abi.kvm_xen_hvm_attr) -> None:
        """KVM_XEN_HVM_SET_ATTR."""
        xen_attributes.hvm_set_attr(self, attr)

    def xen_hvm_get_attr(self, type: int) -> abi.kvm_xen_hvm_attr:
        """KVM_XEN_HVM_GET_ATTR."""
        return xen_attributes.hvm_get_attr(self, type)

    def xen_hvm_evtchn_send(self, event: abi.kvm_irq_routing_xen_evtchn) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND."""
        evtchn.send(self, event)

    # --- processors, MSRs, time ----------------------------------------------------------------------

    def x86_set_msr_filter(self, flags: int, ranges: Sequence[abi.MsrFilterRange]) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        msr_filter = MsrFilter(flags, ranges)
        with self.lock:
            self.msr_filter = msr_filter
            for vcpu in self.vcpus:
                vcpu.call_soon(partial(svm.set_msr_filter, vcpu, msr_filter))

    def set_pmu_event_filter(
        self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER."""
        event_filter = PmuEventFilter(action, events, fixed_counter_bitmap, flags)
        with self.lock:
            self.pmu_event_filter = event_filter
            for vcpu in self.vcpus:
                vcpu.call_soon(partial(filter_changed, vcpu))

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: kept, and without effect: there are nested page tables only, which don't count."""
        if pages < KVM_MIN_ALLOC_MMU_PAGES:
            raise kvm_error(errno.EINVAL, f"pages={pages}, expected at least {KVM_MIN_ALLOC_MMU_PAGES}")
        self.requested_mmu_pages = pages

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES, as a C int."""
        pages = self.requested_mmu_pages
        if not pages and self.memslots.generation:  # the first slot sets the limit
            slot_pages = sum(slot.npages for slot in self.memslots)
            pages = max(slot_pages // KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO, KVM_MIN_ALLOC_MMU_PAGES)
        return ctypes.c_int(pages).value

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

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: the frequency of vCPUs from now on; 0 is the processor's own."""
        self.default_tsc_khz = tsc.check_khz(khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.default_tsc_khz

    def get_clock(self) -> abi.kvm_clock_data:
        """KVM_GET_CLOCK."""
        return kvmclock.get_clock(self)

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """KVM_SET_CLOCK."""
        kvmclock.set_clock(self, clock)


abi.check_requests(Vm, abi.requests_of(abi.File.VM), but=("irq_line", "get_dirty_log"))
serve(Vm, abi.requests_of(abi.File.VM), uninterrupted, but=("get_dirty_log",))
