# SPDX-License-Identifier: Apache-2.0
"""What the KVM API has on x86, beside what every architecture has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from softkvm import abi
from softkvm.api import common


class Kvm(common.Kvm, Protocol):
    """What ``/dev/kvm`` is on x86."""

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM."""

    def get_supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""

    def get_emulated_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID."""

    def get_supported_hv_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID: Hyper-V's leaves, as KVM can give them to a guest."""

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs to save and restore."""

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS on the system: values of feature MSRs, up to the first that cannot be read."""

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED: the bits of IA32_MCG_CAP that KVM_X86_SETUP_MCE takes."""


class Vm(common.Vm, Protocol):
    """A virtual machine of x86.

    KVM_CREATE_IRQCHIP makes two i8259, an IOAPIC, and a local APIC in every vCPU created later.
    """

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU: *id* is the APIC id; EINVAL if KVM_CAP_MAX_VCPU_ID says that none is so high."""

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2."""

    def create_pit(self) -> None:
        """KVM_CREATE_PIT: create_pit2 with KVM_PIT_SPEAKER_DUMMY."""

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: irq_line that tells: > 0 delivered, 0 coalesced, < 0 ignored."""

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """KVM_GET_IRQCHIP."""

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""

    def get_pit(self) -> abi.kvm_pit_state:
        """KVM_GET_PIT: get_pit2 without the flags."""

    def set_pit(self, state: abi.kvm_pit_state) -> None:
        """KVM_SET_PIT: set_pit2 with the flags as they are."""

    def get_pit2(self) -> abi.kvm_pit_state2:
        """KVM_GET_PIT2."""

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: how many pages shadow page tables may take; EINVAL below 64.

        Nested page tables, those of the two-dimensional MMU, don't count.
        """

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES: the limit; a fiftieth of the slots' pages unless userspace has set one.

        ENOTTY since Linux 6.3: the result is a C int, which is too short for the number.
        """

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: three pages for VMX's real mode."""

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page for VMX's real mode."""

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: the bootstrap processor; before any vCPU is created."""

    def get_clock(self) -> abi.kvm_clock_data:
        """KVM_GET_CLOCK."""

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """KVM_SET_CLOCK."""

    def hyperv_eventfd(self, conn_id: int, fd: int, flags: int = 0) -> None:
        """KVM_HYPERV_EVENTFD: a guest's HVCALL_SIGNAL_EVENT of a connection signals eventfd *fd*.

        KVM_HYPERV_EVENTFD_DEASSIGN takes it away. EINVAL for other flags and an id of more than 24 bits, EEXIST for a
        connection that has one, ENOENT to take away what isn't there.
        """

    def xen_hvm_config(self, config: abi.kvm_xen_hvm_config) -> None:
        """KVM_XEN_HVM_CONFIG: the guest's write of an MSR places a page for Xen's hypercalls; MSR 0: no longer.

        Filled by KVM with KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, and hypercalls are KVM_EXIT_XEN then; else with pages of
        userspace's. EINVAL for other flags, and for pages with that one.
        """

    def xen_hvm_set_attr(self, attr: abi.kvm_xen_hvm_attr) -> None:
        """KVM_XEN_HVM_SET_ATTR: one KVM_XEN_ATTR_TYPE_* of Xen's interfaces.

        ENOENT for another type, EINVAL for what it can't be, EFAULT for a place without memory.
        """

    def xen_hvm_get_attr(self, type: int) -> abi.kvm_xen_hvm_attr:
        """KVM_XEN_HVM_GET_ATTR: ENOENT for a type that there is not, or that can't be read."""

    def xen_hvm_evtchn_send(self, event: abi.kvm_irq_routing_xen_evtchn) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND: make a port of the guest's pending; a masked one, too.

        EINVAL for a port, priority or vCPU that there is not and without a shared_info, EFAULT if its memory is gone.
        """

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ on a VM: the TSC's frequency of vCPUs that are created from now on."""

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ on a VM."""

    def x86_set_msr_filter(self, flags: int, ranges: Sequence[abi.MsrFilterRange]) -> None:
        """KVM_X86_SET_MSR_FILTER: which MSRs the guest may read and write; replaces the filter before.

        EINVAL for unknown flags, more than 16 ranges, a range of more than 12288 MSRs, and
        KVM_MSR_FILTER_DEFAULT_DENY without a range; EFAULT for a bitmap that is shorter than its range.
        """

    def set_pmu_event_filter(
        self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER: what performance counters may count, or with KVM_PMU_EVENT_DENY, what not.

        *events* are event numbers and unit masks as in an event select register, or with
        KVM_PMU_EVENT_FLAG_MASKED_EVENTS of KVM_PMU_ENCODE_MASKED_ENTRY; a bit each of *fixed_counter_bitmap* is a fixed
        counter. EINVAL for another action, other flags, or bits that a masked event doesn't have; E2BIG for more than
        300 events.
        """

    def reinject_control(self, pit_reinject: int) -> None:
        """KVM_REINJECT_CONTROL."""


