# SPDX-License-Identifier: Apache-2.0
"""State of a vCPU: registers, FPU, CPUID, events, debugging, clock (KVM API, section 4)."""

from ctypes import Array, Structure
from typing import Annotated

from softkvm.abi._layout import layout, u8, u8s, u8s2, u16, u16s, u32, u32s, u64, u64s
from softkvm.abi.x86.irqchip import KVM_NR_INTERRUPTS

DE_VECTOR = 0
DB_VECTOR = 1
BP_VECTOR = 3
OF_VECTOR = 4
BR_VECTOR = 5
UD_VECTOR = 6
NM_VECTOR = 7
DF_VECTOR = 8
TS_VECTOR = 10
NP_VECTOR = 11
SS_VECTOR = 12
GP_VECTOR = 13
PF_VECTOR = 14
MF_VECTOR = 16
AC_VECTOR = 17
MC_VECTOR = 18
XM_VECTOR = 19
VE_VECTOR = 20

# types of VMs (KVM_CREATE_VM, KVM_CAP_VM_TYPES)
KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1


@layout
class kvm_regs(Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@layout
class kvm_segment(Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741 - the kernel's name
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@layout
class kvm_dtable(Structure):
    base: u64
    limit: u16
    padding: Annotated[u16s, 3]


@layout
class kvm_sregs(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[u64s, (KVM_NR_INTERRUPTS + 63) // 64]


KVM_SREGS2_FLAGS_PDPTRS_VALID = 1


@layout
class kvm_sregs2(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: Annotated[u64s, 4]


@layout
class kvm_fpu(Structure):
    """x87 and SSE state; ``ftwx`` is the abridged tag word of FXSAVE."""

    fpr: Annotated[u8s2, 8, 16]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[u8s2, 16, 16]
    mxcsr: u32
    pad2: u32


@layout
class kvm_xsave(Structure):
    """The XSAVE area in the layout of CPUID leaf 0xD."""

    region: Annotated[u32s, 1024]


KVM_MAX_XCRS = 16


@layout
class kvm_xcr(Structure):
    xcr: u32
    reserved: u32
    value: u64


@layout
class kvm_xcrs(Structure):
    nr_xcrs: u32
    flags: u32
    xcrs: Annotated[Array[kvm_xcr], kvm_xcr, KVM_MAX_XCRS]
    padding: Annotated[u64s, 16]


# --- CPUID ----------------------------------------------------------------------------------------

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # spelt as the kernel spells it
KVM_CPUID_FLAG_STATEFUL_FUNC = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT = 1 << 2


@layout
class kvm_cpuid_entry(Structure):
    function: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: u32


@layout
class kvm_cpuid(Structure):
    nent: u32
    padding: u32


@layout
class kvm_cpuid_entry2(Structure):
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[u32s, 3]


@layout
class kvm_cpuid2(Structure):
    """Header of KVM_SET_CPUID2 and its like; see :func:`softkvm.abi.flexible`."""

    nent: u32
    padding: u32


# --- events and run state -------------------------------------------------------------------------

KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x02
KVM_VCPUEVENT_VALID_SHADOW = 0x04
KVM_VCPUEVENT_VALID_SMM = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20

KVM_X86_SHADOW_INT_MOV_SS = 0x01
KVM_X86_SHADOW_INT_STI = 0x02


@layout
class kvm_vcpu_events_exception(Structure):
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@layout
class kvm_vcpu_events_interrupt(Structure):
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@layout
class kvm_vcpu_events_nmi(Structure):
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@layout
class kvm_vcpu_events_smi(Structure):
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@layout
class kvm_vcpu_events_triple_fault(Structure):
    pending: u8


@layout
class kvm_vcpu_events(Structure):
    exception: kvm_vcpu_events_exception
    interrupt: kvm_vcpu_events_interrupt
    nmi: kvm_vcpu_events_nmi
    sipi_vector: u32
    flags: u32
    smi: kvm_vcpu_events_smi
    triple_fault: kvm_vcpu_events_triple_fault
    reserved: Annotated[u8s, 26]
    exception_has_payload: u8
    exception_payload: u64


# --- debugging ------------------------------------------------------------------------------------

KVM_GUESTDBG_ENABLE = 0x00000001
KVM_GUESTDBG_SINGLESTEP = 0x00000002
KVM_GUESTDBG_USE_SW_BP = 0x00010000
KVM_GUESTDBG_USE_HW_BP = 0x00020000
KVM_GUESTDBG_INJECT_DB = 0x00040000
KVM_GUESTDBG_INJECT_BP = 0x00080000
KVM_GUESTDBG_BLOCKIRQ = 0x00100000


@layout
class kvm_debugregs(Structure):
    db: Annotated[u64s, 4]
    dr6: u64
    dr7: u64
    flags: u64
    reserved: Annotated[u64s, 9]


@layout
class kvm_debug_exit_arch(Structure):
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@layout
class kvm_guest_debug_arch(Structure):
    debugreg: Annotated[u64s, 8]


@layout
class kvm_guest_debug(Structure):
    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


# --- the rest -------------------------------------------------------------------------------------


@layout
class kvm_tpr_access_ctl(Structure):
    enabled: u32
    flags: u32
    reserved: Annotated[u32s, 8]


@layout
class kvm_vapic_addr(Structure):
    vapic_addr: u64


@layout
class kvm_x86_mce(Structure):
    status: u64
    addr: u64
    misc: u64
    mcg_status: u64
    bank: u8
    pad1: Annotated[u8s, 7]
    pad2: Annotated[u64s, 3]


KVM_X86_QUIRK_LINT0_REENABLED = 1 << 0
KVM_X86_QUIRK_CD_NW_CLEARED = 1 << 1
KVM_X86_QUIRK_LAPIC_MMIO_HOLE = 1 << 2
KVM_X86_QUIRK_OUT_7E_INC_RIP = 1 << 3
KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
KVM_X86_QUIRK_FIX_HYPERCALL_INSN = 1 << 5
KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS = 1 << 6
KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7

KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
KVM_X86_DISABLE_EXITS_HLT = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3
KVM_X86_DISABLE_VALID_EXITS = 0xF

KVM_BUS_LOCK_DETECTION_OFF = 1 << 0
KVM_BUS_LOCK_DETECTION_EXIT = 1 << 1
KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1
KVM_PMU_CAP_DISABLE = 1 << 0
KVM_PMU_EVENT_ALLOW = 0
KVM_PMU_EVENT_DENY = 1
KVM_PMU_EVENT_FLAG_MASKED_EVENTS = 1 << 0
KVM_PMU_EVENT_FLAGS_VALID_MASK = KVM_PMU_EVENT_FLAG_MASKED_EVENTS
#: The most events of a filter.
KVM_PMU_EVENT_FILTER_MAX_EVENTS = 300
KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT = 56
KVM_PMU_MASKED_ENTRY_UMASK_MASK = 0xFF << 56
KVM_PMU_MASKED_ENTRY_UMASK_MATCH = 0xFF << 8
KVM_PMU_MASKED_ENTRY_EXCLUDE = 1 << 55

KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
KVM_X86_XCOMP_GUEST_SUPP = 0

KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2
KVM_SYNC_X86_VALID_FIELDS = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS


@layout
class kvm_sync_regs(Structure):
    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


def KVM_PMU_ENCODE_MASKED_ENTRY(event_select: int, mask: int, match: int, exclude: bool) -> int:
    """Return an event of a filter: unit masks that are ``match`` in ``mask``'s bits, or with ``exclude`` not."""
    return (
        event_select & 0xFF
        | (event_select & 0xF00) << 24
        | (mask & 0xFF) << KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT
        | (match & 0xFF) << 8
        | (KVM_PMU_MASKED_ENTRY_EXCLUDE if exclude else 0)
    )


@layout
class kvm_pmu_event_filter(Structure):
    action: u32
    nevents: u32
    fixed_counter_bitmap: u32
    flags: u32
    pad: Annotated[u32s, 4]


KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3


@layout
class kvm_clock_data(Structure):
    """KVM_GET_CLOCK/KVM_SET_CLOCK; ``clock`` and ``realtime`` in nanoseconds."""

    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: Annotated[u32s, 4]
