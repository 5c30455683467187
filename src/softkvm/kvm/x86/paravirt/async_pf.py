# SPDX-License-Identifier: Apache-2.0
"""Asynchronous page faults: a guest runs something else while the host fetches a page (msr.rst, KVM_FEATURE_ASYNC_PF).

Two events, in opposite directions of one wait. **Page not present** is a #PF whose CR2 is a token; ``flags`` in the
guest's structure says that it is no fault of its own. **Page ready** is an interrupt (MSR_KVM_ASYNC_PF_INT has the
vector) with the token in ``token``; the guest clears that and writes MSR_KVM_ASYNC_PF_ACK for the next one. A guest
that can't take the first (it runs in ring 0 and has not asked for SEND_ALWAYS, say) is halted in the middle of its
instruction, and interrupts wake it.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.memory.async_pf import Work
from softkvm.kvm.memory.guest_memory import read_guest, write_guest
from softkvm.kvm.memory.slow_memory import page_of
from softkvm.kvm.x86.exceptions import inject_page_fault
from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_FIXED
from softkvm.kvm.x86.requests import KVM_REQ_APF_HALT, KVM_REQ_APF_READY
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_ON: Final = abi.KVM_ASYNC_PF_ENABLED | abi.KVM_ASYNC_PF_DELIVERY_AS_INT
_RESERVED: Final = 0x30
_GPA_MASK: Final = ~0x3F
#: Where the fields of struct kvm_vcpu_pv_apf_data are.
_FLAGS: Final = 0
_TOKEN: Final = 4
_DATA_BYTES: Final = ctypes.sizeof(ctypes.c_uint64)
KVM_PV_REASON_PAGE_NOT_PRESENT: Final = 1
_U32: Final = 0xFFFF_FFFF


# --- the MSRs ----------------------------------------------------------------------------------


def is_enabled(vcpu: Vcpu) -> bool:
    """Tell whether the guest has asked for both events (``kvm_pv_async_pf_enabled``)."""
    return vcpu.msr_values.get(abi.MSR_KVM_ASYNC_PF_EN, 0) & _ON == _ON


def set_enabled(vcpu: Vcpu, data: int) -> bool:
    """MSR_KVM_ASYNC_PF_EN is written; False for reserved bits, or a structure that is not in memory."""
    if data & _RESERVED:
        return False
    if vcpu.apic is None:
        return not data
    vcpu.msr_values[abi.MSR_KVM_ASYNC_PF_EN] = data
    if data & _ON != _ON:
        vcpu.apf.clear()
        return True
    if read_guest(vcpu.vm, data & _GPA_MASK, _DATA_BYTES) is None:
        return False
    vcpu.vm.find_slow_memory()
    vcpu.apf.wake_all(lambda: _present_queued(vcpu))
    return True


def acknowledge(vcpu: Vcpu, data: int) -> None:
    """MSR_KVM_ASYNC_PF_ACK is written: the guest has taken the token."""
    if data & 1:
        vcpu.apf.pageready_pending = False
        check_completion(vcpu)


def reset(vcpu: Vcpu) -> None:
    """RESET or INIT: what the vCPU waited for is nobody's."""
    vcpu.apf.clear()
    vcpu.apf.halted = vcpu.apf.pageready_pending = False


# --- page not present --------------------------------------------------------------------------


def _can_deliver(vcpu: Vcpu) -> bool:
    """Tell whether the guest can take the #PF now (``kvm_can_deliver_async_pf``)."""
    if not is_enabled(vcpu):
        return False
    if not vcpu.msr_values[abi.MSR_KVM_ASYNC_PF_EN] & abi.KVM_ASYNC_PF_SEND_ALWAYS and not vcpu.b[V.CPL]:
        return False
    return bool(vcpu.cr0 & abi.X86_CR0_PG)  # tables for interrupts in real mode hardly have a #PF


