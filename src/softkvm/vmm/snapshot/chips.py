# SPDX-License-Identifier: Apache-2.0
"""KVM's interrupt chips and the guest's clock (KVM API: KVM_GET_IRQCHIP, KVM_GET_PIT2, KVM_GET_CLOCK)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from softkvm import abi, api
from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.snapshot.structures import field, unpack

_CHIPS: Final = {
    "pic_master": abi.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": abi.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": abi.KVM_IRQCHIP_IOAPIC,
}
_U64: Final = (1 << 64) - 1


def save(vm: api.Vm, *, pit: bool) -> dict[str, Any]:
    """Return the state of the chips; no vCPU is in KVM_RUN."""
    state: dict[str, Any] = {name: bytes(vm.get_irqchip(chip)) for name, chip in _CHIPS.items()}
    if pit:
        state["pit"] = bytes(vm.get_pit2())
    return state


def restore(vm: api.Vm, state: dict[str, Any], *, pit: bool) -> None:
    """Put *state* into new chips; SnapshotError if it is none, or KVM does not take it."""
    chips = [(name, chip, unpack(abi.kvm_irqchip, state.get(name))) for name, chip in _CHIPS.items()]
    for name, chip, structure in chips:
        if structure.chip_id != chip:
            raise SnapshotError(f"{name}: it is the state of chip {structure.chip_id}, expected {chip}")
    timer = unpack(abi.kvm_pit_state2, state.get("pit")) if pit else None
    try:
        for _, _, structure in chips:
            vm.set_irqchip(structure)
        if timer is not None:
            vm.set_pit2(timer)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"interrupt chips: this KVM does not take their state: {error}") from None


def save_clock(vm: api.Vm) -> bytes:
    """Return the guest's clock, with the host's time and counter of the same moment where KVM tells them."""
    return bytes(vm.get_clock())


def restore_clock(
    vm: api.Vm, vcpus: Sequence[api.Vcpu], data: object, states: Sequence[dict[str, Any]], *, step: bool
) -> None:
    """Let the guest's clock and counters go on.

    With *step* they have gone on meanwhile, by the host's realtime clock (KVM_CLOCK_REALTIME), without, they go on from
    where they were. Counters follow the clock as Linux's ``Documentation/virt/kvm/devices/vcpu.rst`` has it
    (KVM_VCPU_TSC_OFFSET): the offset changes by what the host's counters differ by, and by what the clock was stepped.
    """
    clock = unpack(abi.kvm_clock_data, data)
    told = clock.flags
    new = abi.kvm_clock_data(clock=clock.clock)
    if step and told & abi.KVM_CLOCK_REALTIME:
        new.flags, new.realtime = abi.KVM_CLOCK_REALTIME, clock.realtime
    try:
        vm.set_clock(new)
    except OSError as error:
        raise SnapshotError(f"clock: this KVM does not take it: {error}") from None
    if not told & abi.KVM_CLOCK_HOST_TSC:
        return
    now = vm.get_clock()
    if not now.flags & abi.KVM_CLOCK_HOST_TSC:
        return
    for vcpu, state in zip(vcpus, states, strict=True):
        offset = state.get("tsc_offset")
        if type(offset) is not int:
            continue
        ticks = (now.clock - clock.clock) * field(state, "tsc_khz", int) // 1_000_000
        offset += ticks + clock.host_tsc - now.host_tsc
        try:
            vcpu.set_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, offset & _U64)
        except OSError as error:
            raise SnapshotError(f"time-stamp counter: this KVM does not take its offset: {error}") from None
