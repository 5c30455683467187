# SPDX-License-Identifier: Apache-2.0
"""The machine's GSI routing table: what the MADT says, told to KVM (KVM API, KVM_SET_GSI_ROUTING).

KVM's own default routes GSI 0 to IOAPIC pin 0. On a PC the timer arrives at pin 2, as the MADT's interrupt source
override has it.
"""

from __future__ import annotations

from softkvm import abi

_PIC_PINS = 8
_PICS = 2
IOAPIC_PINS = 24
TIMER_PIN = 2


def _entry(gsi: int, chip: int, pin: int) -> abi.kvm_irq_routing_entry:
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry


def pc_routing() -> list[abi.kvm_irq_routing_entry]:
    """Return a PC's table: ISA interrupts to both PICs, all pins to the IOAPIC, the timer to its pin 2."""
    entries = [
        _entry(gsi, (abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE)[gsi // _PIC_PINS], gsi % _PIC_PINS)
        for gsi in range(_PIC_PINS * _PICS)
    ]
    ioapic = [
        _entry(gsi, abi.KVM_IRQCHIP_IOAPIC, TIMER_PIN if gsi == 0 else gsi)
        for gsi in range(IOAPIC_PINS)
        if gsi != TIMER_PIN
    ]
    return entries + ioapic
