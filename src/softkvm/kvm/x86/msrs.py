# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers: one table row per register, with its reader and its writer.

A reader returns the value, or None for #GP; a writer returns False for #GP. ``host`` is True for accesses by
userspace (KVM_GET_MSRS, KVM_SET_MSRS), which may do what the guest may not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import _softcpu, abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import tsc
from softkvm.kvm.x86.features import X86_FEATURE_RDPID, X86_FEATURE_RDTSCP, X86_FEATURE_X2APIC
from softkvm.kvm.x86.irqchip import apic_base
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

log = logging.getLogger(__name__)

Reader = Callable[["Vcpu", int, bool], "int | None"]
Writer = Callable[["Vcpu", int, int, bool], bool]


class Msr(NamedTuple):
    """One row: how a register is read and written, and whether KVM_GET_MSR_INDEX_LIST names it."""

    read: Reader
    write: Writer
    save: bool = True


MSR_IA32_TSC: Final = 0x10
MSR_IA32_APICBASE: Final = 0x1B
MSR_IA32_FEATURE_CONTROL: Final = 0x3A
MSR_IA32_TSC_ADJUST: Final = 0x3B
MSR_SMI_COUNT: Final = 0x34
MSR_IA32_SPEC_CTRL: Final = 0x48
MSR_IA32_PRED_CMD: Final = 0x49
MSR_IA32_UCODE_REV: Final = 0x8B
MSR_PLATFORM_INFO: Final = 0xCE
MSR_MTRRCAP: Final = 0xFE
MSR_IA32_ARCH_CAPABILITIES: Final = 0x10A
MSR_IA32_SYSENTER_CS: Final = 0x174
MSR_IA32_SYSENTER_ESP: Final = 0x175
MSR_IA32_SYSENTER_EIP: Final = 0x176
MSR_IA32_MCG_CAP: Final = 0x179
MSR_IA32_MCG_STATUS: Final = 0x17A
MSR_IA32_MCG_CTL: Final = 0x17B
MSR_MISC_FEATURES_ENABLES: Final = 0x140
MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_IA32_DEBUGCTL: Final = 0x1D9
MSR_IA32_POWER_CTL: Final = 0x1FC
MSR_IA32_CR_PAT: Final = 0x277
MSR_MTRR_DEF_TYPE: Final = 0x2FF
MSR_IA32_MC0_CTL: Final = 0x400
MSR_IA32_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC: Final = 0x800
MSR_IA32_XSS: Final = 0xDA0
MSR_EFER: Final = 0xC000_0080
MSR_STAR: Final = 0xC000_0081
MSR_LSTAR: Final = 0xC000_0082
MSR_CSTAR: Final = 0xC000_0083
MSR_SYSCALL_MASK: Final = 0xC000_0084
MSR_FS_BASE: Final = 0xC000_0100
MSR_GS_BASE: Final = 0xC000_0101
MSR_KERNEL_GS_BASE: Final = 0xC000_0102
MSR_TSC_AUX: Final = 0xC000_0103
MSR_AMD64_SYSCFG: Final = 0xC001_0010
MSR_K7_HWCR: Final = 0xC001_0015
MSR_AMD64_NB_CFG: Final = 0xC001_001F
MSR_AMD64_PATCH_LOADER: Final = 0xC001_0020
MSR_VM_CR: Final = 0xC001_0114
MSR_VM_HSAVE_PA: Final = 0xC001_0117
MSR_AMD64_OSVW_ID_LENGTH: Final = 0xC001_0140
MSR_AMD64_OSVW_STATUS: Final = 0xC001_0141
MSR_AMD64_DE_CFG: Final = 0xC001_1029

KVM_MAX_MCE_BANKS: Final = 32
MCG_CTL_P: Final = 1 << 8
#: Until KVM_X86_SETUP_MCE: banks only.
MCG_CAP: Final = KVM_MAX_MCE_BANKS
UCODE_REV: Final = 0x0100_0065  # AMD's patch level is in the lower half
DE_CFG_LFENCE_SERIALIZE: Final = 1 << 1
MISC_ENABLE_DEFAULT: Final = 1 << 0  # fast strings
MISC_ENABLE_MWAIT: Final = 1 << 18
PLATFORM_INFO_CPUID_FAULT: Final = 1 << 31
MISC_FEATURES_ENABLES_CPUID_FAULT: Final = 1 << 0
HWCR_TSC_FREQ_SEL: Final = 1 << 24  # the TSC counts at the P0 frequency

#: LBR, BTF, and the performance monitoring pins (APM vol. 2, 13.1.1.6).
DEBUGCTL_VALID: Final = 0x3F

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
#: Width of the silicon's linear addresses.
_HOST_LINEAR_BITS: Final = _softcpu.cpuid(0x8000_0008, 0)[0] >> 8 & 0xFF


