# SPDX-License-Identifier: Apache-2.0
"""Emulated far transfers: JMP, CALL and RET between segments, through gates and to tasks, and IRET.

APM vol. 2, 4.7.1, 4.11, 8.7 and 12.2; vol. 3. Everything is read and checked first, so that a fault, or an operand that
userspace has to read, leaves nothing half done.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import segments
from softkvm.kvm.x86.emulate import task_switch
from softkvm.kvm.x86.emulate.access import IoNeeded
from softkvm.kvm.x86.emulate.emulator import Emulator, handler
from softkvm.kvm.x86.emulate.operands import MEM, Insn, Operand
from softkvm.kvm.x86.emulate.stack import Stack, current_stack, push_frame, stack_mask
from softkvm.kvm.x86.exceptions import Unhandleable, X86Exception, gp
from softkvm.kvm.x86.requests import KVM_REQ_EVENT
from softkvm.kvm.x86.segments import Descriptor
from softkvm.kvm.x86.svm import vmcb as V

_U64: Final = (1 << 64) - 1
_RSP: Final = 4
_NULL: Final = V.Segment(0, 0, 0, 0)

# Types of system descriptors (APM vol. 2, tables 4-5 and 4-6)
_TSS: Final = (1, 9)
_TSS_BUSY: Final = (3, 11)
_TASK_GATE: Final = 5
_CALL_GATES: Final = {4: 2, 12: 4}  # type: width of what it pushes

_ARITHMETIC: Final = 0x8D5
_DATA_SEGMENTS: Final = (V.ES_OFFSET, V.DS_OFFSET, V.FS_OFFSET, V.GS_OFFSET)
#: Segment registers of an IRET frame to virtual-8086 mode, in its order.
_V86_SEGMENTS: Final = (V.SS_OFFSET, V.ES_OFFSET, V.DS_OFFSET, V.FS_OFFSET, V.GS_OFFSET)


def _real_or_v86(e: Emulator) -> bool:
    return not e.vcpu.cr0 & abi.X86_CR0_PE or _v86(e)


def _v86(e: Emulator) -> bool:
    return bool(e.q[V.RFLAGS] & abi.X86_EFLAGS_VM)


def _long_mode(e: Emulator) -> bool:
    return bool(e.vcpu.efer & abi.EFER_LMA)


def _next_rip(e: Emulator, i: Insn) -> int:
    rip = e.q[V.RIP] + i.length
    return rip if e.vcpu.is_64bit_code() else rip & 0xFFFF_FFFF


def _enter_code(e: Emulator, d: Descriptor, cpl: int, rip: int) -> None:
    """Load CS at privilege level ``cpl`` and go on at ``rip``."""
    e.vcpu.vmcb.set_segment(V.CS_OFFSET, d.selector & ~3 | cpl, d.attrib | 1, d.limit, d.base)
    e.vcpu.b[V.CPL] = cpl
    _go_on_at(e, rip)


def _enter_real_code(e: Emulator, selector: int, ip: int) -> None:
    segments.load_real(e.vcpu, V.CS_OFFSET, selector)
    _go_on_at(e, ip)


def _go_on_at(e: Emulator, rip: int) -> None:
    e.q[V.RIP] = rip
    e.rip_written = e.branched = True


def _check_target(e: Emulator, d: Descriptor, rip: int) -> None:
    """#GP(0) outside of the code segment: its limit, or not canonical for 64-bit code."""
    if _long_mode(e) and d.attrib & V.SEG_L:
        if cr.is_noncanonical(e.vcpu, rip):
            raise gp()
    elif rip > d.limit:
        raise gp()


def _check_real_target(e: Emulator, ip: int) -> None:
    if ip > e.vcpu.vmcb.segment(V.CS_OFFSET).limit:
        raise gp()


def _runnable(e: Emulator, d: Descriptor) -> bool:
    """Tell whether a descriptor is code that the mode can run: not L and D together in long mode."""
    both = V.SEG_L | V.SEG_DB
    return d.is_code and not (_long_mode(e) and d.attrib & both == both)


