# SPDX-License-Identifier: Apache-2.0
"""The SVM vendor module: the VMCB's state, segments and control registers, event injection, skipping.

Source: AMD64 Architecture Programmer's Manual, volume 2, chapter 15. Exit handlers are in
:mod:`svm_exits <softkvm.kvm.x86.svm.exits>`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from softkvm.abi import (
    DB_VECTOR,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SVME,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    X86_CR0_CD,
    X86_CR0_ET,
    X86_CR0_NW,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_EFLAGS_FIXED,
    X86_EFLAGS_IF,
    X86_EFLAGS_RF,
    X86_EFLAGS_TF,
)
from softkvm.kvm.x86.exceptions import (
    DR6_ACTIVE_LOW,
    DR6_BS,
    SOFT_EXCEPTIONS,
    multiple_exception,
    queue_exception_p,
)
from softkvm.kvm.x86.features import X86_FEATURE_INVPCID, X86_FEATURE_RDTSCP
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.vmcb import INT_STATE_B, NEXT_RIP, RFLAGS, RIP

if TYPE_CHECKING:
    from softkvm.kvm.x86.msr_filter import MsrFilter
    from softkvm.kvm.x86.state import VcpuState as Vcpu

log = logging.getLogger(__name__)


#: What the end of an instruction looks at.
STEP_FLAGS: Final = X86_EFLAGS_TF | X86_EFLAGS_RF
MSR_PAT_DEFAULT: Final = 0x0007_0406_0007_0406
ASID_GUEST: Final = 1

#: MSRs that the guest reads and writes without an exit: they live in the VMCB or the register block.
DIRECT_ACCESS_MSRS: Final = (
    0xC000_0081,  # STAR
    0x0000_0174,  # SYSENTER_CS
    0x0000_0175,  # SYSENTER_ESP
    0x0000_0176,  # SYSENTER_EIP
    0xC000_0100,  # FS_BASE
    0xC000_0101,  # GS_BASE
    0xC000_0102,  # KERNEL_GS_BASE
    0xC000_0082,  # LSTAR
    0xC000_0083,  # CSTAR
    0xC000_0084,  # SYSCALL_MASK
)
_SYSENTER_MSRS: Final = (0x0000_0175, 0x0000_0176)

#: MSRPM: byte offset of the bits of each range of 0x2000 MSRs (APM vol. 2, 15.11).
_MSRPM_RANGES: Final = ((0x0000_0000, 0x0000), (0xC000_0000, 0x0800), (0xC001_0000, 0x1000))

_WORD3: Final = (
    V.INTR
    | V.NMI
    | V.SMI
    | V.INIT
    | V.SELECTIVE_CR0
    | V.RDPMC
    | V.CPUID
    | V.INVD
    | V.INVLPGA
    | V.IOIO_PROT
    | V.MSR_PROT
    | V.TASK_SWITCH
    | V.SHUTDOWN
    | V.HLT
    | V.RSM
)
_WORD4: Final = (
    V.VMRUN
    | V.VMMCALL
    | V.VMLOAD
    | V.VMSAVE
    | V.STGI
    | V.CLGI
    | V.SKINIT
    | V.WBINVD
    | V.XSETBV
    | V.RDPRU
    | V.MONITOR
    | V.MWAIT
)
_EXCEPTIONS: Final = 1 << 6 | 1 << 18 | 1 << 17 | 1 << 1  # UD, MC, AC, DB

_DATA_SEGMENT: Final = V.SEG_P | V.SEG_S | 3
_CODE_SEGMENT: Final = V.SEG_P | V.SEG_S | 0xB
_RESET_DATA_SEGMENTS: Final = (V.ES_OFFSET, V.SS_OFFSET, V.DS_OFFSET, V.FS_OFFSET, V.GS_OFFSET)


# --- set-up ------------------------------------------------------------------------------------


def set_msr_interception(msrpm: memoryview, msr: int, *, read: bool, write: bool) -> None:
    """Set the two permission bits of ``msr`` (set = intercept); MSRs outside the map always exit."""
    for base, offset in _MSRPM_RANGES:
        if base <= msr < base + 0x2000:
            bit = (msr - base) * 2
            byte = offset + (bit >> 3)
            shift = bit & 7
            msrpm[byte] = msrpm[byte] & ~(3 << shift) & 0xFF | (int(read) | int(write) << 1) << shift
            return
    raise ValueError(f"msr {msr:#x} is in no range of the MSR permission map")


def set_msr_filter(vcpu: Vcpu, msr_filter: MsrFilter | None) -> None:
    """Filter the guest's accesses to MSRs from now on; vCPU thread only."""
    vcpu.msr_filter = msr_filter
    recalc_msr_intercepts(vcpu)


