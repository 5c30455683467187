# SPDX-License-Identifier: Apache-2.0
"""x87, SSE and XSAVE state through the API (KVM API, section 4).

The register block keeps the x87 registers by their physical number and the full tag word; FXSAVE's image has
them relative to the top of the stack, with an abridged tag word (APM vol. 2, 11.4.4).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86.exceptions import X86Exception
from softkvm.kvm.x86.register_block import (
    FCS_W,
    FCW_W,
    FDP_Q,
    FDS_W,
    FIP_Q,
    FOP_W,
    FPU_B,
    FPU_END_B,
    FSW_W,
    FTW_W,
    MXCSR_D,
    PKRU_D,
    st_b,
    ymm_b,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_FSW_ES: Final = 1 << 7
_FSW_TOP: Final = 7 << 11
_FSW_B: Final = 1 << 15

MXCSR_DEFAULT: Final = 0x1F80
MXCSR_MASK: Final = 0x2_FFFF  # MM is there: the silicon has MisAlignSse
_XSTATE_BV: Final = 512
_XCOMP_BV: Final = 520
_YMM_OFFSET: Final = 576


def reset(vcpu: Vcpu) -> None:
    """Load the state after RESET: FCW 0040h, everything empty and zero (APM vol. 2, table 14-1)."""
    vcpu.rb[FPU_B:FPU_END_B] = bytes(FPU_END_B - FPU_B)
    vcpu.rw[FCW_W] = 0x40
    vcpu.rw[FTW_W] = 0x5555
    vcpu.rd[MXCSR_D] = MXCSR_DEFAULT
    vcpu.rd[PKRU_D] = 0
    vcpu.xcr0 = cr.XFEATURE_FP


def check_pending(vcpu: Vcpu) -> None:
    """Raise the #MF that an earlier x87 instruction left pending (FSW.ES; APM vol. 1, 6.8.4)."""
    if vcpu.rw[FSW_W] & _FSW_ES:
        raise X86Exception(abi.MF_VECTOR)


#: Bits of the control word that can be written; bit 6 reads as one.
_FCW_WRITABLE: Final = 0x1F3F
_FCW_FIXED: Final = 0x40


def set_control_word(vcpu: Vcpu, value: int) -> None:
    """Load the control word; which exceptions are pending follows from its masks (APM vol. 1, 6.2.2)."""
    vcpu.rw[FCW_W] = value & _FCW_WRITABLE | _FCW_FIXED
    status = vcpu.rw[FSW_W] & ~(_FSW_ES | _FSW_B)
    unmasked = status & ~value & 0x3F
    vcpu.rw[FSW_W] = status | (_FSW_ES | _FSW_B if unmasked else 0)


def initialize(vcpu: Vcpu) -> None:
    """What FNINIT does: control word 037Fh, everything empty, no exception."""
    vcpu.rw[FCW_W], vcpu.rw[FSW_W], vcpu.rw[FTW_W], vcpu.rw[FOP_W] = 0x37F, 0, 0xFFFF, 0
    vcpu.rq[FIP_Q] = vcpu.rq[FDP_Q] = 0
    vcpu.rw[FCS_W] = vcpu.rw[FDS_W] = 0


def enter_mmx(vcpu: Vcpu) -> None:
    """What every MMX instruction but EMMS does to the x87 state: all tags valid, TOP zero (APM vol. 2, 11.4)."""
    vcpu.rw[FSW_W] &= ~_FSW_TOP & 0xFFFF
    vcpu.rw[FTW_W] = 0


def abridge_tags(ftw: int) -> int:
    """Return FXSAVE's tag byte of a full tag word: a bit per register that isn't empty."""
    return sum(1 << n for n in range(8) if ftw >> 2 * n & 3 != 3)


