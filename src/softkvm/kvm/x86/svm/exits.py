# SPDX-License-Identifier: Apache-2.0
"""Handlers of the exit codes (APM vol. 2, appendix C): the dispatch table of the SVM module.

A handler returns 1 to enter the guest again and 0 to leave for userspace.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.pages import PAGE_SHIFT
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import io, reset
from softkvm.kvm.x86.emulate import system as emulate_system
from softkvm.kvm.x86.exceptions import (
    DR6_ACTIVE_LOW,
    DR6_BD,
    DR7_GD,
    X86Exception,
    inject_emulated_exception,
    inject_gp,
    queue_exception,
    queue_exception_e,
)
from softkvm.kvm.x86.features import X86_FEATURE_MWAIT
from softkvm.kvm.x86.halt import halt
from softkvm.kvm.x86.hyperv import hypercalls as hyperv_hypercalls
from softkvm.kvm.x86.mmu.fault import page_fault
from softkvm.kvm.x86.mmu.tdp_mmu import RET_PF_EMULATE
from softkvm.kvm.x86.msr_exits import exit_msr, read_msr, write_msr
from softkvm.kvm.x86.paravirt import hypercalls, vmware
from softkvm.kvm.x86.pmu import pmu
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm import avic, svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.debug import bp_interception, db_interception
from softkvm.kvm.x86.svm.svm import skip_emulated_instruction
from softkvm.kvm.x86.svm.vmcb import (
    EVTINJ_VALID,
    EXIT_INFO_1,
    EXIT_INFO_2,
    EXIT_INT_INFO,
    PFERR_GUEST_FINAL,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

log = logging.getLogger(__name__)

Handler = Callable[["Vcpu"], int]

_U32: Final = (1 << 32) - 1
#: kvm_run.flags' first byte.
_RUN_FLAGS_B: Final = 2 * run_page.FLAGS_W
#: VMCALL and VMMCALL.
_HYPERCALLS: Final = (b"\x0f\x01\xc1", b"\x0f\x01\xd9")
#: SYSENTER and SYSEXIT, which AMD's processors don't have in long mode.
_FAST_CALLS: Final = (b"\x0f\x34", b"\x0f\x35", b"\x48\x0f\x35")
_DECODE_ASSIST_MOV: Final = 1 << 63
#: A yield that takes less than this, in ns, found nobody who wanted the host's processor.
_YIELD_TO_NOBODY_NS: Final = 20_000


# --- the frequent ones -------------------------------------------------------------------------


def intr_interception(vcpu: Vcpu) -> int:
    """A kick or the timer: what it was for is found on the way back into the guest."""
    vcpu.check_interrupt()
    apic = vcpu.apic
    if apic is not None and apic.timer.deadline_ns:
        apic.inject_timer_irqs()
    return 1


def cpuid_interception(vcpu: Vcpu) -> int:
    """CPUID."""
    if vcpu.cpuid_faulting and vcpu.b[V.CPL]:
        inject_gp(vcpu)
        return 1
    gpr = vcpu.gpr
    gpr[0], gpr[3], gpr[1], gpr[2] = vcpu.cpuid.answer(gpr[0] & _U32, gpr[1] & _U32)
    return skip_emulated_instruction(vcpu)


def npf_interception(vcpu: Vcpu) -> int:
    """Nested page fault: map the page, or emulate the access where there is no memory."""
    q = vcpu.q
    gpa, error = q[EXIT_INFO_2], q[EXIT_INFO_1]
    # Devices are accessed again and again: where the last frame without memory is meant, nothing is to be looked up.
    known = gpa >> PAGE_SHIFT == vcpu.mmio_gfn and vcpu.vm.memslots is vcpu.mmio_slots and error & PFERR_GUEST_FINAL
    if not known and page_fault(vcpu, gpa, error) != RET_PF_EMULATE:
        return 1
    # There is no memory, or it is a write to read-only memory.
    if q[EXIT_INT_INFO] & EVTINJ_VALID:
        return _event_vectoring_error(vcpu)
    if not known and error & V.PFERR_GUEST_PAGE and not error & PFERR_GUEST_FINAL:
        gpa = -1  # the walk of the guest's tables faulted: this isn't the operand's address
    return vcpu.emulator.mmio(gpa)


def _event_vectoring_error(vcpu: Vcpu) -> int:
    """The access was one of an event's delivery (APM vol. 2, 15.7.2), not of the instruction at RIP.

    KVM can't carry out a delivery: KVM_EXIT_INTERNAL_ERROR with EXITINTINFO, the exit's code and information, the
    guest-physical address, and the processor (``kvm_prepare_event_vectoring_exit``). The event stays queued.
    """
    q = vcpu.q
    data = (q[EXIT_INT_INFO] & _U32, q[V.EXIT_CODE], q[EXIT_INFO_1], q[EXIT_INFO_2], vcpu.vcpu_id)
    vcpu.internal_error(abi.KVM_INTERNAL_ERROR_DELIVERY_EV, data)
    return 0


def msr_interception(vcpu: Vcpu) -> int:
    """RDMSR and WRMSR; one that raises #GP doesn't advance RIP."""
    gpr = vcpu.gpr
    index = gpr[1] & _U32
    if vcpu.q[EXIT_INFO_1] & 1:
        data = (gpr[2] & _U32) << 32 | gpr[0] & _U32
        if not write_msr(vcpu, index, data):
            return msr_refused(vcpu, index, data, write=True)
    else:
        value = read_msr(vcpu, index)
        if value is None:
            return msr_refused(vcpu, index, 0, write=False)
        gpr[0] = value & _U32
        gpr[2] = value >> 32
    return skip_emulated_instruction(vcpu)