def init_vmcb(vcpu: Vcpu) -> None:
    """Set up intercepts and the save area as after RESET or INIT."""
    b, d, q, w = vcpu.b, vcpu.d, vcpu.q, vcpu.w
    params = vcpu.vm.params
    vcpu.irq_window = False
    vcpu.cr8_intercepted = True
    d[V.INTERCEPT_CR] = V.CR0_READ | V.CR4_READ | V.CR0_WRITE | V.CR4_WRITE | V.CR8_WRITE
    d[V.INTERCEPT_DR] = 0
    d[V.INTERCEPT_WORD3] = _WORD3
    d[V.INTERCEPT_WORD4] = _WORD4
    d[V.INTERCEPT_WORD5] = 0
    q[V.IOPM_BASE_PA] = vcpu.vm.iopm.address
    q[V.MSRPM_BASE_PA] = vcpu.msrpm.address
    q[V.INT_CTL_Q] = V.V_INTR_MASKING
    d[V.ASID] = ASID_GUEST
    b[V.TLB_CTL] = V.TLB_CONTROL_FLUSH_ALL_ASID
    q[V.NESTED_CTL] = V.NP_ENABLE
    q[V.NESTED_CR3] = vcpu.vm.mmu.root_address
    q[V.INT_STATE] = 0
    q[V.EVENT_INJ] = 0
    for offset in _RESET_DATA_SEGMENTS:
        vcpu.vmcb.set_segment(offset, 0, _DATA_SEGMENT, 0xFFFF, 0)
    vcpu.vmcb.set_segment(V.CS_OFFSET, 0xF000, _CODE_SEGMENT, 0xFFFF, 0xFFFF_0000)
    vcpu.vmcb.set_segment(V.GDTR_OFFSET, 0, 0, 0xFFFF, 0)
    vcpu.vmcb.set_segment(V.IDTR_OFFSET, 0, 0, 0xFFFF, 0)
    vcpu.vmcb.set_segment(V.LDTR_OFFSET, 0, V.SEG_P | 2, 0xFFFF, 0)
    vcpu.vmcb.set_segment(V.TR_OFFSET, 0, V.SEG_P | 0xB, 0xFFFF, 0)
    b[V.CPL] = 0
    q[V.G_PAT] = MSR_PAT_DEFAULT
    q[V.CR3] = 0
    q[V.CR2] = 0
    q[V.RIP] = 0xFFF0
    q[V.RFLAGS] = X86_EFLAGS_FIXED
    q[V.DR6] = DR6_ACTIVE_LOW
    vcpu.saved_dr6 = None if vcpu.saved_dr6 is None else DR6_ACTIVE_LOW
    q[V.DR7] = 0x400
    q[V.DBGCTL] = 0
    if not vcpu.vm.pause_in_guest:
        w[V.PAUSE_FILTER_COUNT] = params.pause_filter_count
        w[V.PAUSE_FILTER_THRESH] = params.pause_filter_thresh
        d[V.INTERCEPT_WORD3] |= V.PAUSE
    if vcpu.vm.bus_lock_detection:
        d[V.INTERCEPT_WORD5] |= V.BUSLOCK
        w[V.BUS_LOCK_COUNTER] = 0
    if vcpu.vm.disable_hlt_exits:
        d[V.INTERCEPT_WORD3] &= ~V.HLT
    set_exception_intercepts(vcpu)
    set_instruction_intercepts(vcpu)
    vcpu.q[V.TSC_OFFSET] = vcpu.tsc_offset
    set_efer(vcpu, 0)
    # INIT leaves CD and NW alone (SDM vol. 3, table 9-1); RESET sets them.
    set_cr0(vcpu, (vcpu.cr0 & (X86_CR0_CD | X86_CR0_NW) if vcpu.init_event else X86_CR0_CD | X86_CR0_NW) | X86_CR0_ET)
    set_cr4(vcpu, 0)


