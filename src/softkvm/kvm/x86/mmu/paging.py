# SPDX-License-Identifier: Apache-2.0
"""Walks of the guest's own page tables (APM vol. 2, chapter 5; SDM vol. 3, chapter 4).

The processor does this by itself while the guest runs; KVM needs it for the operands of instructions it
emulates and for KVM_TRANSLATE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from softkvm.abi import (
    EFER_LMA,
    EFER_NX,
    GP_VECTOR,
    PF_VECTOR,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PKE,
    X86_CR4_PSE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
    X86_EFLAGS_AC,
)
from softkvm.kvm.memory.guest_memory import cmpxchg_guest, read_guest
from softkvm.kvm.memory.pages import PAGE_SIZE
from softkvm.kvm.x86.exceptions import X86Exception
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: Bits of a #PF error code, also used to say what an access is.
PFERR_PRESENT: Final = 1 << 0
PFERR_WRITE: Final = 1 << 1
PFERR_USER: Final = 1 << 2
PFERR_RSVD: Final = 1 << 3
PFERR_FETCH: Final = 1 << 4
PFERR_PK: Final = 1 << 5
#: An access by the system itself (descriptor tables, TSS): SMAP applies whatever EFLAGS.AC says.
PFERR_IMPLICIT: Final = 1 << 48

_P: Final = 1 << 0
_W: Final = 1 << 1
_U: Final = 1 << 2
_A: Final = 1 << 5
_D: Final = 1 << 6
_PS: Final = 1 << 7
_NX: Final = 1 << 63
_PFN: Final = 0x000F_FFFF_FFFF_F000


class Translation(NamedTuple):
    """Where a linear address leads, and what the tables allow there."""

    gpa: int
    writable: bool
    user: bool


def is_canonical(address: int, *, la57: bool) -> bool:
    """Tell whether the bits above the linear address width are copies of its highest bit."""
    top = address >> (56 if la57 else 47)
    return top in (0, (1 << (8 if la57 else 17)) - 1)


class _Mode(NamedTuple):
    levels: int
    entry_size: int
    index_bits: int
    root: int


def _paging_mode(cr3: int, cr4: int, efer: int) -> _Mode:
    if efer & EFER_LMA:
        return _Mode(5 if cr4 & X86_CR4_LA57 else 4, 8, 9, cr3 & _PFN)
    if cr4 & X86_CR4_PAE:
        return _Mode(3, 8, 9, cr3 & 0xFFFF_FFE0)
    return _Mode(2, 4, 10, cr3 & 0xFFFF_F000)


def _reserved_bits(vcpu: Vcpu, mode: _Mode, level: int, entry: int, cr4: int, efer: int) -> int:
    """Return the reserved bits that are set in a present entry."""
    if mode.entry_size == 4:
        if level == 2 and entry & _PS and cr4 & X86_CR4_PSE:
            return entry & (1 << 21)
        return 0
    reserved = _PFN & ~((1 << vcpu.maxphyaddr) - 1)
    if not efer & EFER_NX:
        reserved |= _NX
    if mode.levels == 3:
        reserved |= 0x7FF0_0000_0000_0000
        if level == 3:
            reserved |= _NX | 0x1E6
            return entry & reserved
    if level > 3 or (level == 3 and not vcpu.guest_has_gbpages):
        reserved |= _PS
    elif level == 3 and entry & _PS:
        reserved |= 0x3FFF_E000
    elif level == 2 and entry & _PS:
        reserved |= 0x1F_E000
    return entry & reserved


def _page_fault(vcpu: Vcpu, gva: int, access: int, flags: int) -> X86Exception:
    error = flags | (access & (PFERR_WRITE | PFERR_USER))
    if access & PFERR_FETCH and (vcpu.efer & EFER_NX or vcpu.cr4 & X86_CR4_SMEP):
        error |= PFERR_FETCH
    return X86Exception(PF_VECTOR, error, gva)


def read_guest_virt(vcpu: Vcpu, gva: int, size: int) -> bytes | None:
    """Return ``size`` bytes at a linear address as the guest would read them now; None where that would fault."""
    mask = (1 << 64) - 1 if vcpu.is_64bit_code() else 0xFFFF_FFFF
    access = PFERR_USER if vcpu.b[V.CPL] == 3 else 0
    parts = []
    while size:
        gva &= mask
        chunk = min(size, PAGE_SIZE - (gva & PAGE_SIZE - 1))
        try:
            part = read_guest(vcpu.vm, walk(vcpu, gva, access).gpa, chunk)
        except X86Exception:
            return None
        if part is None:
            return None
        parts.append(part)
        gva += chunk
        size -= chunk
    return b"".join(parts)


def walk(vcpu: Vcpu, gva: int, access: int, *, set_bits: bool = True) -> Translation:
    """Translate the linear address ``gva``; ``access`` is a set of PFERR_WRITE, _USER, _FETCH, _IMPLICIT.

    Raises :class:`X86Exception` (#PF, or #GP for a non-canonical address). With ``set_bits`` the accessed
    and dirty bits of the entries used are set.
    """
    cr0, cr4, efer = vcpu.cr0, vcpu.cr4, vcpu.efer
    if not cr0 & X86_CR0_PG:
        return Translation(gva, True, True)
    if efer & EFER_LMA and not is_canonical(gva, la57=bool(cr4 & X86_CR4_LA57)):
        raise X86Exception(GP_VECTOR, 0)
    vm = vcpu.vm
    mode = _paging_mode(vcpu.cr3, cr4, efer)
    size, index_bits = mode.entry_size, mode.index_bits
    table = mode.root
    allowed = _W | _U
    no_execute = 0
    used: list[tuple[int, int]] = []
    level = mode.levels
    while True:
        shift = 12 + (level - 1) * index_bits
        address = table + ((gva >> shift) & ((1 << index_bits) - 1)) * size
        data = read_guest(vm, address, size)
        if data is None:
            raise _page_fault(vcpu, gva, access, PFERR_PRESENT)
        entry = int.from_bytes(data, "little")
        if not entry & _P:
            raise _page_fault(vcpu, gva, access, 0)
        if _reserved_bits(vcpu, mode, level, entry, cr4, efer):
            raise _page_fault(vcpu, gva, access, PFERR_PRESENT | PFERR_RSVD)
        pdpte = mode.levels == 3 and level == 3
        if not pdpte:
            allowed &= entry
            no_execute |= entry & _NX if size == 8 else 0
            used.append((address, entry))
        large = level > 1 and entry & _PS and not pdpte and (size == 8 or cr4 & X86_CR4_PSE)
        if level == 1 or large:
            break
        table = entry & _PFN if size == 8 else entry & 0xFFFF_F000
        level -= 1
    _check_permissions(vcpu, gva, access, allowed, no_execute, entry)
    if set_bits:
        _set_accessed_dirty(vcpu, used, size, write=bool(access & PFERR_WRITE))
    offset_mask = (1 << shift) - 1
    if size == 4:
        base = entry & 0xFFFF_F000
        if level == 2:
            base = (entry & 0xFFC0_0000) | ((entry >> 13 & 0xFF) << 32)
    else:
        base = entry & _PFN
    writable = bool(allowed & _W) or not cr0 & X86_CR0_WP
    return Translation((base & ~offset_mask) | (gva & offset_mask), writable, bool(allowed & _U))


def _check_permissions(vcpu: Vcpu, gva: int, access: int, allowed: int, no_execute: int, leaf: int) -> None:
    """Raise a #PF if the tables forbid the access (SDM vol. 3, 4.6)."""
    user_page = bool(allowed & _U)
    user_access = bool(access & PFERR_USER)
    fetch = bool(access & PFERR_FETCH)
    denied = False
    if user_access and not user_page:
        denied = True
    elif access & PFERR_WRITE and not allowed & _W:
        denied = user_access or bool(vcpu.cr0 & X86_CR0_WP)
    if fetch:
        denied |= bool(no_execute) or (not user_access and user_page and bool(vcpu.cr4 & X86_CR4_SMEP))
    elif not user_access and user_page and vcpu.cr4 & X86_CR4_SMAP:
        denied |= bool(access & PFERR_IMPLICIT) or not vcpu.get_rflags() & X86_EFLAGS_AC
    error = PFERR_PRESENT
    if not fetch and user_page and vcpu.cr4 & X86_CR4_PKE and vcpu.efer & EFER_LMA:
        rights = vcpu.pkru >> ((leaf >> 59 & 0xF) * 2) & 3
        write_denied = rights & 2 and access & PFERR_WRITE and (user_access or vcpu.cr0 & X86_CR0_WP)
        if rights & 1 or write_denied:
            denied = True
            error |= PFERR_PK  # whether or not the page's own rights allow it (SDM vol. 3, 4.7)
    if denied:
        raise _page_fault(vcpu, gva, access, error)


def _set_accessed_dirty(vcpu: Vcpu, used: list[tuple[int, int]], size: int, *, write: bool) -> None:
    """Set A in every entry used and D in the leaf; an entry that changed meanwhile is left alone."""
    for position, (address, entry) in enumerate(used):
        want = _A | (_D if write and position == len(used) - 1 else 0)
        if entry & want != want:
            cmpxchg_guest(vcpu.vm, address, entry.to_bytes(size, "little"), (entry | want).to_bytes(size, "little"))
