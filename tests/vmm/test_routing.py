# SPDX-License-Identifier: Apache-2.0
"""The PC's GSI routing table."""

from softkvm import abi
from softkvm.vmm.routing import pc_routing


def _targets(gsi: int) -> list[tuple[int, int]]:
    return [(e.u.irqchip.irqchip, e.u.irqchip.pin) for e in pc_routing() if e.gsi == gsi]


def test_the_timer_arrives_at_ioapic_pin_2_and_pic_pin_0() -> None:
    assert _targets(0) == [(abi.KVM_IRQCHIP_PIC_MASTER, 0), (abi.KVM_IRQCHIP_IOAPIC, 2)]


def test_no_other_line_drives_ioapic_pin_2() -> None:
    assert _targets(2) == [(abi.KVM_IRQCHIP_PIC_MASTER, 2)]


def test_isa_interrupts_reach_both_chips_and_the_others_the_ioapic() -> None:
    assert _targets(12) == [(abi.KVM_IRQCHIP_PIC_SLAVE, 4), (abi.KVM_IRQCHIP_IOAPIC, 12)]
    assert _targets(20) == [(abi.KVM_IRQCHIP_IOAPIC, 20)]
