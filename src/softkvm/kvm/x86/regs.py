# SPDX-License-Identifier: Apache-2.0
"""General and special registers through the API (KVM API, section 4)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.memory.guest_memory import read_guest
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86.msrs import set_apic_base
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.segments import SREGS_SEGMENTS, get_segment, set_segment
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.state import VcpuState as Vcpu

#: Fields of kvm_regs in the order of the register numbers.
GPR_NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


def get_regs(vcpu: Vcpu) -> abi.kvm_regs:
    """KVM_GET_REGS."""
    regs = abi.kvm_regs()
    for index, name in enumerate(GPR_NAMES):
        setattr(regs, name, vcpu.gpr[index])
    regs.rip = vcpu.q[V.RIP]
    regs.rflags = vcpu.get_rflags()
    return regs


def set_regs(vcpu: Vcpu, regs: abi.kvm_regs) -> None:
    """KVM_SET_REGS: pending exceptions are dropped."""
    for index, name in enumerate(GPR_NAMES):
        vcpu.gpr[index] = getattr(regs, name)
    vcpu.q[V.RIP] = regs.rip
    vcpu.set_rflags(regs.rflags | abi.X86_EFLAGS_FIXED)
    vcpu.exception.pending = False
    vcpu.make_request(KVM_REQ_EVENT)


Sregs = abi.kvm_sregs | abi.kvm_sregs2


def _fill_sregs(vcpu: Vcpu, sregs: Sregs) -> None:
    for name, offset in SREGS_SEGMENTS:
        setattr(sregs, name, get_segment(vcpu, offset))
    for name, offset in (("gdt", V.GDTR_OFFSET), ("idt", V.IDTR_OFFSET)):
        table = vcpu.vmcb.segment(offset)
        setattr(sregs, name, abi.kvm_dtable(base=table.base, limit=table.limit & 0xFFFF))
    sregs.cr0 = vcpu.cr0
    sregs.cr2 = vcpu.q[V.CR2]
    sregs.cr3 = vcpu.cr3
    sregs.cr4 = vcpu.cr4
    sregs.cr8 = cr.kvm_get_cr8(vcpu)
    sregs.efer = vcpu.efer
    sregs.apic_base = vcpu.get_apic_base()


def get_sregs(vcpu: Vcpu) -> abi.kvm_sregs:
    """KVM_GET_SREGS."""
    sregs = abi.kvm_sregs()
    _fill_sregs(vcpu, sregs)
    if vcpu.interrupt_injected and not vcpu.interrupt_soft:
        sregs.interrupt_bitmap[vcpu.interrupt_nr // 64] |= 1 << vcpu.interrupt_nr % 64
    return sregs


def get_sregs2(vcpu: Vcpu) -> abi.kvm_sregs2:
    """KVM_GET_SREGS2, with PAE paging's four PDPTEs as they are in memory, where the silicon reads them."""
    sregs = abi.kvm_sregs2()
    _fill_sregs(vcpu, sregs)
    if _is_pae_paging(sregs):
        table = read_guest(vcpu.vm, sregs.cr3 & 0xFFFF_FFE0, 32)
        if table is not None:
            sregs.pdptrs[:] = list(struct.unpack("<4Q", table))
            sregs.flags = abi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    return sregs


def _is_pae_paging(sregs: Sregs) -> bool:
    """Tell whether these registers page with three levels of 64-bit entries."""
    return bool(sregs.cr0 & abi.X86_CR0_PG and sregs.cr4 & abi.X86_CR4_PAE and not sregs.efer & abi.EFER_LMA)


def is_valid_sregs(vcpu: Vcpu, sregs: Sregs) -> bool:
    """Tell whether CR0, CR4, EFER and CS.L are a legal combination (``kvm_is_valid_sregs``)."""
    if sregs.efer & abi.EFER_LME and sregs.cr0 & abi.X86_CR0_PG:
        if not sregs.cr4 & abi.X86_CR4_PAE or not sregs.efer & abi.EFER_LMA:
            return False
        if sregs.cr3 >> vcpu.maxphyaddr:
            return False
    elif sregs.efer & abi.EFER_LMA or sregs.cs.l:
        return False
    return cr.is_valid_cr4(vcpu, sregs.cr4) and cr.is_valid_cr0(vcpu, sregs.cr0)


def set_sregs(vcpu: Vcpu, sregs: Sregs) -> None:
    """KVM_SET_SREGS: EINVAL for illegal combinations of control registers or APIC base."""
    if not is_valid_sregs(vcpu, sregs):
        raise kvm_error(
            errno.EINVAL,
            f"cr0={sregs.cr0:#x} cr4={sregs.cr4:#x} efer={sregs.efer:#x} cs.l={sregs.cs.l}: no legal combination",
        )
    if not set_apic_base(vcpu, sregs.apic_base, True):
        raise kvm_error(errno.EINVAL, f"apic_base={sregs.apic_base:#x}, expected a legal mode and address")
    for name, offset in (("idt", V.IDTR_OFFSET), ("gdt", V.GDTR_OFFSET)):
        table: abi.kvm_dtable = getattr(sregs, name)
        vcpu.vmcb.set_segment(offset, 0, 0, table.limit, table.base)
    vcpu.q[V.CR2] = sregs.cr2
    vcpu.q[V.CR3] = sregs.cr3
    cr.kvm_set_cr8(vcpu, sregs.cr8)  # one that can't be changes nothing
    svm.set_efer(vcpu, sregs.efer)
    svm.set_cr0(vcpu, sregs.cr0)
    svm.set_cr4(vcpu, sregs.cr4)
    for name, offset in SREGS_SEGMENTS:
        set_segment(vcpu, offset, getattr(sregs, name))
    vcpu.flush_tlb_guest()
    # Older userspace doesn't set the boot processor's state after RESET (KVM keeps that working).
    if (
        vcpu.is_bsp()
        and vcpu.q[V.RIP] == 0xFFF0
        and sregs.cs.selector == 0xF000
        and sregs.cs.base == 0xFFFF_0000
        and not sregs.cr0 & abi.X86_CR0_PE
    ):
        vcpu.mp_state = abi.KVM_MP_STATE_RUNNABLE
    if isinstance(sregs, abi.kvm_sregs):
        for word in range(4):
            bits = sregs.interrupt_bitmap[word]
            if bits:
                vcpu.queue_interrupt(word * 64 + (bits & -bits).bit_length() - 1, soft=False)
                break
    vcpu.make_request(KVM_REQ_EVENT)


def set_sregs2(vcpu: Vcpu, sregs: abi.kvm_sregs2) -> None:
    """KVM_SET_SREGS2: PDPTEs given are ignored, as the silicon reads them from memory."""
    if sregs.flags & ~abi.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        raise kvm_error(errno.EINVAL, f"flags={sregs.flags:#x}, expected KVM_SREGS2_FLAGS_PDPTRS_VALID or none")
    if sregs.flags and not _is_pae_paging(sregs):
        raise kvm_error(errno.EINVAL, "flags has KVM_SREGS2_FLAGS_PDPTRS_VALID without PAE paging")
    set_sregs(vcpu, sregs)
