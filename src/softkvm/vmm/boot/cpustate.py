# SPDX-License-Identifier: Apache-2.0
"""Processor states at entry: 64-bit long mode, 32-bit protected mode without paging, real mode.

Sources: Linux ``Documentation/arch/x86/boot.rst`` (64-bit boot protocol), Xen's PVH boot ABI
(``xen/docs/misc/pvh.pandoc``), Intel SDM vol. 3, sections 3.4.5 (segment descriptors), 4.5 (4-level paging).
"""

from __future__ import annotations

import struct

from softkvm import abi, api
from softkvm.vmm.boot import layout
from softkvm.vmm.memory import GIB, HUGE_PAGE_SIZE, PAGE_SIZE, GuestMemory

# Linux's __BOOT_CS and __BOOT_DS
CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20

_CODE = 0xB  # execute/read, accessed
_DATA = 0x3  # read/write, accessed
_TSS_BUSY = 0xB

_PTE_PRESENT = 1 << 0
_PTE_WRITABLE = 1 << 1
_PTE_HUGE = 1 << 7


def _segment(selector: int, type: int, *, long: bool = False) -> abi.kvm_segment:
    """Return a flat 4 GiB code or data segment."""
    return abi.kvm_segment(
        base=0,
        limit=0xFFFFFFFF,
        selector=selector,
        type=type,
        present=1,
        dpl=0,
        db=0 if long else 1,
        s=1,
        l=1 if long else 0,
        g=1,
    )


def _descriptor(segment: abi.kvm_segment) -> int:
    """Return *segment* as the 8 bytes that a descriptor table holds."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    return (
        (limit & 0xFFFF)
        | (segment.base & 0xFFFFFF) << 16
        | segment.type << 40
        | segment.s << 44
        | segment.dpl << 45
        | segment.present << 47
        | (limit >> 16 & 0xF) << 48
        | segment.avl << 52
        | segment.l << 53
        | segment.db << 54
        | segment.g << 55
        | (segment.base >> 24 & 0xFF) << 56
    )


def _set_flat_segments(sregs: abi.kvm_sregs, memory: GuestMemory, *, long: bool) -> None:
    """Load flat segments and write the descriptor table they come from."""
    code = _segment(CODE_SELECTOR, _CODE, long=long)
    data = _segment(DATA_SELECTOR, _DATA)
    tss = abi.kvm_segment(base=0, limit=0x67, selector=TSS_SELECTOR, type=_TSS_BUSY, present=1)
    table = struct.pack("<6Q", 0, 0, _descriptor(code), _descriptor(data), _descriptor(tss), 0)
    memory.write(layout.GDT, table)
    sregs.cs = code
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.tr = tss
    sregs.gdt.base = layout.GDT
    sregs.gdt.limit = len(table) - 1
    sregs.idt.base = 0
    sregs.idt.limit = 0


def _write_identity_map(memory: GuestMemory) -> int:
    """Map the first 4 GiB onto themselves with 2 MiB pages; return the address of the top-level table."""
    pml4 = layout.PAGE_TABLES
    pdpt = pml4 + PAGE_SIZE
    directories = pdpt + PAGE_SIZE
    flags = _PTE_PRESENT | _PTE_WRITABLE
    memory.write(pml4, struct.pack("<Q", pdpt | flags).ljust(PAGE_SIZE, b"\0"))
    tables = [directories + index * PAGE_SIZE | flags for index in range(4)]
    memory.write(pdpt, struct.pack("<4Q", *tables).ljust(PAGE_SIZE, b"\0"))
    leaves = [address | flags | _PTE_HUGE for address in range(0, 4 * GIB, HUGE_PAGE_SIZE)]
    memory.write(directories, struct.pack(f"<{len(leaves)}Q", *leaves))
    return pml4


def enter_long_mode(vcpu: api.Vcpu, memory: GuestMemory, regs: abi.kvm_regs) -> None:
    """Put *vcpu* at *regs* in 64-bit mode, flat segments, first 4 GiB identity-mapped, interrupts off."""
    sregs = vcpu.get_sregs()
    _set_flat_segments(sregs, memory, long=True)
    sregs.cr3 = _write_identity_map(memory)
    sregs.cr4 |= abi.X86_CR4_PAE
    sregs.cr0 = abi.X86_CR0_PE | abi.X86_CR0_ET | abi.X86_CR0_PG
    sregs.efer |= abi.EFER_LME | abi.EFER_LMA
    vcpu.set_sregs(sregs)
    regs.rflags |= 2
    vcpu.set_regs(regs)


def enter_protected_mode(vcpu: api.Vcpu, memory: GuestMemory, regs: abi.kvm_regs) -> None:
    """Put *vcpu* at *regs* in 32-bit protected mode, flat segments, paging and interrupts off."""
    sregs = vcpu.get_sregs()
    _set_flat_segments(sregs, memory, long=False)
    sregs.cr0 = abi.X86_CR0_PE | abi.X86_CR0_ET
    vcpu.set_sregs(sregs)
    regs.rflags |= 2
    vcpu.set_regs(regs)


def enter_real_mode(vcpu: api.Vcpu, segment: int, regs: abi.kvm_regs, *, code_segment: int | None = None) -> None:
    """Put *vcpu* at *regs* in real mode, every segment register holding *segment*, CS *code_segment* if given."""
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        register = getattr(sregs, name)
        register.selector = segment if name != "cs" or code_segment is None else code_segment
        register.base = register.selector << 4
    vcpu.set_sregs(sregs)
    regs.rflags |= 2
    vcpu.set_regs(regs)


def jump_in_real_mode(vcpu: api.Vcpu, address: int) -> None:
    """Let *vcpu*, which is in its reset state, go on at *address* below 1 MiB: CS:IP is address >> 4 : address & 15."""
    sregs = vcpu.get_sregs()
    sregs.cs.selector = address >> 4
    sregs.cs.base = address & ~0xF
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip = address & 0xF
    vcpu.set_regs(regs)
