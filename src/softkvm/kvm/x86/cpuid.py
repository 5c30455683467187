# SPDX-License-Identifier: Apache-2.0
"""CPUID: what KVM supports, and the table that one vCPU answers from (APM vol. 3, appendix E)."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.abi.x86 import request_sizes as sizes
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.features import (
    EAX,
    EBX,
    ECX,
    EDX,
    X86_FEATURE_APIC,
    X86_FEATURE_ARCH_CAPABILITIES,
    X86_FEATURE_HYPERVISOR,
    X86_FEATURE_MWAIT,
    X86_FEATURE_OSPKE,
    X86_FEATURE_OSXSAVE,
    X86_FEATURE_PERFCTR_CORE,
    X86_FEATURE_PERFMON_V2,
    X86_FEATURE_RDPID,
    X86_FEATURE_SVM,
    X86_FEATURE_TSC_ADJUST,
    X86_FEATURE_TSC_DEADLINE_TIMER,
    X86_FEATURE_WAITPKG,
    X86_FEATURE_X2APIC,
    X86_FEATURE_XSAVE,
    Feature,
)
from softkvm.kvm.x86.irqchip.apicdef import MSR_IA32_APICBASE_ENABLE
from softkvm.kvm.x86.msr_index import MISC_ENABLE_MWAIT, MSR_IA32_MISC_ENABLE

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

KVM_MAX_CPUID_ENTRIES: Final = 256

Leaf = tuple[int, int, int, int]
_ZERO: Final[Leaf] = (0, 0, 0, 0)

#: Leaves whose answer depends on ECX.
_INDEXED: Final = frozenset({0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1E, 0x1F, 0x24, 0x8000_001D})

_MONITOR: Final = X86_FEATURE_MWAIT.mask
_X2APIC: Final = X86_FEATURE_X2APIC.mask
_TSC_DEADLINE: Final = X86_FEATURE_TSC_DEADLINE_TIMER.mask
_OSXSAVE: Final = X86_FEATURE_OSXSAVE.mask
_HYPERVISOR: Final = X86_FEATURE_HYPERVISOR.mask
_APIC: Final = X86_FEATURE_APIC.mask  # at the same place in leaf 0x80000001
_OSPKE: Final = X86_FEATURE_OSPKE.mask
_SVM: Final = X86_FEATURE_SVM.mask
_ADVANCED_POWER: Final = 0x8000_0007
_INVTSC: Final = 1 << 8  # there, EDX

#: Vendors whose processors KVM takes for AMD's; every other one is Intel-compatible.
_AMD_COMPATIBLE: Final = frozenset({b"AuthenticAMD", b"AMDisbetter!", b"HygonGenuine"})

_KVM_FEATURES: Final = (
    1 << abi.KVM_FEATURE_CLOCKSOURCE
    | 1 << abi.KVM_FEATURE_NOP_IO_DELAY
    | 1 << abi.KVM_FEATURE_CLOCKSOURCE2
    | 1 << abi.KVM_FEATURE_ASYNC_PF
    | 1 << abi.KVM_FEATURE_STEAL_TIME
    | 1 << abi.KVM_FEATURE_PV_EOI
    | 1 << abi.KVM_FEATURE_PV_UNHALT
    | 1 << abi.KVM_FEATURE_PV_TLB_FLUSH
    | 1 << abi.KVM_FEATURE_ASYNC_PF_VMEXIT
    | 1 << abi.KVM_FEATURE_PV_SEND_IPI
    | 1 << abi.KVM_FEATURE_POLL_CONTROL
    | 1 << abi.KVM_FEATURE_PV_SCHED_YIELD
    | 1 << abi.KVM_FEATURE_ASYNC_PF_INT
    | 1 << abi.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
)


# --- what KVM supports -------------------------------------------------------------------------


def _supported_leaf(function: int, index: int) -> Leaf:
    """Return the silicon's leaf with what KVM adds and takes away."""
    eax, ebx, ecx, edx = _softcpu.cpuid(function, index)
    if function == 0x1:
        ebx &= 0x0000_FFFF  # APIC id and processor count are the machine's business
        ecx = ecx & ~(_MONITOR | _OSXSAVE) | _X2APIC | _TSC_DEADLINE | _HYPERVISOR
        edx |= _APIC
    elif function == 0x6:
        eax, ebx, ecx, edx = 1 << 2, 0, 0, 0  # ARAT
    elif function == 0x7 and index == 0:
        ebx |= X86_FEATURE_TSC_ADJUST.mask  # kept by KVM
        ecx &= ~_OSPKE
        edx |= X86_FEATURE_ARCH_CAPABILITIES.mask  # kept by KVM
    elif function in (0xA, 0xF, 0x10, 0x8000_000A):
        return _ZERO  # Intel's PMU is not the silicon's; no resource control, no nested SVM
    elif function == 0x8000_0001:
        ecx &= ~_SVM
        edx |= _APIC
    return eax, ebx, ecx, edx


