# SPDX-License-Identifier: Apache-2.0
"""The ioctls of a vCPU: one method each (KVM API section 4, vcpu ioctls)."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import Final

from softkvm import abi
from softkvm.abi.x86 import request_sizes as sizes
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.ioctl import serve, with_mutex
from softkvm.kvm.stats import Statistic
from softkvm.kvm.x86 import debug as debugging
from softkvm.kvm.x86 import events as pending
from softkvm.kvm.x86 import fpu as fpu_state
from softkvm.kvm.x86 import mce, tsc
from softkvm.kvm.x86 import msrs as msr_access
from softkvm.kvm.x86 import regs as registers
from softkvm.kvm.x86.cpuid import check_entry_count
from softkvm.kvm.x86.exceptions import X86Exception
from softkvm.kvm.x86.features import (
    X86_FEATURE_GBPAGES,
    X86_FEATURE_TSC_DEADLINE_TIMER,
    X86_FEATURE_WAITPKG,
    X86_FEATURE_X2APIC,
)
from softkvm.kvm.x86.hyperv import vcpu_caps as hyperv_caps
from softkvm.kvm.x86.hyperv import vp as hyperv_vp
from softkvm.kvm.x86.hyperv.cpuid import get_supported_hv_cpuid
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.mmu.fault import pre_fault_memory
from softkvm.kvm.x86.mmu.paging import walk
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.pmu import pmu
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.stats import VCPU_STATS, vcpu_stats
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.vcpu import Vcpu
from softkvm.kvm.x86.xen import attributes as xen_attributes
from softkvm.kvm.x86.xen import clock as xen_clock

_U64: Final = (1 << 64) - 1
_RUNNABLE: Final = abi.KVM_MP_STATE_RUNNABLE
_HALTED: Final = abi.KVM_MP_STATE_HALTED
_MP_STATES: Final = frozenset(
    {
        abi.KVM_MP_STATE_RUNNABLE,
        abi.KVM_MP_STATE_UNINITIALIZED,
        abi.KVM_MP_STATE_INIT_RECEIVED,
        abi.KVM_MP_STATE_HALTED,
        abi.KVM_MP_STATE_SIPI_RECEIVED,
    }
)


class VcpuIoctls(Vcpu):
    """A vCPU of x86 as userspace drives it (implements :class:`softkvm.api.Vcpu`)."""

    def __repr__(self) -> str:
        state = "closed" if self.closed else "running" if self.running else f"at RIP {self.q[V.RIP]:#x}"
        return f"<softkvm.kvm.Vcpu {self.vcpu_id}: {state}>"

    @property
    def kvm_run(self) -> abi.kvm_run:
        """The shared page as a structure."""
        return self._kvm_run

    def get_regs(self) -> abi.kvm_regs:
        """KVM_GET_REGS."""
        return registers.get_regs(self)

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """KVM_SET_REGS."""
        registers.set_regs(self, regs)

    def get_sregs(self) -> abi.kvm_sregs:
        """KVM_GET_SREGS."""
        return registers.get_sregs(self)

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """KVM_SET_SREGS."""
        registers.set_sregs(self, sregs)

    def get_sregs2(self) -> abi.kvm_sregs2:
        """KVM_GET_SREGS2."""
        return registers.get_sregs2(self)

    def set_sregs2(self, sregs: abi.kvm_sregs2) -> None:
        """KVM_SET_SREGS2."""
        registers.set_sregs2(self, sregs)

    def get_fpu(self) -> abi.kvm_fpu:
        """KVM_GET_FPU."""
        return fpu_state.get_fpu(self)

    def set_fpu(self, fpu: abi.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        fpu_state.set_fpu(self, fpu)

    def get_xsave(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE."""
        return fpu_state.get_xsave(self)

    def get_xsave2(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE2: the silicon has no components beyond those of the structure."""
        return fpu_state.get_xsave(self)

    def get_nested_state(self) -> abi.kvm_nested_state:
        """KVM_GET_NESTED_STATE: a guest that has no SVM runs none itself, with the global interrupt flag set."""
        return abi.kvm_nested_state(
            flags=abi.KVM_STATE_NESTED_GIF_SET,
            format=abi.KVM_STATE_NESTED_FORMAT_SVM,
            size=ctypes.sizeof(abi.kvm_nested_state),
        )

    def set_nested_state(self, state: abi.kvm_nested_state) -> None:
        """KVM_SET_NESTED_STATE: without EFER.SVME there is the one state (KVM API 4.115)."""
        expected = self.get_nested_state()
        sizes.NESTED_BYTES.check(state.size)
        if (state.format, state.flags) != (expected.format, expected.flags):
            raise kvm_error(
                errno.EINVAL,
                f"format={state.format} flags={state.flags:#x}, expected KVM_STATE_NESTED_FORMAT_SVM, "
                "KVM_STATE_NESTED_GIF_SET: the guest has no SVM",
            )

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        """KVM_SET_XSAVE."""
        fpu_state.set_xsave(self, xsave)

    def get_xcrs(self) -> abi.kvm_xcrs:
        """KVM_GET_XCRS."""
        return fpu_state.get_xcrs(self)

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        fpu_state.set_xcrs(self, xcrs)

    def get_msrs(self, indices: Sequence[int]) -> list[int]:
        """KVM_GET_MSRS: values up to the first MSR that cannot be read; E2BIG for 256 or more."""
        sizes.NMSRS.check(len(indices))
        values = []
        for index in indices:
            value = msr_access.get_msr(self, index, host=True)
            if value is None:
                break
            values.append(value)
        return values

    def set_msrs(self, msrs: abi.MsrValues) -> int:
        """KVM_SET_MSRS: how many were set, up to the first that cannot be; E2BIG for 256 or more."""
        pairs = abi.msr_pairs(msrs)
        sizes.NMSRS.check(len(pairs))
        count = 0
        for index, data in pairs:
            if not msr_access.set_msr(self, index, data, host=True):
                break
            count += 1
        return count

    def pre_fault_memory(self, range: abi.kvm_pre_fault_memory) -> None:
        """KVM_PRE_FAULT_MEMORY."""
        pre_fault_memory(self, range)

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE."""
        mce.setup_mce(self, mcg_cap)

    def x86_set_mce(self, event: abi.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE."""
        mce.set_mce(self, event)

    def _lapic(self) -> Lapic:
        if self.apic is None:
            raise kvm_error(errno.EINVAL, "the vCPU has no in-kernel local APIC")
        return self.apic

    def get_lapic(self) -> abi.kvm_lapic_state:
        """KVM_GET_LAPIC."""
        return abi.kvm_lapic_state.from_buffer_copy(self._lapic().get_state())

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""
        self._lapic().set_state(bytes(lapic))
        self.make_request(KVM_REQ_EVENT)

    def tpr_access_reporting(self, enabled: int, flags: int = 0) -> None:
        """KVM_TPR_ACCESS_REPORTING; without effect where userspace has the local APIC."""
        if flags:
            raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected 0")
        if self.apic is not None:
            self.apic.tpr_access_reporting = bool(enabled)

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR."""
        self._lapic()
        assert self.vapic is not None
        if not self.vapic.set_address(vapic_addr):
            raise kvm_error(errno.EINVAL, f"vapic_addr={vapic_addr:#x}, where the guest has no memory")

    def get_mp_state(self) -> abi.kvm_mp_state:
        """KVM_GET_MP_STATE, with a pending INIT or start-up IPI taken; a running vCPU takes it by itself."""
        if self.apic is not None and not self.running:
            self.apic.accept_events()
        state = self.mp_state
        if state == _HALTED and self.pv_unhalted:
            state = _RUNNABLE
        return abi.kvm_mp_state(mp_state=state)

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE: EINVAL for states that x86 doesn't have, or not without a local APIC."""
        value = state.mp_state
        if value not in _MP_STATES or (self.apic is None and value != _RUNNABLE):
            raise kvm_error(errno.EINVAL, f"mp_state={value}, expected 0 to 4, or 0 without an in-kernel APIC")
        if value == abi.KVM_MP_STATE_SIPI_RECEIVED:
            self.mp_state = abi.KVM_MP_STATE_INIT_RECEIVED
            self._lapic().pending_events |= 2
        else:
            self.mp_state = value
        self.make_request(KVM_REQ_EVENT)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        return pending.get_vcpu_events(self)

    def set_vcpu_events(self, events: abi.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        pending.set_vcpu_events(self, events)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        return debugging.get_debugregs(self)

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        debugging.set_debugregs(self, debugregs)

    def set_cpuid(self, entries: Sequence[abi.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID: as set_cpuid2, of leaves that don't look at ECX."""
        names = ("function", "eax", "ebx", "ecx", "edx")
        self.set_cpuid2([abi.kvm_cpuid_entry2(**{name: getattr(e, name) for name in names}) for e in entries])

    def set_cpuid2(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: E2BIG for too many entries; EINVAL once the vCPU has run, unless nothing changes."""
        check_entry_count(entries)
        if self.exit_counts:
            # Bits that follow registers are as they were given, or as KVM_GET_CPUID2 has them now.
            wanted = [bytes(e) for e in entries]
            if all(wanted != [bytes(e) for e in known] for known in (self.cpuid.entries, self.cpuid.get())):
                raise kvm_error(errno.EINVAL, "the vCPU has run: its CPUID can't change any more")
            return
        self.cpuid.set(self, entries)
        hyperv_vp.cpuid_changed(self)
        xen_clock.update_tsc_info(self)
        pmu.refresh(self)
        svm.set_instruction_intercepts(self)
        svm.recalc_msr_intercepts(self)
        self.cpu.waitpkg = self.cpuid.has(X86_FEATURE_WAITPKG)
        leaf = self.cpuid.leaf(0x8000_0008, 0)
        self.maxphyaddr = leaf[0] & 0xFF if leaf is not None and leaf[0] & 0xFF else 36
        self.guest_has_gbpages = self.cpuid.has(X86_FEATURE_GBPAGES)
        if self.apic is not None:
            self.apic.cpuid_changed(
                x2apic=self.cpuid.has(X86_FEATURE_X2APIC),
                tsc_deadline=self.cpuid.has(X86_FEATURE_TSC_DEADLINE_TIMER),
                maxphyaddr=self.maxphyaddr,
            )
            self.apic.masks_lvtpc = self.cpuid.intel_compatible

    def get_cpuid2(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        return self.cpuid.get()

    def get_supported_hv_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID."""
        return get_supported_hv_cpuid(lapic_in_kernel=self.apic is not None)

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: EINVAL for no vector, ENXIO with in-kernel chips, EEXIST if one waits."""
        if not 0 <= irq < abi.KVM_NR_INTERRUPTS:
            raise kvm_error(errno.EINVAL, f"irq={irq}, expected 0 to 255")
        if self.apic is not None and not self.vm.split_irqchip:
            raise kvm_error(errno.ENXIO, "interrupts come from the in-kernel chips")
        if self.pending_external_vector >= 0 or (self.apic is None and self.interrupt_injected):
            raise kvm_error(errno.EEXIST, "a vector is waiting already")
        if self.apic is None and self.ready_for_interrupt_injection():
            self.queue_interrupt(irq, soft=False)  # under way, and so part of the vCPU's events
        else:
            self.pending_external_vector = irq
        self.request_event()

    def nmi(self) -> None:
        """KVM_NMI."""
        self.inject_nmi()

    def smi(self) -> None:
        """KVM_SMI: there is no system management mode."""
        raise kvm_error(errno.ENOTTY, "there is no system management mode (KVM_CAP_X86_SMM is 0)")

    def set_guest_debug(self, debug: abi.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        debugging.set_guest_debug(self, debug)

    def translate(self, linear_address: int) -> abi.kvm_translation:
        """KVM_TRANSLATE. All ones is no physical address: KVM says "none" by it."""
        result = abi.kvm_translation(linear_address=linear_address)
        try:
            translation = walk(self, linear_address, 0, set_bits=False)
        except X86Exception:
            result.physical_address = _U64
        else:
            result.physical_address = translation.gpa
        if result.physical_address != _U64:
            result.valid = 1
            result.writeable = 1
        return result

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; 0 is the processor's own frequency. EINVAL for one that the TSC ratio cannot make."""
        tsc.set_khz(self, tsc.check_khz(khz))

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.tsc_khz

    def has_device_attr(self, group: int, attr: int) -> None:
        """KVM_HAS_DEVICE_ATTR: KVM_VCPU_TSC_OFFSET of KVM_VCPU_TSC_CTRL is all there is."""
        if (group, attr) != (abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET):
            raise kvm_error(errno.ENXIO, f"group={group} attr={attr}, expected KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET")

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR: KVM_VCPU_TSC_OFFSET, what is added to the host's TSC, modulo 2**64."""
        self.has_device_attr(group, attr)
        return self.tsc_offset

    def set_device_attr(self, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR: KVM_VCPU_TSC_OFFSET; new vCPUs get the same."""
        self.has_device_attr(group, attr)
        tsc.set_offset(self, self.vm.tsc.write_offset(self, value))

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL."""
        kvmclock.kvmclock_ctrl(self)

    def xen_vcpu_set_attr(self, attr: abi.kvm_xen_vcpu_attr) -> None:
        """KVM_XEN_VCPU_SET_ATTR."""
        xen_attributes.vcpu_set_attr(self, attr)

    def xen_vcpu_get_attr(self, type: int) -> abi.kvm_xen_vcpu_attr:
        """KVM_XEN_VCPU_GET_ATTR."""
        return xen_attributes.vcpu_get_attr(self, type)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on a vCPU."""
        if cap == abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
            self.pv_cpuid_enforce = bool(args and args[0])
            return
        if not hyperv_caps.enable_cap(self, cap, args[0] if args else 0):
            raise kvm_error(errno.EINVAL, f"cap={cap}, expected one that can be enabled on a vCPU")

    @property
    def arch_stats(self) -> Sequence[Statistic]:
        """The table of :mod:`.stats`."""
        return VCPU_STATS

    def stats(self) -> dict[str, int]:
        """Counters with the names of KVM's binary statistics, and the exits by reason."""
        return vcpu_stats(self)


abi.check_requests(VcpuIoctls, abi.requests_of(abi.File.VCPU))
serve(VcpuIoctls, abi.requests_of(abi.File.VCPU), with_mutex, but=("run",))
