# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of MSRs (:mod:`softkvm.kvm.x86.msrs`): what one is, and those of common kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import _softcpu
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86.features import Feature

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

Reader = Callable[["Vcpu", int, bool], "int | None"]
Writer = Callable[["Vcpu", int, int, bool], bool]


class Msr(NamedTuple):
    """One row: how a register is read and written, and whether KVM_GET_MSR_INDEX_LIST names it."""

    read: Reader
    write: Writer
    save: bool = True


U32: Final = (1 << 32) - 1
U64: Final = (1 << 64) - 1
#: Width of the silicon's linear addresses.
_HOST_LINEAR_BITS: Final = _softcpu.cpuid(0x8000_0008, 0)[0] >> 8 & 0xFF


def constant(value: int) -> Msr:
    """A register that reads ``value`` and ignores writes."""
    return Msr(lambda vcpu, index, host: value, lambda vcpu, index, data, host: True, save=False)


def write_only() -> Msr:
    """A register that can't be read; writes do nothing."""
    return Msr(lambda vcpu, index, host: None, lambda vcpu, index, data, host: True, save=False)


def with_feature(feature: Feature, msr: Msr) -> Msr:
    """A register that the guest has only with a feature; the host always has it."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int | None:
        return msr.read(vcpu, index, host) if host or vcpu.cpuid.has(feature) else None

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        return (host or vcpu.cpuid.has(feature)) and msr.write(vcpu, index, data, host)

    return Msr(read, write, msr.save)


def fixed(value: int) -> Msr:
    """A register that reads ``value`` and that nobody can write."""
    return Msr(lambda vcpu, index, host: value, lambda vcpu, index, data, host: False, save=False)


def read_only(value: int) -> Msr:
    """A register that reads ``value``; the guest's writes raise #GP, the host may write it back."""
    return Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, value),
        lambda vcpu, index, data, host: host and keep(vcpu, index, data),
        save=False,
    )


def keep(vcpu: Vcpu, index: int, data: int) -> bool:
    """Store a value, with no more to it; a writer's answer."""
    vcpu.msr_values[index] = data
    return True


def stored(default: int = 0, valid: int = U64, *, save: bool = True) -> Msr:
    """A register that KVM only stores; bits outside of ``valid`` raise #GP."""

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        return not data & ~valid and keep(vcpu, index, data)

    return Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, default), write, save)


def in_vmcb(field: int, *, canonical: bool = False, valid: int = U64) -> Msr:
    """A register in the VMCB's save area."""

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if (canonical and cr.is_noncanonical(vcpu, data)) or data & ~valid:
            return False
        vcpu.q[field] = data
        return True

    return Msr(lambda vcpu, index, host: vcpu.q[field], write)


def sysenter(field: int) -> Msr:
    """SYSENTER_ESP or _EIP: 32 bits of AMD's, 64 for Intel-compatible guests (upper half in ``msr_values``).

    AMD's don't fault on addresses that aren't canonical, so KVM makes them so instead of raising #GP.
    """

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        high = vcpu.msr_values.get(index, 0) if vcpu.cpuid.intel_compatible else 0
        return high | vcpu.q[field] & U32

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if data >> _HOST_LINEAR_BITS - 1 & 1:
            data |= U64 << _HOST_LINEAR_BITS & U64
        else:
            data &= (1 << _HOST_LINEAR_BITS) - 1
        vcpu.msr_values[index] = data & ~U32 if vcpu.cpuid.intel_compatible else 0
        vcpu.q[field] = data & U32
        return True

    return Msr(read, write)
