# SPDX-License-Identifier: Apache-2.0
"""Hardware task switches, which the processor leaves to KVM (APM vol. 2, 12.2 and 15.14.1)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86 import control_registers as cr
from softkvm.kvm.x86 import segments
from softkvm.kvm.x86.emulate.access import IoNeeded
from softkvm.kvm.x86.exceptions import (
    DR6_BT,
    SOFT_EXCEPTIONS,
    Unhandleable,
    X86Exception,
    gp,
    inject_emulated_exception,
    queue_exception_p,
)
from softkvm.kvm.x86.svm import svm
from softkvm.kvm.x86.svm import vmcb as V

if TYPE_CHECKING:
    from softkvm.kvm.x86.emulate.emulator import Emulator
    from softkvm.kvm.x86.state import VcpuState as Vcpu

# EXITINFO2 of the task-switch intercept
_INFO_IRET: Final = 1 << 36
_INFO_JMP: Final = 1 << 38
_INFO_HAS_ERROR_CODE: Final = 1 << 44
_INFO_RF: Final = 1 << 48

REASON_CALL: Final = 0
REASON_IRET: Final = 1
REASON_JMP: Final = 2
REASON_GATE: Final = 3

_BUSY: Final = 2 << 40
#: Error code: an event from outside the program (APM vol. 2, 8.4.1).
_EXT: Final = 1
#: Offset of the byte with the T bit in a 32-bit TSS.
_TSS_TRAP: Final = 0x64
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
    """Handle VMEXIT_TASK_SWITCH: by JMP, CALL, IRET or through a task gate.

    The processor has checked privilege levels and the TSS's type. A fault is one of the instruction that switches, at
    its RIP, until the new task is in force. KVM_EXIT_INTERNAL_ERROR where a TSS or descriptor is no memory: KVM has
    no MMIO during a task switch.
    """
    selector = vcpu.q[V.EXIT_INFO_1] & 0xFFFF
    info = vcpu.q[V.EXIT_INFO_2]
    event = vcpu.q[V.EXIT_INT_INFO]
    error_code = None
    hardware = False
    if info & _INFO_IRET:
        reason = REASON_IRET
    elif info & _INFO_JMP:
        reason = REASON_JMP
    elif event & V.EVTINJ_VALID:
        reason = REASON_GATE
        kind = event & V.EVTINJ_TYPE_MASK
        hardware = kind != V.EVTINJ_TYPE_SOFT and not (
            kind == V.EVTINJ_TYPE_EXEPT and event & V.EVTINJ_VECTOR_MASK in SOFT_EXCEPTIONS
        )
        # An interrupt has been acknowledged: it goes to the new task, or a fault on the way takes its place. An
        # exception stays until then, as it combines with such a fault (APM vol. 2, 8.2.9).
        vcpu.interrupt_injected = vcpu.nmi_injected = False
        if info & _INFO_HAS_ERROR_CODE:
            error_code = info & 0xFFFF_FFFF
    else:
        reason = REASON_CALL
    next_rip = vcpu.q[V.RIP] if hardware else svm.next_rip(vcpu)
    if next_rip is None:
        vcpu.emulator.report_failure()
        return 0
    rf = abi.X86_EFLAGS_RF if info & _INFO_RF else 0
    return switch(vcpu, selector, reason, error_code, next_rip, rf=rf, external=hardware)


def switch(
    vcpu: Vcpu,
    selector: int,
    reason: int,
    error_code: int | None,
    next_rip: int,
    *,
    rf: int = 0,
    external: bool = False,
) -> int:
    """Save the old task, which goes on at ``next_rip``, and load the new one. Returns what an exit handler does.

    ``error_code``, if any, is pushed on the new task's stack. ``rf`` is RF for the old task's flags. ``external``: an
    event of the processor itself caused the switch, so error codes have their EXT bit. Faults are those of APM
    vol. 2, 12.2.5.
    """
    e = vcpu.emulator
    rflags = vcpu.get_rflags() | rf
    e.begin(None)
    try:
        switch_task(e, selector, reason, error_code, (next_rip, rflags))
        if e.writes:
            raise Unhandleable
    except X86Exception as exception:
        if external and exception.vector != abi.PF_VECTOR and exception.error_code is not None:
            exception.error_code |= _EXT
        inject_emulated_exception(vcpu, exception)
    except (IoNeeded, Unhandleable):
        vcpu.internal_error(abi.KVM_INTERNAL_ERROR_EMULATION, ())
        return 0
    vcpu.b[V.INT_STATE_B] = 0
    return 1


def switch_task(e: Emulator, selector: int, reason: int, error_code: int | None, resume: tuple[int, int]) -> None:
    """Switch; ``resume`` is RIP and RFLAGS of the old task.

    Raises what the switch faults with, and :class:`IoNeeded` or :class:`Unhandleable` without memory.
    """
    vcpu = e.vcpu
    old = vcpu.vmcb.segment(V.TR_OFFSET)
    if selector & 4:
        raise X86Exception(abi.TS_VECTOR if reason == REASON_IRET else abi.GP_VECTOR, selector & 0xFFFC)
    d = segments.fetch_descriptor(e, selector)
    old_d = segments.fetch_descriptor(e, old.selector)
    if d.attrib & V.SEG_S or d.kind not in (1, 3, 9, 11):
        raise gp(d.error)
    wide, old_wide = bool(d.kind & 8), bool(old.attrib & 8)
    if not d.attrib & V.SEG_P or d.limit < (0x67 if wide else 0x2B):
        raise X86Exception(abi.NP_VECTOR if not d.attrib & V.SEG_P else abi.TS_VECTOR, d.error)
    size = 104 if wide else 44
    # Nothing has changed yet, and what changes from here on is memory.
    for start, length in ((d.address, 8), (old_d.address, 8), (old.base, 104 if old_wide else 44), (d.base, size)):
        e.require_memory(start, length)
    data = e.read_linear(d.base, size, implicit=True)

    vcpu.exception.clear()
    if reason in (REASON_IRET, REASON_JMP):
        segments.write_type(e, old_d, old_d.raw & ~_BUSY)
    if reason == REASON_IRET:
        resume = resume[0], resume[1] & ~abi.X86_EFLAGS_NT
    _save(e, old.base, resume, wide=old_wide)
    nested = reason in (REASON_CALL, REASON_GATE)
    if reason != REASON_IRET:
        segments.write_type(e, d, d.raw | _BUSY)
    if nested:
        e.write_linear(d.base, old.selector.to_bytes(2, "little"), implicit=True)
    # The new TSS is in force from here on: faults belong to the new task.
    cr.kvm_set_cr0(vcpu, vcpu.cr0 | abi.X86_CR0_TS)
    vcpu.vmcb.set_segment(V.TR_OFFSET, selector, d.attrib | 2, d.limit, d.base)
    vcpu.guest_dr7 = vcpu.guest_dr7 & ~_DR7_LOCAL
    vcpu.update_dr7()
    _load(e, data, wide=wide)
    if nested:
        vcpu.q[V.RFLAGS] |= abi.X86_EFLAGS_NT
    if error_code is not None:
        e.push(error_code, 4 if wide else 2)
    if wide and data[_TSS_TRAP] & 1:
        queue_exception_p(vcpu, abi.DB_VECTOR, DR6_BT)


def _save(e: Emulator, base: int, resume: tuple[int, int], *, wide: bool) -> None:
    """Save the old task's registers; ``resume`` is its RIP and RFLAGS."""
    vcpu = e.vcpu
    registers = [*resume, *(e.gpr[n] for n in range(8))]
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
