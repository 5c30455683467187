# SPDX-License-Identifier: Apache-2.0
"""The state that processors and interrupt chips have after a reset, taken once and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from softkvm import abi, api

_CHIPS = (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC)
_MSR_IA32_TSC, _MSR_IA32_TSC_ADJUST = 0x10, 0x3B  # APM volume 2, appendix A; Intel SDM volume 4
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class _VcpuState:
    regs: abi.kvm_regs
    sregs: abi.kvm_sregs
    lapic: abi.kvm_lapic_state
    debugregs: abi.kvm_debugregs
    mp_state: abi.kvm_mp_state
    xcrs: abi.kvm_xcrs | None
    xsave: abi.kvm_xsave
    fpu: abi.kvm_fpu
    nested: abi.kvm_nested_state | None
    msrs: dict[int, int]


def _msrs(vcpu: api.Vcpu, indices: Sequence[int]) -> dict[int, int]:
    """Return the values of those MSRs that this vCPU lets read."""
    values: dict[int, int] = {}
    at = 0
    while at < len(indices):
        some = indices[at : at + _AT_ONCE]
        found = vcpu.get_msrs(some)
        values.update(zip(some, found, strict=False))
        at += len(found) + (len(found) < len(some))  # the one behind those cannot be read
    return values


def _take(vcpu: api.Vcpu, msrs: Sequence[int]) -> _VcpuState:
    xcrs = nested = None
    with contextlib.suppress(OSError):  # a KVM or a CPUID without XSAVE
        xcrs = vcpu.get_xcrs()
    with contextlib.suppress(OSError):  # a KVM without nested virtualization
        nested = vcpu.get_nested_state()
    return _VcpuState(
        vcpu.get_regs(),
        vcpu.get_sregs(),
        vcpu.get_lapic(),
        vcpu.get_debugregs(),
        vcpu.get_mp_state(),
        xcrs,
        vcpu.get_xsave(),
        vcpu.get_fpu(),
        nested,
        _msrs(vcpu, msrs),
    )


@dataclass(frozen=True, slots=True)
class ResetState:
    """What :meth:`take` found: the registers of every vCPU, and the interrupt chips."""

    vcpus: tuple[_VcpuState, ...]
    chips: tuple[abi.kvm_irqchip, ...]
    pit: abi.kvm_pit_state2 | None

    @classmethod
    def take(cls, kvm: api.Kvm, vm: api.Vm, vcpus: Sequence[api.Vcpu], *, pit: bool) -> ResetState:
        """Keep the state of a machine that has not run yet. Its time stamp counters go on, as all its clocks do."""
        clocks = (_MSR_IA32_TSC, _MSR_IA32_TSC_ADJUST)
        msrs = [index for index in kvm.get_msr_index_list() if index not in clocks]
        return cls(
            tuple(_take(vcpu, msrs) for vcpu in vcpus),
            tuple(vm.get_irqchip(chip) for chip in _CHIPS),
            vm.get_pit2() if pit else None,
        )

    def restore(self, vm: api.Vm, vcpus: Sequence[api.Vcpu]) -> None:
        """Put it back; no vCPU may be in KVM_RUN."""
        for chip in self.chips:
            vm.set_irqchip(chip)
        if self.pit is not None:
            vm.set_pit2(self.pit)
        for vcpu, state in zip(vcpus, self.vcpus, strict=True):
            vcpu.set_vcpu_events(abi.kvm_vcpu_events(flags=abi.KVM_VCPUEVENT_VALID_SMM))
            if state.nested is not None:
                vcpu.set_nested_state(state.nested)
            vcpu.set_sregs(state.sregs)
            vcpu.set_regs(state.regs)
            _put_back_msrs(vcpu, state.msrs)
            if state.xcrs is not None:
                vcpu.set_xcrs(state.xcrs)
            vcpu.set_xsave(state.xsave)
            vcpu.set_fpu(state.fpu)  # KVM_SET_XSAVE leaves alone what is in its initial state
            vcpu.set_lapic(state.lapic)
            vcpu.set_debugregs(state.debugregs)
            vcpu.set_vcpu_events(abi.kvm_vcpu_events())
            vcpu.set_mp_state(state.mp_state)


def _put_back_msrs(vcpu: api.Vcpu, before: dict[int, int]) -> None:
    """Write what has changed; what counts, or can only be read, is as it is."""
    now = _msrs(vcpu, list(before))
    for index, value in before.items():
        if now.get(index) != value:
            with contextlib.suppress(OSError):
                vcpu.set_msrs({index: value})