def _subleaves(function: int) -> Iterable[int]:
    """Return the subleaf numbers of an indexed leaf."""
    if function == 0x7:
        return range(_softcpu.cpuid(7, 0)[EAX] + 1)
    if function == 0xD:
        xcr0 = supported_xcr0()
        return [0, 1, *(i for i in range(2, 63) if xcr0 >> i & 1)]
    if function in (0x4, 0x8000_001D):
        count = 0
        while count < 8 and _softcpu.cpuid(function, count)[EAX] & 0x1F:
            count += 1
        return range(count + 1)
    if function in (0xB, 0x1F):
        return range(1)
    return range(1)


@cache
def supported_xcr0() -> int:
    """Return the XCR0 bits that the silicon has (leaf 0xD)."""
    eax, _, _, edx = _softcpu.cpuid(0xD, 0)
    return eax | edx << 32


def _entry(function: int, index: int, leaf: Leaf, *, indexed: bool) -> abi.kvm_cpuid_entry2:
    return abi.kvm_cpuid_entry2(
        function=function,
        index=index,
        flags=abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if indexed else 0,
        eax=leaf[EAX],
        ebx=leaf[EBX],
        ecx=leaf[ECX],
        edx=leaf[EDX],
    )


def get_supported_cpuid(*, enable_pmu: bool = True) -> list[abi.kvm_cpuid_entry2]:
    """KVM_GET_SUPPORTED_CPUID: the silicon's leaves as KVM can give them to a guest, and KVM's own."""
    entries = []
    for first in (0x0, 0x8000_0000):
        last = _softcpu.cpuid(first, 0)[EAX]
        for function in range(first, max(last, first) + 1):
            indexed = function in _INDEXED
            entries += [
                _entry(function, index, _supported_leaf(function, index), indexed=indexed)
                for index in (_subleaves(function) if indexed else (0,))
            ]
    if not enable_pmu:
        _take_counters_away(entries)
    signature = [int.from_bytes(abi.KVM_SIGNATURE[i : i + 4], "little") for i in (0, 4, 8)]
    entries.append(
        _entry(abi.KVM_CPUID_SIGNATURE, 0, (abi.KVM_CPUID_FEATURES, *signature), indexed=False)  # type: ignore[arg-type]
    )
    entries.append(_entry(abi.KVM_CPUID_FEATURES, 0, (_KVM_FEATURES, 0, 0, 0), indexed=False))
    return entries


def _take_counters_away(entries: list[abi.kvm_cpuid_entry2]) -> None:
    """Leave out what tells of performance counters."""
    for entry in entries:
        if entry.function == X86_FEATURE_PERFCTR_CORE.leaf:
            entry.ecx &= ~X86_FEATURE_PERFCTR_CORE.mask
        elif entry.function == X86_FEATURE_PERFMON_V2.leaf:
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def get_emulated_cpuid() -> list[abi.kvm_cpuid_entry2]:
    """KVM_GET_EMULATED_CPUID: features that no AMD processor has, or that only the emulator provides.

    MOVBE and RDPID by the emulator, WAITPKG by the silicon: it is a guest's whose CPUID has it, but not among those
    that every guest gets.
    """
    entries = [_entry(0, 0, (7, 0, 0, 0), indexed=False), _entry(1, 0, (0, 0, 1 << 22, 0), indexed=False)]
    entries.append(_entry(7, 0, (0, 0, X86_FEATURE_RDPID.mask | X86_FEATURE_WAITPKG.mask, 0), indexed=True))
    return entries


# --- one vCPU's table --------------------------------------------------------------------------