def _require_present(d: Descriptor) -> None:
    if not d.attrib & V.SEG_P:
        raise X86Exception(abi.NP_VECTOR, d.error)


# --- JMP and CALL ------------------------------------------------------------------------------


@handler("jmp")
def jmp(e: Emulator, i: Insn) -> None:
    """Jump: near or far, direct or through a register or memory."""
    if i.far:
        _transfer(e, i, call=False)
    else:
        e.jump(_near_target(e, i.ops[0]), i.ops[0].size)


@handler("call")
def call(e: Emulator, i: Insn) -> None:
    """Call: near or far, direct or through a register or memory."""
    if i.far:
        _transfer(e, i, call=True)
        return
    vcpu = e.vcpu
    old_rip, shadow = e.q[V.RIP], vcpu.b[V.INT_STATE_B]
    next_rip = _next_rip(e, i)
    try:
        e.jump(_near_target(e, i.ops[0]), i.ops[0].size)
        e.push(next_rip, i.stack_size)
    except BaseException:
        e.q[V.RIP] = old_rip
        vcpu.b[V.INT_STATE_B] = shadow
        e.rip_written = e.branched = False
        raise


def _near_target(e: Emulator, op: Operand) -> int:
    return op.value + e.q[V.RIP] if op.is_branch else e.read(op)


def _far_pointer(e: Emulator, i: Insn) -> tuple[int, int, int]:
    """Return (selector, offset, width of the offset) of a far operand, in memory or in the instruction.

    REX.W makes an offset in memory 64 bits wide: so Intel's processors have it, and KVM for every guest.
    """
    op = i.ops[0]
    if op.kind != MEM:
        return i.far_selector, op.value, op.size - 2
    return read_far_pointer(e, i, 8 if i.rex_w else op.size - 2)


def read_far_pointer(e: Emulator, i: Insn, width: int) -> tuple[int, int, int]:
    """Read a far pointer from the memory operand: (selector, offset, width of the offset)."""
    data = e.read_linear(e.memory_address(i, width + 2, write=False), width + 2)
    return int.from_bytes(data[width:], "little"), int.from_bytes(data[:width], "little"), width


def _transfer(e: Emulator, i: Insn, *, call: bool) -> None:
    selector, rip, width = _far_pointer(e, i)
    frame = (e.vcpu.w[V.CS_OFFSET >> 1], _next_rip(e, i))
    if _real_or_v86(e):
        _check_real_target(e, rip)
        if call:
            e.gpr[_RSP] = push_frame(e, current_stack(e), frame, width)
        _enter_real_code(e, selector, rip)
        return
    if not selector & 0xFFFC:
        raise gp()
    d = segments.fetch_descriptor(e, selector)
    if not d.attrib & V.SEG_S:
        _transfer_system(e, i, d, call=call)
        return
    cpl = e.vcpu.b[V.CPL]
    reachable = d.dpl <= cpl if d.is_conforming else selector & 3 <= cpl and d.dpl == cpl
    if not _runnable(e, d) or not reachable:
        raise gp(d.error)
    _require_present(d)
    _check_target(e, d, rip)
    rsp = push_frame(e, current_stack(e), frame, width) if call else e.gpr[_RSP]
    segments.mark_accessed(e, d)
    e.gpr[_RSP] = rsp
    _enter_code(e, d, cpl, rip)


def _transfer_system(e: Emulator, i: Insn, d: Descriptor, *, call: bool) -> None:
    """Through a call gate, a task gate or a TSS (SDM vol. 3, 6.8.3 and 8.3)."""
    long_mode = _long_mode(e)
    if d.kind not in ((12,) if long_mode else (*_CALL_GATES, _TASK_GATE, *_TSS)):
        raise gp(d.error)
    if d.dpl < e.vcpu.b[V.CPL] or d.dpl < d.selector & 3:
        raise gp(d.error)
    _require_present(d)
    if d.kind in _CALL_GATES:
        _call_gate(e, i, d, call=call)
        return
    tss = d.gate_selector if d.kind == _TASK_GATE else d.selector
    _switch(e, tss, task_switch.REASON_CALL if call else task_switch.REASON_JMP, _next_rip(e, i))


