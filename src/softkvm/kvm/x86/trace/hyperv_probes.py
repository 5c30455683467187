# SPDX-License-Identifier: Apache-2.0
"""Where the events of Hyper-V's interfaces happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm import trace
from softkvm.kvm.x86.hyperv import clock, flush, hypercalls, ipi, msrs, stimer, syndbg, synic
from softkvm.kvm.x86.hyperv.vp import vp_of
from softkvm.kvm.x86.trace.hyperv_events import EVENTS
from softkvm.trace.patch import Wrapper
from softkvm.trace.tracepoint import Emit, Probe, Tracepoint, after, before

if TYPE_CHECKING:
    from softkvm.kvm.x86.hyperv.call import Call
    from softkvm.kvm.x86.hyperv.stimer import Stimer
    from softkvm.kvm.x86.hyperv.synic import Synic
    from softkvm.kvm.x86.state import VcpuState as Vcpu

Values = tuple[int, ...]


def _hypercall(vcpu: Vcpu, call: Call) -> Values:
    return call.rep_count, call.rep_start, call.ingpa, call.outgpa, call.code, call.var_count, call.fast


def _flush_tlb(vcpu: Vcpu, call: Call) -> Values | None:
    words = None if call.code in flush._EX else call.words(vcpu, 0, 3)
    return None if words is None else (words[2], words[0], words[1], False)


def _flush_tlb_ex(vcpu: Vcpu, call: Call) -> Values | None:
    words = call.words(vcpu, 0, 4) if call.code in flush._EX else None
    return None if words is None else (words[3], words[2], words[0], words[1], False)


def _send_ipi(vcpu: Vcpu, call: Call) -> Values | None:
    words = None if call.code == abi.HVCALL_SEND_IPI_EX else call.words(vcpu, 0, 2)
    return None if words is None else (words[0], words[1])


def _send_ipi_ex(vcpu: Vcpu, call: Call) -> Values | None:
    words = call.words(vcpu, 0, 3) if call.code == abi.HVCALL_SEND_IPI_EX else None
    return None if words is None else (words[0], words[1], words[2])


# --- SynIC ---------------------------------------------------------------------------------------------

_SYNIC_MSRS: Final = frozenset(
    {abi.HV_X64_MSR_SCONTROL, abi.HV_X64_MSR_SVERSION, abi.HV_X64_MSR_SIEFP, abi.HV_X64_MSR_SIMP, abi.HV_X64_MSR_EOM}
) | {abi.HV_X64_MSR_SINT0 + n for n in range(abi.HV_SYNIC_SINT_COUNT)}


def _set_msr(vcpu: Vcpu, index: int, data: int, host: bool) -> Values | None:
    if index not in _SYNIC_MSRS or not (vp_of(vcpu).synic.active or host):
        return None
    return vcpu.vcpu_id, index, data, host


def _set_irq(result: int, chip: Synic, sint: int) -> Values:
    vector = chip.sints[sint] & abi.HV_SYNIC_SINT_VECTOR_MASK if sint < len(chip.sints) else -1
    return chip._vcpu.vcpu_id, sint, vector, result


# --- timers --------------------------------------------------------------------------------------------


def _timer(timer: Stimer) -> Values:
    return timer._vcpu.vcpu_id, timer.index


def _set_timer(timer: Stimer, value: int, host: bool) -> Values:
    return *_timer(timer), value, host


def _start(*, periodic: bool) -> Callable[[None, Stimer], Values | None]:
    def values(_: None, timer: Stimer) -> Values | None:
        if bool(timer.config & abi.HV_STIMER_PERIODIC) != periodic:
            return None
        now = clock.reference_counter(timer._vcpu.vm)
        return *_timer(timer), now, timer.expiration_time if periodic else timer.count

    return values


def _expiration(emit: Emit) -> Wrapper:
    def expire(call: Callable[[Stimer], None], timer: Stimer) -> None:
        direct = bool(timer.config & abi.HV_STIMER_DIRECT_MODE)
        call(timer)
        emit(*_timer(timer), direct, -11 if timer.message_pending else 0)  # -EAGAIN: its slot was in use

    return expire


def _debug_get(value: int | None, vcpu: Vcpu, index: int, host: bool) -> Values | None:
    return None if value is None else (vcpu.vcpu_id, vp_of(vcpu).index, index, value)


PROBES: Final[dict[str, Sequence[Probe]]] = {
    "kvm_hv_hypercall": [before(hypercalls._carry_out, _hypercall)],
    "kvm_hv_hypercall_done": [before(hypercalls._set_result, lambda vcpu, result: (result,))],
    "kvm_hv_notify_acked_sint": [before(synic.Synic._acked, lambda chip, sint: (chip._vcpu.vcpu_id, sint))],
    "kvm_hv_synic_set_irq": [after(synic.Synic.set_irq, _set_irq)],
    "kvm_hv_synic_send_eoi": [before(synic.Synic.eoi, lambda chip, vector: (chip._vcpu.vcpu_id, 0, vector, 0))],
    "kvm_hv_synic_set_msr": [before(msrs._write, _set_msr)],
    "kvm_hv_stimer_set_config": [before(stimer.Stimer.write_config, _set_timer)],
    "kvm_hv_stimer_set_count": [before(stimer.Stimer.write_count, _set_timer)],
    "kvm_hv_stimer_start_periodic": [after(stimer.Stimer._start, _start(periodic=True))],
    "kvm_hv_stimer_start_one_shot": [after(stimer.Stimer._start, _start(periodic=False))],
    "kvm_hv_stimer_callback": [before(stimer.Stimer._fired, lambda timer, now_ns: _timer(timer))],
    "kvm_hv_stimer_expiration": [Probe(stimer.Stimer._expire, _expiration)],
    "kvm_hv_stimer_cleanup": [before(stimer.Stimer.stop, _timer)],
    "kvm_hv_flush_tlb": [before(flush.flush_virtual_address, _flush_tlb)],
    "kvm_hv_flush_tlb_ex": [before(flush.flush_virtual_address, _flush_tlb_ex)],
    "kvm_hv_send_ipi": [before(ipi.send_ipi, _send_ipi)],
    "kvm_hv_send_ipi_ex": [before(ipi.send_ipi, _send_ipi_ex)],
    "kvm_hv_syndbg_set_msr": [
        before(syndbg.write, lambda vcpu, index, data, host: (vcpu.vcpu_id, vp_of(vcpu).index, index, data))
    ],
    "kvm_hv_syndbg_get_msr": [after(syndbg.read, _debug_get)],
}


def hyperv() -> list[Tracepoint]:
    """Return the tracepoints of Hyper-V's interfaces."""
    return trace.tracepoints(EVENTS, PROBES)