# --- control registers -------------------------------------------------------------------------


def set_cr0(vcpu: Vcpu, cr0: int) -> None:
    """Load CR0 (checked by the caller), following long mode activation (APM vol. 2, 14.6.1)."""
    old = vcpu.cr0
    if vcpu.efer & EFER_LME:
        if not old & X86_CR0_PG and cr0 & X86_CR0_PG:
            vcpu.efer |= EFER_LMA
            vcpu.q[V.EFER] |= EFER_LMA | EFER_LME
        elif old & X86_CR0_PG and not cr0 & X86_CR0_PG:
            vcpu.efer &= ~EFER_LMA
            vcpu.q[V.EFER] &= ~(EFER_LMA | EFER_LME)
    vcpu.shadow_cr0 = cr0
    hcr0 = cr0
    if cr0 & (X86_CR0_CD | X86_CR0_NW) and vcpu.vm.cd_nw_cleared_quirk:
        hcr0 &= ~(X86_CR0_CD | X86_CR0_NW)
    vcpu.q[V.CR0] = hcr0
    if hcr0 == cr0:
        vcpu.d[V.INTERCEPT_CR] &= ~(V.CR0_READ | V.CR0_WRITE)
        vcpu.cr0_in_vmcb = True
    else:
        vcpu.d[V.INTERCEPT_CR] |= V.CR0_READ | V.CR0_WRITE
        vcpu.cr0_in_vmcb = False
    if (old ^ cr0) & (X86_CR0_PG | X86_CR0_WP | X86_CR0_PE):
        vcpu.flush_tlb_guest()


def set_cr4(vcpu: Vcpu, cr4: int) -> None:
    """Load CR4 (checked by the caller). Every changed bit that a translation depends on flushes them."""
    old = vcpu.cr4
    vcpu.cr4 = cr4
    vcpu.q[V.CR4] = cr4
    if old != cr4:
        vcpu.flush_tlb_guest()
        vcpu.cpuid.update_runtime(vcpu)


def set_efer(vcpu: Vcpu, efer: int) -> None:
    """Load EFER (checked by the caller). SVME is always on underneath: VMRUN demands it."""
    if (vcpu.efer ^ efer) & EFER_NX:
        vcpu.flush_tlb_guest()
    vcpu.efer = efer
    vcpu.q[V.EFER] = efer | EFER_SVME


# --- intercepts --------------------------------------------------------------------------------


def set_instruction_intercepts(vcpu: Vcpu) -> None:
    """Intercept RDTSCP and INVPCID when the guest's CPUID lacks them: their handler raises #UD.

    Without the intercepts they would work, as the silicon has them. RDPID can't be intercepted.
    """
    rdtscp = vcpu.cpuid.has(X86_FEATURE_RDTSCP)
    invpcid = vcpu.cpuid.has(X86_FEATURE_INVPCID)
    d = vcpu.d
    d[V.INTERCEPT_WORD4] = d[V.INTERCEPT_WORD4] & ~V.RDTSCP | (0 if rdtscp else V.RDTSCP)
    d[V.INTERCEPT_WORD5] = d[V.INTERCEPT_WORD5] & ~V.INVPCID | (0 if invpcid else V.INVPCID)


