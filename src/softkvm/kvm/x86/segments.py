# SPDX-License-Identifier: Apache-2.0
"""Segment registers: ``struct kvm_segment``, and loads from the descriptor tables (APM vol. 2, 4.7 and 4.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import abi
from softkvm.kvm.x86.exceptions import X86Exception, gp
from softkvm.kvm.x86.mmu.paging import is_canonical
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


# --- descriptors -------------------------------------------------------------------------------


class Descriptor(NamedTuple):
    """The descriptor that a selector names: the first eight bytes, and where they are (APM vol. 2, 4.7 and 4.8)."""

    selector: int
    address: int
    raw: int

    @property
    def attrib(self) -> int:
        """The attributes in the VMCB's layout."""
        return self.raw >> 40 & 0xFF | (self.raw >> 52 & 0xF) << 8

    @property
    def limit(self) -> int:
        """The limit in bytes."""
        limit = self.raw & 0xFFFF | (self.raw >> 48 & 0xF) << 16
        return limit << 12 | 0xFFF if self.attrib & V.SEG_G else limit

    @property
    def base(self) -> int:
        """The low 32 bits of the base."""
        return self.raw >> 16 & 0xFF_FFFF | (self.raw >> 56 & 0xFF) << 24

    @property
    def kind(self) -> int:
        """The type field."""
        return self.raw >> 40 & 0xF

    @property
    def dpl(self) -> int:
        """The privilege level."""
        return self.raw >> 45 & 3

    @property
    def error(self) -> int:
        """The error code of a fault that names the selector."""
        return self.selector & 0xFFFC

    @property
    def is_code(self) -> bool:
        """A code segment."""
        return self.attrib & (V.SEG_S | 8) == V.SEG_S | 8

    @property
    def is_conforming(self) -> bool:
        """A conforming code segment."""
        return self.is_code and bool(self.kind & 4)

    @property
    def is_readable(self) -> bool:
        """Data, or code that may be read."""
        return bool(self.attrib & V.SEG_S) and self.kind & 0xA != 8

    @property
    def is_writable(self) -> bool:
        """Data that may be written."""
        return self.attrib & (V.SEG_S | 0xA) == V.SEG_S | 2

    @property
    def gate_selector(self) -> int:
        """A gate's selector."""
        return self.raw >> 16 & 0xFFFF

    @property
    def gate_offset(self) -> int:
        """The low 32 bits of a gate's offset, 16 in a 16-bit gate."""
        return self.raw & 0xFFFF | (self.raw >> 48 << 16 if self.kind & 8 else 0)

    def segment(self) -> V.Segment:
        """Return the segment as a register holds it, a code or data segment as accessed."""
        return V.Segment(self.selector, self.attrib | (1 if self.attrib & V.SEG_S else 0), self.limit, self.base)


def try_descriptor(e: Emulator, selector: int, size: int = 8) -> Descriptor | None:
    """Return the descriptor of ``selector``, None where its ``size`` bytes are beyond the table."""
    table = e.vcpu.vmcb.segment(V.LDTR_OFFSET if selector & 4 else V.GDTR_OFFSET)
    at = selector & 0xFFF8
    if (selector & 4 and not table.attrib & V.SEG_P) or at + size - 1 > table.limit:
        return None
    address = table.base + at
    return Descriptor(selector, address, int.from_bytes(e.read_linear(address, 8, implicit=True), "little"))


def fetch_descriptor(e: Emulator, selector: int, vector: int = abi.GP_VECTOR) -> Descriptor:
    """Return the descriptor of ``selector``; ``vector`` with it as error code beyond the table."""
    d = try_descriptor(e, selector)
    if d is None:
        raise X86Exception(vector, selector & 0xFFFC)
    return d


def fetch_high(e: Emulator, d: Descriptor) -> int:
    """Return the second half of a 16-byte descriptor of long mode; #GP beyond the table, or if its type isn't 0."""
    if try_descriptor(e, d.selector, 16) is None:
        raise gp(d.error)
    high = int.from_bytes(e.read_linear(d.address + 8, 8, implicit=True), "little")
    if high >> 40 & 0x1F:
        raise gp(d.error)
    return high


def mark_accessed(e: Emulator, d: Descriptor) -> None:
    """Set the accessed bit of a code or data segment in memory."""
    if not d.raw >> 40 & 1:
        write_type(e, d, d.raw | 1 << 40)