def check_entry_count(entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
    """Raise E2BIG for more entries than KVM_SET_CPUID2 takes."""
    sizes.CPUID_ENTRIES.check(len(entries), called="nent")


def _vendor(leaf: Leaf) -> bytes:
    """Return the vendor's name in leaf 0."""
    return b"".join(leaf[register].to_bytes(4, "little") for register in (EBX, EDX, ECX))


class CpuidTable:
    """The CPUID leaves of one vCPU (KVM_SET_CPUID2), with the bits that follow its registers."""

    __slots__ = (
        "_base_d0",
        "_base_d1",
        "_base_leaf1",
        "_base_leaf7",
        "cr4_valid",
        "entries",
        "indexed",
        "intel_compatible",
        "kvm_features",
        "plain",
        "supported_xcr0",
        "xen_base",
    )

    def __init__(self) -> None:
        self.entries: list[abi.kvm_cpuid_entry2] = []
        #: Answers of leaves that don't look at ECX.
        self.plain: dict[int, Leaf] = {}
        #: Answers of leaves that do.
        self.indexed: dict[int, dict[int, Leaf]] = {}
        self._base_leaf1: Leaf | None = None
        self._base_leaf7: Leaf | None = None
        self._base_d0: Leaf | None = None
        self._base_d1: Leaf | None = None
        #: Whether the guest isn't told that its processor is AMD's or Hygon's.
        self.intel_compatible = True
        self.supported_xcr0 = 0
        self.kvm_features = 0
        #: Where Xen's leaves begin; 0: there are none.
        self.xen_base = 0
        #: CR4 bits that may be set; until there is a table, all that the silicon has.
        self.cr4_valid = _silicon_cr4()

    def set(self, vcpu: Vcpu, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2: EINVAL for a virtual address width that can't be."""
        copies = [type(e).from_buffer_copy(e) for e in entries]
        for e in copies:
            if e.function == 0x8000_0008 and (e.eax >> 8 & 0xFF) not in (0, 48, 57):
                raise kvm_error(errno.EINVAL, f"CPUID 0x80000008: {e.eax >> 8 & 0xFF} linear bits, expected 48 or 57")
        self.entries = copies
        self.plain = {}
        self.indexed = {}
        for e in copies:
            leaf = (e.eax, e.ebx, e.ecx, e.edx)
            if e.flags & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX:
                self.indexed.setdefault(e.function, {}).setdefault(e.index, leaf)
            else:
                self.plain.setdefault(e.function, leaf)
        self._base_leaf1 = self.leaf(1, 0)
        self._base_leaf7 = self.leaf(7, 0)
        self._base_d0 = self.leaf(0xD, 0)
        self._base_d1 = self.leaf(0xD, 1)
        self.intel_compatible = _vendor(self.first(0)) not in _AMD_COMPATIBLE
        d0 = self._base_d0 or _ZERO
        self.supported_xcr0 = (d0[EAX] | d0[EDX] << 32) & supported_xcr0()
        base = self._hypervisor_base(abi.KVM_SIGNATURE)
        self.kvm_features = (self.plain.get(base + 1) or _ZERO)[EAX] if base else 0
        self.xen_base = self._hypervisor_base(abi.XEN_SIGNATURE)
        from softkvm.kvm.x86.control_registers import cr4_valid_bits

        self.cr4_valid = cr4_valid_bits(self.has)
        self.update_runtime(vcpu)

    def get(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2: the entries, with the bits that follow registers as they are now."""
        result = []
        for e in self.entries:
            copy = type(e).from_buffer_copy(e)
            leaf = self.leaf(e.function, e.index)
            if leaf is not None and e.function != _ADVANCED_POWER:  # what is hidden there, the guest alone doesn't see
                copy.eax, copy.ebx, copy.ecx, copy.edx = leaf
            result.append(copy)
        return result

    def leaf(self, function: int, index: int) -> Leaf | None:
        """Return the entry for a leaf, None if there is none."""
        plain = self.plain.get(function)
        if plain is not None:
            return plain
        sub = self.indexed.get(function)
        return sub.get(index) if sub is not None else None

    def has(self, feature: Feature) -> bool:
        """Tell whether the guest has a feature (``guest_cpuid_has``)."""
        leaf = self.leaf(feature.leaf, feature.subleaf)
        return leaf is not None and bool(leaf[feature.register] & feature.mask)

    def _hypervisor_base(self, name: bytes) -> int:
        """Return where a hypervisor's leaves begin (``kvm_get_hypervisor_cpuid``); 0 if there are none."""
        signature = tuple(int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8))
        for base in range(0x4000_0000, 0x4001_0000, 0x100):
            leaf = self.plain.get(base)
            if leaf is not None and leaf[1:] == signature:
                return base
        return 0

    def answer(self, function: int, index: int) -> Leaf:
        """Return what CPUID gives the guest (``kvm_cpuid``): zeros where there is no entry, but for two rules.

        All but AMD's and Hygon's processors answer a leaf beyond its range as the highest basic leaf; and in the leaves
        of the topology every subleaf has its number and the x2APIC id.
        """
        leaf = self.plain.get(function)
        if leaf is not None:
            return leaf
        leaf = self.leaf(function, index)
        if leaf is None and self.intel_compatible and self._out_of_range(function):
            function = self.first(0)[EAX]
            leaf = self.leaf(function, index)
        if leaf is not None:
            return leaf
        if function in (0xB, 0x1F):
            one = self.leaf(function, 1)
            if one is not None:
                return 0, 0, index & 0xFF, one[EDX]
        return _ZERO

    def first(self, function: int) -> Leaf:
        """Return a leaf whatever its subleaf's number is; zeros if there is none (``kvm_find_cpuid_entry``)."""
        leaf = self.plain.get(function)
        if leaf is None:
            sub = self.indexed.get(function)
            leaf = next(iter(sub.values())) if sub else _ZERO
        return leaf

    def _out_of_range(self, function: int) -> bool:
        """Tell whether a leaf is beyond what the first leaf of its class says (``get_out_of_range_cpuid_entry``)."""
        if 0x4000_0000 <= function <= 0x4FFF_FFFF:
            base = function & 0xFFFF_FF00
        else:
            base = 0xC000_0000 if function >= 0xC000_0000 else function & 0x8000_0000
        known = base in self.plain or base in self.indexed
        return not known or function > self.first(base)[EAX]

    def update_runtime(self, vcpu: Vcpu) -> None:
        """Bring the bits that follow registers up to date: OSXSAVE, MONITOR, APIC, OSPKE, the XSAVE area's size."""
        leaf = self._base_leaf1
        if leaf is not None:
            ecx = leaf[ECX] & ~_OSXSAVE | (_OSXSAVE if vcpu.cr4 & abi.X86_CR4_OSXSAVE else 0)
            if not vcpu.vm.has_quirk(abi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
                mwait = vcpu.msr_values.get(MSR_IA32_MISC_ENABLE, 0) & MISC_ENABLE_MWAIT
                ecx = ecx & ~_MONITOR | (_MONITOR if mwait else 0)
            edx = leaf[EDX] & ~_APIC
            if vcpu.get_apic_base() & MSR_IA32_APICBASE_ENABLE:
                edx |= leaf[EDX] & _APIC
            self._replace(0x1, 0, (leaf[EAX], leaf[EBX], ecx, edx))
        leaf = self._base_leaf7
        if leaf is not None:
            ecx = leaf[ECX] & ~_OSPKE | (_OSPKE if vcpu.cr4 & abi.X86_CR4_PKE else 0)
            self._replace(0x7, 0, (leaf[EAX], leaf[EBX], ecx, leaf[EDX]))
        leaf = self._base_d0
        if leaf is not None:
            self._replace(0xD, 0, (leaf[EAX], xstate_size(vcpu.xcr0), leaf[ECX], leaf[EDX]))
        leaf = self._base_d1
        if leaf is not None and leaf[EAX] & 0xA:  # XSAVEC or XSAVES
            self._replace(0xD, 1, (leaf[EAX], xstate_size(vcpu.xcr0, compacted=True), leaf[ECX], leaf[EDX]))

    def hide_invariant_tsc(self, hidden: bool) -> None:
        """Show the guest the invariant TSC as the table has it, or not (``kvm_hv_invtsc_suppressed``)."""
        entry = next((e for e in self.entries if e.function == _ADVANCED_POWER), None)
        if entry is not None and _ADVANCED_POWER in self.plain:
            edx = entry.edx & ~_INVTSC if hidden else entry.edx
            self.plain[_ADVANCED_POWER] = (entry.eax, entry.ebx, entry.ecx, edx)

    def set_xen_time(self, function: int, multiplier: int, shift: int, khz: int) -> None:
        """Put the clock's scale into Xen's leaf of time, where userspace has given its subleaves 1 and 2."""
        sub = self.indexed.get(function, {})
        if 1 in sub:
            sub[1] = (*sub[1][:ECX], multiplier, shift)
        if 2 in sub:
            sub[2] = (khz, *sub[2][EBX:])

    def _replace(self, function: int, index: int, leaf: Leaf) -> None:
        if function in self.plain:
            self.plain[function] = leaf
        else:
            self.indexed[function][index] = leaf


@cache
def _silicon_cr4() -> int:
    """Return the CR4 bits of the silicon."""
    from softkvm.kvm.x86.control_registers import cr4_valid_bits

    def has(feature: Feature) -> bool:
        leaf = _supported_leaf(feature.leaf, feature.subleaf)
        return bool(leaf[feature.register] & feature.mask) or feature is X86_FEATURE_XSAVE

    return cr4_valid_bits(has)


def xstate_size(features: int, *, compacted: bool = False) -> int:
    """Return the size in bytes of the XSAVE area for the state components ``features`` (leaf 0xD)."""
    size = 512 + 64
    for i in range(2, 63):
        if features >> i & 1:
            length, offset, ecx, _ = _softcpu.cpuid(0xD, i)
            if not compacted:
                size = max(size, offset + length)
            else:
                size = (size + 63 & ~63 if ecx & 2 else size) + length
    return size
