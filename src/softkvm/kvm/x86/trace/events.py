# SPDX-License-Identifier: Apache-2.0
"""The events of KVM's tracepoints on x86, with the names, fields and print formats of Linux 6.12.

Those of nested virtualization (``kvm_nested_vmenter`` and what belongs to it), of system management mode
(``kvm_smm_transition``) and SEV are not there, as what they tell of is not. They are a row here and one in
:mod:`.probes` each.
"""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.kvm.trace_events import DELIVER_MODES, event, symbols
from softkvm.kvm.x86.irqchip import apicdef
from softkvm.kvm.x86.svm import vmcb as V

ISA_SVM: Final = 2

_VECTORS: Final = ("DE", "DB", "BP", "OF", "BR", "UD", "NM", "DF", "TS", "NP", "SS", "GP", "PF", "MF", "AC", "MC")
_VECTOR_OF: Final = {name: getattr(abi, f"{name}_VECTOR") for name in _VECTORS if hasattr(abi, f"{name}_VECTOR")} | {
    "BR": 5,
    "NM": 7,
    "MF": 16,
}
_EXCEPTIONS: Final = symbols((_VECTOR_OF[name], f"#{name}") for name in _VECTORS)

#: Reasons by their names in the kernel's table (SVM_EXIT_REASONS) where that is not ours (``vmcb.EXIT_NAMES``).
_OTHER_NAMES: Final = {
    V.EXIT_INTR: "interrupt",
    V.EXIT_IDLE_HLT: "idle-halt",
    V.EXIT_ERR & 0xFFFF_FFFF: "invalid_guest_state",
    V.EXIT_EXCP_BASE + 19: "XF excp",
    V.EXIT_AVIC_UNACCELERATED_ACCESS: "avic_unaccelerated_access",
    V.EXIT_AVIC_INCOMPLETE_IPI: "avic_incomplete_ipi",
    0x69: "read_rt",  # the kernel's spelling of TR
    0x6D: "write_rt",
    **{V.EXIT_EXCP_BASE + vector: f"{name} excp" for name, vector in _VECTOR_OF.items()},
}
EXIT_REASONS: Final[dict[int, str]] = {
    **{code & 0xFFFF_FFFF: name for code, name in V.EXIT_NAMES.items()},
    **_OTHER_NAMES,
}

_REGISTERS: Final = """
    ID LVR TASKPRI ARBPRI PROCPRI EOI RRR LDR DFR SPIV ISR TMR IRR ESR ICR ICR2 LVTT LVTTHMR LVTPC LVT0 LVT1 LVTERR
    TMICT TMCCT TDCR SELF_IPI EFEAT ECTRL
"""
#: Registers that our APIC has no use for, and so no name.
_OTHER_REGISTERS: Final = {"RRR": 0xC0, "LVTTHMR": 0x330, "EFEAT": 0x400, "ECTRL": 0x410}
APIC_REGISTERS: Final = {
    (_OTHER_REGISTERS[name] if name in _OTHER_REGISTERS else getattr(apicdef, f"APIC_{name}")): f"APIC_{name}"
    for name in _REGISTERS.split()
}
APIC: Final = symbols(sorted(APIC_REGISTERS.items()))
_SHORTHANDS: Final = symbols(enumerate(("dst", "self", "all", "all-but-self")))
_REASONS: Final = symbols(sorted(EXIT_REASONS.items()))
_EMULATOR_MODES: Final = '{ 0, "real" }, { 3, "vm16" }, { 1, "prot16" }, { 5, "prot32" }, { 9, "prot64" }'
EMUL_CR0_PE: Final = 1 << 0
EMUL_EFL_VM: Final = 1 << 1
EMUL_CS_D: Final = 1 << 2
EMUL_CS_L: Final = 1 << 3
HOST_CLOCK_TSC: Final = 1

