# SPDX-License-Identifier: Apache-2.0
"""The TPR in the guest's memory (KVM_SET_VAPIC_ADDR): firmware patches a 32-bit guest's accesses of the APIC to use it.

Byte 0 is the TPR. Bytes 1 and 3 tell the guest whether lowering it makes an interrupt deliverable, so that it has to
ask for it (KVM_HC_VAPIC_POLL_IRQ): the priority class in service, and the highest requested vector.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softkvm.kvm.x86.irqchip.apicdef import KVM_APIC_CHECK_VAPIC

if TYPE_CHECKING:
    from softkvm.kvm.x86.irqchip.lapic import Lapic

_WORD: Final = struct.Struct("<I")


class Vapic:
    """One vCPU's; its thread only. *read_guest* and *write_guest* access guest-physical memory."""

    __slots__ = ("_lapic", "_read_guest", "_write_guest", "address")

    def __init__(
        self,
        lapic: Lapic,
        read_guest: Callable[[int, int], bytes | None],
        write_guest: Callable[[int, bytes], bool],
    ) -> None:
        self._lapic = lapic
        self._read_guest = read_guest
        self._write_guest = write_guest
        self.address = 0

    def set_address(self, address: int) -> bool:
        """Begin to use the page, or with 0 end it; False, with nothing changed, where there is no memory."""
        if address and self._read_guest(address, _WORD.size) is None:
            return False
        self.address = address
        if address:
            self._lapic.attention |= KVM_APIC_CHECK_VAPIC
        else:
            self._lapic.attention &= ~KVM_APIC_CHECK_VAPIC
        return True

    def sync_to_guest(self) -> None:
        """Tell the guest, on the way in after an event (``kvm_lapic_sync_to_vapic``)."""
        lapic = self._lapic
        if not (lapic.hw_enabled and lapic.sw_enabled):
            return
        in_service = max(lapic.isr.bit_length() - 1, 0) & 0xF0
        requested = max(lapic.highest_irr(), 0)
        self._write_guest(self.address, _WORD.pack(lapic.tpr & 0xFF | in_service << 8 | requested << 24))

    def sync_from_guest(self) -> None:
        """Take the guest's TPR, after an exit (``kvm_lapic_sync_from_vapic``)."""
        data = self._read_guest(self.address, _WORD.size)
        if data is not None and data[0] != self._lapic.tpr:
            self._lapic.set_tpr(data[0])
