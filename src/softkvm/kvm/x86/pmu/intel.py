# SPDX-License-Identifier: Apache-2.0
"""Intel's architectural performance monitoring (SDM vol. 3, 20.2; ``arch/x86/kvm/vmx/pmu_intel.c``).

Guests have it whose CPUID has another vendor than AMD and leaf 0xA, which KVM_GET_SUPPORTED_CPUID doesn't offer: the
silicon is AMD's. The architecture's events are its own; what a model of Intel's has beside these counts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm.kvm.x86 import msr_index as M
from softkvm.kvm.x86.features import EAX, EDX, X86_FEATURE_PDCM
from softkvm.kvm.x86.pmu.perf_event import WIDTH
from softkvm.kvm.x86.pmu.pmu import (
    RAW_EVENT,
    Access,
    Pmc,
    PmuCapability,
    eventsel_msr,
    reprogram_counters,
    update_instruction_counting,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.pmu.pmu import Pmu

#: The most that there is.
CAPABILITY: Final = PmuCapability(counters_gp=8, counters_fixed=3, width=WIDTH)

_RESERVED_BITS: Final = 0xFFFF_FFFF_0020_0000
_EVENT: Final = 0xFFFF
#: Architectural events, by unit mask and event (SDM vol. 3, table 20-1), as the silicon has them. Last level caches,
#: which it doesn't have, are never referenced; reference cycles are cycles; the silicon's slot is an instruction.
_CYCLES: Final = 0x003C
_INSTRUCTIONS: Final = 0x00C0
_REFERENCE_CYCLES: Final = 0x013C
_TSC_CYCLES: Final = 0x0300
_BRANCHES: Final = 0x00C4
_SLOTS: Final = 0x01A4
_BRANCH_INSTRUCTIONS: Final = 0xF_0000_00C2
_SILICON: Final = {
    _CYCLES: 0x76,
    _INSTRUCTIONS: 0xC0,
    _REFERENCE_CYCLES: 0x76,
    _TSC_CYCLES: 0x76,
    _BRANCHES: _BRANCH_INSTRUCTIONS,
    _SLOTS: 0x76,
}
#: An event that the silicon doesn't know.
_NOTHING: Final = 0xF_0000_00FF
_FIXED: Final = (_INSTRUCTIONS, _CYCLES, _TSC_CYCLES)

_RDPMC_FIXED: Final = 1 << 30
_RDPMC_TYPE: Final = 0xFFFF_0000


def refresh(pmu: Pmu) -> bool:
    """Follow the guest's CPUID (``intel_pmu_refresh``); False if this isn't for it."""
    vcpu = pmu.vcpu
    leaf = vcpu.cpuid.leaf(0xA, 0)
    version = leaf[EAX] & 0xFF if leaf is not None else 0
    if not version or leaf is None or not vcpu.cpuid.intel_compatible:
        return False
    pmu.version = version
    fixed = min(leaf[EDX] & 0x1F, CAPABILITY.counters_fixed) if version > 1 else 0
    pmu.width_gp = min(leaf[EAX] >> 16 & 0xFF, CAPABILITY.width)
    pmu.width_fixed = min(leaf[EDX] >> 5 & 0xFF, CAPABILITY.width)
    pmu.set_counters(min(leaf[EAX] >> 8 & 0xFF, CAPABILITY.counters_gp), fixed)
    pmu.raw_event_mask = RAW_EVENT & 0xFFFF_FFFF
    pmu.event_mask = _EVENT
    pmu.silicon_event = _silicon_event
    pmu.instruction_event = _INSTRUCTIONS
    pmu.branch_event = _BRANCHES
    pmu.rdpmc_to_pmc = lambda index: _rdpmc_to_pmc(pmu, index)
    full_width = vcpu.cpuid.has(X86_FEATURE_PDCM) and vcpu.perf_capabilities & M.PMU_CAP_FW_WRITES
    for n, pmc in enumerate(pmu.gp):
        pmu.msrs[M.MSR_IA32_PERFCTR0 + n] = _counter(pmc, sign_extends=True)
        pmu.msrs[M.MSR_P6_EVNTSEL0 + n] = eventsel_msr(pmc, _write_eventsel)
        if full_width:
            pmu.msrs[M.MSR_IA32_PMC0 + n] = _counter(pmc, sign_extends=False)
    for n, pmc in enumerate(pmu.fixed):
        pmc.eventsel = _FIXED[n]
        pmu.msrs[M.MSR_CORE_PERF_FIXED_CTR0 + n] = _fixed_counter(pmc)
    if pmu.has_global_ctrl:
        pmu.msrs |= _global_msrs(pmu)
    return True


def _silicon_event(select: int) -> int:
    """Return what the silicon has for an event select register."""
    return select & ~_EVENT | _SILICON.get(select & _EVENT, _NOTHING)


def _rdpmc_to_pmc(pmu: Pmu, index: int) -> Pmc | None:
    """The type in bits 31:16 of the index, the number in the others; there is no "fast" read here."""
    pmcs = {0: pmu.gp, _RDPMC_FIXED: pmu.fixed}.get(index & _RDPMC_TYPE, [])
    number = index & ~_RDPMC_TYPE
    return pmcs[number] if number < len(pmcs) else None


def _write_eventsel(pmc: Pmc, data: int) -> bool:
    if data & _RESERVED_BITS:
        return False
    pmc.pmu.write_eventsel(pmc, data)
    return True


def _counter(pmc: Pmc, *, sign_extends: bool) -> Access:
    """IA32_PERFCTRn, of which the guest writes 32 bits, or IA32_PMCn, of which it writes all."""

    def write(data: int, host: bool) -> bool:
        if not sign_extends:
            if data >> pmc.width:
                return False
        elif not host:
            data = data & 0xFFFF_FFFF | (~0 << 32 if data >> 31 & 1 else 0)
        pmc.write(data)
        return True

    return pmc.read, write


def _fixed_counter(pmc: Pmc) -> Access:
    def write(data: int, host: bool) -> bool:
        pmc.write(data)
        return True

    return pmc.read, write


def _global_msrs(pmu: Pmu) -> dict[int, Access]:
    """IA32_FIXED_CTR_CTRL, IA32_PERF_GLOBAL_*: reserved bits are #GP."""
    fixed_valid = sum(0xB << 4 * n for n in range(len(pmu.fixed)))

    def write_fixed_ctr_ctrl(data: int, host: bool) -> bool:
        if data & ~fixed_valid:
            return False
        changed = pmu.fixed_ctr_ctrl ^ data
        pmu.fixed_ctr_ctrl = data
        reprogram_counters(pmu, sum(1 << pmc.idx for n, pmc in enumerate(pmu.fixed) if changed >> 4 * n & 0xF))
        update_instruction_counting(pmu)
        return True

    def write_status(data: int, host: bool) -> bool:
        return host and pmu.write_global_status(data)

    def write_ctrl(data: int, host: bool) -> bool:
        if data & pmu.global_rsvd:
            return False
        pmu.write_global_ctrl(data)
        return True

    def write_ovf_ctrl(data: int, host: bool) -> bool:
        # Bits 62 and 63 are of what there is not: the buffer of precise events, and a condition that has changed.
        if data & pmu.global_rsvd & ~(3 << 62):
            return False
        pmu.clear_global_status(data, host)
        return True

    return {
        M.MSR_CORE_PERF_FIXED_CTR_CTRL: (lambda: pmu.fixed_ctr_ctrl, write_fixed_ctr_ctrl),
        M.MSR_CORE_PERF_GLOBAL_STATUS: (pmu.read_global_status, write_status),
        M.MSR_CORE_PERF_GLOBAL_CTRL: (lambda: pmu.global_ctrl, write_ctrl),
        M.MSR_CORE_PERF_GLOBAL_OVF_CTRL: (lambda: 0, write_ovf_ctrl),
    }
