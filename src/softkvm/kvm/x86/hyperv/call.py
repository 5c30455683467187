# SPDX-License-Identifier: Apache-2.0
"""The registers of one of Hyper-V's hypercalls, and its input (TLFS, 3.7): memory, two registers, XMM registers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.memory.guest_memory import read_guest

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1


@dataclass(slots=True)
class Call:
    """One hypercall's registers."""

    param: int
    #: Where the input is, or for a fast call its first 8 bytes; where the output goes, or the next 8.
    ingpa: int
    outgpa: int
    #: Input of a fast call behind those: halves of XMM registers.
    xmm: list[int] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Which hypercall it is."""
        return self.param & 0xFFFF

    @property
    def fast(self) -> bool:
        """Whether its input is in registers."""
        return bool(self.param & abi.HV_HYPERCALL_FAST_BIT)

    @property
    def var_count(self) -> int:
        """Quadwords that a header of variable size has behind its fixed part."""
        return (self.param & abi.HV_HYPERCALL_VARHEAD_MASK) >> abi.HV_HYPERCALL_VARHEAD_OFFSET

    @property
    def rep_count(self) -> int:
        """Elements of a list."""
        return (self.param & abi.HV_HYPERCALL_REP_COMP_MASK) >> abi.HV_HYPERCALL_REP_COMP_OFFSET

    @property
    def rep_start(self) -> int:
        """The first element that is still to be done."""
        return (self.param & abi.HV_HYPERCALL_REP_START_MASK) >> abi.HV_HYPERCALL_REP_START_OFFSET

    def words(self, vcpu: Vcpu, first: int, count: int) -> list[int] | None:
        """Return *count* quadwords of the input from the one numbered *first*; None if it isn't that long, or there."""
        if self.fast:
            given = [self.ingpa, self.outgpa, *self.xmm]
            return given[first : first + count] if first + count <= len(given) else None
        data = read_guest(vcpu.vm, self.ingpa + 8 * first & _U64, 8 * count)
        return None if data is None else [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