def _switch(e: Emulator, selector: int, reason: int, next_rip: int) -> None:
    """Switch tasks, after the checks of the TSS's type that the processor makes before it leaves one to KVM."""
    returning = reason == task_switch.REASON_IRET
    vector = abi.TS_VECTOR if returning else abi.GP_VECTOR
    error = selector & 0xFFFC
    if selector & 4 or not error:
        raise X86Exception(vector, error)
    d = segments.fetch_descriptor(e, selector, vector)
    if d.attrib & V.SEG_S or d.kind not in (_TSS_BUSY if returning else _TSS):
        raise X86Exception(vector, error)
    try:
        task_switch.switch_task(e, selector, reason, None, (next_rip, e.vcpu.get_rflags()))
    except IoNeeded:
        raise Unhandleable from None
    e.rip_written = e.branched = e.rf_loaded = True


def _call_gate(e: Emulator, i: Insn, gate: Descriptor, *, call: bool) -> None:
    long_mode = _long_mode(e)
    width = 8 if long_mode else _CALL_GATES[gate.kind]
    rip = gate.gate_offset
    if long_mode:
        rip |= (segments.fetch_high(e, gate) & 0xFFFF_FFFF) << 32
    if not gate.gate_selector & 0xFFFC:
        raise gp()
    d = segments.fetch_descriptor(e, gate.gate_selector)
    old_cpl = e.vcpu.b[V.CPL]
    code64 = d.attrib & (V.SEG_L | V.SEG_DB) == V.SEG_L
    reachable = d.dpl <= old_cpl and (call or d.is_conforming or d.dpl == old_cpl)
    if not d.is_code or (long_mode and not code64) or not reachable:
        raise gp(d.error)
    _require_present(d)
    cpl = d.dpl if call and not d.is_conforming else old_cpl
    _check_target(e, d, rip)
    frame = [e.vcpu.w[V.CS_OFFSET >> 1], _next_rip(e, i)]
    rsp = e.gpr[_RSP]
    segment: V.Segment | None = None
    if call and cpl == old_cpl:
        stack = current_stack(e)
        rsp = push_frame(e, stack._replace(mask=_U64) if long_mode else stack, frame, width)
    elif call:
        stack = _inner_stack(e, cpl)
        parameters = 0 if long_mode else gate.raw >> 32 & 31
        copied = [e.peek(width, depth=n * width) for n in reversed(range(parameters))]
        old = [e.vcpu.w[V.SS_OFFSET >> 1], rsp]
        rsp = stack._replace(rsp=rsp).merged(push_frame(e, stack, old + copied + frame, width))
        segment = stack.segment
    segments.mark_accessed(e, d)
    e.gpr[_RSP] = rsp
    if segment is not None:
        e.vcpu.vmcb.set_segment(V.SS_OFFSET, *segment)
    _enter_code(e, d, cpl, rip)


def _null_stack(cpl: int) -> V.Segment:
    """Return SS as a switch to an inner level leaves it in long mode: null, with the new RPL and DPL."""
    return V.Segment(cpl, cpl << V.SEG_DPL_SHIFT, 0, 0)


def _inner_stack(e: Emulator, cpl: int) -> Stack:
    """Return the stack that the TSS holds for the inner privilege level ``cpl`` (APM vol. 2, 4.11.2 and 12.2.5)."""
    tr = e.vcpu.vmcb.segment(V.TR_OFFSET)
    if _long_mode(e):
        offset, width, size = 4 + 8 * cpl, 8, 8
    elif tr.attrib & 8:
        offset, width, size = 4 + 8 * cpl, 4, 6
    else:
        offset, width, size = 2 + 4 * cpl, 2, 4
    if offset + size - 1 > tr.limit:
        raise X86Exception(abi.TS_VECTOR, tr.selector & 0xFFFC)
    data = e.read_linear(tr.base + offset, size, implicit=True)
    rsp = int.from_bytes(data[:width], "little")
    if _long_mode(e):
        return Stack(_null_stack(cpl), rsp, _U64, cpl)
    selector = int.from_bytes(data[width:], "little")
    segment = segments.fetch_stack_segment(e, selector, cpl, abi.TS_VECTOR)
    return Stack(segment, rsp, stack_mask(segment), cpl, selector & 0xFFFC)


