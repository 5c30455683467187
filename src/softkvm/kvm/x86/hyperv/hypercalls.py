# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's hypercalls (TLFS, 3): how one is called, who may, and which there are.

Input is memory of the guest's that its physical address names, or with the *fast* calling convention two registers,
and for some calls XMM0 to XMM5 behind those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import _softcpu, abi
from softkvm.abi import run_page
from softkvm.abi.x86 import run_page as x86_run_page
from softkvm.kvm.memory.guest_memory import read_guest
from softkvm.kvm.x86.exceptions import X86Exception, inject_emulated_exception
from softkvm.kvm.x86.hyperv.call import Call
from softkvm.kvm.x86.hyperv.cpuid import Features
from softkvm.kvm.x86.hyperv.flush import flush_virtual_address
from softkvm.kvm.x86.hyperv.ipi import send_ipi
from softkvm.kvm.x86.hyperv.vp import vp_of
from softkvm.kvm.x86.register_block import ymm_b
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

    Skip = Callable[[Vcpu], int]

_U32: Final = (1 << 32) - 1
_PAGE_SIZE: Final = 4096
#: The places of XMM0 to XMM5 in the register block, by halves.
_XMM_HALVES: Final = tuple(
    ymm_b(number) // 8 + half for number in range(abi.HV_HYPERCALL_MAX_XMM_REGISTERS) for half in (0, 1)
)

#: Carries a call out: its result, None to leave for userspace.
Handler = Callable[["Vcpu", Call], "int | None"]
Allowed = Callable[[Features], bool]


class Hypercall(NamedTuple):
    """One row: what carries it out, which privilege it needs, and which forms its input may have."""

    handler: Handler
    allowed: Allowed
    #: Its header may be of variable size.
    var: bool = False
    #: It has a list, from its first element on (True), or none; None: whatever userspace makes of it.
    rep: bool | None = False
    #: A fast call has input in XMM registers.
    xmm: bool = False

    def has_form(self, call: Call) -> bool:
        """Tell whether a call's input has the form that it should have."""
        if call.var_count and not self.var:
            return False
        if self.rep is None:
            return True
        return bool(call.rep_count) == self.rep and not call.rep_start


# --- what is simple ----------------------------------------------------------------------------------------


def _notify_long_spin_wait(vcpu: Vcpu, call: Call) -> int:
    """The guest has tried a lock for long: let the host's processor go to whom holds it."""
    _softcpu.sched_yield()
    return abi.HV_STATUS_SUCCESS


def _post_message(vcpu: Vcpu, call: Call) -> int | None:
    """Ports are userspace's; without a SynIC it has no way to answer."""
    return None if vp_of(vcpu).synic.active else abi.HV_STATUS_INVALID_HYPERCALL_INPUT


def _signal_event(vcpu: Vcpu, call: Call) -> int | None:
    """Signal the eventfd of a connection; one that has none may be userspace's."""
    connection = call.ingpa
    if not call.fast:
        data = None
        if not call.ingpa & 7 and (call.ingpa & _PAGE_SIZE - 1) + 8 <= _PAGE_SIZE:
            data = read_guest(vcpu.vm, call.ingpa, 8)
        if data is None:
            return abi.HV_STATUS_INVALID_ALIGNMENT
        connection = call.ingpa = int.from_bytes(data, "little")
    if not connection & 0xFFFF_0000_0000:  # a flag's number, which eventfds have no use for
        if connection & ~abi.KVM_HYPERV_CONN_ID_MASK:
            return abi.HV_STATUS_INVALID_HYPERCALL_INPUT
        file = vcpu.vm.hyperv.connections.get(connection)
        if file is not None:
            file.signal()
            return abi.HV_STATUS_SUCCESS
    return _post_message(vcpu, call)


def _debug(vcpu: Vcpu, call: Call, *, has_memory: bool) -> int | None:
    """The synthetic debugger's calls, if the guest has chosen them."""
    if has_memory and call.fast:
        return abi.HV_STATUS_INVALID_PARAMETER
    if not vp_of(vcpu).features.has_syndbg:
        return abi.HV_STATUS_INVALID_HYPERCALL_CODE
    options = vcpu.vm.hyperv.syndbg.get(abi.HV_X64_MSR_SYNDBG_OPTIONS, 0)
    return None if options & abi.HV_X64_SYNDBG_OPTION_USE_HCALLS else abi.HV_STATUS_OPERATION_DENIED


def _extended(vcpu: Vcpu, call: Call) -> int | None:
    """Extended hypercalls are userspace's."""
    return abi.HV_STATUS_INVALID_PARAMETER if call.fast else None


# --- privileges --------------------------------------------------------------------------------------------


def _ebx(mask: int) -> Allowed:
    return lambda features: bool(features.features_ebx & mask)


def _recommended(mask: int) -> Allowed:
    return lambda features: features.enlightenments_eax & mask == mask


def _may_spin(features: Features) -> bool:
    return features.enlightenments_ebx not in (0, abi.HV_NEVER_NOTIFY_LONG_SPIN_WAIT)


def _may_debug(features: Features) -> bool:
    return not features.has_syndbg or bool(features.features_ebx & abi.HV_DEBUGGING)


# --- the table ---------------------------------------------------------------------------------------------

_POSTS: Final = _ebx(abi.HV_POST_MESSAGES)
_FLUSHES: Final = _recommended(abi.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED)
_FLUSHES_EX: Final = _recommended(abi.HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED | abi.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED)
_SENDS: Final = _recommended(abi.HV_X64_CLUSTER_IPI_RECOMMENDED)
_SENDS_EX: Final = _recommended(abi.HV_X64_CLUSTER_IPI_RECOMMENDED | abi.HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED)
_DEBUG_DATA: Final = Hypercall(partial(_debug, has_memory=True), _may_debug, var=True, rep=None)
_EXTENDED: Final = Hypercall(_extended, _ebx(abi.HV_ENABLE_EXTENDED_HYPERCALLS), var=True, rep=None)