def expand_tags(abridged: int, registers: list[bytes]) -> int:
    """Return the full tag word for FXSAVE's tag byte; ``registers`` are 10 bytes by physical number."""
    ftw = 0
    for n in range(8):
        if not abridged >> n & 1:
            tag = 3
        else:
            significand, sign_exponent = struct.unpack("<QH", registers[n])
            exponent = sign_exponent & 0x7FFF
            if exponent == 0x7FFF:
                tag = 2
            elif exponent == 0:
                tag = 1 if not significand else 2
            else:
                tag = 0 if significand >> 63 else 2
        ftw |= tag << 2 * n
    return ftw


def get_fpu(vcpu: Vcpu) -> abi.kvm_fpu:
    """KVM_GET_FPU."""
    rb, rw, rq = vcpu.rb, vcpu.rw, vcpu.rq
    fpu = abi.kvm_fpu()
    fpu.fcw = rw[FCW_W]
    fpu.fsw = rw[FSW_W]
    fpu.ftwx = abridge_tags(rw[FTW_W])
    fpu.last_opcode = rw[FOP_W]
    fpu.last_ip = rq[FIP_Q]
    fpu.last_dp = rq[FDP_Q]
    top = fpu.fsw >> 11 & 7
    for i in range(8):
        at = st_b(top + i & 7)
        fpu.fpr[i][:10] = list(rb[at : at + 10])
    for i in range(16):
        at = ymm_b(i)
        fpu.xmm[i][:] = list(rb[at : at + 16])
    fpu.mxcsr = vcpu.rd[MXCSR_D]
    return fpu


def set_fpu(vcpu: Vcpu, fpu: abi.kvm_fpu) -> None:
    """KVM_SET_FPU. As in the kernel, ``mxcsr`` is not loaded: KVM_SET_XSAVE does that."""
    rb, rw, rq = vcpu.rb, vcpu.rw, vcpu.rq
    rw[FCW_W] = fpu.fcw
    rw[FSW_W] = fpu.fsw
    rw[FOP_W] = fpu.last_opcode
    rq[FIP_Q] = fpu.last_ip
    rq[FDP_Q] = fpu.last_dp
    top = fpu.fsw >> 11 & 7
    for i in range(8):
        at = st_b(top + i & 7)
        rb[at : at + 16] = bytes(fpu.fpr[i][:10]) + bytes(6)
    rw[FTW_W] = expand_tags(fpu.ftwx, [bytes(rb[st_b(n) : st_b(n) + 10]) for n in range(8)])
    for i in range(16):
        at = ymm_b(i)
        rb[at : at + 16] = bytes(fpu.xmm[i])


_LEGACY: Final = struct.Struct("<HHBBHQQII")


def _pkru_offset(vcpu: Vcpu) -> int:
    """Return where the XSAVE area has PKRU (CPUID leaf 0xD, subleaf 9), 0 if the vCPU doesn't have it."""
    if not vcpu.cpuid.supported_xcr0 & cr.XFEATURE_PKRU:
        return 0
    return _softcpu.cpuid(0xD, 9)[1]


def get_xsave(vcpu: Vcpu) -> abi.kvm_xsave:
    """KVM_GET_XSAVE: standard format, every component marked present."""
    fpu = get_fpu(vcpu)
    area = bytearray(4096)
    _LEGACY.pack_into(
        area, 0, fpu.fcw, fpu.fsw, fpu.ftwx, 0, fpu.last_opcode, fpu.last_ip, fpu.last_dp, fpu.mxcsr, MXCSR_MASK
    )
    for i in range(8):
        area[32 + i * 16 : 42 + i * 16] = bytes(fpu.fpr[i][:10])
    for i in range(16):
        area[160 + i * 16 : 176 + i * 16] = bytes(fpu.xmm[i])
    features = cr.XFEATURE_FP | cr.XFEATURE_SSE
    if vcpu.cpuid.supported_xcr0 & cr.XFEATURE_YMM:
        features |= cr.XFEATURE_YMM
        for i in range(16):
            at = ymm_b(i) + 16
            area[_YMM_OFFSET + i * 16 : _YMM_OFFSET + i * 16 + 16] = vcpu.rb[at : at + 16]
    pkru = _pkru_offset(vcpu)
    if pkru:
        features |= cr.XFEATURE_PKRU
        struct.pack_into("<I", area, pkru, vcpu.pkru)
    struct.pack_into("<Q", area, _XSTATE_BV, features)
    return abi.kvm_xsave.from_buffer_copy(area)


