# SPDX-License-Identifier: Apache-2.0
"""The state that processors and interrupt chips have after a reset, taken once and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softkvm import abi, api

_CHIPS = (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC)


@dataclass(frozen=True, slots=True)
class _VcpuState:
    regs: abi.kvm_regs
    sregs: abi.kvm_sregs
    lapic: abi.kvm_lapic_state
    debugregs: abi.kvm_debugregs
    mp_state: abi.kvm_mp_state


@dataclass(frozen=True, slots=True)
class ResetState:
    """What :meth:`take` found: the registers of every vCPU, and the interrupt chips."""

    vcpus: tuple[_VcpuState, ...]
    chips: tuple[abi.kvm_irqchip, ...]

    @classmethod
    def take(cls, vm: api.Vm, vcpus: Sequence[api.Vcpu]) -> ResetState:
        """Keep the state of a machine that has not run yet."""
        return cls(
            tuple(
                _VcpuState(
                    vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_lapic(), vcpu.get_debugregs(), vcpu.get_mp_state()
                )
                for vcpu in vcpus
            ),
            tuple(vm.get_irqchip(chip) for chip in _CHIPS),
        )

    def restore(self, vm: api.Vm, vcpus: Sequence[api.Vcpu]) -> None:
        """Put it back; no vCPU may be in KVM_RUN."""
        for chip in self.chips:
            vm.set_irqchip(chip)
        for vcpu, state in zip(vcpus, self.vcpus, strict=True):
            vcpu.set_sregs(state.sregs)
            vcpu.set_regs(state.regs)
            vcpu.set_lapic(state.lapic)
            vcpu.set_debugregs(state.debugregs)
            vcpu.set_vcpu_events(abi.kvm_vcpu_events())
            vcpu.set_mp_state(state.mp_state)
