# SPDX-License-Identifier: Apache-2.0
"""The local APIC's registers as the guest sees them: the xAPIC page and the x2APIC MSRs (SDM vol. 3, 11.4.1, 11.12.1).

Each register is a row of ``_READ`` or ``_WRITE``; what is in neither is plain storage (``_STORED``) or does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_ARBPRI,
    APIC_BASE_MSR,
    APIC_DEST_ALLINC,
    APIC_DEST_LOGICAL,
    APIC_DEST_SELF,
    APIC_DFR,
    APIC_DFR_CLUSTER,
    APIC_DM_FIXED,
    APIC_DM_LOWEST,
    APIC_EOI,
    APIC_ESR,
    APIC_ESR_ILLEGAL_REGISTER,
    APIC_ESR_RECEIVE_ILLEGAL_VECTOR,
    APIC_ESR_SEND_ILLEGAL_VECTOR,
    APIC_ICR,
    APIC_ICR2,
    APIC_ICR_BUSY,
    APIC_ID,
    APIC_INT_ASSERT,
    APIC_INT_LEVELTRIG,
    APIC_IRR,
    APIC_ISR,
    APIC_LDR,
    APIC_LVR,
    APIC_LVR_DIRECTED_EOI,
    APIC_LVT_MASKED,
    APIC_LVT_MASKS,
    APIC_LVT_READ_ONLY,
    APIC_LVTT,
    APIC_MODE_MASK,
    APIC_PROCPRI,
    APIC_SELF_IPI,
    APIC_SHORT_MASK,
    APIC_SPIV,
    APIC_SPIV_DIRECTED_EOI,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_TMCCT,
    APIC_TMICT,
    APIC_TMR,
    APIC_VECTOR_MASK,
    X2APIC_ICR_RESERVED_BITS,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.irqchip.lapic import Lapic

_APIC_RRR = 0xC0  # remote read, of the processors up to 1997: reads 0
_U32 = 0xFFFFFFFF
_STORED = (APIC_ID, APIC_LVR, APIC_LDR, APIC_SPIV, APIC_ESR, APIC_TDCR, APIC_DFR, APIC_ICR, APIC_ICR2)
_XAPIC_ONLY = (APIC_ARBPRI, _APIC_RRR, APIC_DFR, APIC_ICR2)


# Reads


def _read_bitmap(name: str, word: int) -> Callable[[Lapic], int]:
    shift = 32 * word
    return lambda apic: getattr(apic, name) >> shift & _U32


def _read_arbpri(apic: Lapic) -> int:
    """SDM 11.6.2.4: the higher of task priority, service and request; with the TPR's subclass only if that wins."""
    tpr = apic.tpr
    requested = max(apic.highest_irr(), 0) & 0xF0
    in_service = max(apic.isr.bit_length() - 1, 0) & 0xF0
    if tpr & 0xF0 >= requested and tpr & 0xF0 > in_service:
        return tpr
    return max(tpr & 0xF0, in_service, requested)


def _read_tpr(apic: Lapic) -> int:
    apic.report_tpr_access(write=False)
    return apic.tpr


_READ: dict[int, Callable[[Lapic], int]] = {
    APIC_TASKPRI: _read_tpr,
    APIC_ARBPRI: _read_arbpri,
    APIC_PROCPRI: lambda apic: apic.ppr,
    _APIC_RRR: lambda apic: 0,
    APIC_EOI: lambda apic: 0,
    APIC_TMICT: lambda apic: apic.timer.tmict,
    APIC_TMCCT: lambda apic: apic.timer.tmcct(),
}
for _word in range(8):
    _READ[APIC_ISR + 16 * _word] = _read_bitmap("isr", _word)
    _READ[APIC_TMR + 16 * _word] = _read_bitmap("tmr", _word)
    _READ[APIC_IRR + 16 * _word] = _read_bitmap("irr", _word)


def _read(apic: Lapic, offset: int) -> int | None:
    """Return the 32-bit register at *offset*; None where there is none."""
    function = _READ.get(offset)
    if function is not None:
        return function(apic)
    if offset in _STORED or offset in apic.lvt_masks:
        return apic.regs[offset >> 2]
    return None


