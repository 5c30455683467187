# SPDX-License-Identifier: Apache-2.0
"""Emulated system instructions: control and debug registers, descriptor tables, MSRs, CPUID, flags, HLT."""

from __future__ import annotations

from typing import Final

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import fpu, io, msr_exits, segments, tsc
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import CR, DR, Insn
from softkvm.kvm.x86.exceptions import DR6_BD, DR7_GD, Unhandleable, X86Exception, gp
from softkvm.kvm.x86.halt import halt
from softkvm.kvm.x86.hyperv import hypercalls as hyperv_hypercalls
from softkvm.kvm.x86.paravirt import hypercalls, vmware
from softkvm.kvm.x86.pmu import pmu
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.xen import hypercall_page
from softkvm.kvm.x86.xen import hypercalls as xen_hypercalls

_U64: Final = (1 << 64) - 1


def require_cpl0(e: Emulator) -> None:
    """Raise #GP unless the guest runs at CPL 0."""
    if e.vcpu.b[V.CPL]:
        raise gp()


def _umip(e: Emulator) -> None:
    if e.vcpu.cr4 & abi.X86_CR4_UMIP:
        require_cpl0(e)


def read_cr(e: Emulator, number: int) -> int:
    """Return a control register; #UD for one that doesn't exist."""
    vcpu = e.vcpu
    if number == 0:
        return vcpu.cr0
    if number == 2:
        return e.q[V.CR2]
    if number == 3:
        return vcpu.cr3
    if number == 4:
        return vcpu.cr4
    if number == 8:
        return cr.kvm_get_cr8(vcpu)
    raise X86Exception(abi.UD_VECTOR)


def write_cr(e: Emulator, number: int, value: int) -> None:
    """Write a control register; #GP for values that can't be, #UD for registers that don't exist."""
    vcpu = e.vcpu
    if number == 2:
        e.q[V.CR2] = value
        return
    function = {0: cr.kvm_set_cr0, 3: cr.kvm_set_cr3, 4: cr.kvm_set_cr4, 8: cr.kvm_set_cr8}.get(number)
    if function is None:
        raise X86Exception(abi.UD_VECTOR)
    if not function(vcpu, value):
        raise gp()


def mov_system(e: Emulator, i: Insn) -> None:
    """MOV to and from control and debug registers; always 64 bits wide in 64-bit mode, else 32."""
    require_cpl0(e)
    dst, src = i.ops
    mask = _U64 if e.vcpu.is_64bit_code() else 0xFFFF_FFFF
    if CR in (dst.kind, src.kind):
        if dst.kind == CR:
            write_cr(e, dst.index, e.gpr[src.index] & mask)
        else:
            e.gpr[dst.index] = read_cr(e, src.index) & mask
        return
    number = dst.index if dst.kind == DR else src.index
    check_dr(e, number)
    if dst.kind == DR:
        if not cr.kvm_set_dr(e.vcpu, number, e.gpr[src.index] & mask):
            raise gp()
    else:
        e.gpr[dst.index] = cr.kvm_get_dr(e.vcpu, number) & mask


def check_dr(e: Emulator, number: int) -> None:
    """#UD for DR4 and DR5 with CR4.DE and beyond DR7; #DB with DR7.GD."""
    if number > 7 or (e.vcpu.cr4 & abi.X86_CR4_DE and number in (4, 5)):
        raise X86Exception(abi.UD_VECTOR)
    if e.vcpu.guest_dr7 & DR7_GD:
        e.vcpu.guest_dr6 = e.vcpu.guest_dr6 & ~0xF | DR6_BD
        e.vcpu.guest_dr7 &= ~DR7_GD
        e.vcpu.update_dr7()
        raise X86Exception(abi.DB_VECTOR)


@handler("clts")
def clts(e: Emulator, i: Insn) -> None:
    """Clear CR0.TS."""
    require_cpl0(e)
    cr.kvm_set_cr0(e.vcpu, e.vcpu.cr0 & ~abi.X86_CR0_TS)


@handler("lmsw")
def lmsw(e: Emulator, i: Insn) -> None:
    """Load the machine status word: PE can be set, not cleared."""
    require_cpl0(e)
    value = e.read(i.ops[0])
    old = e.vcpu.cr0
    if not cr.kvm_set_cr0(e.vcpu, old & ~0xE | value & 0xF):
        raise gp()


@handler("smsw")
def smsw(e: Emulator, i: Insn) -> None:
    """Store the machine status word."""
    _umip(e)
    op = i.ops[0]
    e.write(op, e.vcpu.cr0 & (1 << op.size * 8) - 1)