EVENTS: Final = (
    event(
        "kvm_entry",
        "unsigned int vcpu_id; unsigned long rip; bool immediate_exit",
        '"vcpu %u, rip 0x%lx%s", REC->vcpu_id, REC->rip, REC->immediate_exit ? "[immediate exit]" : ""',
    ),
    event(
        "kvm_exit",
        "unsigned int exit_reason; unsigned long guest_rip; u32 isa; u64 info1; u64 info2; u32 intr_info; "
        "u32 error_code; unsigned int vcpu_id",
        '"vcpu %u reason %s%s%s rip 0x%lx info1 0x%016llx info2 0x%016llx intr_info 0x%08x error_code 0x%08x", '
        f'REC->vcpu_id, __print_symbolic(REC->exit_reason, {_REASONS}), "", "", REC->guest_rip, REC->info1, '
        "REC->info2, REC->intr_info, REC->error_code",
    ),
    event(
        "kvm_hypercall",
        "unsigned long nr; unsigned long a0; unsigned long a1; unsigned long a2; unsigned long a3",
        '"nr 0x%lx a0 0x%lx a1 0x%lx a2 0x%lx a3 0x%lx", REC->nr, REC->a0, REC->a1, REC->a2, REC->a3',
    ),
    event(
        "kvm_xen_hypercall",
        "u8 cpl; unsigned long nr; unsigned long a0; unsigned long a1; unsigned long a2; unsigned long a3; "
        "unsigned long a4; unsigned long a5",
        '"cpl %d nr 0x%lx a0 0x%lx a1 0x%lx a2 0x%lx a3 0x%lx a4 0x%lx a5 %lx", REC->cpl, REC->nr, REC->a0, REC->a1, '
        "REC->a2, REC->a3, REC->a4, REC->a5",
    ),
    event(
        "kvm_pio",
        "unsigned int rw; unsigned int port; unsigned int size; unsigned int count; unsigned int val",
        '"pio_%s at 0x%x size %d count %d val 0x%x %s", REC->rw ? "write" : "read", REC->port, REC->size, REC->count, '
        'REC->val, REC->count > 1 ? "(...)" : ""',
    ),
    event(
        "kvm_cpuid",
        "unsigned int function; unsigned int index; unsigned long rax; unsigned long rbx; unsigned long rcx; "
        "unsigned long rdx; bool found; bool used_max_basic",
        '"func %x idx %x rax %lx rbx %lx rcx %lx rdx %lx, cpuid entry %s%s", REC->function, REC->index, REC->rax, '
        'REC->rbx, REC->rcx, REC->rdx, REC->found ? "found" : "not found", '
        'REC->used_max_basic ? ", used max basic" : ""',
    ),
    event(
        "kvm_apic",
        "unsigned int rw; unsigned int reg; u64 val",
        f'"apic_%s %s = 0x%llx", REC->rw ? "write" : "read", __print_symbolic(REC->reg, {APIC}), REC->val',
    ),
    event(
        "kvm_inj_virq",
        "unsigned int vector; bool soft; bool reinjected",
        '"%s 0x%x%s", REC->soft ? "Soft/INTn" : "IRQ", REC->vector, REC->reinjected ? " [reinjected]" : ""',
    ),
    event(
        "kvm_inj_exception",
        "u8 exception; u8 has_error; u32 error_code; bool reinjected",
        f'"%s%s%s%s%s", __print_symbolic(REC->exception, {_EXCEPTIONS}), !REC->has_error ? "" : " (", '
        '!REC->has_error ? "" : __print_symbolic(REC->error_code, { }), !REC->has_error ? "" : ")", '
        'REC->reinjected ? " [reinjected]" : ""',
    ),
    event(
        "kvm_page_fault",
        "unsigned int vcpu_id; unsigned long guest_rip; u64 fault_address; u64 error_code",
        '"vcpu %u rip 0x%lx address 0x%016llx error_code 0x%llx", REC->vcpu_id, REC->guest_rip, REC->fault_address, '
        "REC->error_code",
    ),
    event(
        "kvm_msr",
        "unsigned write; u32 ecx; u64 data; u8 exception",
        '"msr_%s %x = 0x%llx%s", REC->write ? "write" : "read", REC->ecx, REC->data, REC->exception ? " (#GP)" : ""',
    ),
    event(
        "kvm_cr",
        "unsigned int rw; unsigned int cr; unsigned long val",
        '"cr_%s %x = 0x%lx", REC->rw ? "write" : "read", REC->cr, REC->val',
    ),
    event(
        "kvm_pic_set_irq",
        "__u8 chip; __u8 pin; __u8 elcr; __u8 imr; bool coalesced",
        '"chip %u pin %u (%s%s)%s", REC->chip, REC->pin, (REC->elcr & (1 << REC->pin)) ? "level":"edge", '
        '(REC->imr & (1 << REC->pin)) ? "|masked":"", REC->coalesced ? " (coalesced)" : ""',
    ),
    event(
        "kvm_apic_ipi",
        "__u32 icr_low; __u32 dest_id",
        '"dst %x vec %u (%s|%s|%s|%s|%s)", REC->dest_id, (u8)REC->icr_low, '
        f"__print_symbolic((REC->icr_low >> 8 & 0x7), {DELIVER_MODES}), "
        '(REC->icr_low & (1<<11)) ? "logical" : "physical", (REC->icr_low & (1<<14)) ? "assert" : "de-assert", '
        '(REC->icr_low & (1<<15)) ? "level" : "edge", '
        f"__print_symbolic((REC->icr_low >> 18 & 0x3), {_SHORTHANDS})",
    ),
    event(
        "kvm_apic_accept_irq",
        "__u32 apicid; __u16 dm; __u16 tm; __u8 vec",
        f'"apicid %x vec %u (%s|%s)", REC->apicid, REC->vec, __print_symbolic((REC->dm >> 8 & 0x7), {DELIVER_MODES}), '
        'REC->tm ? "level" : "edge"',
    ),
    event("kvm_eoi", "__u32 apicid; int vector", '"apicid %x vector %d", REC->apicid, REC->vector'),
    event("kvm_pv_eoi", "__u32 apicid; int vector", '"apicid %x vector %d", REC->apicid, REC->vector'),
    event(
        "kvm_emulate_insn",
        "__u64 rip; __u32 csbase; __u8 len; __u8 insn[15]; __u8 flags; __u8 failed",
        '"%x:%llx:%s (%s)%s", REC->csbase, REC->rip, __print_hex(REC->insn, REC->len), '
        f'__print_symbolic(REC->flags, {_EMULATOR_MODES}), REC->failed ? " failed" : ""',
    ),
    event(
        "kvm_write_tsc_offset",
        "unsigned int vcpu_id; __u64 previous_tsc_offset; __u64 next_tsc_offset",
        '"vcpu=%u prev=%llu next=%llu", REC->vcpu_id, REC->previous_tsc_offset, REC->next_tsc_offset',
    ),
    event(
        "kvm_update_master_clock",
        "bool use_master_clock; unsigned int host_clock; bool offset_matched",
        '"masterclock %d hostclock %s offsetmatched %u", REC->use_master_clock, '
        '__print_symbolic(REC->host_clock, {0, "none"}, {1, "tsc"}), REC->offset_matched',
    ),
    event(
        "kvm_ple_window_update",
        "unsigned int vcpu_id; unsigned int new; unsigned int old",
        '"vcpu %u old %u new %u (%s)", REC->vcpu_id, REC->old, REC->new, REC->old < REC->new ? "growed" : "shrinked"',
    ),
    event(
        "kvm_pvclock_update",
        "unsigned int vcpu_id; __u32 version; __u64 tsc_timestamp; __u64 system_time; __u32 tsc_to_system_mul; "
        "__s8 tsc_shift; __u8 flags",
        '"vcpu_id %u, pvclock { version %u, tsc_timestamp 0x%llx, system_time 0x%llx, tsc_to_system_mul 0x%x, '
        'tsc_shift %d, flags 0x%x }", REC->vcpu_id, REC->version, REC->tsc_timestamp, REC->system_time, '
        "REC->tsc_to_system_mul, REC->tsc_shift, REC->flags",
    ),
)