def mmio_read(apic: Lapic, offset: int, size: int) -> int:
    """Read from the page. An access that lies within one register is fine, any other reads 0."""
    shift = offset & 0xF
    if shift + size > 4:
        return 0
    value = _read(apic, offset & ~0xF)
    if value is None:
        apic.set_error(APIC_ESR_ILLEGAL_REGISTER)
        return 0
    return value >> 8 * shift & (1 << 8 * size) - 1


def msr_read(apic: Lapic, index: int) -> int | None:
    """Read an x2APIC MSR; None: #GP, the register can't be read or doesn't exist (SDM table 11-6)."""
    offset = (index - APIC_BASE_MSR) << 4
    if offset in _XAPIC_ONLY or offset == APIC_EOI:
        return None
    if offset == APIC_ICR:
        return apic.regs[APIC_ICR2 >> 2] << 32 | apic.regs[APIC_ICR >> 2]
    return _read(apic, offset)


# Writes


def spiv_mask(apic: Lapic) -> int:
    """Return the bits of the spurious-interrupt vector register that can be set."""
    directed = APIC_SPIV_DIRECTED_EOI if apic.regs[APIC_LVR >> 2] & APIC_LVR_DIRECTED_EOI else 0
    return 0x3FF | directed


def _write_tpr(apic: Lapic, value: int) -> None:
    apic.report_tpr_access(write=True)
    apic.set_tpr(value)


def _write_ldr(apic: Lapic, value: int) -> None:
    apic.regs[APIC_LDR >> 2] = value & 0xFF000000
    apic.apic_map.changed()


def _write_dfr(apic: Lapic, value: int) -> None:
    apic.regs[APIC_DFR >> 2] = value | APIC_DFR_CLUSTER
    apic.apic_map.changed()


def _write_lvt(offset: int) -> Callable[[Lapic, int], None]:
    def write(apic: Lapic, value: int) -> None:
        mask = apic.lvt_masks.get(offset)
        if mask is None:
            apic.set_error(APIC_ESR_ILLEGAL_REGISTER)
            return
        value &= mask
        if not apic.sw_enabled:
            value |= APIC_LVT_MASKED
        apic.regs[offset >> 2] = value
        if offset == APIC_LVTT:
            apic.timer.set_mode(value)

    return write


def _write_tdcr(apic: Lapic, value: int) -> None:
    apic.regs[APIC_TDCR >> 2] = value & 0b1011
    apic.timer.set_divide(value)


def _write_icr(apic: Lapic, value: int) -> None:
    apic.regs[APIC_ICR >> 2] = value & ~APIC_ICR_BUSY
    dest = apic.regs[APIC_ICR2 >> 2]
    send_ipi(apic, value, dest if apic.x2apic_mode else dest >> 24)


def _write_icr2(apic: Lapic, value: int) -> None:
    apic.regs[APIC_ICR2 >> 2] = value & 0xFF000000


def _self_ipi(apic: Lapic, value: int) -> None:
    """Send the vector to this APIC itself; one that is reserved is an error of both sides (SDM 11.12.11, 11.5.3)."""
    vector = value & APIC_VECTOR_MASK
    if vector < 16:
        apic.set_error(APIC_ESR_SEND_ILLEGAL_VECTOR | APIC_ESR_RECEIVE_ILLEGAL_VECTOR)
    else:
        apic.accept_irq(APIC_DM_FIXED, vector)


_WRITE: dict[int, Callable[[Lapic, int], None]] = {
    APIC_ID: lambda apic, value: apic.set_xapic_id(value >> 24),
    APIC_TASKPRI: _write_tpr,
    APIC_EOI: lambda apic, value: apic.eoi(),
    APIC_LDR: _write_ldr,
    APIC_DFR: _write_dfr,
    APIC_SPIV: lambda apic, value: apic.set_spiv(value & spiv_mask(apic)),
    APIC_ESR: lambda apic, value: apic.latch_errors(),
    APIC_ICR: _write_icr,
    APIC_ICR2: _write_icr2,
    APIC_TMICT: lambda apic, value: apic.timer.set_tmict(value),
    APIC_TDCR: _write_tdcr,
    **{offset: _write_lvt(offset) for offset in APIC_LVT_MASKS},
}