def write_type(e: Emulator, d: Descriptor, raw: int) -> None:
    """Write the byte of a descriptor that has its type, as it is in ``raw``."""
    e.write_linear(d.address + 5, bytes((raw >> 40 & 0xFF,)), implicit=True)


def fetch_stack_segment(e: Emulator, selector: int, cpl: int, vector: int) -> V.Segment:
    """Return a stack segment for privilege level ``cpl``, marked accessed; the faults are ``vector``, #SS if absent."""
    if not selector & 0xFFFC:
        raise X86Exception(vector, 0)
    d = fetch_descriptor(e, selector, vector)
    if selector & 3 != cpl or d.dpl != cpl or not d.is_writable:
        raise X86Exception(vector, d.error)
    if not d.attrib & V.SEG_P:
        raise X86Exception(abi.SS_VECTOR, d.error)
    mark_accessed(e, d)
    return d.segment()


# --- loads -------------------------------------------------------------------------------------


def load_segment(e: Emulator, offset: int, selector: int) -> None:
    """Load a segment register with ``selector``, with all checks but those of far transfers (CS)."""
    vcpu = e.vcpu
    if not vcpu.cr0 & abi.X86_CR0_PE or e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        load_real(vcpu, offset, selector)
        return
    if offset == V.CS_OFFSET:
        raise X86Exception(abi.UD_VECTOR)
    cpl = vcpu.b[V.CPL]
    if not selector & 0xFFFC:
        _load_null(e, offset, selector, cpl, selector & 3)
    elif offset == V.SS_OFFSET:
        vcpu.vmcb.set_segment(offset, *fetch_stack_segment(e, selector, cpl, abi.GP_VECTOR))
    elif offset in (V.TR_OFFSET, V.LDTR_OFFSET):
        _load_system(e, offset, selector)
    else:
        d = fetch_descriptor(e, selector)
        if not d.is_readable or (not d.is_conforming and d.dpl < max(cpl, selector & 3)):
            raise gp(d.error)
        if not d.attrib & V.SEG_P:
            raise X86Exception(abi.NP_VECTOR, d.error)
        mark_accessed(e, d)
        vcpu.vmcb.set_segment(offset, *d.segment())


def _load_system(e: Emulator, offset: int, selector: int) -> None:
    """Load TR with an available TSS, which is busy then, or LDTR with an LDT."""
    long_mode = bool(e.vcpu.efer & abi.EFER_LMA)
    if selector & 4:
        raise gp(selector & 0xFFFC)
    d = fetch_descriptor(e, selector)
    task = offset == V.TR_OFFSET
    kinds = ((9,) if long_mode else (1, 9)) if task else (2,)
    if d.attrib & V.SEG_S or d.kind not in kinds:
        raise gp(d.error)
    if not d.attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, d.error)
    base = d.base
    if long_mode:
        base |= (fetch_high(e, d) & 0xFFFF_FFFF) << 32
        if not is_canonical(base, la57=bool(e.vcpu.cr4 & abi.X86_CR4_LA57)):
            raise gp(d.error)
    if task:
        write_type(e, d, d.raw | 2 << 40)
    e.vcpu.vmcb.set_segment(offset, selector, d.attrib | (2 if task else 0), d.limit, base)


def load_real(vcpu: Vcpu, offset: int, selector: int) -> None:
    """Load a segment register in real mode (the limit stays) or virtual-8086 mode."""
    seg = vcpu.vmcb.segment(offset)
    if vcpu.cr0 & abi.X86_CR0_PE:
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
        vcpu.vmcb.set_segment(offset, selector, cpl << V.SEG_DPL_SHIFT, 0, 0)
        return
    vcpu.vmcb.set_segment(offset, selector, 0, 0, 0)  # CPUID 80000021h EAX[6]: null selectors clear the base


# --- loads by a task switch --------------------------------------------------------------------


def load_task_segments(e: Emulator, ldt: int, selectors: list[tuple[int, int]]) -> None:
    """Load LDTR and the segment registers of a new task; faults are #TS where others would be #GP."""
    vcpu = e.vcpu
    if e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        vcpu.b[V.CPL] = 3
        for offset, selector in selectors:
            load_real(vcpu, offset, selector)
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
    if not selector & 0xFFFC:
        raise gp()
    d = fetch_descriptor(e, selector)
    rpl = selector & 3
    if not d.is_code or (d.dpl > rpl if d.is_conforming else d.dpl != rpl):
        raise gp(d.error)
    if not d.attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, d.error)
    mark_accessed(e, d)
    e.vcpu.vmcb.set_segment(V.CS_OFFSET, *d.segment())