def msr_refused(vcpu: Vcpu, index: int, data: int, *, write: bool) -> int:
    """Leave for userspace if it asked for that, else #GP."""
    if exit_msr(vcpu, index, data, skip_emulated_instruction, write=write):
        return 0
    inject_gp(vcpu)
    return 1


def halt_interception(vcpu: Vcpu) -> int:
    """HLT."""
    result = skip_emulated_instruction(vcpu)
    return halt(vcpu) & result


def pause_interception(vcpu: Vcpu) -> int:
    """Too many PAUSEs: the guest spins on a lock whose holder may not be running."""
    if _softcpu.sched_yield() < _YIELD_TO_NOBODY_NS:
        svm.grow_ple_window(vcpu)
    else:
        svm.shrink_ple_window(vcpu)
    return skip_emulated_instruction(vcpu)


def bus_lock_interception(vcpu: Vcpu) -> int:
    """A locked operation across cache lines, which has not happened: KVM_EXIT_X86_BUS_LOCK (KVM API, 8.15 and 5)."""
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_X86_BUS_LOCK
    vcpu.run_b[_RUN_FLAGS_B] |= abi.KVM_RUN_X86_BUS_LOCK
    vcpu.complete_userspace_io = partial(_complete_bus_lock, rip=svm.linear_rip(vcpu))
    return 0


def _complete_bus_lock(vcpu: Vcpu, rip: int) -> int:
    """The guest may take this bus lock now, if userspace has not sent it elsewhere."""
    vcpu.run_b[_RUN_FLAGS_B] &= ~abi.KVM_RUN_X86_BUS_LOCK
    if svm.linear_rip(vcpu) == rip:
        vcpu.w[V.BUS_LOCK_COUNTER] = 1
    return 1


def interrupt_window_interception(vcpu: Vcpu) -> int:
    """The guest can take an interrupt now."""
    svm.clear_irq_window(vcpu)
    vcpu.make_request(KVM_REQ_EVENT)
    vcpu.stat_irq_window_exits += 1
    return 1