# --- RET and IRET ------------------------------------------------------------------------------


class _Frame(NamedTuple):
    """What a far return or IRET pops."""

    rip: int
    cs: int
    width: int
    #: Items popped so far; SP and SS come next, after ``release`` bytes.
    items: int
    release: int = 0
    #: IRET: the new RFLAGS.
    rflags: int | None = None


@handler("retf")
def ret_far(e: Emulator, i: Insn) -> None:
    """Far return, to the same or an outer privilege level; releases parameters."""
    width, release = i.operand_size, i.ops[0].value if i.ops else 0
    rip, cs = (e.peek(width, depth=n * width) for n in range(2))
    cs &= 0xFFFF
    if _real_or_v86(e):
        _check_real_target(e, rip)
        e.drop(2 * width + release)
        _enter_real_code(e, cs, rip)
        return
    _return(e, _Frame(rip, cs, width, 2, release))


def _return(e: Emulator, f: _Frame) -> None:
    """Return in protected mode."""
    vcpu = e.vcpu
    if not f.cs & 0xFFFC:
        raise gp()
    cpl, rpl = vcpu.b[V.CPL], f.cs & 3
    d = segments.fetch_descriptor(e, f.cs)
    level = d.dpl <= rpl if d.is_conforming else d.dpl == rpl
    if rpl < cpl or not _runnable(e, d) or not level:
        raise gp(d.error)
    _require_present(d)
    outer = rpl != cpl
    stack = None
    if outer or (f.rflags is not None and vcpu.is_64bit_code()):
        rsp, ss = (e.peek(f.width, depth=(f.items + n) * f.width + f.release) for n in range(2))
        stack = _returned_stack(e, d, rsp, ss & 0xFFFF, rpl)
    _check_target(e, d, f.rip)
    segments.mark_accessed(e, d)
    old_rsp = e.gpr[_RSP]
    if stack is None:
        e.drop(f.items * f.width + f.release)
    else:
        vcpu.vmcb.set_segment(V.SS_OFFSET, *stack.segment)
        e.gpr[_RSP] = stack._replace(rsp=old_rsp).merged(stack.rsp + (f.release if outer else 0))
    if f.rflags is not None:
        _load_flags(e, f.rflags)
    if outer:
        _drop_unreachable_segments(e, rpl)
    _enter_code(e, d, rpl, f.rip)


def _returned_stack(e: Emulator, code: Descriptor, rsp: int, ss: int, rpl: int) -> Stack:
    code64 = _long_mode(e) and code.attrib & V.SEG_L
    if not ss & 0xFFFC and code64 and rpl != 3 and ss & 3 == rpl:
        return Stack(_null_stack(rpl), rsp, _U64, rpl)
    segment = segments.fetch_stack_segment(e, ss, rpl, abi.GP_VECTOR)
    return Stack(segment, rsp, _U64 if code64 else stack_mask(segment), rpl)


def _drop_unreachable_segments(e: Emulator, cpl: int) -> None:
    """Null the segments that a return to privilege level ``cpl`` must not keep; FS and GS keep their bases."""
    for offset in _DATA_SEGMENTS:
        segment = e.vcpu.vmcb.segment(offset)
        conforming = segment.attrib & 0xC == 0xC
        dpl = segment.attrib >> V.SEG_DPL_SHIFT & 3
        if segment.attrib & V.SEG_P and segment.attrib & V.SEG_S and not conforming and dpl < cpl:
            e.vcpu.vmcb.set_segment(offset, *_NULL._replace(base=segment.base))


def _load_flags(e: Emulator, rflags: int) -> None:
    """Load RFLAGS by IRET, RF among them."""
    e.vcpu.set_rflags(rflags)
    e.rf_loaded = True


