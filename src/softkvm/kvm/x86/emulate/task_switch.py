# SPDX-License-Identifier: Apache-2.0
"""Hardware task switches, which the processor leaves to KVM (APM vol. 2, 12.2 and 15.14.1)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import segments
from softkvm.kvm.x86.exceptions import X86Exception, gp, inject_emulated_exception
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_state import VcpuState as Vcpu
    from softkvm.kvm.x86.emulate.emulator import Emulator

# EXITINFO2 of the task-switch intercept
_INFO_IRET: Final = 1 << 36
_INFO_JMP: Final = 1 << 38
_INFO_HAS_ERROR_CODE: Final = 1 << 44

REASON_CALL: Final = 0
REASON_IRET: Final = 1
REASON_JMP: Final = 2
REASON_GATE: Final = 3

_BUSY: Final = 2 << 40
#: L0 to L3 and LE: breakpoints of one task (APM vol. 2, 13.1.1.4).
_DR7_LOCAL: Final = 0x155

#: 32-bit TSS from CR3 on: CR3, EIP, EFLAGS, 8 registers, 6 selectors, LDTR; offsets 28 to 96.
_TSS32: Final = struct.Struct("<18I")
_TSS32_SAVED: Final = struct.Struct("<16I")
#: 16-bit TSS from IP on: IP, FLAGS, 8 registers, 4 selectors, LDTR; offsets 14 to 42.
_TSS16: Final = struct.Struct("<15H")
_TSS16_SAVED: Final = struct.Struct("<14H")

_SEGMENTS32: Final[tuple[int, ...]] = (V.ES_OFFSET, V.CS_OFFSET, V.SS_OFFSET, V.DS_OFFSET, V.FS_OFFSET, V.GS_OFFSET)
_SEGMENTS16: Final[tuple[int, ...]] = _SEGMENTS32[:4]


def interception(vcpu: Vcpu) -> int:
    """Handle VMEXIT_TASK_SWITCH: by JMP, CALL, IRET or through a task gate."""
    selector = vcpu.q[V.EXIT_INFO_1] & 0xFFFF
    info = vcpu.q[V.EXIT_INFO_2]
    gate = False
    vector_is_soft = True
    error_code = None
    if info & _INFO_IRET:
        reason = REASON_IRET
    elif info & _INFO_JMP:
        reason = REASON_JMP
    elif vcpu.q[V.EXIT_INT_INFO] & V.EVTINJ_VALID:
        reason, gate = REASON_GATE, True
        kind = vcpu.q[V.EXIT_INT_INFO] & V.EVTINJ_TYPE_MASK
        vector = vcpu.q[V.EXIT_INT_INFO] & V.EVTINJ_VECTOR_MASK
        vector_is_soft = kind == V.EVTINJ_TYPE_SOFT or (
            kind == V.EVTINJ_TYPE_EXEPT and vector in (abi.BP_VECTOR, abi.OF_VECTOR)
        )
        # The event goes to the new task: it isn't injected again.
        vcpu.exception.clear()
        vcpu.interrupt_injected = False
        if kind == V.EVTINJ_TYPE_NMI:
            vcpu.nmi_injected = False
        if info & _INFO_HAS_ERROR_CODE:
            error_code = info & 0xFFFF_FFFF
    else:
        reason = REASON_CALL
    try:
        if not gate or vector_is_soft:
            # The instruction that switched is behind the saved RIP.
            length = vcpu.instruction_length()
            vcpu.q[V.RIP] += length
        switch(vcpu, selector, reason, error_code)
    except X86Exception as exception:
        inject_emulated_exception(vcpu, exception)
    vcpu.b[V.INT_STATE_B] = 0
    return 1


def switch(vcpu: Vcpu, selector: int, reason: int, error_code: int | None) -> None:
    """Save the old task, load the new one; raises #GP, #TS, #NP, #SS by the checks of APM vol. 2, 12.2.5."""
    e = vcpu.emulator
    old = vcpu.vmcb.segment(V.TR_OFFSET)
    if selector & 4:
        raise X86Exception(abi.TS_VECTOR if reason == REASON_IRET else abi.GP_VECTOR, selector & 0xFFFC)
    address, raw = segments.read_descriptor(e, selector)
    attrib, limit, base = segments.parse_descriptor(raw)
    kind = attrib & 0xF
    if attrib & V.SEG_S or kind not in (1, 3, 9, 11):
        raise gp(selector & 0xFFFC)
    if reason in (REASON_CALL, REASON_JMP):
        dpl = attrib >> V.SEG_DPL_SHIFT & 3
        if selector & 3 > dpl or vcpu.b[V.CPL] > dpl:
            raise gp(selector & 0xFFFC)
    busy = bool(kind & 2)
    if busy != (reason == REASON_IRET):
        raise X86Exception(abi.TS_VECTOR if reason == REASON_IRET else abi.GP_VECTOR, selector & 0xFFFC)
    wide = bool(kind & 8)
    if not attrib & V.SEG_P or limit < (0x67 if wide else 0x2B):
        raise X86Exception(abi.NP_VECTOR if not attrib & V.SEG_P else abi.TS_VECTOR, selector & 0xFFFC)

    if reason in (REASON_IRET, REASON_JMP):
        old_address, old_raw = segments.read_descriptor(e, old.selector)
        e.write_linear(old_address, (old_raw & ~_BUSY).to_bytes(8, "little"), implicit=True)
    if reason == REASON_IRET:
        vcpu.q[V.RFLAGS] &= ~abi.X86_EFLAGS_NT
    _save(e, old.base, wide=bool(old.attrib & 8))
    link = old.selector if reason in (REASON_CALL, REASON_GATE) else None
    if reason != REASON_IRET:
        raw |= _BUSY
        e.write_linear(address, raw.to_bytes(8, "little"), implicit=True)
    attrib, limit, base = segments.parse_descriptor(raw)
    if link is not None:
        e.write_linear(base, link.to_bytes(2, "little"), implicit=True)
    # Long-mode fields aside, the new TSS is in force from here on: faults belong to the new task.
    data = e.read_linear(base, 104 if wide else 44, implicit=True)
    cr.kvm_set_cr0(vcpu, vcpu.cr0 | abi.X86_CR0_TS)
    vcpu.vmcb.set_segment(V.TR_OFFSET, selector, attrib | 2, limit, base)
    vcpu.guest_dr7 = vcpu.guest_dr7 & ~_DR7_LOCAL
    vcpu.update_dr7()
    _load(e, data, wide=wide)
    if link is not None:
        vcpu.q[V.RFLAGS] |= abi.X86_EFLAGS_NT
    if error_code is not None:
        e.push(error_code, 4 if wide else 2)


