# SPDX-License-Identifier: Apache-2.0
"""Control registers, XCR0, EFER and debug registers: the checks of their writes (APM vol. 2, chapter 3).

The ``kvm_set_*`` functions return False where the processor raises #GP, with nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.exceptions import DR7_FIXED_1, DR7_VOLATILE
from softkvm.kvm.x86.features import (
    X86_FEATURE_FSGSBASE,
    X86_FEATURE_LA57,
    X86_FEATURE_LM,
    X86_FEATURE_NX,
    X86_FEATURE_PCID,
    X86_FEATURE_PKU,
    X86_FEATURE_SMAP,
    X86_FEATURE_SMEP,
    X86_FEATURE_SYSCALL,
    X86_FEATURE_UMIP,
    X86_FEATURE_XSAVE,
    Feature,
)
from softkvm.kvm.x86.mmu.paging import is_canonical
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

CR0_VALID: Final = 0xE005_003F


#: CR4 bits that exist only with a CPUID feature.
_CR4_FEATURES: Final = (
    (abi.X86_CR4_OSXSAVE, X86_FEATURE_XSAVE),
    (abi.X86_CR4_PCIDE, X86_FEATURE_PCID),
    (abi.X86_CR4_SMEP, X86_FEATURE_SMEP),
    (abi.X86_CR4_SMAP, X86_FEATURE_SMAP),
    (abi.X86_CR4_FSGSBASE, X86_FEATURE_FSGSBASE),
    (abi.X86_CR4_PKE, X86_FEATURE_PKU),
    (abi.X86_CR4_LA57, X86_FEATURE_LA57),
    (abi.X86_CR4_UMIP, X86_FEATURE_UMIP),
)
#: EFER bits, the same.
_EFER_FEATURES: Final = (
    (abi.EFER_SCE, X86_FEATURE_SYSCALL),
    (abi.EFER_NX, X86_FEATURE_NX),
    (abi.EFER_LME | abi.EFER_LMA, X86_FEATURE_LM),
)
_CR4_ALWAYS: Final = (
    abi.X86_CR4_VME
    | abi.X86_CR4_PVI
    | abi.X86_CR4_TSD
    | abi.X86_CR4_DE
    | abi.X86_CR4_PSE
    | abi.X86_CR4_PAE
    | abi.X86_CR4_MCE
    | abi.X86_CR4_PGE
    | abi.X86_CR4_PCE
    | abi.X86_CR4_OSFXSR
    | abi.X86_CR4_OSXMMEXCPT
)

XFEATURE_FP: Final = 1 << 0
XFEATURE_SSE: Final = 1 << 1
XFEATURE_YMM: Final = 1 << 2
XFEATURE_PKRU: Final = 1 << 9


def cr4_valid_bits(has: Callable[[Feature], bool]) -> int:
    """Return the CR4 bits that exist, ``has`` telling about features."""
    valid = _CR4_ALWAYS
    for bit, feature in _CR4_FEATURES:
        if has(feature):
            valid |= bit
    return valid


def is_valid_cr0(vcpu: Vcpu, cr0: int) -> bool:
    """Tell whether ``cr0`` is a legal combination: 32 bits, NW only with CD, PG only with PE."""
    if cr0 >> 32:
        return False
    if cr0 & abi.X86_CR0_NW and not cr0 & abi.X86_CR0_CD:
        return False
    return not cr0 & abi.X86_CR0_PG or bool(cr0 & abi.X86_CR0_PE)


def is_valid_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """Tell whether ``cr4`` has only bits that the guest's CPUID allows."""
    return not cr4 & ~vcpu.cpuid.cr4_valid


def kvm_set_cr0(vcpu: Vcpu, cr0: int) -> bool:
    """MOV to CR0 (APM vol. 2, 3.1.1 and 14.6.1)."""
    old = vcpu.cr0
    cr0 |= abi.X86_CR0_ET
    if not is_valid_cr0(vcpu, cr0):
        return False
    cr0 &= CR0_VALID
    if vcpu.efer & abi.EFER_LME and not old & abi.X86_CR0_PG and cr0 & abi.X86_CR0_PG:
        if not vcpu.cr4 & abi.X86_CR4_PAE or vcpu.w[V.CS_ATTRIB] & V.SEG_L:
            return False
    if not cr0 & abi.X86_CR0_PG and (vcpu.cr4 & abi.X86_CR4_PCIDE or vcpu.is_64bit_code()):
        return False
    svm.set_cr0(vcpu, cr0)
    return True


