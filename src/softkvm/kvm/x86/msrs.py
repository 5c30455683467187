# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers: one table row per register, with its reader and its writer.

A reader returns the value, or None for #GP; a writer returns False for #GP. ``host`` is True for accesses by
userspace (KVM_GET_MSRS, KVM_SET_MSRS), which may do what the guest may not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import msr_index as M
from softkvm.kvm.x86 import mtrr, tsc
from softkvm.kvm.x86.features import (
    X86_FEATURE_ARCH_CAPABILITIES,
    X86_FEATURE_OSVW,
    X86_FEATURE_PDCM,
    X86_FEATURE_RDPID,
    X86_FEATURE_RDTSCP,
    X86_FEATURE_TSC_ADJUST,
    X86_FEATURE_VIRT_SSBD,
    X86_FEATURE_WAITPKG,
    X86_FEATURE_X2APIC,
    X86_FEATURE_XMM3,
    X86_FEATURE_XSAVES,
)
from softkvm.kvm.x86.hyperv import msrs as hyperv_msrs
from softkvm.kvm.x86.irqchip import apic_base
from softkvm.kvm.x86.msr_rows import (
    U32,
    U64,
    Msr,
    constant,
    fixed,
    in_vmcb,
    keep,
    read_only,
    stored,
    sysenter,
    with_feature,
    write_only,
)
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.pmu import amd, intel, pmu
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

log = logging.getLogger(__name__)

# --- registers with a behaviour ----------------------------------------------------------------


