# SPDX-License-Identifier: Apache-2.0
"""A processor's state through the KVM API: what is saved, and the order in which it is restored.

The order matters. Structures that change others' fields come first (special registers before the local APIC, which is
where IA32_APIC_BASE says), the counter before the deadline that it runs to, the APIC before that deadline, and pending
events last, since setting registers drops them. It is the order of Linux's ``Documentation/virt/kvm/api.rst`` where
that says any, and of what other machine monitors do where it doesn't.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from ctypes import Structure
from typing import Any, Final, NamedTuple

from softkvm import abi, api
from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.snapshot.structures import field, unpack

_CR4_VMXE: Final = 1 << 13

MSR_IA32_TSC: Final = 0x10
MSR_IA32_TSC_DEADLINE: Final = 0x6E0
_MSR_IA32_MCG_CAP: Final = 0x179
_MSR_IA32_MC0_CTL: Final = 0x400
_MSR_AMD64_OSVW: Final = (0xC001_0140, 0xC001_0141)
_MSR_AMD64_DE_CFG: Final = 0xC001_1029
#: A guest without Hyper-V's interfaces has none of its registers: writing the assist page's, a zero too, ends KVM's own
#: paravirtual EOI.
_HYPERV_MSRS: Final = range(0x4000_0000, 0x4000_0200)
#: Of Hyper-V's, what the index list leaves out: SIEFP, SIMP, SINTs, and all synthetic timers but one register.
_HYPERV: Final = (0x4000_0082, 0x4000_0083, *range(0x4000_0090, 0x4000_00A0), *range(0x4000_00B0, 0x4000_00B8))
_HYPERV_INTERFACE: Final = int.from_bytes(b"Hv#1", "little")
_MOST_MSRS: Final = 128
"""Registers in one KVM_GET_MSRS or KVM_SET_MSRS: fewer than MAX_IO_MSRS."""

_FIRST: Final = (MSR_IA32_TSC,)
_LAST: Final = (MSR_IA32_TSC_DEADLINE,)


class _Part(NamedTuple):
    """One structure of a vCPU's: how it is read and written."""

    name: str
    kind: type[Structure]
    get: Callable[[api.Vcpu], Structure]
    set: Callable[[api.Vcpu, Any], None]
    needs: int = 0
    """The capability without which there is no such request; 0: none."""
    unless: int = 0
    """The capability with which another one says all of it."""


#: In the order of restoring.
_BEFORE_MSRS: Final = (
    _Part("sregs", abi.kvm_sregs, lambda v: v.get_sregs(), lambda v, s: v.set_sregs(s), unless=abi.KVM_CAP_SREGS2),
    _Part("sregs2", abi.kvm_sregs2, lambda v: v.get_sregs2(), lambda v, s: v.set_sregs2(s), abi.KVM_CAP_SREGS2),
    _Part("xcrs", abi.kvm_xcrs, lambda v: v.get_xcrs(), lambda v, s: v.set_xcrs(s), abi.KVM_CAP_XCRS),
    _Part("fpu", abi.kvm_fpu, lambda v: v.get_fpu(), lambda v, s: v.set_fpu(s), unless=abi.KVM_CAP_XSAVE),
    _Part("xsave", abi.kvm_xsave, lambda v: v.get_xsave(), lambda v, s: v.set_xsave(s), abi.KVM_CAP_XSAVE),
    _Part("regs", abi.kvm_regs, lambda v: v.get_regs(), lambda v, s: v.set_regs(s)),
    _Part(
        "debugregs",
        abi.kvm_debugregs,
        lambda v: v.get_debugregs(),
        lambda v, s: v.set_debugregs(s),
        abi.KVM_CAP_DEBUGREGS,
    ),
    _Part("lapic", abi.kvm_lapic_state, lambda v: v.get_lapic(), lambda v, s: v.set_lapic(s)),
)
_AFTER_MSRS: Final = (
    _Part("mp_state", abi.kvm_mp_state, lambda v: v.get_mp_state(), lambda v, s: v.set_mp_state(s)),
    _Part("events", abi.kvm_vcpu_events, lambda v: v.get_vcpu_events(), lambda v, s: v.set_vcpu_events(s)),
)


def _read_msrs(vcpu: api.Vcpu, indices: Iterable[int]) -> list[list[int]]:
    """Return (index, value) of those of *indices* that can be read."""
    found = []
    left = list(dict.fromkeys(indices))
    while left:
        part = left[:_MOST_MSRS]
        values = vcpu.get_msrs(part)
        found += [list(pair) for pair in zip(part, values, strict=False)]
        left = left[len(values) + (len(values) < len(part)) :]  # without the one that there isn't
    return found