def vmmcall_interception(vcpu: Vcpu) -> int:
    """VMMCALL."""
    if vcpu.hyperv_enabled and hyperv_hypercalls.is_enabled(vcpu):
        return hyperv_hypercalls.hypercall(vcpu, skip_emulated_instruction)
    if not hypercalls.emulate_hypercall(vcpu, skip_emulated_instruction):
        return 0
    return skip_emulated_instruction(vcpu)


# --- control and debug registers ---------------------------------------------------------------


def cr_interception(vcpu: Vcpu) -> int:
    """MOV to or from a control register, by the decode assist; LMSW, SMSW and CLTS by the emulator."""
    info = vcpu.q[V.EXIT_INFO_1]
    code = vcpu.q[V.EXIT_CODE]
    if not info & _DECODE_ASSIST_MOV:
        return vcpu.emulator.emulate()
    register = info & 0xF
    mask = (1 << 64) - 1 if vcpu.is_64bit_code() else _U32
    try:
        if code == V.EXIT_CR0_SEL_WRITE:
            emulate_system.write_cr(vcpu.emulator, 0, vcpu.gpr[register] & mask)
        elif code >= V.EXIT_WRITE_CR0:
            emulate_system.write_cr(vcpu.emulator, code - V.EXIT_WRITE_CR0, vcpu.gpr[register] & mask)
        else:
            vcpu.gpr[register] = emulate_system.read_cr(vcpu.emulator, code - V.EXIT_READ_CR0) & mask
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
        return 1
    return skip_emulated_instruction(vcpu)


def cr8_write_interception(vcpu: Vcpu) -> int:
    """MOV to CR8: leaves for userspace when that lowers the priority and the chips are not in the kernel."""
    old = cr.kvm_get_cr8(vcpu)
    result = cr_interception(vcpu)
    if vcpu.apic is not None:
        return result
    if old <= cr.kvm_get_cr8(vcpu):
        return result
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_SET_TPR
    return 0


def dr_interception(vcpu: Vcpu) -> int:
    """MOV to or from a debug register, intercepted while the guest's debugger owns them."""
    code = vcpu.q[V.EXIT_CODE]
    write = code >= V.EXIT_WRITE_DR0
    number = code - (V.EXIT_WRITE_DR0 if write else V.EXIT_READ_DR0)
    register = vcpu.q[V.EXIT_INFO_1] & 0xF
    if vcpu.guest_debug & abi.KVM_GUESTDBG_USE_HW_BP and vcpu.guest_dr7 & DR7_GD:
        vcpu.exit_debug(abi.DB_VECTOR, DR6_BD | DR6_ACTIVE_LOW, svm.linear_rip(vcpu))
        return 0
    try:
        emulate_system.check_dr(vcpu.emulator, number)
        if write:
            if not cr.kvm_set_dr(vcpu, number, vcpu.gpr[register]):
                inject_gp(vcpu)
                return 1
        else:
            vcpu.gpr[register] = cr.kvm_get_dr(vcpu, number)
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
        return 1
    return skip_emulated_instruction(vcpu)


# --- exceptions --------------------------------------------------------------------------------


def ud_interception(vcpu: Vcpu) -> int:
    """#UD: the other vendor's instructions, the forced-emulation prefix, or the guest's own."""
    emulator = vcpu.emulator
    try:
        code = emulator.fetch()
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
        return 1
    if vcpu.vm.params.force_emulation_prefix and code.startswith(b"\x0f\x0bkvm"):
        vcpu.q[V.RIP] += 5
        return emulator.emulate(forced=True)
    if code.startswith(_HYPERCALLS) or (vcpu.cpuid.intel_compatible and code.startswith(_FAST_CALLS)):
        return emulator.emulate()
    queue_exception(vcpu, abi.UD_VECTOR)
    return 1


def ac_interception(vcpu: Vcpu) -> int:
    """#AC goes to the guest."""
    queue_exception_e(vcpu, abi.AC_VECTOR, 0)
    return 1