@handler("invlpg")
def invlpg(e: Emulator, i: Insn) -> None:
    """Forget the translation of one page."""
    require_cpl0(e)
    e.vcpu.flush_tlb_guest()


@handler("wbinvd", "invd", "wbnoinvd")
def wbinvd(e: Emulator, i: Insn) -> None:
    """Cache write-back: caches are coherent."""
    require_cpl0(e)


@handler("hlt")
def hlt(e: Emulator, i: Insn) -> None:
    """Wait for an interrupt."""
    require_cpl0(e)
    if not halt(e.vcpu):
        e.exit_to_userspace = True


@handler("cpuid")
def cpuid(e: Emulator, i: Insn) -> None:
    """CPUID from the vCPU's table."""
    if e.vcpu.cpuid_faulting:
        require_cpl0(e)
    e.gpr[0], e.gpr[3], e.gpr[1], e.gpr[2] = e.vcpu.cpuid.answer(e.gpr[0] & 0xFFFF_FFFF, e.gpr[1] & 0xFFFF_FFFF)


@handler("rdmsr")
def rdmsr(e: Emulator, i: Insn) -> None:
    """Read an MSR."""
    require_cpl0(e)
    index = e.gpr[1] & 0xFFFF_FFFF
    value = msr_exits.read_msr(e.vcpu, index)
    if value is None:
        _msr_refused(e, i, index, 0, write=False)
        return
    e.gpr[0] = value & 0xFFFF_FFFF
    e.gpr[2] = value >> 32


@handler("wrmsr")
def wrmsr(e: Emulator, i: Insn) -> None:
    """Write an MSR."""
    require_cpl0(e)
    index = e.gpr[1] & 0xFFFF_FFFF
    value = (e.gpr[2] & 0xFFFF_FFFF) << 32 | e.gpr[0] & 0xFFFF_FFFF
    write = hypercall_page.write_msr if index and index == e.vm.xen.config.msr else msr_exits.write_msr
    if not write(e.vcpu, index, value):
        _msr_refused(e, i, index, value, write=True)


def _msr_refused(e: Emulator, i: Insn, index: int, data: int, *, write: bool) -> None:
    """Leave for userspace if it asked for that, else #GP."""
    if not msr_exits.exit_msr(e.vcpu, index, data, lambda vcpu: io.advance(vcpu, i.length), write=write):
        raise gp()
    e.rip_written = e.exit_to_userspace = True


@handler("rdtsc", "rdtscp")
def rdtsc(e: Emulator, i: Insn) -> None:
    """Read the time-stamp counter."""
    if e.vcpu.cr4 & abi.X86_CR4_TSD and e.vcpu.cr0 & abi.X86_CR0_PE:
        require_cpl0(e)
    value = tsc.read_guest_tsc(e.vcpu)
    e.gpr[0] = value & 0xFFFF_FFFF
    e.gpr[2] = value >> 32
    if i.mnemonic == "rdtscp":
        e.gpr[1] = e.vcpu.tsc_aux & 0xFFFF_FFFF


@handler("rdpmc")
def rdpmc(e: Emulator, i: Insn) -> None:
    """A performance counter, or one of VMware's."""
    index = e.gpr[1] & 0xFFFF_FFFF
    value = vmware.read_pmc(e.vcpu, index)
    if value is None:
        value = pmu.rdpmc(e.vcpu, index)
    if value is None:
        raise gp()
    e.gpr[0] = value & 0xFFFF_FFFF
    e.gpr[2] = value >> 32


@handler("vmcall", "vmmcall")
def vmcall(e: Emulator, i: Insn) -> None:
    """A hypercall; the other vendor's instruction is patched to this one's.

    It is #UD without KVM_X86_QUIRK_FIX_HYPERCALL_INSN.
    """
    if i.mnemonic == "vmcall":
        if not e.vm.fix_hypercall_quirk:
            raise X86Exception(abi.UD_VECTOR)
        e.write_linear(svm.linear_rip(e.vcpu), b"\x0f\x01\xd9")
        e.rip_written = e.step_inhibited = True  # the patched instruction is executed next
        return
    if e.vm.xen.intercepts_hypercalls:
        emulate = xen_hypercalls.emulate_hypercall
    elif hyperv_hypercalls.is_enabled(e.vcpu):
        emulate = hyperv_hypercalls.emulate_hypercall
    else:
        emulate = hypercalls.emulate_hypercall
    if not emulate(e.vcpu, lambda vcpu: io.advance(vcpu, i.length)):
        e.rip_written = e.exit_to_userspace = True


