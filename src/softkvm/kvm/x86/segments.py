# SPDX-License-Identifier: Apache-2.0
"""Segment registers: ``struct kvm_segment``, and loads from the descriptor tables (APM vol. 2, 4.7 and 4.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, gp
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.emulate.emulator import Emulator
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: Fields of kvm_sregs and where the VMCB has them.
SREGS_SEGMENTS: Final = (
    ("cs", V.CS_OFFSET),
    ("ds", V.DS_OFFSET),
    ("es", V.ES_OFFSET),
    ("fs", V.FS_OFFSET),
    ("gs", V.GS_OFFSET),
    ("ss", V.SS_OFFSET),
    ("tr", V.TR_OFFSET),
    ("ldt", V.LDTR_OFFSET),
)


def get_segment(vcpu: Vcpu, offset: int) -> abi.kvm_segment:
    """Return a segment register as KVM reports it."""
    seg = vcpu.vmcb.segment(offset)
    a = seg.attrib
    result = abi.kvm_segment(
        base=seg.base,
        limit=seg.limit,
        selector=seg.selector,
        type=a & 0xF,
        s=a >> 4 & 1,
        dpl=a >> 5 & 3,
        present=a >> 7 & 1,
        avl=a >> 8 & 1,
        l=a >> 9 & 1,
        db=a >> 10 & 1,
        # AMD processors ignore G: it follows from the limit, which is in bytes.
        g=int(seg.limit > 0xFFFFF),
        unusable=int(not a >> 7 & 1),
    )
    if offset == V.TR_OFFSET:
        result.type |= 2  # a loaded TSS is busy
    elif offset == V.SS_OFFSET:
        if result.unusable:
            result.db = 0
        result.dpl = vcpu.b[V.CPL]
    elif offset in (V.DS_OFFSET, V.ES_OFFSET, V.FS_OFFSET, V.GS_OFFSET) and not result.unusable:
        result.type |= 1
    return result


def set_segment(vcpu: Vcpu, offset: int, segment: abi.kvm_segment) -> None:
    """Load a segment register as userspace gives it; SS sets the privilege level."""
    attrib = (
        segment.type & 0xF
        | (segment.s & 1) << 4
        | (segment.dpl & 3) << 5
        | int(bool(segment.present & 1) and not segment.unusable) << 7
        | (segment.avl & 1) << 8
        | (segment.l & 1) << 9
        | (segment.db & 1) << 10
        | (segment.g & 1) << 11
    )
    vcpu.vmcb.set_segment(offset, segment.selector, attrib, segment.limit, segment.base)
    if offset == V.SS_OFFSET:
        vcpu.b[V.CPL] = segment.dpl & 3


# --- loads -------------------------------------------------------------------------------------


def parse_descriptor(raw: int) -> tuple[int, int, int]:
    """Return (attributes in the VMCB's layout, limit in bytes, base) of an 8-byte descriptor."""
    attrib = raw >> 40 & 0xFF | (raw >> 52 & 0xF) << 8
    limit = raw & 0xFFFF | (raw >> 48 & 0xF) << 16
    if attrib & V.SEG_G:
        limit = limit << 12 | 0xFFF
    base = raw >> 16 & 0xFF_FFFF | (raw >> 56 & 0xFF) << 24
    return attrib, limit, base


def read_descriptor(e: Emulator, selector: int) -> tuple[int, int]:
    """Return (address, raw) of the descriptor of ``selector``; #GP beyond the table."""
    vcpu = e.vcpu
    if selector & 4:
        table = vcpu.vmcb.segment(V.LDTR_OFFSET)
        if not table.attrib & V.SEG_P:
            raise gp(selector & 0xFFFC)
    else:
        table = vcpu.vmcb.segment(V.GDTR_OFFSET)
    at = selector & 0xFFF8
    if at + 7 > table.limit:
        raise gp(selector & 0xFFFC)
    address = table.base + at
    return address, int.from_bytes(e.read_linear(address, 8, implicit=True), "little")


def load_segment(e: Emulator, offset: int, selector: int) -> None:
    """Load a segment register with ``selector``, with all checks but those of far transfers (CS)."""
    vcpu = e.vcpu
    protected = bool(vcpu.cr0 & abi.X86_CR0_PE)
    if not protected or e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        _load_real(vcpu, offset, selector, virtual8086=protected)
        return
    if offset == V.CS_OFFSET:
        raise X86Exception(abi.UD_VECTOR)
    error = selector & 0xFFFC
    cpl = vcpu.b[V.CPL]
    rpl = selector & 3
    if not error:
        _load_null(e, offset, selector, cpl, rpl)
        return
    if offset == V.TR_OFFSET and selector & 4:
        raise gp(error)
    address, raw = read_descriptor(e, selector)
    attrib, limit, base = parse_descriptor(raw)
    system = not attrib & V.SEG_S
    kind = attrib & 0xF
    dpl = attrib >> V.SEG_DPL_SHIFT & 3
    if offset == V.TR_OFFSET:
        if not system or kind not in (1, 9):
            raise gp(error)
    elif offset == V.LDTR_OFFSET:
        if not system or kind != 2:
            raise gp(error)
    elif offset == V.SS_OFFSET:
        if system or rpl != cpl or kind & 0xA != 2 or dpl != cpl:
            raise gp(error)
        if not attrib & V.SEG_P:
            raise X86Exception(abi.SS_VECTOR, error)
    elif system or kind & 0xA == 8 or (kind & 0xC != 0xC and (rpl > dpl or cpl > dpl)):
        raise gp(error)
    if not attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, error)
    if offset in (V.TR_OFFSET, V.LDTR_OFFSET):
        if vcpu.efer & abi.EFER_LMA:
            high = int.from_bytes(e.read_linear(address + 8, 8, implicit=True), "little")
            base |= (high & 0xFFFF_FFFF) << 32
        if offset == V.TR_OFFSET:
            attrib |= 2
            e.write_linear(address, (raw | 2 << 40).to_bytes(8, "little"), implicit=True)
    elif not kind & 1:
        attrib |= 1
        e.write_linear(address, (raw | 1 << 40).to_bytes(8, "little"), implicit=True)
    vcpu.vmcb.set_segment(offset, selector, attrib, limit, base)


