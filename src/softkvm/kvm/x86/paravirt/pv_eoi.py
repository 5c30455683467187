# SPDX-License-Identifier: Apache-2.0
"""Paravirtual EOI: the guest ends an interrupt by clearing a bit in its memory (msr.rst, MSR_KVM_PV_EOI_EN).

Before the vCPU enters the guest, :meth:`PvEoi.sync_to_guest` sets the bit if the end of the interrupt in service needs
nothing but to be noted; after the exit, :meth:`PvEoi.sync_from_guest` sees whether the guest has cleared it.
"""

from collections.abc import Callable
from typing import Final

from softkvm.abi import KVM_PV_EOI_DISABLED, KVM_PV_EOI_ENABLED
from softkvm.kvm.x86.irqchip.apicdef import KVM_APIC_PV_EOI_PENDING
from softkvm.kvm.x86.irqchip.lapic import Lapic

_KVM_MSR_ENABLED: Final = 1
_SET: Final = bytes([KVM_PV_EOI_ENABLED])
_CLEAR: Final = bytes([KVM_PV_EOI_DISABLED])

ReadGuest = Callable[[int, int], bytes | None]
WriteGuest = Callable[[int, bytes], bool]


class PvEoi:
    """One vCPU's paravirtual EOI; its thread only. *read_guest* and *write_guest* access guest-physical memory."""

    __slots__ = ("_gpa", "_lapic", "_read_guest", "_write_guest", "msr")

    def __init__(self, lapic: Lapic, read_guest: ReadGuest, write_guest: WriteGuest) -> None:
        self._lapic = lapic
        self._read_guest = read_guest
        self._write_guest = write_guest
        self._gpa = 0
        self.msr = 0

    @property
    def pending(self) -> bool:
        """The guest may end the interrupt in service in its memory."""
        return bool(self._lapic.attention & KVM_APIC_PV_EOI_PENDING)

    @pending.setter
    def pending(self, pending: bool) -> None:
        if pending:
            self._lapic.attention |= KVM_APIC_PV_EOI_PENDING
        else:
            self._lapic.attention &= ~KVM_APIC_PV_EOI_PENDING

    def set_msr(self, value: int) -> bool:
        """Write MSR_KVM_PV_EOI_EN: a 4-byte aligned address, and bit 0 to enable.

        False stands for #GP: for an address that isn't aligned, or has no memory.
        """
        gpa = value & ~_KVM_MSR_ENABLED
        if gpa & 0b11 or (value & _KVM_MSR_ENABLED and self._read_guest(gpa, 1) is None):
            return False
        self.msr = value
        self._gpa = gpa
        return True

    def reset(self) -> None:
        """Stop, as after RESET or INIT."""
        self.msr = self._gpa = 0
        self.pending = False

    def sync_to_guest(self) -> None:
        """Offer the end of the interrupt in service to the guest, on the way in."""
        lapic = self._lapic
        isr = lapic.isr
        if not isr or lapic.irr or not self.msr & _KVM_MSR_ENABLED:
            return  # with another one requested, the EOI must be seen at once
        target = lapic.apic_map.eoi_target
        if target is not None and target.handled_vectors >> isr.bit_length() - 1 & 1:
            return
        self.pending = self._write_guest(self._gpa, _SET)

    def sync_from_guest(self) -> None:
        """Take the guest's EOI, or withdraw the offer, after an exit."""
        if not self.pending:
            return
        self.pending = False
        byte = self._read_guest(self._gpa, 1)
        if byte is None or byte[0] & KVM_PV_EOI_ENABLED:
            self._write_guest(self._gpa, _CLEAR)
        else:
            self._lapic.eoi()
