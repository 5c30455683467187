# SPDX-License-Identifier: Apache-2.0
"""KVM_HC_SEND_IPI: one hypercall for an IPI to many processors (Documentation/virt/kvm/x86/hypercalls.rst, 6)."""

from softkvm.abi import KVM_EINVAL
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_DEST_LOGICAL,
    APIC_INT_ASSERT,
    APIC_INT_LEVELTRIG,
    APIC_MODE_MASK,
    APIC_SHORT_MASK,
    APIC_VECTOR_MASK,
)
from softkvm.kvm.x86.irqchip.seams import LapicIrq


def pv_send_ipi(apic_map: ApicMap, bitmap_low: int, bitmap_high: int, lowest: int, icr: int, *, op_64_bit: bool) -> int:
    """Send what *icr* says to the APIC IDs *lowest* + n, for the bits n of the bitmap.

    *bitmap_high* goes on where *bitmap_low* ends: at 64 bits, or 32 for a guest that is not in 64-bit mode. Returns the
    hypercall's result: how many processors took it, or -KVM_EINVAL for an *icr* with a destination of its own.
    """
    if icr & (APIC_DEST_LOGICAL | APIC_SHORT_MASK):
        return -KVM_EINVAL
    width = 64 if op_64_bit else 32
    limit = (1 << width) - 1
    bitmap = bitmap_low & limit | (bitmap_high & limit) << width
    ids = {lapic.vcpu_id: lapic for lapic in apic_map.enabled()}
    message = LapicIrq(
        vector=icr & APIC_VECTOR_MASK,
        delivery_mode=icr & APIC_MODE_MASK,
        level=icr & APIC_INT_ASSERT != 0,
        level_triggered=icr & APIC_INT_LEVELTRIG != 0,
    )
    delivered = 0
    while bitmap:
        bit = (bitmap & -bitmap).bit_length() - 1
        bitmap &= bitmap - 1
        lapic = ids.get(lowest + bit)
        if lapic is not None:
            delivered += lapic.accept_irq(message.delivery_mode, message.vector, message.level, message.level_triggered)
    return delivered
