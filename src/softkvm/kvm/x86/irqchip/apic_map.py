# SPDX-License-Identifier: Apache-2.0
"""Which local APICs an interrupt message is for, and its delivery to them (SDM vol. 3, 11.6.2).

A destination is looked up once and then remembered, until some APIC changes its mode, its ID or its logical address.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_BROADCAST,
    APIC_DM_LOWEST,
    X2APIC_BROADCAST,
)
from softkvm.kvm.x86.irqchip.seams import IRQ_IGNORED, EoiTarget, LapicIrq

if TYPE_CHECKING:
    from softkvm.kvm.x86.irqchip.lapic import Lapic

_CACHE_LIMIT = 4096  # the guest chooses destinations


class ApicMap:
    """All local APICs of a virtual machine, and what they have in common.

    ``vector_hashing`` picks the target of a lowest-priority message by its vector, as KVM's module parameter does;
    otherwise such messages go round.
    """

    def __init__(self) -> None:
        self.lapics: tuple[Lapic, ...] = ()
        self.eoi_target: EoiTarget | None = None
        self.directed_eoi = False  # the IOAPIC has an EOI register: one of userspace's may, KVM's has none
        self.x2apic_format = False  # KVM_X2APIC_API_USE_32BIT_IDS
        self.x2apic_broadcast_quirk_disabled = False  # KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        self.lint0_reenabled = True  # KVM_X86_QUIRK_LINT0_REENABLED
        self.mmio_hole = True  # KVM_X86_QUIRK_LAPIC_MMIO_HOLE
        self.bus_cycle_ns = 1  # KVM_CAP_X86_APIC_BUS_CYCLES_NS
        self.min_timer_period_us = 200  # the module parameter
        self.vector_hashing = True
        self.bsp_vcpu_id = 0  # KVM_SET_BOOT_CPU_ID
        self.on_change: Callable[[], None] | None = None  # called when destinations may be others
        self._lock = threading.Lock()
        self._cache: dict[tuple[int, bool, bool], tuple[Lapic, ...]] = {}

    def add(self, lapic: Lapic) -> None:
        """Bring the APIC of a new vCPU onto the bus."""
        with self._lock:
            self.lapics = (*self.lapics, lapic)
        self.changed()

    def remove(self, lapic: Lapic) -> None:
        """Take the APIC of a vCPU that never ran off the bus."""
        with self._lock:
            self.lapics = tuple(other for other in self.lapics if other is not lapic)
        self.changed()

    def changed(self) -> None:
        """Forget the destinations found so far: an APIC has another mode, ID or logical address."""
        self._cache = {}
        if self.on_change is not None:
            self.on_change()

    def destinations(self, dest: int, logical: bool, ipi: bool) -> tuple[Lapic, ...]:
        """Return the enabled APICs that *dest* names; *ipi* tells a processor's message from a device's."""
        cache = self._cache
        key = (dest, logical, ipi)
        found = cache.get(key)
        if found is None:
            found = tuple(apic for apic in self.lapics if apic.hw_enabled and self._matches(apic, *key))
            if len(cache) >= _CACHE_LIMIT:
                self.changed()
            else:
                cache[key] = found
        return found

    def _matches(self, apic: Lapic, dest: int, logical: bool, ipi: bool) -> bool:
        if apic.x2apic_mode:
            if not ipi and dest == APIC_BROADCAST and not self.x2apic_broadcast_quirk_disabled:
                return True  # a device has only 8 bits to say "all"
            if dest == X2APIC_BROADCAST:
                return True
        elif dest == APIC_BROADCAST:
            return True
        return apic.matches_logical(dest) if logical else apic.matches_physical(dest)

    def enabled(self, but: Lapic | None = None) -> tuple[Lapic, ...]:
        """Return the APICs that are there for a broadcast, without *but*."""
        return tuple(apic for apic in self.lapics if apic.hw_enabled and apic is not but)

    def lowest_priority(self, targets: tuple[Lapic, ...], vector: int) -> tuple[Lapic, ...]:
        """Arbitrate a lowest-priority message among *targets*: one of those that software has enabled."""
        candidates = [apic for apic in targets if apic.sw_enabled]
        if not candidates:
            return ()
        if self.vector_hashing:
            return (candidates[vector % len(candidates)],)
        winner = min(candidates, key=lambda apic: apic.arb_prio)
        winner.arb_prio += 1
        return (winner,)

    def deliver(self, irq: LapicIrq) -> int:
        """Deliver *irq*, a message of a device, to the APICs it is for.

        Returns how many accepted it, or IRQ_IGNORED with nobody there.
        """
        targets = self.destinations(irq.dest, irq.logical, False)
        if irq.delivery_mode == APIC_DM_LOWEST or irq.redirection_hint:
            targets = self.lowest_priority(targets, irq.vector)
        delivered = 0
        for apic in targets:
            delivered += apic.accept_irq(irq.delivery_mode, irq.vector, irq.level, irq.level_triggered)
        return delivered if targets else IRQ_IGNORED