def _write_efer(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return cr.kvm_set_efer(vcpu, data, host_initiated=host)


def _read_tsc(vcpu: Vcpu, index: int, host: bool) -> int:
    return tsc.read_guest_tsc(vcpu)


def _write_tsc(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if host:
        tsc.synchronize(vcpu, data)
    else:
        adjust = data - tsc.read_guest_tsc(vcpu)
        tsc.set_offset(vcpu, vcpu.tsc_offset + adjust)
        vcpu.tsc_adjust = (vcpu.tsc_adjust + adjust) & U64
    return True


def _write_tsc_adjust(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not vcpu.cpuid.has(X86_FEATURE_TSC_ADJUST):
        return True
    if not host:
        tsc.set_offset(vcpu, vcpu.tsc_offset + data - vcpu.tsc_adjust)
    vcpu.tsc_adjust = data
    return True


def _read_apic_base(vcpu: Vcpu, index: int, host: bool) -> int:
    return vcpu.get_apic_base()


def _write_apic_base(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return set_apic_base(vcpu, data, host)


def _read_tsc_deadline(vcpu: Vcpu, index: int, host: bool) -> int:
    return vcpu.apic.tsc_deadline if vcpu.apic is not None else 0


def _write_tsc_deadline(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if vcpu.apic is not None:
        vcpu.apic.set_tsc_deadline(data)
    return True


def _read_x2apic(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.apic.msr_read(index) if vcpu.apic is not None else None


def _write_x2apic(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return vcpu.apic is not None and vcpu.apic.msr_write(index, data)


def _read_mcg_ctl(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.msr_values.get(index, 0) if vcpu.mcg_cap & M.MCG_CTL_P or host else None


def _write_mcg_ctl(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not vcpu.mcg_cap & M.MCG_CTL_P and (data or not host):
        return False
    return data in (0, U64) and keep(vcpu, index, data)


def _read_mc_bank(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if index - M.MSR_IA32_MC0_CTL >= 4 * (vcpu.mcg_cap & 0xFF):
        return None
    return vcpu.msr_values.get(index, 0)


def _write_mc_bank(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if index - M.MSR_IA32_MC0_CTL >= 4 * (vcpu.mcg_cap & 0xFF):
        return False
    kind = index & 3
    # Linux clears bit 10 of bank 4's control register on AMD, bit 0 of some Intel's: KVM takes them for set.
    if kind == 0 and data and data | 1 << 10 | 1 != U64:
        return False
    if kind == 1 and not host and data and not vcpu.msr_values.get(M.MSR_K7_HWCR, 0) & 1 << 18:
        return False
    return keep(vcpu, index, data)


def _write_ucode_rev(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return keep(vcpu, index, data) if host else True


def _write_misc_enable(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    old = vcpu.msr_values.get(index, M.MISC_ENABLE_PMU_READ_ONLY)
    if not host:
        if (old ^ data) & M.MISC_ENABLE_PMU_READ_ONLY:
            return False
        data = data & ~M.MISC_ENABLE_EMON | old & M.MISC_ENABLE_EMON
    changes_mwait = (old ^ data) & M.MISC_ENABLE_MWAIT
    if changes_mwait and not vcpu.vm.has_quirk(abi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
        if not vcpu.cpuid.has(X86_FEATURE_XMM3):
            return False
    keep(vcpu, index, data)
    vcpu.cpuid.update_runtime(vcpu)
    return True


def _write_hwcr(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    data &= ~(1 << 6 | 1 << 3 | 1 << 8)  # FFDIS, TLBCACHEDIS, IGNNE_EM: written by firmware, meaningless here
    if data & ~(1 << 24 | 1 << 18):
        return False
    return keep(vcpu, index, data)


def _write_debugctl(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Bits that exist are dropped: the silicon has neither branch records, nor steps by branches, nor pins.

    That is how KVM on AMD's processors tells that it doesn't have them; bits that don't exist are #GP.
    """
    if data & ~M.DEBUGCTL_VALID:
        return False
    if data and not host:
        vcpu.vm.log_limited(log, "vcpu%d: unimplemented bits of DEBUGCTL: %#x", vcpu.vcpu_id, data)
    return True


def _read_mc_ctl2(vcpu: Vcpu, index: int, host: bool) -> int | None:
    """Without CMCI (MCG_CMCI_P), which SVM doesn't have, there is nothing in it, for the host alone."""
    return 0 if host and index - M.MSR_IA32_MC0_CTL2 < vcpu.mcg_cap & 0xFF else None


def _write_mc_ctl2(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return host and not data and index - M.MSR_IA32_MC0_CTL2 < vcpu.mcg_cap & 0xFF


def _write_tsc_ratio(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Without TSC scaling, the host may write what is there; QEMU 6.2 wrote 0, which is taken for that."""
    return host and data in (0, M.TSC_RATIO_DEFAULT)


def _write_de_cfg(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if data & ~M.DE_CFG_LFENCE_SERIALIZE or (not host and data != M.DE_CFG_LFENCE_SERIALIZE):
        return False
    return keep(vcpu, index, data)


def _write_hsave_pa(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Kept for a hypervisor in the guest, of which there is none; the host may restore any value."""
    if not host and (data & 0xFFF or data >> vcpu.maxphyaddr):
        return False
    return keep(vcpu, index, data & ~0xFFF)


def _has_osvw(vcpu: Vcpu) -> bool:
    return vcpu.cpuid.has(X86_FEATURE_OSVW)


def _read_osvw(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.msr_values.get(index, 0) if _has_osvw(vcpu) else None


def _write_osvw(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return _has_osvw(vcpu) and keep(vcpu, index, data)


def _read_platform_info(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if not host and not vcpu.vm.guest_can_read_msr_platform_info:  # KVM_CAP_MSR_PLATFORM_INFO
        return None
    return vcpu.msr_values.get(index, M.PLATFORM_INFO_CPUID_FAULT)


def _write_platform_info(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not host or (vcpu.cpuid_faulting and not data & M.PLATFORM_INFO_CPUID_FAULT):
        return False
    return keep(vcpu, index, data)


def set_misc_features_enables(vcpu: Vcpu, data: int) -> None:
    """Load MSR_MISC_FEATURES_ENABLES: CPUID faulting."""
    vcpu.msr_values[M.MSR_MISC_FEATURES_ENABLES] = data
    vcpu.cpuid_faulting = bool(data & M.MISC_FEATURES_ENABLES_CPUID_FAULT)


def _write_misc_features_enables(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    platform_info = _read_platform_info(vcpu, M.MSR_PLATFORM_INFO, True) or 0
    if data & ~(M.MISC_FEATURES_ENABLES_CPUID_FAULT if platform_info & M.PLATFORM_INFO_CPUID_FAULT else 0):
        return False
    set_misc_features_enables(vcpu, data)
    return True


def _has_tsc_aux(vcpu: Vcpu, host: bool) -> bool:
    """TSC_AUX exists with RDTSCP or RDPID; the host may always have it."""
    return host or vcpu.cpuid.has(X86_FEATURE_RDTSCP) or vcpu.cpuid.has(X86_FEATURE_RDPID)


def _write_tsc_aux(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not _has_tsc_aux(vcpu, host) or (vcpu.cpuid.intel_compatible and data >> 32):
        return False
    vcpu.tsc_aux = data & U32  # AMD's drops the upper half
    return True


def _read_tsc_aux(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.tsc_aux if _has_tsc_aux(vcpu, host) else None


def _write_umwait_control(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """The longest wait in bits 31:2, and bit 0: C0.2 is not allowed. The rest is reserved (SDM vol. 4)."""
    if data & ~M.UMWAIT_CONTROL_VALID:
        return False
    vcpu.umwait_control = data
    return True


def _write_perf_capabilities(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Userspace may give a guest with Intel's counters, though it isn't offered, writes of all of a counter's bits."""
    if not host or data & ~M.PMU_CAP_FW_WRITES:
        return False
    if data != vcpu.perf_capabilities:
        vcpu.perf_capabilities = data
        pmu.refresh(vcpu)
    return True


def _write_xss(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return not data


# --- the table ---------------------------------------------------------------------------------

#: Index -> how it is read and written.
MSRS: Final[dict[int, Msr]] = {
    M.MSR_IA32_P5_MC_ADDR: fixed(0),
    M.MSR_IA32_P5_MC_TYPE: fixed(0),
    M.MSR_IA32_TSC: Msr(_read_tsc, _write_tsc),
    M.MSR_IA32_PLATFORM_ID: fixed(0),
    M.MSR_IA32_APICBASE: Msr(_read_apic_base, _write_apic_base, save=False),
    M.MSR_IA32_EBL_CR_POWERON: fixed(0),
    M.MSR_EBC_FREQUENCY_ID: fixed(1 << 24),  # a ratio of 1, which nobody divides by 0 with
    M.MSR_SMI_COUNT: read_only(0)._replace(save=True),  # no SMM: userspace's own count
    M.MSR_IA32_TSC_ADJUST: Msr(lambda vcpu, index, host: vcpu.tsc_adjust, _write_tsc_adjust),
    M.MSR_IA32_UCODE_REV: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, M.UCODE_REV), _write_ucode_rev),
    M.MSR_IA32_UCODE_WRITE: write_only(),
    0xCD: fixed(3),  # FSB_FREQ
    M.MSR_PLATFORM_INFO: Msr(_read_platform_info, _write_platform_info),
    M.MSR_MISC_FEATURES_ENABLES: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_misc_features_enables
    ),
    M.MSR_IA32_ARCH_CAPABILITIES: with_feature(
        X86_FEATURE_ARCH_CAPABILITIES, read_only(M.ARCH_CAPABILITIES)._replace(save=True)
    ),
    M.MSR_IA32_BBL_CR_CTL3: constant(0xBE70_2111),  # an L2 cache that is on: Windows XP asks
    M.MSR_IA32_SYSENTER_CS: in_vmcb(V.SYSENTER_CS),
    M.MSR_IA32_SYSENTER_ESP: sysenter(V.SYSENTER_ESP),
    M.MSR_IA32_SYSENTER_EIP: sysenter(V.SYSENTER_EIP),
    M.MSR_IA32_MCG_CAP: Msr(lambda vcpu, index, host: vcpu.mcg_cap, lambda vcpu, index, data, host: False, False),
    M.MSR_IA32_MCG_STATUS: stored(),
    M.MSR_IA32_MCG_CTL: Msr(_read_mcg_ctl, _write_mcg_ctl),
    M.MSR_IA32_PERF_STATUS: fixed(1000 | 4 << 40),  # TSC ticks and multiplier
    M.MSR_IA32_PERF_CTL: fixed(0),
    M.MSR_IA32_MISC_ENABLE: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, M.MISC_ENABLE_PMU_READ_ONLY), _write_misc_enable
    ),
    M.MSR_IA32_DEBUGCTL: Msr(lambda vcpu, index, host: 0, _write_debugctl),
    0x1DB: Msr(lambda vcpu, index, host: vcpu.q[V.BR_FROM], lambda vcpu, index, data, host: False, False),
    0x1DC: Msr(lambda vcpu, index, host: vcpu.q[V.BR_TO], lambda vcpu, index, data, host: False, False),
    0x1DD: Msr(lambda vcpu, index, host: vcpu.q[V.LAST_EXCP_FROM], lambda vcpu, index, data, host: False, False),
    0x1DE: Msr(lambda vcpu, index, host: vcpu.q[V.LAST_EXCP_TO], lambda vcpu, index, data, host: False, False),
    M.MSR_IA32_POWER_CTL: stored(),
    M.MSR_IA32_UMWAIT_CONTROL: with_feature(
        X86_FEATURE_WAITPKG, Msr(lambda vcpu, index, host: vcpu.umwait_control, _write_umwait_control)
    ),
    M.MSR_IA32_TSC_DEADLINE: Msr(_read_tsc_deadline, _write_tsc_deadline),
    M.MSR_IA32_PERF_CAPABILITIES: with_feature(
        X86_FEATURE_PDCM, Msr(lambda vcpu, index, host: vcpu.perf_capabilities, _write_perf_capabilities)
    ),
    **{index: fixed(0) for index in (0x606, 0x611, 0x619, 0x639, 0x641)},  # RAPL: what the host consumes is its own
    M.MSR_IA32_XSS: with_feature(X86_FEATURE_XSAVES, Msr(lambda vcpu, index, host: 0, _write_xss)),
    M.MSR_EFER: Msr(lambda vcpu, index, host: vcpu.efer & ~abi.EFER_SVME, _write_efer, save=False),
    M.MSR_STAR: in_vmcb(V.STAR),
    M.MSR_LSTAR: in_vmcb(V.LSTAR, canonical=True),
    M.MSR_CSTAR: in_vmcb(V.CSTAR, canonical=True),
    M.MSR_SYSCALL_MASK: in_vmcb(V.SFMASK, valid=U32),
    M.MSR_FS_BASE: in_vmcb(V.FS_BASE, canonical=True)._replace(save=False),
    M.MSR_GS_BASE: in_vmcb(V.GS_BASE, canonical=True)._replace(save=False),
    M.MSR_KERNEL_GS_BASE: in_vmcb(V.KERNEL_GS_BASE, canonical=True),
    M.MSR_TSC_AUX: Msr(_read_tsc_aux, _write_tsc_aux),
    # AMD
    M.MSR_AMD64_TSC_RATIO: Msr(lambda vcpu, index, host: M.TSC_RATIO_DEFAULT if host else None, _write_tsc_ratio),
    M.MSR_AMD64_SYSCFG: fixed(0),
    M.MSR_K7_HWCR: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, M.HWCR_TSC_FREQ_SEL), _write_hwcr),
    **{index: constant(0) for index in (*range(0xC001_0016, 0xC001_001B), 0xC001_001D)},
    M.MSR_AMD64_NB_CFG: constant(0),  # Linux enables extended PCI configuration there on AMD processors
    M.MSR_K7_CLK_CTL: constant(0x2000_0000),  # a ramp-up count: Linux sets it on the K7s that need that
    M.MSR_AMD64_PATCH_LOADER: write_only(),
    M.MSR_K8_INT_PENDING_MSG: fixed(0),
    M.MSR_FAM10H_MMIO_CONF_BASE: stored(valid=0, save=False),
    0xC001_0062: constant(0),
    0xC001_0063: constant(0),
    M.MSR_K8_TSEG_ADDR: fixed(0),
    M.MSR_K8_TSEG_MASK: fixed(0),
    M.MSR_VM_HSAVE_PA: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_hsave_pa, False),
    M.MSR_VM_IGNNE: write_only(),
    M.MSR_AMD64_VIRT_SPEC_CTRL: with_feature(X86_FEATURE_VIRT_SSBD, stored(valid=M.VIRT_SPEC_CTRL_SSBD)),
    M.MSR_VM_CR: Msr(lambda vcpu, index, host: 0x10, lambda vcpu, index, data, host: data & 0x10 == data, False),
    M.MSR_AMD64_OSVW_ID_LENGTH: Msr(_read_osvw, _write_osvw, save=False),
    M.MSR_AMD64_OSVW_STATUS: Msr(_read_osvw, _write_osvw, save=False),
    M.MSR_F15H_IC_CFG: fixed(0),
    M.MSR_AMD64_DC_CFG: constant(0),
    M.MSR_AMD64_TW_CFG: constant(0),
    M.MSR_AMD64_BU_CFG2: constant(0),
    M.MSR_F15H_EX_CFG: constant(0),
    M.MSR_AMD64_DE_CFG: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, M.DE_CFG_LFENCE_SERIALIZE), _write_de_cfg, save=False
    ),
    M.MSR_MTRRCAP: fixed(mtrr.MTRRCAP),
    **{index: Msr(read, write) for index, (read, write) in mtrr.MSRS.items()},
    **{
        index: Msr(_read_mc_bank, _write_mc_bank, save=False)
        for index in range(M.MSR_IA32_MC0_CTL, M.MSR_IA32_MC0_CTL + 4 * M.KVM_MAX_MCE_BANKS)
    },
    **{
        index: Msr(_read_mc_ctl2, _write_mc_ctl2, save=False)
        for index in range(M.MSR_IA32_MC0_CTL2, M.MSR_IA32_MC0_CTL2 + M.KVM_MAX_MCE_BANKS)
    },
    **{index: Msr(_read_x2apic, _write_x2apic, save=False) for index in range(M.MSR_X2APIC, M.MSR_X2APIC + 0x100)},
    # paravirtual
    **{index: Msr(read, write) for index, (read, write) in kvmclock.MSRS.items()},
    **{index: Msr(*row) for index, row in hyperv_msrs.MSRS.items()},
}

_PMU_MSRS: Final = (
    *range(M.MSR_CORE_PERF_FIXED_CTR0, M.MSR_CORE_PERF_FIXED_CTR0 + intel.CAPABILITY.counters_fixed),
    M.MSR_CORE_PERF_FIXED_CTR_CTRL,
    M.MSR_CORE_PERF_GLOBAL_STATUS,
    M.MSR_CORE_PERF_GLOBAL_CTRL,
    *range(M.MSR_IA32_PERFCTR0, M.MSR_IA32_PERFCTR0 + intel.CAPABILITY.counters_gp),
    *range(M.MSR_P6_EVNTSEL0, M.MSR_P6_EVNTSEL0 + intel.CAPABILITY.counters_gp),
    *range(M.MSR_K7_EVNTSEL0, M.MSR_K7_PERFCTR0 + amd.AMD64_NUM_COUNTERS),
    *range(M.MSR_F15H_PERF_CTL0, M.MSR_F15H_PERF_CTL0 + 2 * amd.AMD64_NUM_COUNTERS_CORE),
    M.MSR_AMD64_PERF_CNTR_GLOBAL_CTL,
    M.MSR_AMD64_PERF_CNTR_GLOBAL_STATUS,
    M.MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_CLR,
)
#: Performance counters' registers that are saved, by index. Which of them a guest has, its CPUID says
#: (:mod:`.pmu.pmu`); those that it doesn't have are 0.
PMU_MSRS_TO_SAVE: Final = dict.fromkeys(_PMU_MSRS)
#: Those that read 0 and ignore writes where there are no counters: the K7's, and the P6's two.
_PMU_MSRS_IGNORED: Final = frozenset(
    {
        *range(M.MSR_K7_EVNTSEL0, M.MSR_K7_PERFCTR0 + amd.AMD64_NUM_COUNTERS),
        *(base + n for base in (M.MSR_IA32_PERFCTR0, M.MSR_P6_EVNTSEL0) for n in range(2)),
    }
)

#: MSRs that say what this KVM supports (KVM_GET_MSR_FEATURE_INDEX_LIST), and their values.
FEATURE_MSRS: Final = {
    M.MSR_AMD64_DE_CFG: M.DE_CFG_LFENCE_SERIALIZE,
    M.MSR_IA32_UCODE_REV: M.UCODE_REV,
    M.MSR_IA32_ARCH_CAPABILITIES: M.ARCH_CAPABILITIES,
    M.MSR_IA32_PERF_CAPABILITIES: 0,
}


def msr_index_list(*, enable_pmu: bool = True) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the registers to save and restore."""
    return [index for index, msr in MSRS.items() if msr.save] + ([*PMU_MSRS_TO_SAVE] if enable_pmu else [])


def is_known(vcpu: Vcpu, index: int) -> bool:
    """Tell whether there is such a register, whatever this guest may do with it."""
    return index in MSRS or index in vcpu.pmu.msrs or index in _PMU_MSRS_IGNORED


def get_msr(vcpu: Vcpu, index: int, *, host: bool) -> int | None:
    """Read an MSR; None stands for #GP, or for "unknown" to the host."""
    row = MSRS.get(index)
    if row is not None:
        return row.read(vcpu, index, host)
    counter = vcpu.pmu.msrs.get(index)
    if counter is not None:
        return counter[0]()
    if index in _PMU_MSRS_IGNORED or (host and index in PMU_MSRS_TO_SAVE):
        return 0
    params = vcpu.vm.params
    if params.ignore_msrs:
        if params.report_ignored_msrs:
            vcpu.vm.log_limited(log, "vcpu%d: ignored rdmsr: %#x", vcpu.vcpu_id, index)
        return 0
    if not host:
        vcpu.vm.log_limited(log, "vcpu%d: unhandled rdmsr: %#x", vcpu.vcpu_id, index)
    return None


def set_msr(vcpu: Vcpu, index: int, data: int, *, host: bool) -> bool:
    """Write an MSR; False stands for #GP, or for "refused" to the host."""
    row = MSRS.get(index)
    if row is not None:
        return row.write(vcpu, index, data & U64, host)
    counter = vcpu.pmu.msrs.get(index)
    if counter is not None:
        return counter[1](data & U64, host)
    if index in _PMU_MSRS_IGNORED or (host and not data and index in PMU_MSRS_TO_SAVE):
        return True
    params = vcpu.vm.params
    if params.ignore_msrs:
        if params.report_ignored_msrs:
            vcpu.vm.log_limited(log, "vcpu%d: ignored wrmsr: %#x data %#x", vcpu.vcpu_id, index, data)
        return True
    if not host:
        vcpu.vm.log_limited(log, "vcpu%d: unhandled wrmsr: %#x data %#x", vcpu.vcpu_id, index, data)
    return False


def set_apic_base(vcpu: Vcpu, value: int, host: bool) -> bool:
    """Write IA32_APIC_BASE; False for a mode or address that can't be."""
    if vcpu.apic is not None:
        return vcpu.apic.set_base(value, host)
    old = vcpu.get_apic_base()
    if value == old:
        return True
    valid = apic_base.valid_bits(vcpu.maxphyaddr, x2apic=vcpu.cpuid.has(X86_FEATURE_X2APIC))
    if not apic_base.may_load(old, value, valid, host=host):
        return False
    vcpu.msr_values[M.MSR_IA32_APICBASE] = value
    vcpu.cpuid.update_runtime(vcpu)
    return True
