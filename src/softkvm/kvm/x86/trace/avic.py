# SPDX-License-Identifier: Apache-2.0
"""Tracepoints of AVIC: their events, as Linux 6.12 has them, and where they happen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from softkvm.kvm import trace
from softkvm.kvm.state import IN_GUEST_MODE
from softkvm.kvm.trace_events import DELIVER_MODES, event
from softkvm.kvm.x86 import avic_vcpu
from softkvm.kvm.x86.irqchip import apicv_lapic
from softkvm.kvm.x86.svm import avic
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.trace.events import APIC
from softkvm.trace.tracepoint import Probe, Tracepoint, after, before

if TYPE_CHECKING:
    from softkvm.kvm.x86.avic_vcpu import AvicVcpu
    from softkvm.kvm.x86.irqchip.apicv_lapic import ApicvLapic
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U32: Final = (1 << 32) - 1
_INDEX_MASK: Final = 0x1FF

EVENTS: Final = (
    event(
        "kvm_apicv_inhibit_changed",
        "int reason; bool set; unsigned long inhibits",
        '"%s reason=%u, inhibits=0x%lx", REC->set ? "set" : "cleared", REC->reason, REC->inhibits',
    ),
    event(
        "kvm_apicv_accept_irq",
        "__u32 apicid; __u16 dm; __u16 tm; __u8 vec",
        f'"apicid %x vec %u (%s|%s)", REC->apicid, REC->vec, __print_symbolic((REC->dm >> 8 & 0x7), {DELIVER_MODES}), '
        'REC->tm ? "level" : "edge"',
    ),
    event(
        "kvm_avic_incomplete_ipi",
        "u32 vcpu; u32 icrh; u32 icrl; u32 id; u32 index",
        '"vcpu=%u, icrh:icrl=%#010x:%08x, id=%u, index=%u", REC->vcpu, REC->icrh, REC->icrl, REC->id, REC->index',
    ),
    event(
        "kvm_avic_unaccelerated_access",
        "u32 vcpu; u32 offset; bool ft; bool rw; u32 vec",
        f'"vcpu=%u, offset=%#x(%s), %s, %s, vec=%#x", REC->vcpu, REC->offset, __print_symbolic(REC->offset, {APIC}), '
        'REC->ft ? "trap" : "fault", REC->rw ? "write" : "read", REC->vec',
    ),
    event("kvm_avic_doorbell", "u32 vcpuid; u32 apicid", '"vcpuid=%u, apicid=%u", REC->vcpuid, REC->apicid'),
)


def _inhibit_changed(_: None, of_vm: avic.Avic, reason: avic.Inhibit, on: bool) -> tuple[int, ...]:
    return reason.bit_length() - 1, on, int(of_vm.inhibits)


def _accept_irq(
    _: None, apic: ApicvLapic, mode: int, vector: int, level_triggered: bool, sender: object
) -> tuple[int, ...] | None:
    return (apic.vcpu_id, mode, level_triggered, vector) if apic.apicv_active else None


def _incomplete_ipi(vcpu: Vcpu) -> tuple[int, ...]:
    icr, info = vcpu.q[V.EXIT_INFO_1], vcpu.q[V.EXIT_INFO_2]
    return vcpu.vcpu_id, icr >> 32, icr & _U32, info >> 32, info & _INDEX_MASK


def _unaccelerated_access(vcpu: Vcpu) -> tuple[int, ...]:
    info = vcpu.q[V.EXIT_INFO_1]
    offset, write = info & 0xFF0, info >> 32 & 1
    return vcpu.vcpu_id, offset, offset in avic._TRAPS, write, vcpu.q[V.EXIT_INFO_2] & _U32


def _doorbell(vcpu: AvicVcpu, sender: object = None) -> tuple[int, ...] | None:
    """The processor of a vCPU that is in its guest is rung; it has the vCPU's number."""
    return (vcpu.vcpu_id, vcpu.vcpu_id) if vcpu.mode == IN_GUEST_MODE else None


PROBES: Final[dict[str, Sequence[Probe]]] = {
    "kvm_apicv_inhibit_changed": [after(avic.Avic.set_inhibit, _inhibit_changed)],
    "kvm_apicv_accept_irq": [after(apicv_lapic.ApicvLapic.deliver_interrupt, _accept_irq)],
    "kvm_avic_incomplete_ipi": [before(avic.incomplete_ipi_interception, _incomplete_ipi)],
    "kvm_avic_unaccelerated_access": [before(avic.unaccelerated_access_interception, _unaccelerated_access)],
    "kvm_avic_doorbell": [before(avic_vcpu.AvicVcpu.ring, _doorbell)],
}


def of_avic() -> list[Tracepoint]:
    """Return the tracepoints of AVIC."""
    return trace.tracepoints(EVENTS, PROBES)
