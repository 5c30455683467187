# SPDX-License-Identifier: Apache-2.0
"""CPUID and MSRs of one vCPU: what KVM supports, with the vCPU's own identity and the machine's topology.

The machine is one package with one thread per core. Sources: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softkvm import abi, api

BRAND = b"softkvm virtual processor"

TSC_DEADLINE = 1 << 24  # leaf 1, ECX
HYPERVISOR = 1 << 31  # leaf 1, ECX
MTRR = 1 << 12  # leaf 1, EDX
HTT = 1 << 28  # leaf 1, EDX

_TOPOLOGY_SMT = 1
_TOPOLOGY_CORE = 2

MSR_IA32_MISC_ENABLE = 0x1A0
MSR_IA32_MTRR_DEF_TYPE = 0x2FF
MISC_ENABLE_FAST_STRING = 1 << 0
MTRR_ENABLE = 1 << 11
MTRR_WRITE_BACK = 6

APIC_LVT_LINT0 = 0x350
APIC_LVT_LINT1 = 0x360
APIC_MODE_NMI = 4 << 8
APIC_MODE_EXTINT = 7 << 8


def _core_bits(vcpus: int) -> int:
    """Return how many bits of an APIC id number the cores."""
    return (vcpus - 1).bit_length()


def _leaf_1(entry: abi.kvm_cpuid_entry2, apic_id: int, vcpus: int, deadline_timer: bool) -> None:
    ids = 1 << _core_bits(vcpus)
    entry.ebx = (entry.ebx & 0x0000FFFF) | ids << 16 | apic_id << 24
    entry.ecx |= HYPERVISOR | (TSC_DEADLINE if deadline_timer else 0)
    entry.edx = entry.edx | HTT if vcpus > 1 else entry.edx & ~HTT


def _leaf_4(entry: abi.kvm_cpuid_entry2, apic_id: int, vcpus: int, deadline_timer: bool) -> None:
    """Deterministic caches: levels 1 and 2 belong to a core, level 3 to the package."""
    if entry.eax & 0x1F == 0:
        return
    level = entry.eax >> 5 & 7
    sharing = (1 << _core_bits(vcpus)) if level >= 3 else 1
    cores = 1 << _core_bits(vcpus)
    entry.eax = (entry.eax & 0x3FFF) | (sharing - 1) << 14 | (cores - 1) << 26


def _leaf_8000_0008(entry: abi.kvm_cpuid_entry2, apic_id: int, vcpus: int, deadline_timer: bool) -> None:
    entry.ecx = (entry.ecx & ~0xF0FF) | _core_bits(vcpus) << 12 | (vcpus - 1)


def _leaf_8000_001d(entry: abi.kvm_cpuid_entry2, apic_id: int, vcpus: int, deadline_timer: bool) -> None:
    if entry.eax & 0x1F == 0:
        return
    sharing = vcpus if entry.eax >> 5 & 7 >= 3 else 1
    entry.eax = (entry.eax & 0x3FFF) | (sharing - 1) << 14


def _leaf_8000_001e(entry: abi.kvm_cpuid_entry2, apic_id: int, vcpus: int, deadline_timer: bool) -> None:
    entry.eax = apic_id
    entry.ebx = (entry.ebx & ~0xFFFF) | apic_id  # core id, one thread per core
    entry.ecx = 0  # one node


_PATCHES: dict[int, Callable[[abi.kvm_cpuid_entry2, int, int, bool], None]] = {
    0x00000001: _leaf_1,
    0x00000004: _leaf_4,
    0x80000008: _leaf_8000_0008,
    0x8000001D: _leaf_8000_001d,
    0x8000001E: _leaf_8000_001e,
}

_REPLACED = (0xB, 0x1F, 0x80000002, 0x80000003, 0x80000004)


def _topology(function: int, apic_id: int, vcpus: int) -> list[abi.kvm_cpuid_entry2]:
    """Extended topology (leaf 0xB or 0x1F): threads, cores, end."""
    bits = _core_bits(vcpus)
    levels = ((0, 1, _TOPOLOGY_SMT), (bits, vcpus, _TOPOLOGY_CORE), (0, 0, 0))
    return [
        abi.kvm_cpuid_entry2(
            function=function,
            index=index,
            flags=abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=count,
            ecx=kind << 8 | index,
            edx=apic_id,
        )
        for index, (shift, count, kind) in enumerate(levels)
    ]


def _brand(text: bytes) -> list[abi.kvm_cpuid_entry2]:
    """The processor's name: 48 characters in leaves 0x80000002 to 0x80000004."""
    padded = text[:47].ljust(48, b"\0")
    words = [int.from_bytes(padded[at : at + 4], "little") for at in range(0, 48, 4)]
    return [
        abi.kvm_cpuid_entry2(
            function=0x80000002 + index,
            eax=words[4 * index],
            ebx=words[4 * index + 1],
            ecx=words[4 * index + 2],
            edx=words[4 * index + 3],
        )
        for index in range(3)
    ]


def vcpu_cpuid(
    supported: Sequence[abi.kvm_cpuid_entry2], apic_id: int, vcpus: int, *, deadline_timer: bool
) -> list[abi.kvm_cpuid_entry2]:
    """Return the CPUID table for the vCPU with *apic_id* of *vcpus*, from what KVM supports."""
    entries = []
    max_basic = max((entry.eax for entry in supported if entry.function == 0), default=0)
    for entry in supported:
        if entry.function in _REPLACED:
            continue
        copy = abi.kvm_cpuid_entry2.from_buffer_copy(entry)
        patch = _PATCHES.get(entry.function)
        if patch is not None:
            patch(copy, apic_id, vcpus, deadline_timer)
        entries.append(copy)
    for function in (0xB, 0x1F):
        if max_basic >= function:
            entries += _topology(function, apic_id, vcpus)
    return entries + _brand(BRAND)


def set_boot_msrs(vcpu: api.Vcpu, cpuid: Sequence[abi.kvm_cpuid_entry2]) -> None:
    """Set the MSRs that firmware leaves for an operating system: fast strings, all memory write-back."""
    msrs = {MSR_IA32_MISC_ENABLE: MISC_ENABLE_FAST_STRING}
    if any(entry.function == 1 and entry.edx & MTRR for entry in cpuid):
        msrs[MSR_IA32_MTRR_DEF_TYPE] = MTRR_ENABLE | MTRR_WRITE_BACK
    for index, value in msrs.items():
        vcpu.set_msrs({index: value})  # a KVM without the register loses nothing


def set_boot_lapic(vcpu: api.Vcpu, *, bootstrap: bool) -> None:
    """Wire the local APIC's pins as firmware does: LINT0 the i8259s (first processor), LINT1 the NMI."""
    lapic = vcpu.get_lapic()
    registers = memoryview(lapic.regs).cast("B")
    if bootstrap:
        registers[APIC_LVT_LINT0 : APIC_LVT_LINT0 + 4] = APIC_MODE_EXTINT.to_bytes(4, "little")
    registers[APIC_LVT_LINT1 : APIC_LVT_LINT1 + 4] = APIC_MODE_NMI.to_bytes(4, "little")
    vcpu.set_lapic(lapic)