def mc_interception(vcpu: Vcpu) -> int:
    """#MC: memory that was mapped for the guest has been taken away; EFAULT, as where the kernel gets no pages.

    The next KVM_RUN looks again what is there. That is nothing until somebody maps something at this very address.
    """
    hva = vcpu.q[EXIT_INFO_2]
    vcpu.vm.host_unmapped(hva, 1)
    vcpu.vm.machine.fill_holes(hva)
    raise kvm_error(errno.EFAULT, f"guest memory at {hva:#x} is not there, or not for writing")


def gp_interception(vcpu: Vcpu) -> int:
    """#GP, intercepted for the VMware backdoor ports."""
    error_code = vcpu.q[V.EXIT_INFO_1]
    if error_code:
        queue_exception_e(vcpu, abi.GP_VECTOR, error_code)
        return 1
    return vmware.gp_interception(vcpu)


# --- the rest ----------------------------------------------------------------------------------


def nmi_interception(vcpu: Vcpu) -> int:
    """A physical NMI: the host's performance counters, or nothing of ours."""
    pmu.nmi(vcpu)
    return 1


def iret_interception(vcpu: Vcpu) -> int:
    """IRET with NMIs masked: they are unmasked once it has been executed."""
    vcpu.stat_nmi_window_exits += 1
    vcpu.awaiting_iret_completion = True
    vcpu.nmi_iret_rip = vcpu.q[V.RIP]
    vcpu.d[V.INTERCEPT_WORD3] &= ~V.IRET
    vcpu.make_request(KVM_REQ_EVENT)
    return 1


def shutdown_interception(vcpu: Vcpu) -> int:
    """Triple fault: KVM_EXIT_SHUTDOWN, the vCPU as after INIT."""
    reset.vcpu_reset(vcpu, True)
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_SHUTDOWN
    return 0


def invlpg_interception(vcpu: Vcpu) -> int:
    """INVLPG: only the translations of one page, but all may go."""
    vcpu.flush_tlb_guest()
    return skip_emulated_instruction(vcpu)


def skip_interception(vcpu: Vcpu) -> int:
    """An instruction that has nothing to do: caches are coherent."""
    return skip_emulated_instruction(vcpu)


def monitor_mwait_interception(vcpu: Vcpu) -> int:
    """MONITOR and MWAIT do nothing; #UD if the guest's CPUID lacks them and the quirk is off."""
    if not vcpu.vm.has_quirk(abi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS) and not vcpu.cpuid.has(X86_FEATURE_MWAIT):
        queue_exception(vcpu, abi.UD_VECTOR)
        return 1
    return skip_emulated_instruction(vcpu)


def emulate_on_interception(vcpu: Vcpu) -> int:
    """An instruction that the emulator carries out."""
    return vcpu.emulator.emulate()


def ud_on_interception(vcpu: Vcpu) -> int:
    """An instruction that the guest doesn't have."""
    queue_exception(vcpu, abi.UD_VECTOR)
    return 1


def rdpmc_interception(vcpu: Vcpu) -> int:
    """RDPMC: the guest's counters, or VMware's."""
    index = vcpu.gpr[1] & _U32
    value = vmware.read_pmc(vcpu, index)
    if value is None:
        value = pmu.rdpmc(vcpu, index)
    if value is None:
        inject_gp(vcpu)
        return 1
    vcpu.gpr[0] = value & _U32
    vcpu.gpr[2] = value >> 32
    return skip_emulated_instruction(vcpu)


def xsetbv_interception(vcpu: Vcpu) -> int:
    """XSETBV, skipped by its decoded length like any other instruction."""
    gpr = vcpu.gpr
    value = (gpr[2] & _U32) << 32 | gpr[0] & _U32
    if vcpu.b[V.CPL] or not cr.kvm_set_xcr(vcpu, gpr[1] & _U32, value):
        inject_gp(vcpu)
        return 1
    return skip_emulated_instruction(vcpu)