def _indices(vcpu: api.Vcpu, listed: Sequence[int]) -> Iterable[int]:
    """Every register to save: those of KVM_GET_MSR_INDEX_LIST, and what a feature adds that has no fixed number."""
    hyperv = any(
        entry.function == abi.HYPERV_CPUID_INTERFACE and entry.eax == _HYPERV_INTERFACE for entry in vcpu.get_cpuid2()
    )
    yield from (index for index in listed if hyperv or index not in _HYPERV_MSRS)
    yield from (*_MSR_AMD64_OSVW, _MSR_AMD64_DE_CFG)
    capability = vcpu.get_msrs([_MSR_IA32_MCG_CAP])
    banks = capability[0] & 0xFF if capability else 0
    yield from range(_MSR_IA32_MC0_CTL, _MSR_IA32_MC0_CTL + 4 * banks)
    if hyperv:
        yield from _HYPERV


def _available(vm: api.Vm, parts: Sequence[_Part]) -> list[_Part]:
    def has(cap: int) -> bool:
        return vm.check_extension(cap) > 0

    return [part for part in parts if (not part.needs or has(part.needs)) and not (part.unless and has(part.unless))]


def save(vm: api.Vm, vcpu: api.Vcpu, listed: Sequence[int]) -> dict[str, Any]:
    """Return the state of *vcpu*, which is not in KVM_RUN; *listed* is what KVM_GET_MSR_INDEX_LIST says.

    SnapshotError if its guest runs guests itself.
    """
    # first: it takes what has been sent to the processor, which may change its registers
    mp_state = vcpu.get_mp_state()
    sregs = vcpu.get_sregs()
    if sregs.efer & abi.EFER_SVME or sregs.cr4 & _CR4_VMXE:
        raise SnapshotError("the guest runs guests of its own: their state cannot be saved")
    parts = _available(vm, (*_BEFORE_MSRS, *_AFTER_MSRS))
    state: dict[str, Any] = {part.name: bytes(part.get(vcpu)) for part in parts}
    state["mp_state"] = bytes(mp_state)
    state["msrs"] = _read_msrs(vcpu, _indices(vcpu, listed))
    state["tsc_khz"] = vcpu.get_tsc_khz()
    state["tsc_offset"] = None
    with contextlib.suppress(OSError):  # a kernel before 5.16
        state["tsc_offset"] = vcpu.get_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)
    return state


def _set(vcpu: api.Vcpu, part: _Part, state: dict[str, Any]) -> None:
    structure = unpack(part.kind, state.get(part.name))
    try:
        part.set(vcpu, structure)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{part.name}: this KVM does not take it: {error}") from None


def _write_msrs(vcpu: api.Vcpu, pairs: Sequence[tuple[int, int]]) -> None:
    for start in range(0, len(pairs), _MOST_MSRS):
        part = pairs[start : start + _MOST_MSRS]
        done = 0
        while done < len(part):
            done += vcpu.set_msrs(part[done:])
            if done < len(part):
                index, value = part[done]
                if vcpu.get_msrs([index]) != [value]:  # it is read-only, and has it already, otherwise
                    raise SnapshotError(f"MSR {index:#x}: this KVM does not take {value:#x}")
                done += 1


def _msr_pairs(state: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the registers that *state* has, in the order of writing."""
    pairs = []
    for pair in field(state, "msrs", list):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair)):
            raise SnapshotError("msrs: expected pairs of an index and a value")
        index, value = pair
        if not (0 <= index < 1 << 32 and 0 <= value < 1 << 64):
            raise SnapshotError(f"MSR {index:#x}: there is no such register or value")
        pairs.append((index, value))
    order = {**dict.fromkeys(_FIRST, 0), **dict.fromkeys(_LAST, 2)}
    return sorted(pairs, key=lambda pair: order.get(pair[0], 1))


def set_tsc_khz(vm: api.Vm, vcpu: api.Vcpu, khz: int) -> None:
    """Let the counter tick as it did; SnapshotError if this KVM cannot have it so."""
    here = vcpu.get_tsc_khz()
    if khz == here:
        return
    try:
        vcpu.set_tsc_khz(khz)
    except OSError:
        raise SnapshotError(
            f"the guest's time-stamp counter runs at {khz} kHz, this KVM's at {here} kHz, and it cannot scale"
        ) from None


def restore(vm: api.Vm, vcpu: api.Vcpu, state: dict[str, Any]) -> None:
    """Put *state* into a vCPU that has its CPUID and has never run; SnapshotError if this KVM does not take it.

    The counter is set to what it was: :func:`softkvm.vmm.snapshot.chips.restore_clock` lets it go on from there.
    """
    set_tsc_khz(vm, vcpu, field(state, "tsc_khz", int))
    for part in _available(vm, _BEFORE_MSRS):
        _set(vcpu, part, state)
    _write_msrs(vcpu, _msr_pairs(state))
    for part in _AFTER_MSRS:
        _set(vcpu, part, state)


def restore_deadline(vcpu: api.Vcpu, state: dict[str, Any]) -> None:
    """Write the TSC deadline once more: the counter has another value than when it was written first."""
    deadlines = [pair for pair in _msr_pairs(state) if pair[0] in _LAST]
    if deadlines:
        _write_msrs(vcpu, deadlines)