def _save(e: Emulator, base: int, *, wide: bool) -> None:
    vcpu = e.vcpu
    registers = [e.q[V.RIP], vcpu.get_rflags(), *(e.gpr[n] for n in range(8))]
    if wide:
        selectors = [vcpu.w[offset >> 1] for offset in _SEGMENTS32]
        data = _TSS32_SAVED.pack(*(value & 0xFFFF_FFFF for value in registers), *selectors)
        e.write_linear(base + 32, data, implicit=True)
    else:
        selectors = [vcpu.w[offset >> 1] for offset in _SEGMENTS16]
        e.write_linear(
            base + 14, _TSS16_SAVED.pack(*(value & 0xFFFF for value in registers), *selectors), implicit=True
        )


def _load(e: Emulator, data: bytes, *, wide: bool) -> None:
    vcpu = e.vcpu
    if wide:
        cr3, *values = _TSS32.unpack_from(data, 28)
        if vcpu.cr0 & abi.X86_CR0_PG and not cr.kvm_set_cr3(vcpu, cr3):
            raise gp()
        offsets = _SEGMENTS32
    else:
        values = list(_TSS16.unpack_from(data, 14))
        offsets = _SEGMENTS16
    vcpu.q[V.RIP] = values[0]
    vcpu.set_rflags(values[1] | abi.X86_EFLAGS_FIXED)
    for n in range(8):
        e.gpr[n] = values[2 + n]
    selectors = values[10 : 10 + len(offsets)]
    ldt = values[10 + len(offsets)] & 0xFFFF
    # The selectors are loaded before any descriptor is looked at, so that a fault sees them.
    for offset, selector in zip(offsets, selectors, strict=True):
        vcpu.w[offset >> 1] = selector & 0xFFFF
    vcpu.w[V.LDTR_OFFSET >> 1] = ldt
    segments.load_task_segments(e, ldt, [(o, s & 0xFFFF) for o, s in zip(offsets, selectors, strict=True)])
