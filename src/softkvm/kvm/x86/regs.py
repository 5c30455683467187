# SPDX-License-Identifier: Apache-2.0
"""General and special registers through the API (KVM API, section 4)."""

from __future__ import annotations

import errno
import operator
import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_memory import read_guest
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86.msrs import set_apic_base
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.segments import SEGMENTS_SIZE, get_segments, set_segments
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: The general registers in the order of their numbers, and in that of kvm_regs, which has RIP and RFLAGS behind them.
GPR_NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_KVM_NAMES: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))
_GPRS: Final = struct.Struct("<16Q")
_KVM_REGS: Final = struct.Struct("<18Q")
_BY_NUMBER: Final = operator.itemgetter(*map(_KVM_NAMES.index, GPR_NAMES))
_BY_NAME: Final = operator.itemgetter(*map(GPR_NAMES.index, _KVM_NAMES))


def get_regs(vcpu: Vcpu) -> abi.kvm_regs:
    """KVM_GET_REGS."""
    gprs = _BY_NAME(vcpu.gpr.tolist())
    return abi.kvm_regs.from_buffer_copy(_KVM_REGS.pack(*gprs, vcpu.q[V.RIP], vcpu.get_rflags()))


def set_regs(vcpu: Vcpu, regs: abi.kvm_regs) -> None:
    """KVM_SET_REGS: pending exceptions are dropped."""
    values = _KVM_REGS.unpack_from(regs)
    _GPRS.pack_into(vcpu.gpr, 0, *_BY_NUMBER(values))
    vcpu.q[V.RIP] = values[16]
    vcpu.set_rflags(values[17])
    vcpu.exception.pending = False


Sregs = abi.kvm_sregs | abi.kvm_sregs2


#: What follows the segments in both: CR0, CR2, CR3, CR4, CR8, EFER, IA32_APIC_BASE, and 32 bytes that differ.
_CONTROL: Final = struct.Struct("<7Q32s")
_NO_INTERRUPT: Final = bytes(32)
_MORE_PDPTRS: Final = bytes(8)


def _pack_sregs(vcpu: Vcpu) -> bytes:
    """Return kvm_sregs, which kvm_sregs2 begins with, without interrupt and PDPTEs."""
    q = vcpu.q
    cr8 = cr.kvm_get_cr8(vcpu)
    return get_segments(vcpu) + _CONTROL.pack(
        vcpu.cr0, q[V.CR2], q[V.CR3], vcpu.cr4, cr8, vcpu.efer, vcpu.get_apic_base(), _NO_INTERRUPT
    )


def get_sregs(vcpu: Vcpu) -> abi.kvm_sregs:
    """KVM_GET_SREGS."""
    sregs = abi.kvm_sregs.from_buffer_copy(_pack_sregs(vcpu))
    if vcpu.interrupt_injected and not vcpu.interrupt_soft:
        sregs.interrupt_bitmap[vcpu.interrupt_nr // 64] |= 1 << vcpu.interrupt_nr % 64
    return sregs


def get_sregs2(vcpu: Vcpu) -> abi.kvm_sregs2:
    """KVM_GET_SREGS2, with PAE paging's four PDPTEs as they are in memory, where the silicon reads them."""
    sregs = abi.kvm_sregs2.from_buffer_copy(_pack_sregs(vcpu) + _MORE_PDPTRS)
    if _is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        table = read_guest(vcpu.vm, sregs.cr3 & 0xFFFF_FFE0, 32)
        if table is not None:
            sregs.pdptrs[:] = list(struct.unpack("<4Q", table))
            sregs.flags = abi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    return sregs


def _is_pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    """Tell whether these registers page with three levels of 64-bit entries."""
    return bool(cr0 & abi.X86_CR0_PG and cr4 & abi.X86_CR4_PAE and not efer & abi.EFER_LMA)


def _is_valid_sregs(vcpu: Vcpu, cr0: int, cr3: int, cr4: int, efer: int, cs_l: int) -> bool:
    """Tell whether CR0, CR4, EFER and CS.L are a legal combination (``kvm_is_valid_sregs``)."""
    if efer & abi.EFER_LME and cr0 & abi.X86_CR0_PG:
        if not cr4 & abi.X86_CR4_PAE or not efer & abi.EFER_LMA:
            return False
        if cr3 >> vcpu.maxphyaddr:
            return False
    elif efer & abi.EFER_LMA or cs_l:
        return False
    return cr.is_valid_cr4(vcpu, cr4) and cr.is_valid_cr0(vcpu, cr0)


def set_sregs(vcpu: Vcpu, sregs: Sregs) -> None:
    """KVM_SET_SREGS: EINVAL for illegal combinations of control registers or APIC base."""
    cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupts = _CONTROL.unpack_from(sregs, SEGMENTS_SIZE)
    cs = sregs.cs
    if not _is_valid_sregs(vcpu, cr0, cr3, cr4, efer, cs.l):
        raise kvm_error(errno.EINVAL, f"cr0={cr0:#x} cr4={cr4:#x} efer={efer:#x} cs.l={cs.l}: no legal combination")
    if not set_apic_base(vcpu, apic_base, True):
        raise kvm_error(errno.EINVAL, f"apic_base={apic_base:#x}, expected a legal mode and address")
    vcpu.q[V.CR2] = cr2
    vcpu.q[V.CR3] = cr3
    cr.kvm_set_cr8(vcpu, cr8)  # one that can't be changes nothing
    svm.set_efer(vcpu, efer)
    svm.set_cr0(vcpu, cr0)
    svm.set_cr4(vcpu, cr4)
    set_segments(vcpu, sregs)
    vcpu.flush_tlb_guest()
    # Older userspace doesn't set the boot processor's state after RESET (KVM keeps that working).
    if (
        vcpu.q[V.RIP] == 0xFFF0
        and vcpu.is_bsp()
        and cs.selector == 0xF000
        and cs.base == 0xFFFF_0000
        and not cr0 & abi.X86_CR0_PE
    ):
        vcpu.mp_state = abi.KVM_MP_STATE_RUNNABLE
    if interrupts != _NO_INTERRUPT and isinstance(sregs, abi.kvm_sregs):
        bits = int.from_bytes(interrupts, "little")
        vcpu.queue_interrupt((bits & -bits).bit_length() - 1, soft=False)
    vcpu.make_request(KVM_REQ_EVENT)


def set_sregs2(vcpu: Vcpu, sregs: abi.kvm_sregs2) -> None:
    """KVM_SET_SREGS2: PDPTEs given are ignored, as the silicon reads them from memory."""
    if sregs.flags & ~abi.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        raise kvm_error(errno.EINVAL, f"flags={sregs.flags:#x}, expected KVM_SREGS2_FLAGS_PDPTRS_VALID or none")
    if sregs.flags and not _is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        raise kvm_error(errno.EINVAL, "flags has KVM_SREGS2_FLAGS_PDPTRS_VALID without PAE paging")
    set_sregs(vcpu, sregs)