@handler("xsetbv")
def xsetbv(e: Emulator, i: Insn) -> None:
    """Write an extended control register."""
    if not e.vcpu.cr4 & abi.X86_CR4_OSXSAVE:
        raise X86Exception(abi.UD_VECTOR)
    require_cpl0(e)
    value = (e.gpr[2] & 0xFFFF_FFFF) << 32 | e.gpr[0] & 0xFFFF_FFFF
    if not cr.kvm_set_xcr(e.vcpu, e.gpr[1] & 0xFFFF_FFFF, value):
        raise gp()


# --- descriptor tables -------------------------------------------------------------------------


def _table_base_size(e: Emulator) -> int:
    return 8 if e.vcpu.is_64bit_code() else 4


@handler("lgdt", "lidt")
def load_table(e: Emulator, i: Insn) -> None:
    """Load GDTR or IDTR."""
    require_cpl0(e)
    width = _table_base_size(e)
    address = e.memory_address(i, 2 + width, write=False)
    data = e.read_linear(address, 2 + width)
    base = int.from_bytes(data[2:], "little")
    if "o16" in i.text:
        base &= 0xFF_FFFF
    if width == 8 and cr.is_noncanonical(e.vcpu, base):
        raise gp()
    offset = V.GDTR_OFFSET if i.mnemonic == "lgdt" else V.IDTR_OFFSET
    e.vcpu.vmcb.set_segment(offset, 0, 0, int.from_bytes(data[:2], "little"), base)


@handler("sgdt", "sidt")
def store_table(e: Emulator, i: Insn) -> None:
    """Store GDTR or IDTR."""
    _umip(e)
    width = _table_base_size(e)
    table = e.vcpu.vmcb.segment(V.GDTR_OFFSET if i.mnemonic == "sgdt" else V.IDTR_OFFSET)
    data = (table.limit & 0xFFFF).to_bytes(2, "little") + (table.base & (1 << width * 8) - 1).to_bytes(width, "little")
    e.write_linear(e.memory_address(i, len(data), write=True), data)


@handler("sldt", "str")
def store_selector(e: Emulator, i: Insn) -> None:
    """Store the selector of LDTR or TR."""
    vcpu = e.vcpu
    _protected_only(e)
    _umip(e)
    offset = V.LDTR_OFFSET if i.mnemonic == "sldt" else V.TR_OFFSET
    e.write(i.ops[0], vcpu.w[offset >> 1])


@handler("lldt", "ltr")
def load_selector(e: Emulator, i: Insn) -> None:
    """Load LDTR or TR."""
    _protected_only(e)
    require_cpl0(e)
    selector = e.read(i.ops[0]) & 0xFFFF
    segments.load_segment(e, V.LDTR_OFFSET if i.mnemonic == "lldt" else V.TR_OFFSET, selector)


# --- looking at descriptors --------------------------------------------------------------------

#: Types of system descriptors that LAR and LSL know, in legacy and in long mode (APM vol. 3).
_LAR_TYPES: Final = (frozenset((1, 2, 3, 4, 5, 9, 11, 12)), frozenset((2, 9, 11, 12)))
_LSL_TYPES: Final = (frozenset((1, 2, 3, 9, 11)), frozenset((2, 9, 11)))
_NO_TYPES: Final[tuple[frozenset[int], frozenset[int]]] = (frozenset(), frozenset())


def _protected_only(e: Emulator) -> None:
    if not e.vcpu.cr0 & abi.X86_CR0_PE or e.q[V.RFLAGS] & abi.X86_EFLAGS_VM:
        raise X86Exception(abi.UD_VECTOR)


def _visible(e: Emulator, selector: int, types: tuple[frozenset[int], frozenset[int]]) -> segments.Descriptor | None:
    """Return the descriptor that an instruction may look at, and set ZF if there is one."""
    d = segments.try_descriptor(e, selector) if selector & 0xFFFC else None
    if d is not None:
        known = d.attrib & V.SEG_S or d.kind in types[bool(e.vcpu.efer & abi.EFER_LMA)]
        if not known or not (d.is_conforming or d.dpl >= max(e.vcpu.b[V.CPL], selector & 3)):
            d = None
    e.set_flags(abi.X86_EFLAGS_ZF, abi.X86_EFLAGS_ZF if d is not None else 0)
    return d