# --- building blocks ---------------------------------------------------------------------------


def _constant(value: int) -> Msr:
    """A register that reads ``value`` and ignores writes."""
    return Msr(lambda vcpu, index, host: value, lambda vcpu, index, data, host: True, save=False)


def _fixed(value: int) -> Msr:
    """A register that reads ``value`` and that nobody can write."""
    return Msr(lambda vcpu, index, host: value, lambda vcpu, index, data, host: False, save=False)


def _read_only(value: int) -> Msr:
    """A register that reads ``value``; the guest's writes raise #GP, the host may write it back."""
    return Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, value),
        lambda vcpu, index, data, host: host and _keep(vcpu, index, data),
        save=False,
    )


def _keep(vcpu: Vcpu, index: int, data: int) -> bool:
    vcpu.msr_values[index] = data
    return True


def _stored(default: int = 0, valid: int = _U64, *, save: bool = True) -> Msr:
    """A register that KVM only stores; bits outside of ``valid`` raise #GP."""

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        return not data & ~valid and _keep(vcpu, index, data)

    return Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, default), write, save)


def _in_vmcb(field: int, *, canonical: bool = False, valid: int = _U64) -> Msr:
    """A register in the VMCB's save area."""

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if (canonical and cr.is_noncanonical(vcpu, data)) or data & ~valid:
            return False
        vcpu.q[field] = data
        return True

    return Msr(lambda vcpu, index, host: vcpu.q[field], write)