def rsm_interception(vcpu: Vcpu) -> int:
    """RSM outside of system management mode."""
    queue_exception(vcpu, abi.UD_VECTOR)
    return 1


def task_switch_interception(vcpu: Vcpu) -> int:
    """A hardware task switch (APM vol. 2, 12.3)."""
    from softkvm.kvm.x86.emulate import task_switch

    return task_switch.interception(vcpu)


#: Exit code -> handler.
EXIT_HANDLERS: Final[dict[int, Handler]] = {
    V.EXIT_READ_CR0: cr_interception,
    V.EXIT_READ_CR0 + 3: cr_interception,
    V.EXIT_READ_CR0 + 4: cr_interception,
    V.EXIT_READ_CR0 + 8: cr_interception,
    V.EXIT_WRITE_CR0: cr_interception,
    V.EXIT_WRITE_CR0 + 3: cr_interception,
    V.EXIT_WRITE_CR0 + 4: cr_interception,
    V.EXIT_WRITE_CR0 + 8: cr8_write_interception,
    V.EXIT_CR0_SEL_WRITE: cr_interception,
    **{V.EXIT_READ_DR0 + n: dr_interception for n in range(8)},
    **{V.EXIT_WRITE_DR0 + n: dr_interception for n in range(8)},
    V.EXIT_EXCP_BASE + abi.DB_VECTOR: db_interception,
    V.EXIT_EXCP_BASE + abi.BP_VECTOR: bp_interception,
    V.EXIT_EXCP_BASE + abi.UD_VECTOR: ud_interception,
    V.EXIT_EXCP_BASE + abi.GP_VECTOR: gp_interception,
    V.EXIT_EXCP_BASE + abi.AC_VECTOR: ac_interception,
    V.EXIT_EXCP_BASE + abi.MC_VECTOR: mc_interception,
    V.EXIT_INTR: intr_interception,
    V.EXIT_NMI: nmi_interception,
    V.EXIT_SMI: nmi_interception,
    V.EXIT_INIT: nmi_interception,
    V.EXIT_VINTR: interrupt_window_interception,
    V.EXIT_RDPMC: rdpmc_interception,
    V.EXIT_CPUID: cpuid_interception,
    V.EXIT_RSM: rsm_interception,
    V.EXIT_IRET: iret_interception,
    V.EXIT_INVD: skip_interception,
    V.EXIT_PAUSE: pause_interception,
    V.EXIT_HLT: halt_interception,
    V.EXIT_INVLPG: invlpg_interception,
    V.EXIT_INVLPGA: ud_on_interception,
    V.EXIT_IOIO: io.io_interception,
    V.EXIT_MSR: msr_interception,
    V.EXIT_TASK_SWITCH: task_switch_interception,
    V.EXIT_SHUTDOWN: shutdown_interception,
    V.EXIT_VMRUN: ud_on_interception,
    V.EXIT_VMMCALL: vmmcall_interception,
    V.EXIT_VMLOAD: ud_on_interception,
    V.EXIT_VMSAVE: ud_on_interception,
    V.EXIT_STGI: ud_on_interception,
    V.EXIT_CLGI: ud_on_interception,
    V.EXIT_SKINIT: ud_on_interception,
    V.EXIT_RDTSC: emulate_on_interception,
    V.EXIT_RDTSCP: ud_on_interception,
    V.EXIT_WBINVD: skip_interception,
    V.EXIT_MONITOR: monitor_mwait_interception,
    V.EXIT_MWAIT: monitor_mwait_interception,
    V.EXIT_XSETBV: xsetbv_interception,
    V.EXIT_RDPRU: ud_on_interception,
    V.EXIT_INVPCID: ud_on_interception,
    V.EXIT_BUSLOCK: bus_lock_interception,
    V.EXIT_NPF: npf_interception,
    V.EXIT_IDLE_HLT: halt_interception,
    **avic.EXIT_HANDLERS,
}
