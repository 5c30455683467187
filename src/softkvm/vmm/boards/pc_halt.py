# SPDX-License-Identifier: Apache-2.0
"""Whether a PC has halted for good: what can wake a processor that is in HLT with interrupts disabled.

Only an NMI, an SMI or an INIT leads on from there, and another processor that could send one is halted, too.

Source: AMD64 Architecture Programmer's Manual, volume 3, HLT (what ends it); volume 2, 16.4 and 16.5 (local vector
table and interrupt command: message types); Intel 82093AA IOAPIC data sheet, 3.2.4 (delivery modes).
"""

from __future__ import annotations

from collections.abc import Sequence

from softkvm import abi, api

_RFLAGS_IF = 1 << 9
_CR4_VMXE = 1 << 13
_WAITING_FOR_STARTUP = (abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED)
_LVT_LINT0 = 0x350
_MASKED = 1 << 16
_DELIVERY_MODE_SHIFT = 8
_REACHES_DISABLED = (2, 4, 5)  # delivery modes SMI, NMI and INIT
_IOAPIC_PINS = 24


def halted_for_good(vm: api.Vm, vcpus: Sequence[api.Vcpu]) -> bool:
    """Whether no interrupt that there can be wakes any of *vcpus*. None of them may be in KVM_RUN."""
    return all(_cannot_wake(vcpu) for vcpu in vcpus) and not _ioapic_reaches_disabled(vm)


def _cannot_wake(vcpu: api.Vcpu) -> bool:
    state = vcpu.get_mp_state().mp_state
    if state in _WAITING_FOR_STARTUP:
        return True
    if state != abi.KVM_MP_STATE_HALTED or vcpu.get_regs().rflags & _RFLAGS_IF:
        return False
    sregs = vcpu.get_sregs()
    if sregs.efer & abi.EFER_SVME or sregs.cr4 & _CR4_VMXE:
        return False  # a hypervisor's guest may be halted, and interrupts are for the hypervisor
    events = vcpu.get_vcpu_events()
    pending = events.nmi.pending or events.smi.pending or events.exception.injected or events.exception.pending
    # the i8254 may drive NMIs through LINT0 (Linux's NMI watchdog did)
    lint0 = int.from_bytes(bytes(vcpu.get_lapic().regs[_LVT_LINT0 : _LVT_LINT0 + 4]), "little")
    return not pending and not _reaches_disabled(lint0)


def _ioapic_reaches_disabled(vm: api.Vm) -> bool:
    ioapic = vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic
    return any(_reaches_disabled(ioapic.redirtbl[pin].bits) for pin in range(_IOAPIC_PINS))


def _reaches_disabled(entry: int) -> bool:
    """Whether a local vector or a redirection *entry* makes an interrupt that RFLAGS.IF does not hold off."""
    return not entry & _MASKED and entry >> _DELIVERY_MODE_SHIFT & 7 in _REACHES_DISABLED
