# SPDX-License-Identifier: Apache-2.0
"""Exit reasons, and what ``struct kvm_run`` tells of each (KVM API, section 5)."""

from ctypes import Structure, Union
from typing import Annotated

from softkvm.abi._layout import chars, layout, u8, u8s, u16, u32, u64, u64s

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_S390_SIEIC = 13
KVM_EXIT_S390_RESET = 14
KVM_EXIT_DCR = 15
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_OSI = 18
KVM_EXIT_PAPR_HCALL = 19
KVM_EXIT_S390_UCONTROL = 20
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_S390_TSCH = 22
KVM_EXIT_EPR = 23
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_S390_STSI = 25
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_ARM_NISV = 28
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_RISCV_SBI = 35
KVM_EXIT_RISCV_CSR = 36
KVM_EXIT_NOTIFY = 37
KVM_EXIT_LOONGARCH_IOCSR = 38
KVM_EXIT_MEMORY_FAULT = 39

EXIT_REASON_NAMES = {value: name for name, value in globals().copy().items() if name.startswith("KVM_EXIT_")}
"""Name of every exit reason: ``{2: "KVM_EXIT_IO", ...}``."""

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_EXIT_HYPERV_SYNIC = 1
KVM_EXIT_HYPERV_HCALL = 2
KVM_EXIT_HYPERV_SYNDBG = 3
KVM_EXIT_XEN_HCALL = 1

KVM_RUN_X86_SMM = 1 << 0
KVM_RUN_X86_BUS_LOCK = 1 << 1
KVM_RUN_X86_GUEST_MODE = 1 << 2

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3
KVM_SYSTEM_EVENT_WAKEUP = 4
KVM_SYSTEM_EVENT_SUSPEND = 5
KVM_SYSTEM_EVENT_SEV_TERM = 6

KVM_NOTIFY_CONTEXT_INVALID = 1 << 0
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3

KVM_S390_RESET_POR = 1
KVM_S390_RESET_CLEAR = 2
KVM_S390_RESET_SUBSYSTEM = 4
KVM_S390_RESET_CPU_INIT = 8
KVM_S390_RESET_IPL = 16

#: Room for an architecture's registers in ``struct kvm_run`` (KVM_CAP_SYNC_REGS).
SYNC_REGS_SIZE_BYTES = 2048


@layout
class kvm_run_hw(Structure):
    hardware_exit_reason: u64


