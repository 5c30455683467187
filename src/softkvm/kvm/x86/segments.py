# SPDX-License-Identifier: Apache-2.0
"""Segment registers: ``struct kvm_segment``, and loads from the descriptor tables (APM vol. 2, 4.7 and 4.8)."""

from __future__ import annotations

import operator
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm import abi
from softkvm.kvm.x86.exceptions import X86Exception, gp
from softkvm.kvm.x86.mmu.paging import is_canonical
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.emulate.emulator import Emulator
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: The attributes in ``struct kvm_segment``: type, present, DPL, D/B, S, L, G, AVL, unusable.
_ATTRIBUTES: Final = struct.Struct("9Bx")

#: Segment registers in the order of kvm_sregs, and where the VMCB has them.
SREGS_SEGMENTS: Final = (
    V.CS_OFFSET,
    V.DS_OFFSET,
    V.ES_OFFSET,
    V.FS_OFFSET,
    V.GS_OFFSET,
    V.SS_OFFSET,
    V.TR_OFFSET,
    V.LDTR_OFFSET,
)
_DATA: Final = frozenset({V.DS_OFFSET, V.ES_OFFSET, V.FS_OFFSET, V.GS_OFFSET})


def _kvm_attributes(offset: int, attrib: int, large: bool, cpl: int) -> bytes:
    """Return the attributes of the register at ``offset`` as KVM reports them; ``large`` is a limit above 1 MiB."""
    kind, s, dpl, present = attrib & 0xF, attrib >> 4 & 1, attrib >> 5 & 3, attrib >> 7 & 1
    avl, l, db = attrib >> 8 & 1, attrib >> 9 & 1, attrib >> 10 & 1  # noqa: E741 - the manual's name
    if offset == V.TR_OFFSET:
        kind |= 2  # a loaded TSS is busy
    elif offset == V.SS_OFFSET:
        db &= present
        dpl = cpl
    elif offset in _DATA and present:
        kind |= 1
    # AMD processors ignore G: it follows from the limit, which is in bytes.
    return _ATTRIBUTES.pack(kind, present, dpl, db, s, l, large, avl, 1 - present)


def _vmcb_attributes(attributes: bytes) -> int:
    """Return the attributes that userspace gives in the VMCB's layout."""
    kind, present, dpl, db, s, l, g, avl, unusable = _ATTRIBUTES.unpack(attributes)  # noqa: E741 - the manual's name
    attrib: int = (
        kind & 0xF
        | (s & 1) << 4
        | (dpl & 3) << 5
        | int(present & 1 and not unusable) << 7
        | (avl & 1) << 8
        | (l & 1) << 9
        | (db & 1) << 10
        | (g & 1) << 11
    )
    return attrib


#: The registers in the VMCB's order: selector, attributes, limit and base of each. Tables have limits of 16 bits.
_VMCB_ORDER: Final = range(V.ES_OFFSET, V.TR_OFFSET + 16, 16)
_TABLES: Final = (V.GDTR_OFFSET, V.IDTR_OFFSET)
_VMCB_SEGMENTS: Final = struct.Struct("<" + "".join("HHH2xQ" if at in _TABLES else "HHIQ" for at in _VMCB_ORDER))
#: What kvm_sregs begins with: base, limit, selector, attributes of each segment register; base and limit of the tables.
_KVM_SEGMENTS: Final = struct.Struct("<" + "QIH10s" * 8 + "QH6x" * 2)
SEGMENTS_SIZE: Final = _KVM_SEGMENTS.size
_SELECTOR, _ATTRIB, _LIMIT, _BASE = range(4)


def _in_vmcb(offset: int, field: int) -> int:
    """Return where a register's field is among the values of the VMCB's registers."""
    return (offset - V.ES_OFFSET) // 16 * 4 + field


#: Where kvm_sregs' values are among the VMCB's, behind which the attributes stand.
_FROM_VMCB: Final = operator.itemgetter(
    *(
        place
        for n, at in enumerate(SREGS_SEGMENTS)
        for place in (_in_vmcb(at, _BASE), _in_vmcb(at, _LIMIT), _in_vmcb(at, _SELECTOR), 4 * len(_VMCB_ORDER) + n)
    ),
    *(_in_vmcb(at, field) for at in _TABLES for field in (_BASE, _LIMIT)),
)
#: And the other way: the VMCB's values among kvm_sregs', behind which the attributes stand and a zero.
_KVM_ATTRIBUTES: Final = slice(3, 4 * len(SREGS_SEGMENTS), 4)
_ZERO: Final = 4 * len(SREGS_SEGMENTS) + 2 * len(_TABLES) + len(SREGS_SEGMENTS)


def _in_kvm(at: int) -> tuple[int, int, int, int]:
    """Return where selector, attributes, limit and base of a register are among the values of kvm_sregs."""
    if at in _TABLES:
        base = 4 * len(SREGS_SEGMENTS) + 2 * _TABLES.index(at)
        return _ZERO, _ZERO, base + 1, base
    n = SREGS_SEGMENTS.index(at)
    return 4 * n + 2, _ZERO - len(SREGS_SEGMENTS) + n, 4 * n + 1, 4 * n


_FROM_KVM: Final = operator.itemgetter(*(place for at in _VMCB_ORDER for place in _in_kvm(at)))
_SS_ATTRIBUTES: Final = _in_kvm(V.SS_OFFSET)[_ATTRIB]


#: Where the VMCB has all of them.
_IN_VMCB: Final = slice(V.ES_OFFSET, V.ES_OFFSET + _VMCB_SEGMENTS.size)


# Userspace that looks at a vCPU often finds the segments that it found before, and sets those: they are remembered.


@lru_cache(1024)
def _kvm_image(image: bytes, cpl: int) -> bytes:
    """Return what kvm_sregs begins with for the VMCB's registers."""
    values = _VMCB_SEGMENTS.unpack(image)
    by_place = dict(zip(_VMCB_ORDER, zip(values[_ATTRIB::4], values[_LIMIT::4], strict=True), strict=True))
    attributes = tuple(_kvm_attributes(at, by_place[at][0], by_place[at][1] > 0xFFFFF, cpl) for at in SREGS_SEGMENTS)
    return _KVM_SEGMENTS.pack(*_FROM_VMCB(values + attributes))


@lru_cache(1024)
def _vmcb_image(image: bytes) -> tuple[bytes, int]:
    """Return the VMCB's registers for what kvm_sregs begins with, and the privilege level."""
    values = _KVM_SEGMENTS.unpack(image)
    values += (*map(_vmcb_attributes, values[_KVM_ATTRIBUTES]), 0)
    return _VMCB_SEGMENTS.pack(*_FROM_KVM(values)), values[_SS_ATTRIBUTES] >> V.SEG_DPL_SHIFT & 3


def get_segments(vcpu: Vcpu) -> bytes:
    """Return the segment registers and the tables as KVM reports them, in the layout that kvm_sregs begins with."""
    return _kvm_image(bytes(vcpu.b[_IN_VMCB]), vcpu.b[V.CPL])


def set_segments(vcpu: Vcpu, sregs: abi.kvm_sregs | abi.kvm_sregs2) -> None:
    """Load the segment registers and the tables as userspace gives them; SS sets the privilege level."""
    vcpu.b[_IN_VMCB], vcpu.b[V.CPL] = _vmcb_image(bytes(sregs)[:SEGMENTS_SIZE])


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
