# SPDX-License-Identifier: Apache-2.0
"""Save and restore of a local APIC: KVM_GET_LAPIC and KVM_SET_LAPIC (KVM API 4.57, 4.58)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from softkvm.abi import KVM_APIC_REG_SIZE
from softkvm.kvm.x86.irqchip import lapic_regs
from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_ID,
    APIC_IRR,
    APIC_ISR,
    APIC_LVR,
    APIC_LVTT,
    APIC_PROCPRI,
    APIC_SPIV,
    APIC_TASKPRI,
    APIC_TDCR,
    APIC_TMCCT,
    APIC_TMICT,
    APIC_TMR,
)

if TYPE_CHECKING:
    from softkvm.kvm.x86.irqchip.lapic import Lapic

#: Where the architecture has what is one integer of 256 bits while the machine runs: eight registers, 16 bytes apart.
_BITMAPS: Final = tuple(
    (slice(offset >> 2, offset + 8 * 16 >> 2, 16 >> 2), name)
    for offset, name in ((APIC_ISR, "isr"), (APIC_TMR, "tmr"), (APIC_IRR, "irr"))
)


def get_state(apic: Lapic) -> bytes:
    """Return the registers as KVM_GET_LAPIC does (``kvm_lapic_state``)."""
    state = bytearray(apic.page[:KVM_APIC_REG_SIZE])
    regs = memoryview(state).cast("I")
    for words, name in _BITMAPS:
        bits: int = getattr(apic, name)
        regs[words] = memoryview(bits.to_bytes(32, "little")).cast("I")
    regs[APIC_PROCPRI >> 2] = apic.ppr
    regs[APIC_TMICT >> 2] = apic.timer.tmict
    regs[APIC_TMCCT >> 2] = apic.timer.tmcct()
    if apic.x2apic_mode and not apic.apic_map.x2apic_format:
        regs[APIC_ID >> 2] = apic.vcpu_id << 24 & 0xFFFFFFFF
    return bytes(state)


def set_state(apic: Lapic, state: bytes) -> None:
    """Load the registers as KVM_SET_LAPIC does; EINVAL for an x2APIC ID that isn't the vCPU's."""
    if len(state) != KVM_APIC_REG_SIZE:
        raise OSError(errno.EINVAL, f"kvm_lapic_state: {len(state)} bytes, expected {KVM_APIC_REG_SIZE}")
    if apic.x2apic_mode:
        (apic_id,) = struct.unpack_from("<I", state, APIC_ID)
        expected = apic.vcpu_id if apic.apic_map.x2apic_format else apic.vcpu_id << 24 & 0xFFFFFFFF
        if apic_id != expected:
            raise OSError(errno.EINVAL, f"kvm_lapic_state: x2APIC ID {apic_id:#x}, expected {expected:#x}")
    regs = apic.regs
    version = regs[APIC_LVR >> 2]
    apic.timer.reset()
    apic.page[:KVM_APIC_REG_SIZE] = state
    regs[APIC_LVR >> 2] = version
    if apic.x2apic_mode:
        apic.set_x2apic_id()
    for offset, mask in apic.lvt_masks.items():
        regs[offset >> 2] &= mask
    regs[APIC_TASKPRI >> 2] &= 0xFF
    apic.load_spiv(regs[APIC_SPIV >> 2] & lapic_regs.spiv_mask(apic))
    with apic.lock:
        for words, name in _BITMAPS:
            setattr(apic, name, int.from_bytes(regs[words].tobytes(), "little"))
        apic.pending_esr = 0
    apic.timer.set_mode(regs[APIC_LVTT >> 2])
    apic.timer.set_divide(regs[APIC_TDCR >> 2])
    apic.timer.restore(regs[APIC_TMICT >> 2], regs[APIC_TMCCT >> 2])
    apic.update_ppr()
    apic.apic_map.changed()
    apic.vcpu.request_event()
