# SPDX-License-Identifier: Apache-2.0
"""When a halted machine is beyond waking: what RFLAGS.IF holds off (APM volume 2, 16.4; IOAPIC data sheet, 3.2.4)."""

from __future__ import annotations

from typing import Any, cast

import pytest

from softkvm import abi, api
from softkvm.vmm.boards.pc_halt import halted_for_good

IF = 1 << 9


class HaltedVcpu:
    """A vCPU in HLT with interrupts disabled."""

    def __init__(self) -> None:
        self.mp_state = abi.KVM_MP_STATE_HALTED
        self.regs = abi.kvm_regs(rflags=2)
        self.sregs = abi.kvm_sregs()
        self.events = abi.kvm_vcpu_events()
        self.lapic = abi.kvm_lapic_state()
        self.lint0(0x10700)  # masked, as after reset; ExtINT

    def lint0(self, value: int) -> None:
        for index, byte in enumerate(value.to_bytes(4, "little")):
            self.lapic.regs[0x350 + index] = byte

    def get_mp_state(self) -> abi.kvm_mp_state:
        return abi.kvm_mp_state(self.mp_state)

    def get_regs(self) -> abi.kvm_regs:
        return self.regs

    def get_sregs(self) -> abi.kvm_sregs:
        return self.sregs

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        return self.events

    def get_lapic(self) -> abi.kvm_lapic_state:
        return self.lapic


class Chips:
    def __init__(self) -> None:
        self.ioapic = abi.kvm_irqchip()
        for pin in range(24):
            self.entry(pin, 1 << 16)

    def entry(self, pin: int, bits: int) -> None:
        self.ioapic.chip.ioapic.redirtbl[pin].bits = bits

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        assert chip_id == abi.KVM_IRQCHIP_IOAPIC
        return self.ioapic


def verdict(chips: Chips, *vcpus: HaltedVcpu) -> bool:
    return halted_for_good(cast(api.Vm, chips), [cast(api.Vcpu, vcpu) for vcpu in vcpus])


def test_interrupts_disabled_everywhere() -> None:
    assert verdict(Chips(), HaltedVcpu(), HaltedVcpu())


@pytest.mark.parametrize("state", [abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED])
def test_processor_that_waits_for_its_start_cannot_start_itself(state: int) -> None:
    other = HaltedVcpu()
    other.mp_state = state
    assert verdict(Chips(), HaltedVcpu(), other)


def _enable(vcpu: Any) -> None:
    vcpu.regs.rflags |= IF


def _run(vcpu: Any) -> None:
    vcpu.mp_state = abi.KVM_MP_STATE_RUNNABLE


def _nmi(vcpu: Any) -> None:
    vcpu.events.nmi.pending = 1


def _smi(vcpu: Any) -> None:
    vcpu.events.smi.pending = 1


def _svm(vcpu: Any) -> None:
    vcpu.sregs.efer |= 1 << 12


def _vmx(vcpu: Any) -> None:
    vcpu.sregs.cr4 |= 1 << 13


def _lint0_nmi(vcpu: Any) -> None:
    vcpu.lint0(0x400)


@pytest.mark.parametrize("change", [_enable, _run, _nmi, _smi, _svm, _vmx, _lint0_nmi])
def test_one_vcpu_that_may_wake_is_enough(change: Any) -> None:
    other = HaltedVcpu()
    change(other)
    assert not verdict(Chips(), HaltedVcpu(), other)


@pytest.mark.parametrize(
    ("mode", "wakes"), [(0, False), (1, False), (2, True), (4, True), (5, True), (7, False)]
)  # fixed, lowest priority, SMI, NMI, INIT, ExtINT
def test_ioapic_entry_wakes_by_its_delivery_mode(mode: int, wakes: bool) -> None:
    chips = Chips()
    chips.entry(5, mode << 8)
    assert verdict(chips, HaltedVcpu()) is not wakes
    chips.entry(5, mode << 8 | 1 << 16)
    assert verdict(chips, HaltedVcpu())
