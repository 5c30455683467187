# SPDX-License-Identifier: Apache-2.0
"""Local APICs of vCPUs that the processor can virtualize (AVIC; APM vol. 2, 15.29).

The registers lie in the vCPU's backing page. While that is in force (:class:`AvicLapic`), IRR, ISR, TMR and PPR are
there, too: the processor takes interrupts from them, and other processors request some. While it is inhibited
(:class:`InhibitedLapic`) they are what any :class:`~.lapic.Lapic` has. An APIC changes from one to the other on its
vCPU's thread, or while that stands, with the lock held: a message goes where they are then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_IRR,
    APIC_ISR,
    APIC_PROCPRI,
    APIC_TMICT,
    APIC_TMR,
)
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.irqchip.seams import ApicVcpu
from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi

if TYPE_CHECKING:
    from softkvm._softcpu import Machine, Page
    from softkvm.kvm.x86.irqchip.apic_map import ApicMap

_IRR: Final = slice(APIC_IRR, APIC_IRR + 8 * 16)


class ApicvVcpu(ApicVcpu, Protocol):
    """A vCPU, as its virtualized APIC sees it."""

    def ring(self, sender: Any = None) -> None:
        """Have the processor look at the IRR, and wake a vCPU that is halted. Any thread."""

    def request_apicv_update(self) -> None:
        """Software has enabled or disabled the APIC: only while it is enabled it is virtualized."""


class ApicvLapic(Lapic):
    """One that may be virtualized: what is the same whether it is or not."""

    vcpu: ApicvVcpu

    def __init__(self, vcpu: ApicvVcpu, apic_map: ApicMap, machine: Machine, page: Page) -> None:
        self.machine = machine
        self.backing_page = page.address
        self.sw_enabled = False
        super().__init__(vcpu, apic_map, page=memoryview(page).cast("B"))

    def deliver_interrupt(
        self, delivery_mode: int, vector: int, level_triggered: bool, sender: ApicVcpu | None
    ) -> None:
        """As :meth:`Lapic.deliver_interrupt`; the doorbell is enough where the processor looks at the IRR by itself."""
        with self.lock:
            active = self.apicv_active
            self.request_vector(vector, level_triggered)
        if active:
            self.vcpu.ring(sender)
        else:
            self.vcpu.request_event(sender)

    def load_spiv(self, value: int) -> None:
        """Messages to an APIC that software has disabled are dropped, which the processor does not."""
        enabled = self.sw_enabled
        super().load_spiv(value)
        if self.sw_enabled != enabled:
            self.vcpu.request_apicv_update()


class InhibitedLapic(ApicvLapic):
    """One whose vCPU runs without AVIC now."""

    def activate(self) -> None:
        """Let the processor have the registers."""
        with self.lock:
            bitmaps = self.irr, self.isr, self.tmr
            self.__class__ = AvicLapic  # type: ignore[assignment]
            self.irr, self.isr, self.tmr = bitmaps
        self.update_ppr()
        self.regs[APIC_TMICT >> 2] = self.timer.tmict


def _bitmap(offset: int) -> Any:
    words = slice(offset >> 2, offset + 8 * 16 >> 2, 16 >> 2)

    def get(apic: AvicLapic) -> int:
        return int.from_bytes(apic.regs[words].tobytes(), "little")

    def put(apic: AvicLapic, bits: int) -> None:
        apic.regs[words] = memoryview(bits.to_bytes(32, "little")).cast("I")

    return property(get, put)


class AvicLapic(ApicvLapic):
    """One whose registers the processor works on.

    Bits of the IRR are set atomically (:meth:`request_vector`); everything else is the vCPU's thread's, while the
    processor is not in the guest.
    """

    apicv_active = True

    irr = _bitmap(APIC_IRR)
    isr = _bitmap(APIC_ISR)
    tmr = _bitmap(APIC_TMR)

    @property
    def ppr(self) -> int:
        """The processor priority, which the processor keeps up to date."""
        return self.regs[APIC_PROCPRI >> 2]

    @ppr.setter
    def ppr(self, value: int) -> None:
        self.regs[APIC_PROCPRI >> 2] = value

    def deactivate(self) -> None:
        """Take the registers back; no processor reaches them through the physical APIC ID table any more."""
        with self.lock:
            bitmaps, ppr = (self.irr, self.isr, self.tmr), self.ppr
            self.irr = self.isr = self.tmr = 0
            self.__class__ = InhibitedLapic  # type: ignore[assignment]
            self.irr, self.isr, self.tmr = bitmaps
            self.ppr = ppr

    def request_vector(self, vector: int, level_triggered: bool) -> None:
        """Set the bit in IRR, and in TMR for a level-triggered interrupt: its EOI exits. The lock is held."""
        at = 16 * (vector >> 5)
        bit = 1 << (vector & 31)
        regs, tmr = self.regs, APIC_TMR + at >> 2
        if level_triggered:
            regs[tmr] |= bit
        elif regs[tmr] & bit:
            regs[tmr] &= ~bit
        self.machine.pte_or(self.backing_page + APIC_IRR + at, bit)

    def highest_irr(self) -> int:
        """As :meth:`Lapic.highest_irr`; looked at whenever the vCPU wakes, so not made of :attr:`irr`."""
        bits = int.from_bytes(self.page[_IRR], "little")
        top = bits.bit_length() - 1
        return top >> 7 << 5 | top & 31 if bits else -1  # 32 bits each 16 bytes

    def has_interrupt(self) -> int:
        """As :meth:`Lapic.has_interrupt`."""
        vector = self.highest_irr()
        return vector if vector >= 0 and vector & 0xF0 > self.ppr and self.hw_enabled else -1

    def has_injectable(self) -> int:
        """None: the processor takes interrupts from the IRR by itself."""
        return -1

    def get_interrupt(self) -> int:
        """None, see :meth:`has_injectable`."""
        return -1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """An access that KVM emulates; the processor reads the timer's count from the page."""
        super().mmio_write(offset, size, value)
        self.regs[APIC_TMICT >> 2] = self.timer.tmict

    def msr_write(self, index: int, value: int) -> bool:
        """The same for an MSR."""
        done = super().msr_write(index, value)
        self.regs[APIC_TMICT >> 2] = self.timer.tmict
        return done


class ApicvPvEoi(PvEoi):
    """Paravirtual EOI of a vCPU with such an APIC: not offered where an EOI costs no exit anyway.

    The bit in the guest's memory would stand for whatever interrupt the processor has delivered since.
    """

    __slots__ = ()

    def sync_to_guest(self) -> None:
        """Offer the end of the interrupt in service while AVIC is inhibited."""
        if not self._lapic.apicv_active:
            super().sync_to_guest()
