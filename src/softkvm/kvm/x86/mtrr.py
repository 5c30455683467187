# SPDX-License-Identifier: Apache-2.0
"""Memory types: the MTRRs and PAT (APM vol. 2, 7.7 and 7.8). Kept only: the silicon has no caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.kvm.x86 import msr_index as M
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_U64: Final = (1 << 64) - 1
_VARIABLE_RANGES: Final = 8
_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
#: Variable and fixed ranges, and write-combining.
MTRRCAP: Final = 1 << 10 | 1 << 8 | _VARIABLE_RANGES


def _keep(vcpu: Vcpu, index: int, data: int) -> bool:
    vcpu.msr_values[index] = data
    return True


def _read(vcpu: Vcpu, index: int, host: bool) -> int:
    return vcpu.msr_values.get(index, 0)


def _read_pat(vcpu: Vcpu, index: int, host: bool) -> int:
    return vcpu.q[V.G_PAT]


def _write_pat(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if any((data >> shift & 0xFF) not in (0, 1, 4, 5, 6, 7) for shift in range(0, 64, 8)):
        return False
    vcpu.q[V.G_PAT] = data
    return True


def _mtrr_type_valid(kind: int) -> bool:
    return kind in (0, 1, 4, 5, 6)


def _write_mtrr_fixed(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not all(_mtrr_type_valid(data >> shift & 0xFF) for shift in range(0, 64, 8)):
        return False
    return _keep(vcpu, index, data)


def _write_mtrr_def_type(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return not data & ~0xCFF and _mtrr_type_valid(data & 0xFF) and _keep(vcpu, index, data)


def _write_mtrr_var(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    reserved = ~((1 << vcpu.maxphyaddr) - 1) & _U64
    if index & 1:  # mask
        return not data & (reserved | 0x7FF) and _keep(vcpu, index, data)
    return not data & (reserved | 0xF00) and _mtrr_type_valid(data & 0xFF) and _keep(vcpu, index, data)


_VARIABLE: Final = range(M.MSR_MTRR_PHYS_BASE0, M.MSR_MTRR_PHYS_BASE0 + 2 * _VARIABLE_RANGES)

#: Reader and writer of every such MSR, as :mod:`softkvm.kvm.x86.msrs` has them.
MSRS: Final[dict[int, tuple[Callable[[Vcpu, int, bool], int], Callable[[Vcpu, int, int, bool], bool]]]] = {
    M.MSR_IA32_CR_PAT: (_read_pat, _write_pat),
    M.MSR_MTRR_DEF_TYPE: (_read, _write_mtrr_def_type),
    **dict.fromkeys(_FIXED, (_read, _write_mtrr_fixed)),
    **dict.fromkeys(_VARIABLE, (_read, _write_mtrr_var)),
}