def _can_do(vcpu: Vcpu) -> bool:
    """Tell whether the vCPU can be given something else to do, a halt at least (``kvm_can_do_async_pf``)."""
    exception = vcpu.exception
    if vcpu.apic is None or exception.pending or exception.injected:
        return False
    if vcpu.interrupt_injected or vcpu.nmi_injected:  # an event's delivery has faulted
        return False
    if vcpu.vm.disable_hlt_exits and not _can_deliver(vcpu):
        return False
    return not svm.interrupt_blocked(vcpu)


def fault_in(vcpu: Vcpu, gfn: int, hva: int, requests: int) -> None:
    """A page that the guest has touched isn't there: have it fetched; the guest runs on, halts or waits (see above).

    ``requests`` end a wait.
    """
    apf = vcpu.apf
    if _can_do(vcpu):
        if apf.awaits(gfn):
            vcpu.make_request(KVM_REQ_APF_HALT)
            return
        work = Work(gfn, page_of(hva), apf.new_token(vcpu.vcpu_id))
        if _setup(vcpu, work):
            return
    apf.wait(vcpu, page_of(hva), requests)


def _setup(vcpu: Vcpu, work: Work) -> bool:
    """Tell the guest, and have the page waited for; False if too many are."""
    work.notpresent_injected = _can_deliver(vcpu)
    if not vcpu.apf.setup(vcpu.vm.machine, work, lambda: _present_queued(vcpu)):
        return False
    if work.notpresent_injected and _put(vcpu, _FLAGS, KVM_PV_REASON_PAGE_NOT_PRESENT):
        vcpu.stat_async_pf_not_present += 1
        inject_page_fault(vcpu, 0, work.token)
    else:
        work.notpresent_injected = False
        vcpu.make_request(KVM_REQ_APF_HALT)
    return True


# --- page ready --------------------------------------------------------------------------------


def _present_queued(vcpu: Vcpu) -> None:
    """A page has come; on any thread."""
    vcpu.make_request(KVM_REQ_APF_READY)
    vcpu.vcpu_kick()


def ends_halt(vcpu: Vcpu) -> bool:
    """Tell whether pages that have come let a halted vCPU go on.

    Linux lets any: the vCPU of a guest that never enables its APIC, and so can't be told, spins in HLT for ever.
    """
    apf = vcpu.apf
    return bool(apf.done) and (apf.halted or _can_dequeue(vcpu))


def _can_dequeue(vcpu: Vcpu) -> bool:
    """Tell whether the guest can be told of the next page (``kvm_arch_can_dequeue_async_page_present``)."""
    if not is_enabled(vcpu):
        return True
    apic = vcpu.apic
    assert apic is not None
    if not (apic.hw_enabled and apic.sw_enabled):
        return False
    gpa = vcpu.msr_values[abi.MSR_KVM_ASYNC_PF_EN] & _GPA_MASK
    return read_guest(vcpu.vm, gpa + _TOKEN, 4) == bytes(4)


def check_completion(vcpu: Vcpu) -> None:
    """Tell the guest of pages that have come, one at a time; on the vCPU's thread."""
    apf = vcpu.apf
    while apf.done and _can_dequeue(vcpu):
        _present(vcpu, apf.finish())


def _present(vcpu: Vcpu, work: Work) -> None:
    told = work.wakeup_all or work.notpresent_injected
    if told and is_enabled(vcpu) and _put(vcpu, _TOKEN, work.token):
        vcpu.apf.pageready_pending = True
        vcpu.stat_async_pf_ready += 1
        apic = vcpu.apic
        assert apic is not None
        vector = vcpu.msr_values.get(abi.MSR_KVM_ASYNC_PF_INT, 0) & abi.KVM_ASYNC_PF_VEC_MASK
        apic.accept_irq(APIC_DM_FIXED, vector)


def _put(vcpu: Vcpu, offset: int, value: int) -> bool:
    gpa = vcpu.msr_values[abi.MSR_KVM_ASYNC_PF_EN] & _GPA_MASK
    return write_guest(vcpu.vm, gpa + offset, struct.pack("<I", value & _U32))
