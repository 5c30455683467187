# SPDX-License-Identifier: Apache-2.0
"""AMD's performance counters (APM vol. 2, 13.2; ``arch/x86/kvm/svm/pmu.c``).

The four of the K7, which every guest has; six with the core extensions (CPUID Fn8000_0001_ECX[PerfCtrExtCore]); global
control and status with PerfMonV2 (Fn8000_0022). What they count is the silicon's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import _softcpu
from softkvm.kvm.x86 import msr_index as M
from softkvm.kvm.x86.features import EBX, X86_FEATURE_PERFCTR_CORE, X86_FEATURE_PERFMON_V2
from softkvm.kvm.x86.pmu.pmu import Access, Pmc, counter_msr, eventsel_msr

if TYPE_CHECKING:
    from softkvm.kvm.x86.pmu.pmu import Pmu

AMD64_NUM_COUNTERS: Final = 4
AMD64_NUM_COUNTERS_CORE: Final = 6
_PERFMON: Final = 0x8000_0022
#: Bits of an event select register that are not kept; software may write anything to them.
_RESERVED_BITS: Final = 0xFFFF_FFF0_0028_0000
#: Instructions and branches that have retired.
_INSTRUCTIONS: Final = 0xC0
_BRANCHES: Final = 0xC2


def refresh(pmu: Pmu) -> None:
    """Follow the guest's CPUID (``amd_pmu_refresh``)."""
    cpuid = pmu.vcpu.cpuid
    core = cpuid.has(X86_FEATURE_PERFCTR_CORE)
    pmu.version = 1
    if cpuid.has(X86_FEATURE_PERFMON_V2):
        pmu.version = 2
        leaf = cpuid.leaf(_PERFMON, 0)
        assert leaf is not None
        counters = leaf[EBX] & 0xF
    else:
        counters = AMD64_NUM_COUNTERS_CORE if core else AMD64_NUM_COUNTERS
    pmu.set_counters(min(counters, _softcpu.cpuid(_PERFMON, 0)[EBX] & 0xF))
    pmu.instruction_event = _INSTRUCTIONS
    pmu.branch_event = _BRANCHES
    pmu.rdpmc_to_pmc = lambda index: pmu.gp[index] if index < len(pmu.gp) else None
    for n, pmc in enumerate(pmu.gp):
        eventsel, counter = eventsel_msr(pmc, _write_eventsel), counter_msr(pmc)
        if n < AMD64_NUM_COUNTERS:
            pmu.msrs[M.MSR_K7_EVNTSEL0 + n] = eventsel
            pmu.msrs[M.MSR_K7_PERFCTR0 + n] = counter
        if core:
            pmu.msrs[M.MSR_F15H_PERF_CTL0 + 2 * n] = eventsel
            pmu.msrs[M.MSR_F15H_PERF_CTR0 + 2 * n] = counter
    if pmu.has_global_ctrl:
        pmu.msrs |= _global_msrs(pmu)


def _write_eventsel(pmc: Pmc, data: int) -> bool:
    pmc.pmu.write_eventsel(pmc, data & ~_RESERVED_BITS)
    return True


def _global_msrs(pmu: Pmu) -> dict[int, Access]:
    """PerfMonV2's: bits that are reserved, and registers that cannot be written, ignore writes."""

    def write_status(data: int, host: bool) -> bool:
        return not host or pmu.write_global_status(data)

    def write_ctl(data: int, host: bool) -> bool:
        pmu.write_global_ctrl(data & ~pmu.global_rsvd)
        return True

    def write_status_clr(data: int, host: bool) -> bool:
        pmu.clear_global_status(data, host)
        return True

    return {
        M.MSR_AMD64_PERF_CNTR_GLOBAL_STATUS: (pmu.read_global_status, write_status),
        M.MSR_AMD64_PERF_CNTR_GLOBAL_CTL: (lambda: pmu.global_ctrl, write_ctl),
        M.MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_CLR: (lambda: 0, write_status_clr),
    }
