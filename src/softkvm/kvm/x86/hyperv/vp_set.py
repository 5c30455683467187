# SPDX-License-Identifier: Apache-2.0
"""Sets of virtual processors in the input of hypercalls (TLFS, 7.8.7.3): up to 64 banks of 64 indices each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.abi.sizes import Size
from softkvm.kvm.capabilities import KVM_MAX_VCPUS
from softkvm.kvm.x86.hyperv.call import Call

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu
    from softkvm.kvm.x86.state import VmState as Vm

_BANK: Final = abi.HV_VCPUS_PER_SPARSE_BANK
_BANKS: Final = Size(
    "banks of a sparse set of virtual processors",
    -(-KVM_MAX_VCPUS // _BANK),
    None,
    element=8,
    giver="guest",
    effect="higher ones aren't read",
    where=__name__,
)


@dataclass(frozen=True, slots=True)
class VpSet:
    """Banks by their number: bit n of bank b is index 64 * b + n."""

    banks: dict[int, int]

    @classmethod
    def read(cls, vcpu: Vcpu, call: Call, first: int, valid_banks: int) -> VpSet | None:
        """Return a set of which only the banks of a mask are there, in ascending order, from input word *first* on.

        None if the input isn't there. Banks behind those of the highest index that there can be aren't looked at.
        """
        numbers = [number for number in range(abi.HV_MAX_SPARSE_VCPU_BANKS) if valid_banks >> number & 1]
        contents = call.words(vcpu, first, len(numbers) if call.fast else _BANKS.cut(len(numbers)))
        return None if contents is None else cls(dict(zip(numbers, contents, strict=False)))

    def members(self, vm: Vm) -> list[Vcpu]:
        """Return those of the VM's vCPUs that are in the set."""
        return [vcpu for at, vcpu in enumerate(vm.vcpus) if self._has(vcpu.hyperv.index if vcpu.hyperv else at)]

    def _has(self, index: int) -> bool:
        return bool(self.banks.get(index // _BANK, 0) >> index % _BANK & 1)