def _sysenter(field: int) -> Msr:
    """SYSENTER_ESP or _EIP: 32 bits of AMD's, 64 for Intel-compatible guests (upper half in ``msr_values``).

    AMD's don't fault on addresses that aren't canonical, so KVM makes them so instead of raising #GP.
    """

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        high = vcpu.msr_values.get(index, 0) if vcpu.cpuid.intel_compatible else 0
        return high | vcpu.q[field] & _U32

    def write(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
        if data >> _HOST_LINEAR_BITS - 1 & 1:
            data |= _U64 << _HOST_LINEAR_BITS & _U64
        else:
            data &= (1 << _HOST_LINEAR_BITS) - 1
        vcpu.msr_values[index] = data & ~_U32 if vcpu.cpuid.intel_compatible else 0
        vcpu.q[field] = data & _U32
        return True

    return Msr(read, write)


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
        vcpu.tsc_adjust = (vcpu.tsc_adjust + adjust) & _U64
    return True


def _write_tsc_adjust(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
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


def _read_mcg_ctl(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.msr_values.get(index, 0) if vcpu.mcg_cap & MCG_CTL_P or host else None


def _write_mcg_ctl(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not vcpu.mcg_cap & MCG_CTL_P and (data or not host):
        return False
    return data in (0, _U64) and _keep(vcpu, index, data)


def _read_mc_bank(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if index - MSR_IA32_MC0_CTL >= 4 * (vcpu.mcg_cap & 0xFF):
        return None
    return vcpu.msr_values.get(index, 0)


def _write_mc_bank(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if index - MSR_IA32_MC0_CTL >= 4 * (vcpu.mcg_cap & 0xFF):
        return False
    kind = index & 3
    # Linux clears bit 10 of bank 4's control register on AMD, bit 0 of some Intel's: KVM takes them for set.
    if kind == 0 and data and data | 1 << 10 | 1 != _U64:
        return False
    if kind == 1 and not host and data and not vcpu.msr_values.get(MSR_K7_HWCR, 0) & 1 << 18:
        return False
    return _keep(vcpu, index, data)


def _write_ucode_rev(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return _keep(vcpu, index, data) if host else True


def _write_misc_enable(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    _keep(vcpu, index, data)
    vcpu.cpuid.update_runtime(vcpu)
    return True


def _write_hwcr(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    data &= ~(1 << 6 | 1 << 3 | 1 << 8)  # FFDIS, TLBCACHEDIS, IGNNE_EM: written by firmware, meaningless here
    if data & ~(1 << 24 | 1 << 18):
        return False
    return _keep(vcpu, index, data)


def _write_debugctl(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    """Bits that exist are dropped: the silicon has neither branch records, nor steps by branches, nor pins.

    That is how KVM on AMD's processors tells that it doesn't have them; bits that don't exist are #GP.
    """
    if data & ~DEBUGCTL_VALID:
        return False
    if data and not host:
        vcpu.vm.log_limited(log, "vcpu%d: unimplemented bits of DEBUGCTL: %#x", vcpu.vcpu_id, data)
    return True


def _read_platform_info(vcpu: Vcpu, index: int, host: bool) -> int | None:
    if not host and not vcpu.vm.guest_can_read_msr_platform_info:  # KVM_CAP_MSR_PLATFORM_INFO
        return None
    return vcpu.msr_values.get(index, PLATFORM_INFO_CPUID_FAULT)


def _write_platform_info(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not host or (vcpu.cpuid_faulting and not data & PLATFORM_INFO_CPUID_FAULT):
        return False
    return _keep(vcpu, index, data)


def set_misc_features_enables(vcpu: Vcpu, data: int) -> None:
    """Load MSR_MISC_FEATURES_ENABLES: CPUID faulting."""
    vcpu.msr_values[MSR_MISC_FEATURES_ENABLES] = data
    vcpu.cpuid_faulting = bool(data & MISC_FEATURES_ENABLES_CPUID_FAULT)


def _write_misc_features_enables(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    platform_info = _read_platform_info(vcpu, MSR_PLATFORM_INFO, True) or 0
    if data & ~(MISC_FEATURES_ENABLES_CPUID_FAULT if platform_info & PLATFORM_INFO_CPUID_FAULT else 0):
        return False
    set_misc_features_enables(vcpu, data)
    return True


def _has_tsc_aux(vcpu: Vcpu, host: bool) -> bool:
    """TSC_AUX exists with RDTSCP or RDPID; the host may always have it."""
    return host or vcpu.cpuid.has(X86_FEATURE_RDTSCP) or vcpu.cpuid.has(X86_FEATURE_RDPID)


def _write_tsc_aux(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    if not _has_tsc_aux(vcpu, host) or (vcpu.cpuid.intel_compatible and data >> 32):
        return False
    vcpu.tsc_aux = data & _U32  # AMD's drops the upper half
    return True


def _read_tsc_aux(vcpu: Vcpu, index: int, host: bool) -> int | None:
    return vcpu.tsc_aux if _has_tsc_aux(vcpu, host) else None


def _write_xss(vcpu: Vcpu, index: int, data: int, host: bool) -> bool:
    return not data


# --- the table ---------------------------------------------------------------------------------

_MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))

#: Index -> how it is read and written.
MSRS: Final[dict[int, Msr]] = {
    MSR_IA32_TSC: Msr(_read_tsc, _write_tsc),
    0x17: _constant(0),  # PLATFORM_ID
    MSR_IA32_APICBASE: Msr(_read_apic_base, _write_apic_base, save=False),
    0x2A: _constant(0),  # EBL_CR_POWERON
    MSR_SMI_COUNT: _read_only(0)._replace(save=True),  # no SMM: userspace's own count
    MSR_IA32_TSC_ADJUST: Msr(lambda vcpu, index, host: vcpu.tsc_adjust, _write_tsc_adjust),
    MSR_IA32_UCODE_REV: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, UCODE_REV), _write_ucode_rev),
    0x79: Msr(lambda vcpu, index, host: 0, lambda vcpu, index, data, host: True, False),  # UCODE_WRITE
    0xC1: _constant(0),
    0xC2: _constant(0),
    0xCD: _fixed(3),  # FSB_FREQ
    MSR_PLATFORM_INFO: Msr(_read_platform_info, _write_platform_info),
    MSR_MISC_FEATURES_ENABLES: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_misc_features_enables
    ),
    0xFE: _fixed(0x508),  # MTRRcap: 8 variable
    MSR_IA32_SYSENTER_CS: _in_vmcb(V.SYSENTER_CS),
    MSR_IA32_SYSENTER_ESP: _sysenter(V.SYSENTER_ESP),
    MSR_IA32_SYSENTER_EIP: _sysenter(V.SYSENTER_EIP),
    MSR_IA32_MCG_CAP: Msr(lambda vcpu, index, host: vcpu.mcg_cap, lambda vcpu, index, data, host: False, False),
    MSR_IA32_MCG_STATUS: _stored(),
    MSR_IA32_MCG_CTL: Msr(_read_mcg_ctl, _write_mcg_ctl),
    0x198: _fixed(1000 | 4 << 40),  # PERF_STATUS
    MSR_IA32_MISC_ENABLE: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, MISC_ENABLE_DEFAULT), _write_misc_enable
    ),
    MSR_IA32_DEBUGCTL: Msr(lambda vcpu, index, host: 0, _write_debugctl),
    0x1DB: Msr(lambda vcpu, index, host: vcpu.q[V.BR_FROM], lambda vcpu, index, data, host: False, False),
    0x1DC: Msr(lambda vcpu, index, host: vcpu.q[V.BR_TO], lambda vcpu, index, data, host: False, False),
    0x1DD: Msr(lambda vcpu, index, host: vcpu.q[V.LAST_EXCP_FROM], lambda vcpu, index, data, host: False, False),
    0x1DE: Msr(lambda vcpu, index, host: vcpu.q[V.LAST_EXCP_TO], lambda vcpu, index, data, host: False, False),
    MSR_IA32_POWER_CTL: _stored(),
    MSR_IA32_CR_PAT: Msr(lambda vcpu, index, host: vcpu.q[V.G_PAT], _write_pat),
    MSR_MTRR_DEF_TYPE: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_mtrr_def_type),
    MSR_IA32_TSC_DEADLINE: Msr(_read_tsc_deadline, _write_tsc_deadline),
    MSR_IA32_XSS: Msr(lambda vcpu, index, host: 0, _write_xss),
    MSR_EFER: Msr(lambda vcpu, index, host: vcpu.efer & ~abi.EFER_SVME, _write_efer, save=False),
    MSR_STAR: _in_vmcb(V.STAR),
    MSR_LSTAR: _in_vmcb(V.LSTAR, canonical=True),
    MSR_CSTAR: _in_vmcb(V.CSTAR, canonical=True),
    MSR_SYSCALL_MASK: _in_vmcb(V.SFMASK, valid=_U32),
    MSR_FS_BASE: _in_vmcb(V.FS_BASE, canonical=True)._replace(save=False),
    MSR_GS_BASE: _in_vmcb(V.GS_BASE, canonical=True)._replace(save=False),
    MSR_KERNEL_GS_BASE: _in_vmcb(V.KERNEL_GS_BASE, canonical=True),
    MSR_TSC_AUX: Msr(_read_tsc_aux, _write_tsc_aux),
    # AMD
    MSR_AMD64_SYSCFG: _constant(0),
    MSR_K7_HWCR: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, HWCR_TSC_FREQ_SEL), _write_hwcr),
    **{
        index: _constant(0)
        for index in (*range(0xC001_0000, 0xC001_0008), *range(0xC001_0016, 0xC001_001B), 0xC001_001D)
    },
    MSR_AMD64_NB_CFG: _constant(0),  # Linux enables extended PCI configuration there on AMD processors
    MSR_AMD64_PATCH_LOADER: _constant(0),
    0xC001_0055: _constant(0),  # INT_PENDING
    0xC001_0058: _constant(0),  # MMIO configuration base
    0xC001_0062: _constant(0),
    0xC001_0063: _constant(0),
    MSR_VM_HSAVE_PA: Msr(
        lambda vcpu, index, host: vcpu.msr_values.get(index, 0), lambda v, i, d, host: host and not d, False
    ),
    MSR_VM_CR: Msr(lambda vcpu, index, host: 0x10, lambda vcpu, index, data, host: data & 0x10 == data, False),
    MSR_AMD64_OSVW_ID_LENGTH: _read_only(0),
    MSR_AMD64_OSVW_STATUS: _read_only(0),
    0xC001_1022: _constant(0),  # DC_CFG
    0xC001_102A: _constant(0),  # BU_CFG2
    MSR_AMD64_DE_CFG: _stored(DE_CFG_LFENCE_SERIALIZE, DE_CFG_LFENCE_SERIALIZE, save=False),
    **{index: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_mtrr_fixed) for index in _MTRR_FIXED},
    **{
        index: Msr(lambda vcpu, index, host: vcpu.msr_values.get(index, 0), _write_mtrr_var)
        for index in range(0x200, 0x210)
    },
    **{
        index: Msr(_read_mc_bank, _write_mc_bank, save=False)
        for index in range(MSR_IA32_MC0_CTL, MSR_IA32_MC0_CTL + 4 * KVM_MAX_MCE_BANKS)
    },
    **{index: Msr(_read_x2apic, _write_x2apic, save=False) for index in range(MSR_X2APIC, MSR_X2APIC + 0x100)},
    # paravirtual
    **{index: Msr(read, write) for index, (read, write) in kvmclock.MSRS.items()},
}

#: MSRs that say what this KVM supports (KVM_GET_MSR_FEATURE_INDEX_LIST), and their values.
FEATURE_MSRS: Final = {
    MSR_IA32_UCODE_REV: UCODE_REV,
    MSR_AMD64_DE_CFG: DE_CFG_LFENCE_SERIALIZE,
}


def msr_index_list() -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the registers to save and restore."""
    return [index for index, msr in MSRS.items() if msr.save]


def is_known(index: int) -> bool:
    """Tell whether there is such a register, whatever this guest may do with it."""
    return index in MSRS


def get_msr(vcpu: Vcpu, index: int, *, host: bool) -> int | None:
    """Read an MSR; None stands for #GP, or for "unknown" to the host."""
    row = MSRS.get(index)
    if row is not None:
        return row.read(vcpu, index, host)
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
        return row.write(vcpu, index, data & _U64, host)
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
    valid = apic_base.valid_bits(vcpu.maxphyaddr, x2apic=vcpu.cpuid.has(X86_FEATURE_X2APIC))
    if not apic_base.may_load(vcpu.get_apic_base(), value, valid, host=host):
        return False
    vcpu.msr_values[MSR_IA32_APICBASE] = value
    vcpu.cpuid.update_runtime(vcpu)
    return True