def _load_real(vcpu: Vcpu, offset: int, selector: int, *, virtual8086: bool) -> None:
    seg = vcpu.vmcb.segment(offset)
    if virtual8086:
        vcpu.vmcb.set_segment(offset, selector, V.SEG_P | V.SEG_S | 3 << V.SEG_DPL_SHIFT | 3, 0xFFFF, selector << 4)
    else:
        vcpu.vmcb.set_segment(offset, selector, seg.attrib, seg.limit, selector << 4)


def _load_null(e: Emulator, offset: int, selector: int, cpl: int, rpl: int) -> None:
    """Null selectors: fine for data segments, for SS only in 64-bit mode, for LDTR always, for TR never."""
    vcpu = e.vcpu
    if offset == V.TR_OFFSET:
        raise gp()
    if offset == V.SS_OFFSET:
        if not vcpu.is_64bit_code() or cpl == 3 or rpl != cpl:
            raise gp()
        vcpu.vmcb.set_segment(
            offset, selector, V.SEG_P | V.SEG_S | cpl << V.SEG_DPL_SHIFT | V.SEG_DB | V.SEG_G | 3, _MAX, 0
        )
        return
    vcpu.vmcb.set_segment(offset, selector, 0, 0, 0)  # CPUID 80000021h EAX[6]: null selectors clear the base


_MAX: Final = 0xFFFF_FFFF


# --- loads by a task switch ---------------------------------------------------------------------------------


def load_task_segments(e: Emulator, ldt: int, selectors: list[tuple[int, int]]) -> None:
    """Load LDTR and the segment registers of a new task; faults are #TS where others would be #GP."""
    vcpu = e.vcpu
    if e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        vcpu.b[V.CPL] = 3
        for offset, selector in selectors:
            _load_real(vcpu, offset, selector, virtual8086=True)
        return
    vcpu.b[V.CPL] = next(selector for offset, selector in selectors if offset == V.CS_OFFSET) & 3
    try:
        load_segment(e, V.LDTR_OFFSET, ldt)
        for offset, selector in selectors:
            if offset == V.CS_OFFSET:
                _load_code(e, selector)
            else:
                load_segment(e, offset, selector)
    except X86Exception as exception:
        if exception.vector == abi.GP_VECTOR:
            raise X86Exception(abi.TS_VECTOR, exception.error_code) from None
        raise


def _load_code(e: Emulator, selector: int) -> None:
    """Load CS without a change of privilege."""
    vcpu = e.vcpu
    error = selector & 0xFFFC
    if not error:
        raise gp()
    address, raw = read_descriptor(e, selector)
    attrib, limit, base = parse_descriptor(raw)
    dpl = attrib >> V.SEG_DPL_SHIFT & 3
    conforming = bool(attrib & 4)
    if not attrib & V.SEG_S or not attrib & 8:
        raise gp(error)
    if dpl > selector & 3 if conforming else dpl != selector & 3:
        raise gp(error)
    if not attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, error)
    if not attrib & 1:
        attrib |= 1
        e.write_linear(address, (raw | 1 << 40).to_bytes(8, "little"), implicit=True)
    vcpu.vmcb.set_segment(V.CS_OFFSET, selector, attrib, limit, base)


# --- far transfers --------------------------------------------------------------------------------


def load_code_far(e: Emulator, selector: int) -> int:
    """Load CS for a far jump or call to code of the same privilege; returns the new code's bitness.

    #GP for what isn't code or not accessible, #NP if absent (APM vol. 2, 4.7.1). Gates are not followed.
    """
    vcpu = e.vcpu
    if not vcpu.cr0 & abi.X86_CR0_PE or e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        _load_real(vcpu, V.CS_OFFSET, selector, virtual8086=bool(vcpu.cr0 & abi.X86_CR0_PE))
        return 16
    error = selector & 0xFFFC
    if not error:
        raise gp()
    address, raw = read_descriptor(e, selector)
    attrib, limit, base = parse_descriptor(raw)
    if not attrib & V.SEG_S:
        raise Unhandleable  # a gate
    cpl = vcpu.b[V.CPL]
    dpl = attrib >> V.SEG_DPL_SHIFT & 3
    if not attrib & 8:
        raise gp(error)
    if dpl > cpl if attrib & 4 else (selector & 3 > cpl or dpl != cpl):
        raise gp(error)
    long_mode = bool(vcpu.efer & abi.EFER_LMA)
    if long_mode and attrib & V.SEG_L and attrib & V.SEG_DB:
        raise gp(error)
    if not attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, error)
    if not attrib & 1:
        attrib |= 1
        e.write_linear(address, (raw | 1 << 40).to_bytes(8, "little"), implicit=True)
    vcpu.vmcb.set_segment(V.CS_OFFSET, error | cpl, attrib, limit, base)
    return 64 if long_mode and attrib & V.SEG_L else 32 if attrib & V.SEG_DB else 16