def _writable_flags(e: Emulator, width: int) -> int:
    """Return the flags that IRET may load at the privilege level with the operand size."""
    mask = _ARITHMETIC | abi.X86_EFLAGS_TF | abi.X86_EFLAGS_DF | abi.X86_EFLAGS_NT
    if width > 2:
        mask |= abi.X86_EFLAGS_RF | abi.X86_EFLAGS_AC | abi.X86_EFLAGS_ID
    cpl = e.vcpu.b[V.CPL]
    if cpl == 0:
        mask |= abi.X86_EFLAGS_IOPL
    if cpl <= e.q[V.RFLAGS] >> 12 & 3:
        mask |= abi.X86_EFLAGS_IF
    return mask


@handler("iret", "iretd", "iretq")
def iret(e: Emulator, i: Insn) -> None:
    """Return from an interrupt; with NT to the task that was interrupted. NMIs are taken again."""
    vcpu = e.vcpu
    if not _real_or_v86(e) and e.q[V.RFLAGS] & abi.X86_EFLAGS_NT:
        if _long_mode(e):
            raise gp()
        link = e.read_linear(vcpu.vmcb.segment(V.TR_OFFSET).base, 2, implicit=True)
        _switch(e, int.from_bytes(link, "little"), task_switch.REASON_IRET, _next_rip(e, i))
    else:
        _iret_frame(e, i.operand_size)
    if vcpu.nmi_masked:
        vcpu.set_nmi_mask(False)
        vcpu.make_request(KVM_REQ_EVENT)


def _iret_frame(e: Emulator, width: int) -> None:
    rip, cs, image = (e.peek(width, depth=n * width) for n in range(3))
    cs &= 0xFFFF
    old = e.vcpu.get_rflags()
    mask = _writable_flags(e, width)
    if _v86(e):
        _iret_v86(e, rip, cs, image, width)
    elif not e.vcpu.cr0 & abi.X86_CR0_PE:
        _iret_real(e, rip, cs, old & ~mask | image & mask, width)
    elif width == 4 and not _long_mode(e) and not e.vcpu.b[V.CPL] and image & abi.X86_EFLAGS_VM:
        _iret_to_v86(e, rip, cs, image)
    else:
        if width > 2 and not e.vcpu.b[V.CPL]:
            mask |= abi.X86_EFLAGS_VIF | abi.X86_EFLAGS_VIP
        _return(e, _Frame(rip, cs, width, 3, rflags=old & ~mask | image & mask))


def _iret_real(e: Emulator, ip: int, cs: int, rflags: int, width: int) -> None:
    _check_real_target(e, ip)
    e.drop(3 * width)
    _load_flags(e, rflags)
    _enter_real_code(e, cs, ip)


def _iret_v86(e: Emulator, ip: int, cs: int, image: int, width: int) -> None:
    """IRET of virtual-8086 mode: with IOPL 3, or by VME on the virtual interrupt flag (APM vol. 2, 8.11)."""
    old = e.vcpu.get_rflags()
    mask = _writable_flags(e, width) & ~abi.X86_EFLAGS_IF
    if old & abi.X86_EFLAGS_IOPL == abi.X86_EFLAGS_IOPL:
        mask |= abi.X86_EFLAGS_IF
    else:
        pending = image & abi.X86_EFLAGS_IF and old & abi.X86_EFLAGS_VIP
        if not e.vcpu.cr4 & abi.X86_CR4_VME or width != 2 or pending or image & abi.X86_EFLAGS_TF:
            raise gp()
        image = image & ~abi.X86_EFLAGS_VIF | (abi.X86_EFLAGS_VIF if image & abi.X86_EFLAGS_IF else 0)
        mask |= abi.X86_EFLAGS_VIF
    _iret_real(e, ip, cs, old & ~mask | image & mask, width)


def _iret_to_v86(e: Emulator, ip: int, cs: int, image: int) -> None:
    rsp, *selectors = (e.peek(4, depth=12 + 4 * n) for n in range(6))
    if ip > 0xFFFF:
        raise gp()
    _load_flags(e, image)
    e.vcpu.b[V.CPL] = 3
    e.gpr[_RSP] = rsp
    for offset, selector in zip(_V86_SEGMENTS, selectors, strict=True):
        segments.load_real(e.vcpu, offset, selector & 0xFFFF)
    _enter_real_code(e, cs, ip)
