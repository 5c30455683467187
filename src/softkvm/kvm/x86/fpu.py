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
from softkvm.abi.x86 import request_sizes as sizes
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
    ST_SIZE,
    YMM_SIZE,
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


#: FXSAVE's four bits for each byte of the full tag word, one per register that isn't empty; and the tag word for each
#: of its bytes. Only emptiness is kept: the silicon classifies the others when FNSTENV stores them.
_ABRIDGED: Final = tuple(sum(1 << n for n in range(4) if tags >> 2 * n & 3 != 3) for tags in range(256))
_EXPANDED: Final = tuple(sum(3 << 2 * n for n in range(8) if not tags >> n & 1) for tags in range(256))


def abridge_tags(ftw: int) -> int:
    """Return FXSAVE's tag byte of a full tag word: a bit per register that isn't empty."""
    return _ABRIDGED[ftw & 0xFF] | _ABRIDGED[ftw >> 8] << 4


#: Where the register block has the x87 registers, and the quadwords of a vector register that an image has together.
_ST: Final = slice(st_b(0), st_b(8))
_XMM: Final = tuple(slice(ymm_b(0) // 8 + n, ymm_b(16) // 8, YMM_SIZE // 8) for n in (0, 1))
_YMM_HIGH: Final = tuple(slice(ymm_b(0) // 8 + n, ymm_b(16) // 8, YMM_SIZE // 8) for n in (2, 3))
_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)
#: Bytes that eight x87 registers have in an image of 16 bytes each.
_ST_MASK: Final = int.from_bytes((b"\xff" * 10 + bytes(6)) * 8, "little")


def _get_stack(vcpu: Vcpu, top: int) -> bytes:
    """Return the x87 registers from the top of the stack on, in 16 bytes each."""
    twice = (int.from_bytes(vcpu.rb[_ST], "little") & _ST_MASK).to_bytes(128, "little") * 2
    return twice[top * ST_SIZE : top * ST_SIZE + 128]


def _set_stack(vcpu: Vcpu, top: int, stack: bytes) -> None:
    """Load the x87 registers, given from the top of the stack on."""
    twice = (int.from_bytes(stack, "little") & _ST_MASK).to_bytes(128, "little") * 2
    vcpu.rb[_ST] = twice[128 - top * ST_SIZE : 256 - top * ST_SIZE]


def _get_vectors(vcpu: Vcpu, halves: tuple[slice, ...]) -> bytearray:
    """Return one half of every vector register, 16 bytes each."""
    image = bytearray(256)
    quadwords = memoryview(image).cast("Q")
    quadwords[_EVEN] = vcpu.rq[halves[0]]
    quadwords[_ODD] = vcpu.rq[halves[1]]
    return image


def _set_vectors(vcpu: Vcpu, halves: tuple[slice, ...], image: bytes) -> None:
    """Load one half of every vector register."""
    quadwords = memoryview(image).cast("Q")
    vcpu.rq[halves[0]] = quadwords[_EVEN]
    vcpu.rq[halves[1]] = quadwords[_ODD]


#: ``struct kvm_fpu``: the stack; FCW, FSW, tags, opcode, instruction and data pointer; XMM registers; MXCSR.
_FPU: Final = struct.Struct("<128sHHBxHQQ256sI4x")
#: The XSAVE area (APM vol. 2, 11.5.4): FCW, FSW, tags, opcode, pointers, MXCSR and its mask; the stack; XMM registers;
#: XSTATE_BV and XCOMP_BV; the high halves of the YMM registers.
_XSAVE: Final = struct.Struct("<HHBxHQQII128s256s96xQQ48x256s")
_NO_STACK: Final = bytes(128)
_NO_VECTORS: Final = bytes(256)
#: Where the XSAVE area has PKRU (CPUID leaf 0xD, subleaf 9).
_PKRU: Final = struct.Struct("<I")
_PKRU_OFFSET: Final = _softcpu.cpuid(0xD, 9)[1]


def get_fpu(vcpu: Vcpu) -> abi.kvm_fpu:
    """KVM_GET_FPU."""
    return abi.kvm_fpu.from_buffer_copy(_FPU.pack(*_get_x87(vcpu), _get_vectors(vcpu, _XMM), vcpu.rd[MXCSR_D]))


def set_fpu(vcpu: Vcpu, fpu: abi.kvm_fpu) -> None:
    """KVM_SET_FPU. As in the kernel, ``mxcsr`` is not loaded: KVM_SET_XSAVE does that."""
    stack, fcw, fsw, ftwx, fop, fip, fdp, xmm, _ = _FPU.unpack_from(fpu)
    _set_x87(vcpu, stack, fcw, fsw, ftwx, fop, fip, fdp)
    _set_vectors(vcpu, _XMM, xmm)


def _get_x87(vcpu: Vcpu) -> tuple[bytes, int, int, int, int, int, int]:
    """Return what :func:`_set_x87` takes."""
    rw, rq = vcpu.rw, vcpu.rq
    fsw = rw[FSW_W]
    tags = abridge_tags(rw[FTW_W])
    return _get_stack(vcpu, fsw >> 11 & 7), rw[FCW_W], fsw, tags, rw[FOP_W], rq[FIP_Q], rq[FDP_Q]


def _set_x87(vcpu: Vcpu, stack: bytes, fcw: int, fsw: int, ftwx: int, fop: int, fip: int, fdp: int) -> None:
    rw, rq = vcpu.rw, vcpu.rq
    rw[FCW_W] = fcw
    rw[FSW_W] = fsw
    rw[FOP_W] = fop
    rq[FIP_Q] = fip
    rq[FDP_Q] = fdp
    rw[FTW_W] = _EXPANDED[ftwx]
    _set_stack(vcpu, fsw >> 11 & 7, stack)


def get_xsave(vcpu: Vcpu) -> abi.kvm_xsave:
    """KVM_GET_XSAVE: standard format, every component marked present."""
    supported = vcpu.cpuid.supported_xcr0
    features = cr.XFEATURE_FP | cr.XFEATURE_SSE | supported & (cr.XFEATURE_YMM | cr.XFEATURE_PKRU)
    area = abi.kvm_xsave()
    stack, *control = _get_x87(vcpu)
    _XSAVE.pack_into(
        area,
        0,
        *control,
        vcpu.rd[MXCSR_D],
        MXCSR_MASK,
        stack,
        _get_vectors(vcpu, _XMM),
        features,
        0,
        _get_vectors(vcpu, _YMM_HIGH) if features & cr.XFEATURE_YMM else _NO_VECTORS,
    )
    if features & cr.XFEATURE_PKRU:
        _PKRU.pack_into(area, _PKRU_OFFSET, vcpu.pkru)
    return area


def set_xsave(vcpu: Vcpu, xsave: abi.kvm_xsave) -> None:
    """KVM_SET_XSAVE: EINVAL for components that the guest doesn't have, or MXCSR bits that don't exist.

    Components that XSTATE_BV leaves out get their initial state, all but PKRU, which stays as it is.
    """
    fcw, fsw, ftwx, fop, fip, fdp, mxcsr, _, stack, xmm, features, compaction, ymm = _XSAVE.unpack_from(xsave)
    allowed = vcpu.cpuid.supported_xcr0 | cr.XFEATURE_FP | cr.XFEATURE_SSE
    if features & ~allowed or compaction:
        raise kvm_error(errno.EINVAL, f"xstate_bv={features:#x} xcomp_bv={compaction:#x}, expected within {allowed:#x}")
    if mxcsr & ~MXCSR_MASK:
        raise kvm_error(errno.EINVAL, f"mxcsr={mxcsr:#x}, expected within {MXCSR_MASK:#x}")
    if features & cr.XFEATURE_FP:
        _set_x87(vcpu, stack, fcw, fsw, ftwx, fop, fip, fdp)
    else:
        _set_x87(vcpu, _NO_STACK, 0x37F, 0, 0, 0, 0, 0)
    _set_vectors(vcpu, _XMM, xmm if features & cr.XFEATURE_SSE else _NO_VECTORS)
    vcpu.rd[MXCSR_D] = mxcsr if features & (cr.XFEATURE_SSE | cr.XFEATURE_YMM) else MXCSR_DEFAULT
    if allowed & cr.XFEATURE_YMM:  # else the guest has no instruction that sets them
        _set_vectors(vcpu, _YMM_HIGH, ymm if features & cr.XFEATURE_YMM else _NO_VECTORS)
    if features & cr.XFEATURE_PKRU:
        (value,) = _PKRU.unpack_from(xsave, _PKRU_OFFSET)
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
    if xcrs.flags:
        raise kvm_error(errno.EINVAL, f"flags={xcrs.flags:#x}, expected 0")
    for i in range(sizes.XCRS.check(xcrs.nr_xcrs)):
        if xcrs.xcrs[i].xcr == 0:
            if not cr.kvm_set_xcr(vcpu, 0, xcrs.xcrs[i].value):
                raise kvm_error(errno.EINVAL, f"XCR0={xcrs.xcrs[i].value:#x}, expected what XSETBV takes")
            break
