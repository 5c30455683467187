# SPDX-License-Identifier: Apache-2.0
"""The state of a PC: processors, interrupt chips, clock, devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softkvm import abi, api
from softkvm.vmm.boards import Saving
from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.snapshot import chips, vcpu
from softkvm.vmm.snapshot.structures import field, unpack

Cpuid = Sequence[Sequence[abi.kvm_cpuid_entry2]]
"""What each processor is said to be."""


def save(
    vm: api.Vm,
    vcpus: Sequence[api.Vcpu],
    devices: Mapping[str, Saving],
    cpuid: Cpuid,
    msr_indices: Sequence[int],
    *,
    pit: bool,
) -> dict[str, Any]:
    """Return the state of a machine that stands.

    The clock comes first and the chips last: KVM's own timers run on, and what comes due meanwhile is to happen twice
    rather than never.
    """
    return {
        "clock": chips.save_clock(vm),
        "cpuid": [[bytes(entry) for entry in entries] for entries in cpuid],
        "vcpus": [vcpu.save(vm, one, msr_indices) for one in vcpus],
        "devices": {name: device.save() for name, device in devices.items()},
        "chips": chips.save(vm, pit=pit),
    }


def restore(
    vm: api.Vm,
    vcpus: Sequence[api.Vcpu],
    devices: Mapping[str, Saving],
    cpuid: Cpuid,
    state: dict[str, Any],
    *,
    pit: bool,
    step_time: bool,
) -> None:
    """Put *state* into a new machine. SnapshotError for that of another one; nothing has been changed then.

    Or it is a KVM, or a device, that does not take what this one said before.
    """
    _check_cpuid(field(state, "cpuid", list), cpuid)
    states = field(state, "vcpus", list)
    if len(states) != len(vcpus):
        raise SnapshotError(f"state of {len(states)} vCPUs, expected {len(vcpus)}")
    saved = field(state, "devices", dict)
    if saved.keys() != devices.keys():
        raise SnapshotError(f"state of a machine with {_named(saved)}, expected {_named(devices)}")
    for one, its in zip(vcpus, states, strict=True):
        vcpu.restore(vm, one, its)
    chips.restore(vm, field(state, "chips", dict), pit=pit)
    for name, device in devices.items():
        device.restore(saved[name])
    chips.restore_clock(vm, vcpus, state.get("clock"), states, step=step_time)
    for one, its in zip(vcpus, states, strict=True):
        vcpu.restore_deadline(one, its)


def _named(devices: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _check_cpuid(saved: list[Any], here: Cpuid) -> None:
    """Raise SnapshotError unless the processors that this KVM makes are those of the state."""
    if len(saved) != len(here):
        raise SnapshotError(f"state of {len(saved)} vCPUs, expected {len(here)}")
    for index, (theirs, ours) in enumerate(zip(saved, here, strict=True)):
        if not isinstance(theirs, list):
            raise SnapshotError("cpuid: expected a list of leaves for each vCPU")
        if theirs != [bytes(entry) for entry in ours]:
            leaves = [unpack(abi.kvm_cpuid_entry2, entry) for entry in theirs]
            raise SnapshotError(f"another processor: {_difference(leaves, ours)} (vCPU {index})")


def _difference(theirs: Sequence[abi.kvm_cpuid_entry2], ours: Sequence[abi.kvm_cpuid_entry2]) -> str:
    """Say in which leaf of CPUID two processors differ first."""

    def table(entries: Sequence[abi.kvm_cpuid_entry2]) -> dict[tuple[int, int], tuple[int, ...]]:
        return {(entry.function, entry.index): (entry.eax, entry.ebx, entry.ecx, entry.edx) for entry in entries}

    saved, here = table(theirs), table(ours)
    for place in sorted(saved.keys() | here.keys()):
        if saved.get(place) != here.get(place):
            names = [
                " ".join(f"{value:08x}" for value in values) if values else "none"
                for values in (saved.get(place), here.get(place))
            ]
            return f"CPUID leaf {place[0]:#x}.{place[1]} was {names[0]}, is {names[1]} here"
    return "CPUID's leaves are in another order or have other flags here"