class Vcpu(common.Vcpu, Protocol):
    """A virtual processor of x86."""

    @property
    def kvm_run(self) -> abi.kvm_run:
        """The shared page as a structure over :attr:`shared`."""

    def get_regs(self) -> abi.kvm_regs:
        """KVM_GET_REGS."""

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """KVM_SET_REGS."""

    def get_sregs(self) -> abi.kvm_sregs:
        """KVM_GET_SREGS."""

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """KVM_SET_SREGS."""

    def get_sregs2(self) -> abi.kvm_sregs2:
        """KVM_GET_SREGS2."""

    def set_sregs2(self, sregs: abi.kvm_sregs2) -> None:
        """KVM_SET_SREGS2."""

    def get_fpu(self) -> abi.kvm_fpu:
        """KVM_GET_FPU."""

    def set_fpu(self, fpu: abi.kvm_fpu) -> None:
        """KVM_SET_FPU."""

    def get_xsave(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE."""

    def get_xsave2(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE2: as get_xsave; on a device, what the structure has no room for (AMX) is cut off."""

    def get_nested_state(self) -> abi.kvm_nested_state:
        """KVM_GET_NESTED_STATE: the header; without a nested guest it is all there is."""

    def set_nested_state(self, state: abi.kvm_nested_state) -> None:
        """KVM_SET_NESTED_STATE. EINVAL for a state that the vCPU cannot be in, or a size below the header's."""

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        """KVM_SET_XSAVE."""

    def get_xcrs(self) -> abi.kvm_xcrs:
        """KVM_GET_XCRS."""

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS: the values, up to the first MSR that cannot be read."""

    def set_msrs(self, msrs: abi.MsrValues) -> int:
        """KVM_SET_MSRS: how many were set; stops at the first that cannot be written.

        *msrs* is values by index, or a sequence of (index, value) pairs, which are written in their order: it may
        hold an index twice.
        """

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE: IA32_MCG_CAP, with the number of banks in bits 7:0; EINVAL for what isn't supported."""

    def x86_set_mce(self, event: abi.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE: report an error in a bank; EINVAL for a bank that isn't there or no valid status."""

    def get_lapic(self) -> abi.kvm_lapic_state:
        """KVM_GET_LAPIC."""

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""

    def tpr_access_reporting(self, enabled: int, flags: int = 0) -> None:
        """KVM_TPR_ACCESS_REPORTING: KVM_EXIT_TPR_ACCESS after each instruction that reads or writes the APIC's TPR.

        Writes by way of CR8 don't count. EINVAL for *flags*.
        """

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR: where the guest has its TPR in memory, with what it needs to know to use it; 0: nowhere.

        Byte 0 is the TPR, taken over after each exit; byte 1 the priority class of the interrupt in service, byte 3 the
        highest requested vector. EINVAL without an in-kernel local APIC, or for an address without memory.
        """

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""

    def set_vcpu_events(self, events: abi.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""

    def get_debugregs(self) -> abi.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""

    def set_cpuid(self, entries: Sequence[abi.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID: set_cpuid2 for leaves without subleaves."""

    def set_cpuid2(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2."""

    def get_supported_hv_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID: Hyper-V's leaves, as KVM can give them to this vCPU."""

    def get_cpuid2(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""

    def nmi(self) -> None:
        """KVM_NMI."""

    def smi(self) -> None:
        """KVM_SMI."""

    def set_guest_debug(self, debug: abi.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: EINVAL for what KVM_CAP_TSC_CONTROL doesn't cover; 0 is the host's frequency."""

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""

    def xen_vcpu_set_attr(self, attr: abi.kvm_xen_vcpu_attr) -> None:
        """KVM_XEN_VCPU_SET_ATTR: one KVM_XEN_VCPU_ATTR_TYPE_* of Xen's interfaces; errors as of xen_hvm_set_attr."""

    def xen_vcpu_get_attr(self, type: int) -> abi.kvm_xen_vcpu_attr:
        """KVM_XEN_VCPU_GET_ATTR: ENOENT for a type that there is not, EINVAL for one that can't be read."""

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped."""
