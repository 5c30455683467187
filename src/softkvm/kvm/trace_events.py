# SPDX-License-Identifier: Apache-2.0
"""The events of KVM's tracepoints that every architecture has (``include/trace/events/kvm.h`` of Linux 6.12).

Fields and print formats are an interface: tools ask for them by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Final

from softkvm import abi
from softkvm.trace.event import Event, fields_of

SYSTEM: Final = "kvm"

_ids: Final = count(1)


def event(name: str, fields: str, print_fmt: str) -> Event:
    """Return an event of KVM's, with the next number."""
    return Event(SYSTEM, name, next(_ids), fields_of(fields), print_fmt)


def symbols(pairs: Iterable[tuple[int, str]]) -> str:
    """Return the names of values as ``__print_symbolic`` takes them."""
    return ", ".join(f'{{ {value:#x}, "{name}" }}' for value, name in pairs)


_EXIT_REASONS: Final = symbols(sorted(abi.EXIT_REASON_NAMES.items()))
DELIVER_MODES: Final = symbols(enumerate(("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")))
_IRQCHIPS: Final = symbols(enumerate(("PIC master", "PIC slave", "IOAPIC")))
_MMIO: Final = symbols(enumerate(("unsatisfied-read", "read", "write")))
MMIO_READ_UNSATISFIED: Final = 0
MMIO_READ: Final = 1
MMIO_WRITE: Final = 2

EVENTS: Final = (
    event(
        "kvm_userspace_exit",
        "__u32 reason; int errno",
        '"reason %s (%d)", REC->errno < 0 ? (REC->errno == -4 ? "restart" : "error") : '
        f"__print_symbolic(REC->reason, {_EXIT_REASONS}), REC->errno < 0 ? -REC->errno : REC->reason",
    ),
    event(
        "kvm_vcpu_wakeup",
        "__u64 ns; bool waited; bool valid",
        '"%s time %lld ns, polling %s", REC->waited ? "wait" : "poll", REC->ns, REC->valid ? "valid" : "invalid"',
    ),
    event(
        "kvm_set_irq",
        "unsigned int gsi; int level; int irq_source_id",
        '"gsi %u level %d source %d", REC->gsi, REC->level, REC->irq_source_id',
    ),
    event(
        "kvm_ioapic_set_irq",
        "__u64 e; int pin; bool coalesced",
        f'"pin %u dst %x vec %u (%s|%s|%s%s)%s", REC->pin, (u8)(REC->e >> 56), (u8)REC->e, '
        f"__print_symbolic((REC->e >> 8 & 0x7), {DELIVER_MODES}), "
        '(REC->e & (1<<11)) ? "logical" : "physical", (REC->e & (1<<15)) ? "level" : "edge", '
        '(REC->e & (1<<16)) ? "|masked" : "", REC->coalesced ? " (coalesced)" : ""',
    ),
    event(
        "kvm_msi_set_irq",
        "__u64 address; __u64 data",
        '"dst %llx vec %u (%s|%s|%s%s)", (u8)(REC->address >> 12) | ((REC->address >> 32) & 0xffffff00), '
        f"(u8)REC->data, __print_symbolic((REC->data >> 8 & 0x7), {DELIVER_MODES}), "
        '(REC->address & (1<<2)) ? "logical" : "physical", (REC->data & (1<<15)) ? "level" : "edge", '
        '(REC->address & (1<<3)) ? "|rh" : ""',
    ),
    event(
        "kvm_ack_irq",
        "unsigned int irqchip; unsigned int pin",
        f'"irqchip %s pin %u", __print_symbolic(REC->irqchip, {_IRQCHIPS}), REC->pin',
    ),
    event(
        "kvm_mmio",
        "u32 type; u32 len; u64 gpa; u64 val",
        f'"mmio %s len %u gpa 0x%llx val 0x%llx", __print_symbolic(REC->type, {_MMIO}), REC->len, REC->gpa, REC->val',
    ),
    event("kvm_fpu", "u32 load", '"%s", __print_symbolic(REC->load, {0, "unload"}, {1, "load"})'),
    event("kvm_try_async_get_page", "__u64 gva; u64 gfn", '"gva = %#llx, gfn = %#llx", REC->gva, REC->gfn'),
    event("kvm_async_pf_repeated_fault", "__u64 gva; u64 gfn", '"gva = %#llx, gfn = %#llx", REC->gva, REC->gfn'),
    event("kvm_async_pf_not_present", "__u64 token; __u64 gva", '"token %#llx gva %#llx", REC->token, REC->gva'),
    event("kvm_async_pf_ready", "__u64 token; __u64 gva", '"token %#llx gva %#llx", REC->token, REC->gva'),
    event(
        "kvm_async_pf_completed",
        "unsigned long address; u64 gva",
        '"gva %#llx address %#lx", REC->gva, REC->address',
    ),
    event(
        "kvm_halt_poll_ns",
        "bool grow; unsigned int vcpu_id; unsigned int new; unsigned int old",
        '"vcpu %u: halt_poll_ns %u (%s %u)", REC->vcpu_id, REC->new, REC->grow ? "grow" : "shrink", REC->old',
    ),
    event(
        "kvm_dirty_ring_push",
        "int index; u32 dirty_index; u32 reset_index; u32 slot; u64 offset",
        '"ring %d: dirty 0x%x reset 0x%x slot %u offset 0x%llx (used %u)", REC->index, REC->dirty_index, '
        "REC->reset_index, REC->slot, REC->offset, REC->dirty_index - REC->reset_index",
    ),
    event(
        "kvm_dirty_ring_reset",
        "int index; u32 dirty_index; u32 reset_index",
        '"ring %d: dirty 0x%x reset 0x%x (used %u)", REC->index, REC->dirty_index, REC->reset_index, '
        "REC->dirty_index - REC->reset_index",
    ),
    event("kvm_dirty_ring_exit", "int vcpu_id", '"vcpu %d", REC->vcpu_id'),
    event(
        "kvm_vm_set_mem_attributes",
        "gfn_t start; gfn_t end; unsigned long attr",
        '"%#016llx -- %#016llx [0x%lx]", REC->start, REC->end, REC->attr',
    ),
    event(
        "kvm_unmap_hva_range",
        "unsigned long start; unsigned long end",
        '"mmu notifier unmap range: %#016lx -- %#016lx", REC->start, REC->end',
    ),
)