def grow_ple_window(vcpu: Vcpu) -> None:
    """After VMEXIT_PAUSE: let the guest spin longer before the next one, as leaving did not help it."""
    params = vcpu.vm.params
    by, base, count = params.pause_filter_count_grow, params.pause_filter_count, vcpu.w[V.PAUSE_FILTER_COUNT]
    if not vcpu.vm.pause_in_guest:
        grown = min(count * by if by < base else count + by, params.pause_filter_count_max)
        vcpu.w[V.PAUSE_FILTER_COUNT] = grown if by else base


def shrink_ple_window(vcpu: Vcpu) -> None:
    """The vCPU's thread had lost the host's processor: from here on the guest waits for something else."""
    params = vcpu.vm.params
    by, base, count = params.pause_filter_count_shrink, params.pause_filter_count, vcpu.w[V.PAUSE_FILTER_COUNT]
    if not vcpu.vm.pause_in_guest:
        vcpu.w[V.PAUSE_FILTER_COUNT] = max(count // by if by < base else count - by, base) if by else base


def recalc_msr_intercepts(vcpu: Vcpu) -> None:
    """Intercept those of the MSRs with direct access that the filter denies, and what an Intel guest needs.

    Intel's SYSENTER_ESP and _EIP have 64 bits, while AMD's SYSENTER uses 32 (APM vol. 2, 6.1.2): KVM keeps the upper
    halves.
    """
    msr_filter = vcpu.msr_filter
    for msr in DIRECT_ACCESS_MSRS:
        read = write = vcpu.cpuid.intel_compatible and msr in _SYSENTER_MSRS
        if msr_filter is not None:
            read |= not msr_filter.allows(msr, KVM_MSR_FILTER_READ)
            write |= not msr_filter.allows(msr, KVM_MSR_FILTER_WRITE)
        set_msr_interception(vcpu.permission_map, msr, read=read, write=write)


def set_exception_intercepts(vcpu: Vcpu) -> None:
    """Recompute the exception intercepts for guest debugging and module parameters."""
    word = _EXCEPTIONS
    if vcpu.guest_debug & 1 and vcpu.guest_debug & 0x10000:  # KVM_GUESTDBG_ENABLE, _USE_SW_BP
        word |= 1 << 3
    if vcpu.vm.params.enable_vmware_backdoor:
        word |= 1 << 13
    vcpu.d[V.INTERCEPT_EXCEPTION] = word


# --- event injection (APM vol. 2, 15.20) -------------------------------------------------------


def inject_exception(vcpu: Vcpu) -> None:
    """Give the queued exception to the processor."""
    exception = vcpu.exception
    event = exception.vector | V.EVTINJ_VALID | V.EVTINJ_TYPE_EXEPT
    if exception.has_error_code and vcpu.cr0 & X86_CR0_PE:
        event |= V.EVTINJ_VALID_ERR | exception.error_code << 32
    vcpu.q[V.EVENT_INJ] = event
    vcpu.injecting = True


def inject_nmi(vcpu: Vcpu) -> None:
    """Give an NMI to the processor; further ones are blocked until its IRET."""
    vcpu.q[V.EVENT_INJ] = V.EVTINJ_VALID | V.EVTINJ_TYPE_NMI | 2
    vcpu.injecting = True
    vcpu.nmi_masked = True
    vcpu.d[V.INTERCEPT_WORD3] |= V.IRET
    vcpu.stat_nmi_injections += 1


def inject_irq(vcpu: Vcpu) -> None:
    """Give the queued interrupt to the processor."""
    kind = V.EVTINJ_TYPE_SOFT if vcpu.interrupt_soft else V.EVTINJ_TYPE_INTR
    vcpu.q[V.EVENT_INJ] = vcpu.interrupt_nr | V.EVTINJ_VALID | kind
    vcpu.injecting = True
    vcpu.stat_irq_injections += 1


def interrupt_blocked(vcpu: Vcpu) -> bool:
    """Tell whether RFLAGS.IF or the interrupt shadow keep interrupts out."""
    return not vcpu.q[V.RFLAGS] & X86_EFLAGS_IF or bool(vcpu.b[V.INT_STATE_B] & V.INTERRUPT_SHADOW)


def nmi_blocked(vcpu: Vcpu) -> bool:
    """Tell whether a running NMI handler or the interrupt shadow keep NMIs out."""
    return vcpu.nmi_masked or bool(vcpu.b[V.INT_STATE_B] & V.INTERRUPT_SHADOW)


def enable_irq_window(vcpu: Vcpu) -> None:
    """Ask for VMEXIT_VINTR as soon as the guest can take an interrupt (V_IRQ with the highest priority)."""
    if vcpu.irq_window:
        return
    vcpu.irq_window = True
    vcpu.d[V.INT_VECTOR] = 0
    vcpu.d[V.INT_CTL] = vcpu.d[V.INT_CTL] & ~V.V_INTR_PRIO_MASK | V.V_IRQ | 0xF << V.V_INTR_PRIO_SHIFT | V.V_IGN_TPR
    vcpu.d[V.INTERCEPT_WORD3] |= V.VINTR


def clear_irq_window(vcpu: Vcpu) -> None:
    """Take the request for VMEXIT_VINTR back."""
    vcpu.irq_window = False
    vcpu.d[V.INT_CTL] &= ~(V.V_IRQ | V.V_INTR_PRIO_MASK | V.V_IGN_TPR)
    vcpu.d[V.INTERCEPT_WORD3] &= ~V.VINTR


def enable_nmi_window(vcpu: Vcpu) -> None:
    """Ask for an exit when the guest can take an NMI: its IRET, or one step past what blocks it."""
    if vcpu.nmi_masked and not vcpu.awaiting_iret_completion:
        return  # IRET is intercepted: that exit opens the window
    # An interrupt shadow, or IRET itself still to be executed: single-step over it.
    if not vcpu.nmi_singlestep:
        vcpu.nmi_singlestep_guest_rflags = vcpu.get_rflags()
        vcpu.nmi_singlestep = True
        vcpu.q[V.RFLAGS] |= X86_EFLAGS_TF | X86_EFLAGS_RF


def disable_nmi_singlestep(vcpu: Vcpu) -> None:
    """End the single step that opened an NMI window, restoring the guest's own TF and RF."""
    vcpu.nmi_singlestep = False
    if not vcpu.guest_debug & 2:  # KVM_GUESTDBG_SINGLESTEP
        flags = vcpu.nmi_singlestep_guest_rflags
        if not flags & X86_EFLAGS_TF:
            vcpu.q[V.RFLAGS] &= ~X86_EFLAGS_TF
        if not flags & X86_EFLAGS_RF:
            vcpu.q[V.RFLAGS] &= ~X86_EFLAGS_RF


def complete_interrupts(vcpu: Vcpu) -> None:
    """After an exit: forget what was delivered, queue again what EXITINTINFO says was interrupted.

    Called when something had been injected, or when EXITINTINFO is valid (APM vol. 2, 15.7.2). A software
    interrupt or exception that the guest itself raised isn't queued: its instruction is executed again.
    """
    injected = vcpu.injecting
    soft_injected = injected and vcpu.interrupt_injected and vcpu.interrupt_soft
    vcpu.injecting = False
    vcpu.q[V.EVENT_INJ] = 0
    vcpu.nmi_injected = False
    vcpu.exception.injected = False
    vcpu.interrupt_injected = False
    info = vcpu.q[V.EXIT_INT_INFO]
    if not info & V.EVTINJ_VALID:
        return
    vcpu.make_request(KVM_REQ_EVENT)
    vector = info & V.EVTINJ_VECTOR_MASK
    kind = info & V.EVTINJ_TYPE_MASK
    if kind == V.EVTINJ_TYPE_NMI:
        vcpu.nmi_injected = True
        vcpu.nmi_masked = True
    elif kind == V.EVTINJ_TYPE_EXEPT:
        if vector in SOFT_EXCEPTIONS and not injected:
            return
        error_code = info >> 32 if info & V.EVTINJ_VALID_ERR else None
        multiple_exception(vcpu, vector, error_code, reinject=True)
    elif kind == V.EVTINJ_TYPE_INTR:
        vcpu.queue_interrupt(vector, soft=False)
    elif kind == V.EVTINJ_TYPE_SOFT and soft_injected:
        vcpu.queue_interrupt(vector, soft=True)


# --- skipping ----------------------------------------------------------------------------------


def linear_rip(vcpu: Vcpu) -> int:
    """Return the linear address of the next instruction."""
    if vcpu.is_64bit_code():
        return vcpu.q[V.RIP]
    return (vcpu.q[V.CS_BASE] + vcpu.q[V.RIP]) & 0xFFFF_FFFF


def next_rip(vcpu: Vcpu) -> int | None:
    """Return RIP behind the intercepted instruction: NEXT_RIP, or by the decoded length where that isn't to be had.

    None for an instruction that can't be decoded.
    """
    q = vcpu.q
    if vcpu.nrips and q[NEXT_RIP]:
        return q[NEXT_RIP]
    length = vcpu.emulator.instruction_length()
    if not length:
        vcpu.vm.log_limited(log, "vcpu%d: cannot skip the instruction at rip %#x", vcpu.vcpu_id, q[RIP])
        return None
    rip = q[RIP] + length
    return rip if vcpu.is_64bit_code() else rip & 0xFFFF_FFFF


def skip_emulated_instruction(vcpu: Vcpu) -> int:
    """Advance RIP past the intercepted instruction, end its interrupt shadow and RFLAGS.RF (APM vol. 2, 13.1.3.2).

    Returns 1 to go on, 0 to leave for userspace (single step; an instruction that can't be decoded).
    """
    q = vcpu.q
    rip = q[NEXT_RIP] if vcpu.nrips else 0
    if not rip:
        decoded = next_rip(vcpu)
        if decoded is None:
            vcpu.emulator.report_failure()
            return 0
        rip = decoded
    q[RIP] = rip
    vcpu.b[INT_STATE_B] = 0
    flags = q[RFLAGS]
    if flags & STEP_FLAGS:
        q[RFLAGS] = flags & ~X86_EFLAGS_RF
        if flags & X86_EFLAGS_TF:
            return do_singlestep(vcpu)
    return 1


def do_singlestep(vcpu: Vcpu) -> int:
    """An emulated instruction ended with TF set: #DB for the guest or KVM_EXIT_DEBUG for its debugger."""
    if vcpu.guest_debug & 2:  # KVM_GUESTDBG_SINGLESTEP
        vcpu.exit_debug(DB_VECTOR, DR6_BS | DR6_ACTIVE_LOW, linear_rip(vcpu))
        return 0
    if vcpu.nmi_singlestep:
        disable_nmi_singlestep(vcpu)
        vcpu.make_request(KVM_REQ_EVENT)
        if not vcpu.get_rflags() & X86_EFLAGS_TF:
            return 1
    queue_exception_p(vcpu, DB_VECTOR, DR6_BS)
    return 1


# --- segments ----------------------------------------------------------------------------------


def code_bitness(vcpu: Vcpu) -> int:
    """Return 16, 32 or 64: the default size of the guest's code."""
    attrib = vcpu.w[V.CS_ATTRIB]
    if vcpu.efer & EFER_LMA and attrib & V.SEG_L:
        return 64
    return 32 if attrib & V.SEG_DB else 16
