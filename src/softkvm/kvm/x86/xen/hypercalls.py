# SPDX-License-Identifier: Apache-2.0
"""Xen's hypercalls: number in RAX; arguments in RDI, RSI, RDX, R10, R8, R9, of 32-bit guests in EBX, ECX, EDX, ESI,
EDI, EBP. All that KVM doesn't carry out, and all from outside of ring 0, are userspace's: KVM_EXIT_XEN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page
from softkvm.kvm.x86.hyperv import hypercalls as hyperv_hypercalls
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.xen import ports, timer
from softkvm.kvm.x86.xen.poll import poll

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

    Skip = Callable[[Vcpu], int]

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
#: Set in EAX by the page of Hyper-V's hypercalls, where a guest may have both.
_HYPERV: Final = 1 << 31
_PARAMS: Final = (7, 6, 2, 10, 8, 9)
_PARAMS_32: Final = (3, 1, 2, 6, 7, 5)


class Call(NamedTuple):
    """One hypercall's registers."""

    cpl: int
    longmode: bool
    input: int
    params: tuple[int, ...]


#: Carries one out: the result, a negative errno among them; None to leave for userspace.
Hypercall = Callable[["Vcpu", Call], "int | None"]


def _xen_version(vcpu: Vcpu, call: Call) -> int | None:
    """XENVER_version, if userspace has told it."""
    return vcpu.vm.xen.xen_version or None if call.params[0] == abi.XENVER_version else None


def _event_channel_op(vcpu: Vcpu, call: Call) -> int | None:
    return ports.send(vcpu, call.params[1]) if call.params[0] == abi.EVTCHNOP_send else None


def _sched_op(vcpu: Vcpu, call: Call) -> int | None:
    """SCHEDOP_yield; SCHEDOP_poll, which is no more than that where KVM doesn't see all events."""
    command = call.params[0] & _U32
    if command == abi.SCHEDOP_poll:
        result = poll(vcpu, call.params[1], longmode=call.longmode)
        if result is not None:
            return result
    elif command != abi.SCHEDOP_yield:
        return None
    _softcpu.sched_yield()
    return 0


def _vcpu_op(vcpu: Vcpu, call: Call) -> int | None:
    command, vcpu_id, address = call.params[:3]
    return timer.vcpu_op(vcpu, command & _U32, vcpu_id & _U32, address, longmode=call.longmode)


def _set_timer_op(vcpu: Vcpu, call: Call) -> int | None:
    """The time is one register of a 64-bit guest's, two of a 32-bit one's."""
    low, high = call.params[:2]
    return timer.set_timer_op(vcpu, low if call.longmode else high << 32 | low)


HYPERCALLS: Final[dict[int, Hypercall]] = {
    abi.HYPERVISOR_xen_version: _xen_version,
    abi.HYPERVISOR_event_channel_op: _event_channel_op,
    abi.HYPERVISOR_sched_op: _sched_op,
    abi.HYPERVISOR_vcpu_op: _vcpu_op,
    abi.HYPERVISOR_set_timer_op: _set_timer_op,
}


def emulate_hypercall(vcpu: Vcpu, skip: Skip) -> bool:
    """Carry out the hypercall in the guest's registers; False to leave for userspace, behind which ``skip`` goes on.

    Raises what Hyper-V's do for those that are meant for it.
    """
    gpr = vcpu.gpr
    longmode = vcpu.is_64bit_code()
    number = gpr[0] & (_U64 if longmode else _U32)
    if number & _HYPERV and hyperv_hypercalls.is_enabled(vcpu):
        return hyperv_hypercalls.emulate_hypercall(vcpu, skip)
    if longmode:
        params = tuple(gpr[n] for n in _PARAMS)
    else:
        params = tuple(gpr[n] & _U32 for n in _PARAMS_32)
    call = Call(vcpu.b[V.CPL], longmode, number, params)
    result = _carry_out(vcpu, call)
    if result is None:
        _exit_to_userspace(vcpu, call, skip)
        return False
    gpr[0] = result & _U64
    return True


def _carry_out(vcpu: Vcpu, call: Call) -> int | None:
    """Return the result, None to leave for userspace, which has all of other rings."""
    function = None if call.cpl else HYPERCALLS.get(call.input)
    return None if function is None else function(vcpu, call)


def _exit_to_userspace(vcpu: Vcpu, call: Call, skip: Skip) -> None:
    """Describe KVM_EXIT_XEN_HCALL; its result comes with the next KVM_RUN."""
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_XEN
    vcpu.run_d[x86_run_page.XEN_TYPE_D] = abi.KVM_EXIT_XEN_HCALL
    vcpu.run_d[x86_run_page.XEN_HCALL_LONGMODE_D] = call.longmode
    vcpu.run_d[x86_run_page.XEN_HCALL_CPL_D] = call.cpl
    vcpu.run_q[x86_run_page.XEN_HCALL_INPUT_Q] = call.input
    for n, value in enumerate(call.params):
        vcpu.run_q[x86_run_page.XEN_HCALL_PARAMS_Q + n] = value
    vcpu.complete_userspace_io = partial(_complete, rip=svm.linear_rip(vcpu), skip=skip)


def _complete(vcpu: Vcpu, rip: int, skip: Skip) -> int:
    """After KVM_EXIT_XEN: the result is userspace's, if it has not sent the guest elsewhere."""
    if svm.linear_rip(vcpu) != rip:
        return 1
    vcpu.gpr[0] = vcpu.run_q[x86_run_page.XEN_HCALL_RESULT_Q]
    return skip(vcpu)