def set_xsave(vcpu: Vcpu, xsave: abi.kvm_xsave) -> None:
    """KVM_SET_XSAVE: EINVAL for components that the guest doesn't have, or MXCSR bits that don't exist.

    Components that XSTATE_BV leaves out get their initial state, all but PKRU, which stays as it is.
    """
    area = bytes(xsave)
    (features,) = struct.unpack_from("<Q", area, _XSTATE_BV)
    (compaction,) = struct.unpack_from("<Q", area, _XCOMP_BV)
    allowed = vcpu.cpuid.supported_xcr0 | cr.XFEATURE_FP | cr.XFEATURE_SSE
    if features & ~allowed or compaction:
        raise kvm_error(errno.EINVAL, f"xstate_bv={features:#x} xcomp_bv={compaction:#x}, expected within {allowed:#x}")
    fcw, fsw, ftwx, _, fop, fip, fdp, mxcsr, _ = _LEGACY.unpack_from(area, 0)
    if mxcsr & ~MXCSR_MASK:
        raise kvm_error(errno.EINVAL, f"mxcsr={mxcsr:#x}, expected within {MXCSR_MASK:#x}")
    fpu = abi.kvm_fpu()
    fpu.fcw = 0x37F
    if features & cr.XFEATURE_FP:
        fpu.fcw, fpu.fsw, fpu.ftwx = fcw, fsw, ftwx
        fpu.last_opcode, fpu.last_ip, fpu.last_dp = fop, fip, fdp
        for i in range(8):
            fpu.fpr[i][:10] = list(area[32 + i * 16 : 42 + i * 16])
    if features & cr.XFEATURE_SSE:
        for i in range(16):
            fpu.xmm[i][:] = list(area[160 + i * 16 : 176 + i * 16])
    set_fpu(vcpu, fpu)
    vcpu.rd[MXCSR_D] = mxcsr if features & (cr.XFEATURE_SSE | cr.XFEATURE_YMM) else MXCSR_DEFAULT
    for i in range(16):
        at = ymm_b(i) + 16
        high = area[_YMM_OFFSET + i * 16 : _YMM_OFFSET + i * 16 + 16] if features & cr.XFEATURE_YMM else bytes(16)
        vcpu.rb[at : at + 16] = high
    pkru = _pkru_offset(vcpu)
    if pkru and features & cr.XFEATURE_PKRU:
        (value,) = struct.unpack_from("<I", area, pkru)
        if value != vcpu.pkru:
            vcpu.rd[PKRU_D] = value
            vcpu.flush_tlb_guest()  # the silicon folds the keys' rights into its translations


def get_xcrs(vcpu: Vcpu) -> abi.kvm_xcrs:
    """KVM_GET_XCRS."""
    xcrs = abi.kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = vcpu.xcr0
    return xcrs


def set_xcrs(vcpu: Vcpu, xcrs: abi.kvm_xcrs) -> None:
    """KVM_SET_XCRS: EINVAL for flags, too many registers, or an XCR0 that XSETBV would refuse."""
    if xcrs.nr_xcrs > abi.KVM_MAX_XCRS or xcrs.flags:
        raise kvm_error(errno.EINVAL, f"nr_xcrs={xcrs.nr_xcrs} flags={xcrs.flags:#x}, expected up to 16 and 0")
    for i in range(xcrs.nr_xcrs):
        if xcrs.xcrs[i].xcr == 0:
            if not cr.kvm_set_xcr(vcpu, 0, xcrs.xcrs[i].value):
                raise kvm_error(errno.EINVAL, f"XCR0={xcrs.xcrs[i].value:#x}, expected what XSETBV takes")
            break
