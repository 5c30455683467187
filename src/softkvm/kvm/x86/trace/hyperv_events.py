# SPDX-License-Identifier: Apache-2.0
"""The events of KVM's tracepoints that tell of Hyper-V's interfaces, as Linux 6.12 has them."""

from __future__ import annotations

from typing import Final

from softkvm.kvm.trace_events import event

EVENTS: Final = (
    event(
        "kvm_hv_hypercall",
        "__u16 rep_cnt; __u16 rep_idx; __u64 ingpa; __u64 outgpa; __u16 code; __u16 var_cnt; bool fast",
        '"code 0x%x %s var_cnt 0x%x rep_cnt 0x%x idx 0x%x in 0x%llx out 0x%llx", REC->code, '
        'REC->fast ? "fast" : "slow", REC->var_cnt, REC->rep_cnt, REC->rep_idx, REC->ingpa, REC->outgpa',
    ),
    event("kvm_hv_hypercall_done", "__u64 result", '"result 0x%llx", REC->result'),
    event("kvm_hv_notify_acked_sint", "int vcpu_id; u32 sint", '"vcpu_id %d sint %u", REC->vcpu_id, REC->sint'),
    event(
        "kvm_hv_synic_set_irq",
        "int vcpu_id; u32 sint; int vector; int ret",
        '"vcpu_id %d sint %u vector %d ret %d", REC->vcpu_id, REC->sint, REC->vector, REC->ret',
    ),
    event(
        "kvm_hv_synic_send_eoi",
        "int vcpu_id; u32 sint; int vector; int ret",
        '"vcpu_id %d vector %d", REC->vcpu_id, REC->vector',
    ),
    event(
        "kvm_hv_synic_set_msr",
        "int vcpu_id; u32 msr; u64 data; bool host",
        '"vcpu_id %d msr 0x%x data 0x%llx host %d", REC->vcpu_id, REC->msr, REC->data, REC->host',
    ),
    event(
        "kvm_hv_stimer_set_config",
        "int vcpu_id; int timer_index; u64 config; bool host",
        '"vcpu_id %d timer %d config 0x%llx host %d", REC->vcpu_id, REC->timer_index, REC->config, REC->host',
    ),
    event(
        "kvm_hv_stimer_set_count",
        "int vcpu_id; int timer_index; u64 count; bool host",
        '"vcpu_id %d timer %d count %llu host %d", REC->vcpu_id, REC->timer_index, REC->count, REC->host',
    ),
    event(
        "kvm_hv_stimer_start_periodic",
        "int vcpu_id; int timer_index; u64 time_now; u64 exp_time",
        '"vcpu_id %d timer %d time_now %llu exp_time %llu", REC->vcpu_id, REC->timer_index, REC->time_now, '
        "REC->exp_time",
    ),
    event(
        "kvm_hv_stimer_start_one_shot",
        "int vcpu_id; int timer_index; u64 time_now; u64 count",
        '"vcpu_id %d timer %d time_now %llu count %llu", REC->vcpu_id, REC->timer_index, REC->time_now, REC->count',
    ),
    event(
        "kvm_hv_stimer_callback",
        "int vcpu_id; int timer_index",
        '"vcpu_id %d timer %d", REC->vcpu_id, REC->timer_index',
    ),
    event(
        "kvm_hv_stimer_expiration",
        "int vcpu_id; int timer_index; int direct; int msg_send_result",
        '"vcpu_id %d timer %d direct %d send result %d", REC->vcpu_id, REC->timer_index, REC->direct, '
        "REC->msg_send_result",
    ),
    event(
        "kvm_hv_stimer_cleanup",
        "int vcpu_id; int timer_index",
        '"vcpu_id %d timer %d", REC->vcpu_id, REC->timer_index',
    ),
    event(
        "kvm_hv_flush_tlb",
        "u64 processor_mask; u64 address_space; u64 flags; bool guest_mode",
        '"processor_mask 0x%llx address_space 0x%llx flags 0x%llx %s", REC->processor_mask, REC->address_space, '
        'REC->flags, REC->guest_mode ? "(L2)" : ""',
    ),
    event(
        "kvm_hv_flush_tlb_ex",
        "u64 valid_bank_mask; u64 format; u64 address_space; u64 flags; bool guest_mode",
        '"valid_bank_mask 0x%llx format 0x%llx address_space 0x%llx flags 0x%llx %s", REC->valid_bank_mask, '
        'REC->format, REC->address_space, REC->flags, REC->guest_mode ? "(L2)" : ""',
    ),
    event(
        "kvm_hv_send_ipi",
        "u32 vector; u64 processor_mask",
        '"vector %x processor_mask 0x%llx", REC->vector, REC->processor_mask',
    ),
    event(
        "kvm_hv_send_ipi_ex",
        "u32 vector; u64 format; u64 valid_bank_mask",
        '"vector %x format %llx valid_bank_mask 0x%llx", REC->vector, REC->format, REC->valid_bank_mask',
    ),
    event(
        "kvm_hv_syndbg_set_msr",
        "int vcpu_id; u32 vp_index; u32 msr; u64 data",
        '"vcpu_id %d vp_index %u msr 0x%x data 0x%llx", REC->vcpu_id, REC->vp_index, REC->msr, REC->data',
    ),
    event(
        "kvm_hv_syndbg_get_msr",
        "int vcpu_id; u32 vp_index; u32 msr; u64 data",
        '"vcpu_id %d vp_index %u msr 0x%x data 0x%llx", REC->vcpu_id, REC->vp_index, REC->msr, REC->data',
    ),
)