def kvm_set_cr3(vcpu: Vcpu, cr3: int) -> bool:
    """MOV to CR3."""
    if vcpu.cr4 & abi.X86_CR4_PCIDE and cr3 >> 63:
        cr3 &= ~(1 << 63)
    else:
        vcpu.flush_tlb_guest()
    if vcpu.efer & abi.EFER_LMA and cr3 >> vcpu.maxphyaddr:
        return False
    vcpu.q[V.CR3] = cr3
    return True


def kvm_set_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """MOV to CR4 (APM vol. 2, 3.1.3)."""
    old = vcpu.cr4
    if not is_valid_cr4(vcpu, cr4):
        return False
    if vcpu.efer & abi.EFER_LMA:
        if not cr4 & abi.X86_CR4_PAE or (cr4 ^ old) & abi.X86_CR4_LA57:
            return False
    if cr4 & abi.X86_CR4_PCIDE and not old & abi.X86_CR4_PCIDE:
        if not vcpu.efer & abi.EFER_LMA or vcpu.cr3 & 0xFFF:
            return False
    svm.set_cr4(vcpu, cr4)
    return True


def kvm_set_cr8(vcpu: Vcpu, cr8: int) -> bool:
    """MOV to CR8: the task priority."""
    if cr8 & ~0xF:
        return False
    if vcpu.apic is not None:
        vcpu.apic.set_tpr(cr8 << 4)
    else:
        vcpu.shadow_cr8 = cr8
        vcpu.b[V.V_TPR] = vcpu.b[V.V_TPR] & 0xF0 | cr8  # what the guest reads
    return True


def kvm_get_cr8(vcpu: Vcpu) -> int:
    """Return CR8."""
    return vcpu.apic.cr8 if vcpu.apic is not None else vcpu.shadow_cr8


def efer_valid_bits(vcpu: Vcpu) -> int:
    """Return the EFER bits that the guest's CPUID allows."""
    valid = 0
    for bit, feature in _EFER_FEATURES:
        if vcpu.cpuid.has(feature):
            valid |= bit
    return valid


def kvm_set_efer(vcpu: Vcpu, efer: int, *, host_initiated: bool) -> bool:
    """WRMSR to EFER: LMA stays as it is; the host may set bits that the guest's CPUID lacks but the silicon has."""
    valid = abi.EFER_SCE | abi.EFER_NX | abi.EFER_LME | abi.EFER_LMA if host_initiated else efer_valid_bits(vcpu)
    if efer & ~valid:
        return False
    if not host_initiated and vcpu.cr0 & abi.X86_CR0_PG and (vcpu.efer ^ efer) & abi.EFER_LME:
        return False
    svm.set_efer(vcpu, efer & ~abi.EFER_LMA | vcpu.efer & abi.EFER_LMA)
    return True


def kvm_set_xcr(vcpu: Vcpu, index: int, value: int) -> bool:
    """XSETBV (APM vol. 2, 11.5.2)."""
    if index != 0 or not value & XFEATURE_FP:
        return False
    if value & XFEATURE_YMM and not value & XFEATURE_SSE:
        return False
    if value & ~(vcpu.cpuid.supported_xcr0 | XFEATURE_FP):
        return False
    vcpu.xcr0 = value
    vcpu.cpuid.update_runtime(vcpu)
    return True


def kvm_set_dr(vcpu: Vcpu, index: int, value: int) -> bool:
    """MOV to a debug register; DR4 and DR5 are DR6 and DR7."""
    if index < 4:
        vcpu.db[index] = value
        return True
    if value >> 32:
        return False
    if index in (4, 6):
        vcpu.guest_dr6 = value & 0xE00F | 0xFFFF_0FF0
    else:
        vcpu.guest_dr7 = value & DR7_VOLATILE | DR7_FIXED_1
        vcpu.update_dr7()
    return True


def kvm_get_dr(vcpu: Vcpu, index: int) -> int:
    """Return a debug register."""
    if index < 4:
        return vcpu.db[index]
    if index in (4, 6):
        return vcpu.guest_dr6
    return vcpu.guest_dr7


def is_noncanonical(vcpu: Vcpu, address: int) -> bool:
    """Tell whether ``address`` is not canonical for the guest's paging mode."""
    return not is_canonical(address, la57=bool(vcpu.cr4 & abi.X86_CR4_LA57))
