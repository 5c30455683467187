# SPDX-License-Identifier: Apache-2.0
"""Which event the guest gets next: exceptions, NMIs, interrupts (``kvm_check_and_inject_events``).

Also KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.exceptions import (
    DR7_GD,
    SOFT_EXCEPTIONS,
    deliver_exception_payload,
    exception_has_error_code,
    exception_is_fault,
)
from softkvm.kvm.x86.requests import KVM_REQ_EVENT, KVM_REQ_TRIPLE_FAULT
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu


def cpu_has_interrupt(vcpu: Vcpu) -> bool:
    """Tell whether some source has an interrupt for the vCPU, flags aside."""
    if vcpu.apic is not None:
        chips = vcpu.chips
        assert chips is not None
        if vcpu.vm.split_irqchip and vcpu.pending_external_vector >= 0 and vcpu.apic.accept_pic_intr():
            return True
        return chips.cpu_has_interrupt(vcpu.apic)
    return vcpu.pending_external_vector >= 0


def cpu_has_injectable_intr(vcpu: Vcpu) -> bool:
    """Tell whether there is one for KVM to inject: those of a virtualized APIC the processor takes by itself."""
    if vcpu.apic is not None:
        chips = vcpu.chips
        assert chips is not None
        if vcpu.vm.split_irqchip and vcpu.pending_external_vector >= 0 and vcpu.apic.accept_pic_intr():
            return True
        return chips.cpu_has_injectable_intr(vcpu.apic)
    return vcpu.pending_external_vector >= 0


def cpu_get_interrupt(vcpu: Vcpu) -> int:
    """Acknowledge the next interrupt and return its vector, -1 for none."""
    if vcpu.apic is not None and vcpu.chips is not None:
        if vcpu.vm.split_irqchip and vcpu.pending_external_vector >= 0 and vcpu.apic.accept_pic_intr():
            vector = vcpu.pending_external_vector
            vcpu.pending_external_vector = -1
            return vector
        return vcpu.chips.cpu_get_interrupt(vcpu.apic)
    vector = vcpu.pending_external_vector
    vcpu.pending_external_vector = -1
    return vector


def process_nmi(vcpu: Vcpu) -> None:
    """Take queued NMIs over: at most two, one if they are blocked (KVM's limit; APM vol. 2, 8.2.3).

    The caller sees to it that events are looked at (KVM_REQ_EVENT).
    """
    limit = 1 if vcpu.nmi_masked or vcpu.nmi_injected else 2
    with vcpu.request_lock:
        queued, vcpu.nmi_queued = vcpu.nmi_queued, 0
    vcpu.nmi_pending = min(vcpu.nmi_pending + queued, limit)


def inject_events(vcpu: Vcpu) -> None:
    """Hand one event to the processor and ask for windows for those that have to wait."""
    exception = vcpu.exception
    can_inject = True
    # What was interrupted in the middle of its delivery comes first.
    if exception.injected:
        svm.inject_exception(vcpu)
        can_inject = False
    elif exception.pending:
        pass
    elif vcpu.nmi_injected:
        svm.inject_nmi(vcpu)
        can_inject = False
    elif vcpu.interrupt_injected:
        svm.inject_irq(vcpu)
        can_inject = False

    if exception.pending:
        _deliver_pending_exception(vcpu)
        can_inject = False

    if vcpu.guest_debug & abi.KVM_GUESTDBG_BLOCKIRQ:
        return

    if vcpu.nmi_pending:
        if can_inject and not svm.nmi_blocked(vcpu):
            vcpu.nmi_pending -= 1
            vcpu.nmi_injected = True
            svm.inject_nmi(vcpu)
            can_inject = False
        if vcpu.nmi_pending:
            svm.enable_nmi_window(vcpu)

    if cpu_has_injectable_intr(vcpu):
        if can_inject and not svm.interrupt_blocked(vcpu):
            vector = cpu_get_interrupt(vcpu)
            if vector >= 0:
                vcpu.interrupt_injected = True
                vcpu.interrupt_nr = vector
                vcpu.interrupt_soft = False
                svm.inject_irq(vcpu)
        if cpu_has_injectable_intr(vcpu):
            svm.enable_irq_window(vcpu)
        elif vcpu.irq_window:
            svm.clear_irq_window(vcpu)  # what it was opened for is on its way


def _deliver_pending_exception(vcpu: Vcpu) -> None:
    exception = vcpu.exception
    if exception_is_fault(exception.vector, exception.payload):
        vcpu.q[V.RFLAGS] |= abi.X86_EFLAGS_RF
    if exception.vector == abi.DB_VECTOR:
        deliver_exception_payload(vcpu, exception)
        if vcpu.guest_dr7 & DR7_GD:
            vcpu.guest_dr7 &= ~DR7_GD
            vcpu.update_dr7()
    elif exception.has_payload:
        deliver_exception_payload(vcpu, exception)
    exception.pending = False
    exception.injected = True
    svm.inject_exception(vcpu)


# --- the API -----------------------------------------------------------------------------------


def get_vcpu_events(vcpu: Vcpu) -> abi.kvm_vcpu_events:
    """Return everything that is pending or under way."""
    process_nmi(vcpu)
    vcpu.make_request(KVM_REQ_EVENT)
    events = abi.kvm_vcpu_events()
    exception = vcpu.exception
    if not vcpu.vm.exception_payload_enabled:
        # Without the capability, "pending" is not to be seen: it is reported as injected.
        deliver_exception_payload(vcpu, exception)
        events.exception.injected = int(exception.injected or exception.pending)
        events.exception.pending = 0
    else:
        events.exception.injected = int(exception.injected)
        events.exception.pending = int(exception.pending)
        events.flags |= abi.KVM_VCPUEVENT_VALID_PAYLOAD
        events.exception_has_payload = int(exception.has_payload)
        events.exception_payload = exception.payload
    if exception.vector in SOFT_EXCEPTIONS:
        events.exception.injected = events.exception.pending = 0
    events.exception.nr = exception.vector
    events.exception.has_error_code = int(exception.has_error_code)
    events.exception.error_code = exception.error_code
    events.interrupt.injected = int(vcpu.interrupt_injected and not vcpu.interrupt_soft)
    events.interrupt.nr = vcpu.interrupt_nr
    if vcpu.b[V.INT_STATE_B] & V.INTERRUPT_SHADOW:
        events.interrupt.shadow = abi.KVM_X86_SHADOW_INT_STI | abi.KVM_X86_SHADOW_INT_MOV_SS
    events.nmi.injected = int(vcpu.nmi_injected)
    events.nmi.pending = vcpu.nmi_pending
    events.nmi.masked = int(vcpu.nmi_masked)
    events.flags |= abi.KVM_VCPUEVENT_VALID_NMI_PENDING | abi.KVM_VCPUEVENT_VALID_SHADOW | abi.KVM_VCPUEVENT_VALID_SMM
    if vcpu.apic is not None:
        events.smi.latched_init = vcpu.apic.pending_events & 1
    if vcpu.vm.triple_fault_event:
        events.triple_fault.pending = int(bool(vcpu.requests & KVM_REQ_TRIPLE_FAULT))
        events.flags |= abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    return events


def set_vcpu_events(vcpu: Vcpu, events: abi.kvm_vcpu_events) -> None:
    """Load what is pending; EINVAL for unknown flags, exceptions that can't be, and SMM (which isn't there)."""
    valid = (
        abi.KVM_VCPUEVENT_VALID_NMI_PENDING
        | abi.KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | abi.KVM_VCPUEVENT_VALID_SHADOW
        | abi.KVM_VCPUEVENT_VALID_SMM
        | abi.KVM_VCPUEVENT_VALID_PAYLOAD
        | abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    )
    flags = events.flags
    if flags & ~valid:
        raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected KVM_VCPUEVENT_VALID_* bits")
    if flags & abi.KVM_VCPUEVENT_VALID_PAYLOAD:
        if not vcpu.vm.exception_payload_enabled:
            raise kvm_error(errno.EINVAL, "flags has VALID_PAYLOAD without KVM_CAP_EXCEPTION_PAYLOAD")
        if events.exception.pending:
            events.exception.injected = 0
        else:
            events.exception_has_payload = 0
    else:
        events.exception.pending = 0
        events.exception_has_payload = 0
    nr = events.exception.nr
    if (events.exception.injected or events.exception.pending) and (nr > 31 or nr == 2):
        raise kvm_error(errno.EINVAL, f"exception.nr={nr}, expected an exception vector")
    if flags & abi.KVM_VCPUEVENT_VALID_SMM and events.smi.smm:
        raise kvm_error(errno.EINVAL, "smi.smm=1: there is no system management mode")
    if flags & abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT and not vcpu.vm.triple_fault_event:
        raise kvm_error(errno.EINVAL, "flags has VALID_TRIPLE_FAULT without KVM_CAP_X86_TRIPLE_FAULT_EVENT")
    exception = vcpu.exception
    exception.injected = bool(events.exception.injected)
    exception.pending = bool(events.exception.pending)
    exception.vector = nr
    exception.has_error_code = bool(events.exception.has_error_code) and exception_has_error_code(nr)
    exception.error_code = events.exception.error_code
    exception.has_payload = bool(events.exception_has_payload)
    exception.payload = events.exception_payload
    vcpu.interrupt_injected = bool(events.interrupt.injected)
    vcpu.interrupt_nr = events.interrupt.nr
    vcpu.interrupt_soft = bool(events.interrupt.soft)
    if flags & abi.KVM_VCPUEVENT_VALID_SHADOW:
        vcpu.b[V.INT_STATE_B] = V.INTERRUPT_SHADOW if events.interrupt.shadow else 0
    vcpu.nmi_injected = bool(events.nmi.injected)
    if flags & abi.KVM_VCPUEVENT_VALID_NMI_PENDING:
        vcpu.nmi_pending = 0
        vcpu.nmi_queued = events.nmi.pending
        process_nmi(vcpu)
    vcpu.set_nmi_mask(bool(events.nmi.masked))
    if flags & abi.KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.apic is not None:
        vcpu.apic.sipi_vector = events.sipi_vector
    if flags & abi.KVM_VCPUEVENT_VALID_SMM and vcpu.apic is not None:
        if events.smi.latched_init:
            vcpu.apic.pending_events |= 1
        else:
            vcpu.apic.pending_events &= ~1
    if flags & abi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        if events.triple_fault.pending:
            vcpu.make_request(KVM_REQ_TRIPLE_FAULT)
        else:
            vcpu.take_request(KVM_REQ_TRIPLE_FAULT)
    vcpu.make_request(KVM_REQ_EVENT)