_READ_ONLY = frozenset({APIC_LVR, APIC_ARBPRI, APIC_PROCPRI, _APIC_RRR, APIC_TMCCT}) | {
    base + 16 * word for base in (APIC_ISR, APIC_TMR, APIC_IRR) for word in range(8)
}

# The x2APIC registers that can be written, with the bits that must be 0 (SDM table 11-6 and the registers' figures).
# The LVT entries are in Lapic.lvt_masks, the ICR has 64 bits.
_X2APIC_RESERVED: dict[int, int] = {
    APIC_TASKPRI: ~0xFF,
    APIC_EOI: ~0,
    APIC_ESR: ~0,
    APIC_TMICT: ~_U32,
    APIC_TDCR: ~0b1011,
    APIC_SELF_IPI: ~APIC_VECTOR_MASK,
}


def mmio_write(apic: Lapic, offset: int, value: int) -> None:
    """Write the 32-bit register at *offset*, a multiple of 16, of the page."""
    function = _WRITE.get(offset)
    if function is not None:
        function(apic, value)
    elif offset not in _READ_ONLY:
        apic.set_error(APIC_ESR_ILLEGAL_REGISTER)


def msr_write(apic: Lapic, index: int, value: int) -> bool:
    """Write an x2APIC MSR; False: #GP, for a reserved bit or a register that can't be written."""
    offset = (index - APIC_BASE_MSR) << 4
    if offset == APIC_EOI:
        if value:
            return False
        apic.eoi()
        return True
    if offset == APIC_ICR:
        return x2apic_icr_write(apic, value)
    reserved = _X2APIC_RESERVED.get(offset)
    if reserved is None:
        if offset in apic.lvt_masks:
            reserved = ~(apic.lvt_masks[offset] | APIC_LVT_READ_ONLY)
        elif offset == APIC_SPIV:
            reserved = ~spiv_mask(apic)
        else:
            return False
    if value & reserved:
        return False
    if offset == APIC_SELF_IPI:
        _self_ipi(apic, value)
    else:
        _WRITE[offset](apic, value)
    return True


def x2apic_icr_write(apic: Lapic, value: int) -> bool:
    """Write the 64-bit ICR of x2APIC mode; False: a reserved bit is set."""
    if value & X2APIC_ICR_RESERVED_BITS:
        return False
    apic.regs[APIC_ICR2 >> 2] = value >> 32
    apic.regs[APIC_ICR >> 2] = value & ~APIC_ICR_BUSY & _U32
    send_ipi(apic, value & _U32, value >> 32)
    return True


def write_nodecode(apic: Lapic, offset: int) -> None:
    """Act on a write of the register at *offset* that the processor has done already (``kvm_apic_write_nodecode``)."""
    mmio_write(apic, offset, apic.regs[offset >> 2])
    apic.regs[offset >> 2] = _read(apic, offset) or 0


def ipi_targets(apic: Lapic, icr: int, dest: int) -> tuple[Lapic, ...]:
    """Return the enabled APICs that the low half of an ICR and *dest* name, before arbitration."""
    apic_map = apic.apic_map
    shorthand = icr & APIC_SHORT_MASK
    if not shorthand:
        return apic_map.destinations(dest, icr & APIC_DEST_LOGICAL != 0, True)
    if shorthand == APIC_DEST_SELF:
        return (apic,)
    return apic_map.enabled(but=None if shorthand == APIC_DEST_ALLINC else apic)


def send_ipi(apic: Lapic, icr: int, dest: int) -> None:
    """Send what the low half of the ICR says to *dest* (SDM 11.6.1). It is delivered on return."""
    mode = icr & APIC_MODE_MASK
    vector = icr & APIC_VECTOR_MASK
    if vector < 16 and mode in (APIC_DM_FIXED, APIC_DM_LOWEST):
        apic.set_error(APIC_ESR_SEND_ILLEGAL_VECTOR)
        return
    targets = ipi_targets(apic, icr, dest)
    if mode == APIC_DM_LOWEST:
        targets = apic.apic_map.lowest_priority(targets, vector)
    level, level_triggered = icr & APIC_INT_ASSERT != 0, icr & APIC_INT_LEVELTRIG != 0
    for target in targets:
        target.accept_irq(mode, vector, level, level_triggered, apic.vcpu)