@handler("lar", "lsl")
def load_rights_or_limit(e: Emulator, i: Insn) -> None:
    """Load the access rights or the limit of a segment."""
    _protected_only(e)
    selector = e.read(i.ops[1]) & 0xFFFF
    d = _visible(e, selector, _LAR_TYPES if i.mnemonic == "lar" else _LSL_TYPES)
    if d is not None:
        value = d.raw >> 32 & 0x00FF_FF00 if i.mnemonic == "lar" else d.limit
        e.write(i.ops[0], value & (1 << i.ops[0].size * 8) - 1)


@handler("verr", "verw")
def verify(e: Emulator, i: Insn) -> None:
    """Tell by ZF whether a segment can be read or written."""
    _protected_only(e)
    d = _visible(e, e.read(i.ops[0]) & 0xFFFF, _NO_TYPES)
    if d is not None and not (d.is_readable if i.mnemonic == "verr" else d.is_writable):
        e.set_flags(abi.X86_EFLAGS_ZF, 0)


@handler("arpl")
def arpl(e: Emulator, i: Insn) -> None:
    """Raise the RPL of a selector to that of another; written only if it changes."""
    _protected_only(e)
    dst, src = i.ops
    old, rpl = e.read(dst), e.read(src) & 3
    changes = old & 3 < rpl
    if changes:
        e.write(dst, old & ~3 | rpl)
    e.set_flags(abi.X86_EFLAGS_ZF, abi.X86_EFLAGS_ZF if changes else 0)


# --- flags -------------------------------------------------------------------------------------


@handler("cli", "sti")
def interrupt_flag(e: Emulator, i: Insn) -> None:
    """Clear or set IF as IOPL allows; STI opens a shadow of one instruction."""
    flags = e.q[V.RFLAGS]
    if e.vcpu.cr0 & abi.X86_CR0_PE and e.vcpu.b[V.CPL] > flags >> 12 & 3:
        raise gp()
    if i.mnemonic == "cli":
        e.q[V.RFLAGS] = flags & ~abi.X86_EFLAGS_IF
    else:
        if not flags & abi.X86_EFLAGS_IF:
            e.shadow_after = 1
        e.q[V.RFLAGS] = flags | abi.X86_EFLAGS_IF


@handler("pushf", "pushfd", "pushfq")
def pushf(e: Emulator, i: Insn) -> None:
    """Push the flags without VM and RF."""
    size = {"pushf": 2, "pushfd": 4, "pushfq": 8}[i.mnemonic]
    if e.q[V.RFLAGS] & abi.X86_EFLAGS_VM and e.q[V.RFLAGS] & abi.X86_EFLAGS_IOPL != abi.X86_EFLAGS_IOPL:
        raise gp()
    e.push(e.vcpu.get_rflags() & ~(abi.X86_EFLAGS_VM | abi.X86_EFLAGS_RF), size)


@handler("popf", "popfd", "popfq")
def popf(e: Emulator, i: Insn) -> None:
    """Pop the flags that the privilege level may change."""
    size = {"popf": 2, "popfd": 4, "popfq": 8}[i.mnemonic]
    flags = e.q[V.RFLAGS]
    if flags & abi.X86_EFLAGS_VM and flags & abi.X86_EFLAGS_IOPL != abi.X86_EFLAGS_IOPL:
        raise gp()
    value = e.peek(size)
    change = 0x24_4DD5  # CF PF AF ZF SF TF DF OF NT AC ID
    if not e.vcpu.cr0 & abi.X86_CR0_PE:
        change |= abi.X86_EFLAGS_IOPL | abi.X86_EFLAGS_IF
    else:
        cpl = e.vcpu.b[V.CPL]
        if cpl == 0:
            change |= abi.X86_EFLAGS_IOPL
        if cpl <= flags >> 12 & 3:
            change |= abi.X86_EFLAGS_IF
    if size == 2:
        change &= 0xFFFF
    e.drop(size)
    e.vcpu.set_rflags(flags & ~(change | abi.X86_EFLAGS_RF) | value & change)


@handler("wait", "fnop")
def fwait(e: Emulator, i: Insn) -> None:
    """Wait for x87: #NM with TS and MP set (FNOP: TS or EM), then #MF if one is pending."""
    cr0 = e.vcpu.cr0
    waits = abi.X86_CR0_TS | abi.X86_CR0_MP
    if cr0 & waits == waits or (i.mnemonic == "fnop" and cr0 & (abi.X86_CR0_TS | abi.X86_CR0_EM)):
        raise X86Exception(abi.NM_VECTOR)
    fpu.check_pending(e.vcpu)


@handler("int3", "int", "into", "int1")
def software_interrupt(e: Emulator, i: Insn) -> None:
    """Software interrupts go through the silicon: KVM injects what they raise."""
    raise Unhandleable