@layout
class kvm_run_fail_entry(Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@layout
class kvm_run_ex(Structure):
    exception: u32
    error_code: u32


@layout
class kvm_run_io(Structure):
    """``count`` values of ``size`` bytes each lie at ``data_offset`` from the start of ``kvm_run``."""

    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@layout
class kvm_run_mmio(Structure):
    phys_addr: u64
    data: Annotated[u8s, 8]
    len: u32
    is_write: u8


@layout
class kvm_run_hypercall(Structure):
    nr: u64
    args: Annotated[u64s, 6]
    ret: u64
    longmode: u32
    pad: u32


@layout
class kvm_run_tpr_access(Structure):
    rip: u64
    is_write: u32
    pad: u32


@layout
class kvm_run_s390_sieic(Structure):
    icptcode: u8
    ipa: u16
    ipb: u32


@layout
class kvm_run_s390_ucontrol(Structure):
    trans_exc_code: u64
    pgm_code: u32


@layout
class kvm_run_dcr(Structure):
    dcrn: u32
    data: u32
    is_write: u8


@layout
class kvm_run_internal(Structure):
    suberror: u32
    ndata: u32
    data: Annotated[u64s, 16]


@layout
class kvm_run_emulation_failure(Structure):
    """Overlay of ``internal`` for KVM_INTERNAL_ERROR_EMULATION."""

    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Annotated[u8s, 15]


@layout
class kvm_run_osi(Structure):
    gprs: Annotated[u64s, 32]


@layout
class kvm_run_papr_hcall(Structure):
    nr: u64
    ret: u64
    args: Annotated[u64s, 9]


@layout
class kvm_run_s390_tsch(Structure):
    subchannel_id: u16
    subchannel_nr: u16
    io_int_parm: u32
    io_int_word: u32
    ipb: u32
    dequeued: u8


@layout
class kvm_run_epr(Structure):
    epr: u32


@layout
class _flags_or_data(Union):
    flags: u64
    data: Annotated[u64s, 16]


@layout
class kvm_run_system_event(Structure):
    _anonymous_ = ("_u",)
    type: u32
    ndata: u32
    _u: _flags_or_data


@layout
class kvm_run_s390_stsi(Structure):
    addr: u64
    ar: u8
    reserved: u8
    fc: u8
    sel1: u8
    sel2: u16


@layout
class kvm_run_eoi(Structure):
    vector: u8


@layout
class kvm_hyperv_exit_synic(Structure):
    msr: u32
    pad2: u32
    control: u64
    evt_page: u64
    msg_page: u64


@layout
class kvm_hyperv_exit_hcall(Structure):
    input: u64
    result: u64
    params: Annotated[u64s, 2]


@layout
class kvm_hyperv_exit_syndbg(Structure):
    msr: u32
    pad2: u32
    control: u64
    status: u64
    send_page: u64
    recv_page: u64
    pending_page: u64


@layout
class kvm_hyperv_exit_u(Union):
    synic: kvm_hyperv_exit_synic
    hcall: kvm_hyperv_exit_hcall
    syndbg: kvm_hyperv_exit_syndbg


@layout
class kvm_hyperv_exit(Structure):
    type: u32
    pad1: u32
    u: kvm_hyperv_exit_u


@layout
class kvm_xen_exit_hcall(Structure):
    longmode: u32
    cpl: u32
    input: u64
    result: u64
    params: Annotated[u64s, 6]


@layout
class kvm_xen_exit_u(Union):
    hcall: kvm_xen_exit_hcall


@layout
class kvm_xen_exit(Structure):
    type: u32
    u: kvm_xen_exit_u


@layout
class kvm_run_arm_nisv(Structure):
    esr_iss: u64
    fault_ipa: u64


@layout
class kvm_run_msr(Structure):
    error: u8
    pad: Annotated[u8s, 7]
    reason: u32
    index: u32
    data: u64


@layout
class kvm_run_riscv_sbi(Structure):
    extension_id: u64
    function_id: u64
    args: Annotated[u64s, 6]
    ret: Annotated[u64s, 2]


@layout
class kvm_run_riscv_csr(Structure):
    csr_num: u64
    new_value: u64
    write_mask: u64
    ret_value: u64


@layout
class kvm_run_notify(Structure):
    flags: u32


@layout
class kvm_run_memory_fault(Structure):
    flags: u64
    gpa: u64
    size: u64


class kvm_run_exits(Union):
    """What ``exit_reason`` tells to look at; an architecture adds its own members and lays it out.

    The members keep the kernel's names.
    """

    hw: kvm_run_hw
    fail_entry: kvm_run_fail_entry
    ex: kvm_run_ex
    io: kvm_run_io
    mmio: kvm_run_mmio
    hypercall: kvm_run_hypercall
    tpr_access: kvm_run_tpr_access
    s390_sieic: kvm_run_s390_sieic
    s390_reset_flags: u64
    s390_ucontrol: kvm_run_s390_ucontrol
    dcr: kvm_run_dcr
    internal: kvm_run_internal
    emulation_failure: kvm_run_emulation_failure
    osi: kvm_run_osi
    papr_hcall: kvm_run_papr_hcall
    s390_tsch: kvm_run_s390_tsch
    epr: kvm_run_epr
    system_event: kvm_run_system_event
    s390_stsi: kvm_run_s390_stsi
    eoi: kvm_run_eoi
    hyperv: kvm_hyperv_exit
    arm_nisv: kvm_run_arm_nisv
    msr: kvm_run_msr
    xen: kvm_xen_exit
    riscv_sbi: kvm_run_riscv_sbi
    riscv_csr: kvm_run_riscv_csr
    notify: kvm_run_notify
    memory_fault: kvm_run_memory_fault
    padding: Annotated[chars, 256]


@layout
class kvm_run_page(Structure):
    """The page that a vCPU shares with its client (``struct kvm_run``), as far as it is alike on all architectures.

    The exit follows, and an architecture's registers.
    """

    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[u8s, 6]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