HYPERCALLS: Final[dict[int, Hypercall]] = {
    abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE: Hypercall(flush_virtual_address, _FLUSHES, xmm=True),
    abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST: Hypercall(flush_virtual_address, _FLUSHES, rep=True, xmm=True),
    abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX: Hypercall(flush_virtual_address, _FLUSHES_EX, var=True, xmm=True),
    abi.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX: Hypercall(
        flush_virtual_address, _FLUSHES_EX, var=True, rep=True, xmm=True
    ),
    abi.HVCALL_NOTIFY_LONG_SPIN_WAIT: Hypercall(_notify_long_spin_wait, _may_spin),
    abi.HVCALL_SEND_IPI: Hypercall(send_ipi, _SENDS),
    abi.HVCALL_SEND_IPI_EX: Hypercall(send_ipi, _SENDS_EX, var=True, xmm=True),
    abi.HVCALL_POST_MESSAGE: Hypercall(_post_message, _POSTS),
    abi.HVCALL_SIGNAL_EVENT: Hypercall(_signal_event, _ebx(abi.HV_SIGNAL_EVENTS)),
    abi.HVCALL_POST_DEBUG_DATA: _DEBUG_DATA,
    abi.HVCALL_RETRIEVE_DEBUG_DATA: _DEBUG_DATA,
    abi.HVCALL_RESET_DEBUG_SESSION: _DEBUG_DATA._replace(handler=partial(_debug, has_memory=False)),
    **dict.fromkeys(range(abi.HV_EXT_CALL_QUERY_CAPABILITIES, abi.HV_EXT_CALL_MAX + 1), _EXTENDED),
}


def is_enabled(vcpu: Vcpu) -> bool:
    """Tell whether the guest's hypercalls are Hyper-V's: it has the interface, and has told what it is."""
    return vcpu.hyperv_enabled and bool(vcpu.vm.hyperv.guest_os_id)


def hypercall(vcpu: Vcpu, skip: Skip) -> int:
    """VMMCALL by a guest of Hyper-V's: 1 to go on, 0 to leave for userspace. ``skip`` goes past the instruction."""
    try:
        done = emulate_hypercall(vcpu, skip)
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
        return 1
    return skip(vcpu) if done else 0


def emulate_hypercall(vcpu: Vcpu, skip: Skip) -> bool:
    """Carry a hypercall out; False to leave for userspace, which ``skip`` follows then.

    Raises #UD outside of ring 0 and in real mode, and for XMM registers that the guest was told not to use.
    """
    if vcpu.b[V.CPL] or not vcpu.cr0 & abi.X86_CR0_PE:
        raise X86Exception(abi.UD_VECTOR)
    vcpu.stat_hypercalls += 1
    gpr = vcpu.gpr
    if vcpu.is_64bit_code():
        call = Call(gpr[1], gpr[2], gpr[8])
    else:
        param, ingpa, outgpa = ((gpr[high] & _U32) << 32 | gpr[low] & _U32 for high, low in ((2, 0), (3, 1), (7, 6)))
        call = Call(param, ingpa, outgpa)
    result = _carry_out(vcpu, call)
    if result is None:
        _exit_to_userspace(vcpu, call, skip)
        return False
    _set_result(vcpu, result)
    return True


def _carry_out(vcpu: Vcpu, call: Call) -> int | None:
    """Return the result, None to leave for userspace."""
    vp = vp_of(vcpu)
    row = HYPERCALLS.get(call.code)
    if row is not None and vp.enforce_cpuid and not row.allowed(vp.features):
        return abi.HV_STATUS_ACCESS_DENIED
    if call.param & abi.HV_HYPERCALL_RSVD_MASK:
        return abi.HV_STATUS_INVALID_HYPERCALL_INPUT
    if row is None:
        return abi.HV_STATUS_INVALID_HYPERCALL_CODE
    if call.fast and row.xmm:
        if vp.enforce_cpuid and not vp.features.features_edx & abi.HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE:
            raise X86Exception(abi.UD_VECTOR)
        call.xmm = [vcpu.rq[at] for at in _XMM_HALVES]
    return row.handler(vcpu, call) if row.has_form(call) else abi.HV_STATUS_INVALID_HYPERCALL_INPUT


def _set_result(vcpu: Vcpu, result: int) -> None:
    if vcpu.is_64bit_code():
        vcpu.gpr[0] = result
    else:
        vcpu.gpr[0], vcpu.gpr[2] = result & _U32, result >> 32


def _exit_to_userspace(vcpu: Vcpu, call: Call, skip: Skip) -> None:
    """Describe KVM_EXIT_HYPERV_HCALL; its result comes with the next KVM_RUN."""
    vcpu.run_d[run_page.EXIT_REASON_D] = abi.KVM_EXIT_HYPERV
    vcpu.run_d[x86_run_page.HYPERV_TYPE_D] = abi.KVM_EXIT_HYPERV_HCALL
    vcpu.run_q[x86_run_page.HYPERV_HCALL_INPUT_Q] = call.param
    vcpu.run_q[x86_run_page.HYPERV_HCALL_PARAMS_Q] = call.ingpa
    vcpu.run_q[x86_run_page.HYPERV_HCALL_PARAMS_Q + 1] = call.outgpa
    vcpu.complete_userspace_io = partial(_complete, skip=skip)


def _complete(vcpu: Vcpu, skip: Skip) -> int:
    _set_result(vcpu, vcpu.run_q[x86_run_page.HYPERV_HCALL_RESULT_Q])
    return skip(vcpu)
