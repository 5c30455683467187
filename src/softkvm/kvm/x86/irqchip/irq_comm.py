# SPDX-License-Identifier: Apache-2.0
"""GSI routing: from a line's number or a message to the chips (KVM API 4.24, 4.52, 4.70).

The table is replaced as a whole: a thread that raises a line sees the old one or the new one.
"""

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from softkvm.abi import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQ_ROUTING_XEN_EVTCHN,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
    kvm_irq_routing_entry,
    kvm_irq_routing_xen_evtchn,
    kvm_msi,
)
from softkvm.abi.sizes import Size
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.irqchip import KVM_USERSPACE_IRQ_SOURCE_ID, AckNotifier
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicdef import APIC_MODE_MASK
from softkvm.kvm.x86.irqchip.i8259 import Pic
from softkvm.kvm.x86.irqchip.ioapic import IoApic
from softkvm.kvm.x86.irqchip.seams import IRQ_IGNORED, LapicIrq, MaskNotifier

KVM_MAX_IRQ_ROUTES: Final = 4096
ROUTES: Final = Size("routes of a VM", KVM_MAX_IRQ_ROUTES, errno.EINVAL, where=__name__)

_PIC_PINS: Final = 8  # of one chip
_PINS: Final = {
    KVM_IRQCHIP_PIC_MASTER: _PIC_PINS,
    KVM_IRQCHIP_PIC_SLAVE: _PIC_PINS,
    KVM_IRQCHIP_IOAPIC: KVM_IOAPIC_NUM_PINS,
}

_Target = Callable[[int, int], int]  # (source, level) -> as IrqRouting.set_gsi returns
Msi = tuple[int, int, int]
"""Address low, address high, data."""


def msi_message(msi: Msi, x2apic_format: bool) -> LapicIrq:
    """Decode an MSI (SDM vol. 3, 11.11). In *x2apic_format* the high address holds bits 8..31 of the destination."""
    address_lo, address_hi, data = msi
    dest = address_lo >> 12 & 0xFF
    if x2apic_format:
        dest |= address_hi & 0xFFFFFF00
    return LapicIrq(
        vector=data & 0xFF,
        delivery_mode=data & APIC_MODE_MASK,
        logical=address_lo & 1 << 2 != 0,
        level_triggered=data & 1 << 15 != 0,
        dest=dest,
        redirection_hint=address_lo & 1 << 3 != 0,
    )


def irqchip_entry(gsi: int, irqchip: int, pin: int) -> kvm_irq_routing_entry:
    """Return the routing entry from *gsi* to a pin of an in-kernel chip."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = irqchip
    entry.u.irqchip.pin = pin
    return entry


def default_routing() -> list[kvm_irq_routing_entry]:
    """Return the table that KVM_CREATE_IRQCHIP sets up: GSI n to IOAPIC pin n, and up to 15 to the PICs too."""
    entries = [irqchip_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(KVM_IOAPIC_NUM_PINS)]
    entries += [irqchip_entry(gsi, KVM_IRQCHIP_PIC_MASTER + gsi // 8, gsi % 8) for gsi in range(16)]
    return entries


def _no_event_channels(target: kvm_irq_routing_xen_evtchn) -> _Target:
    raise kvm_error(errno.EINVAL, "there are no event channels")


class IrqRouting:
    """The GSI routing table of a virtual machine, and the notifiers of its lines.

    Without *pic* and *ioapic* (split irqchip) only messages can be routed.
    """

    def __init__(self, apic_map: ApicMap, pic: Pic | None = None, ioapic: IoApic | None = None) -> None:
        self._map = apic_map
        self._pic = pic
        self._ioapic = ioapic
        self._targets: dict[int, tuple[_Target, ...]] = {}
        self._gsi_of_pin: dict[tuple[int, int], int] = {}
        self._msis: dict[int, Msi] = {}
        #: Routes to sources of SynICs (Hyper-V): index of the virtual processor, and the source; by GSI.
        self.sints: dict[int, tuple[int, int]] = {}
        #: Raises a source; the VM's, which has the SynICs.
        self.set_sint: Callable[[int, int], int] = lambda vp_index, sint: IRQ_IGNORED
        #: Returns what a route to one of Xen's event channels does, EINVAL for none; the VM's, which has them.
        self.evtchn_target: Callable[[kvm_irq_routing_xen_evtchn], _Target] = _no_event_channels
        self._ack_notifiers: dict[int, tuple[AckNotifier, ...]] = {}
        self._mask_notifiers: dict[int, tuple[MaskNotifier, ...]] = {}
        self.on_change: list[Callable[[], None]] = []  # called after a new table is in force

    # The table

    def set_routing(self, entries: Iterable[kvm_irq_routing_entry]) -> None:
        """Replace the table; EINVAL, with the old one in force, for an entry that is not valid."""
        entries = list(entries)
        ROUTES.check(len(entries), called="nr")
        targets: defaultdict[int, list[_Target]] = defaultdict(list)
        chips: defaultdict[int, list[int | None]] = defaultdict(list)  # by GSI; None is not a chip
        gsi_of_pin: dict[tuple[int, int], int] = {}
        msis: dict[int, Msi] = {}
        sints: dict[int, tuple[int, int]] = {}
        for entry in entries:
            gsi = entry.gsi
            ROUTES.index(gsi, called="gsi")
            flags = KVM_MSI_VALID_DEVID if entry.type == KVM_IRQ_ROUTING_MSI else 0  # which x86 has no use for
            if entry.flags & ~flags:
                raise kvm_error(errno.EINVAL, f"flags of GSI {gsi}: {entry.flags:#x}, expected {flags}")
            chip = entry.u.irqchip.irqchip if entry.type == KVM_IRQ_ROUTING_IRQCHIP else None
            if chip in chips[gsi] or (chips[gsi] and None in (chip, chips[gsi][0])):
                raise kvm_error(errno.EINVAL, f"gsi: {gsi} is routed twice to one chip, or to a chip and a message")
            chips[gsi].append(chip)
            if chip is not None:
                pin = entry.u.irqchip.pin
                targets[gsi].append(self._chip_target(gsi, chip, pin))
                gsi_of_pin[chip, pin] = gsi
            elif entry.type == KVM_IRQ_ROUTING_HV_SINT:
                sints[gsi] = entry.u.hv_sint.vcpu, entry.u.hv_sint.sint
                targets[gsi].append(self._sint_target(*sints[gsi]))
            elif entry.type == KVM_IRQ_ROUTING_XEN_EVTCHN:
                targets[gsi].append(self.evtchn_target(entry.u.xen_evtchn))
            else:
                msis[gsi] = self._routed_msi(gsi, entry)
                targets[gsi].append(self._msi_target(msis[gsi]))
        self._gsi_of_pin = gsi_of_pin
        self._msis = msis
        self.sints = sints
        self._targets = {gsi: tuple(found) for gsi, found in targets.items()}
        for notify in self.on_change:
            notify()

    def _chip_target(self, gsi: int, chip: int, pin: int) -> _Target:
        pins = _PINS.get(chip)
        if pins is None or pin >= pins:
            raise kvm_error(errno.EINVAL, f"GSI {gsi}: irqchip {chip} pin {pin}, expected 0-1 pin 0-7 or 2 pin 0-23")
        if chip == KVM_IRQCHIP_IOAPIC:
            ioapic = self._ioapic
            if ioapic is None:
                raise kvm_error(errno.EINVAL, f"GSI {gsi}: there is no in-kernel IOAPIC")
            return lambda source, level: ioapic.set_pin(pin, level, source)
        pic = self._pic
        if pic is None:
            raise kvm_error(errno.EINVAL, f"GSI {gsi}: there is no in-kernel PIC")
        pin += _PIC_PINS * chip
        return lambda source, level: pic.set_pin(pin, level, source)

    def _routed_msi(self, gsi: int, entry: kvm_irq_routing_entry) -> Msi:
        if entry.type != KVM_IRQ_ROUTING_MSI:
            raise kvm_error(
                errno.EINVAL, f"type of GSI {gsi}: {entry.type}, expected IRQCHIP, MSI, HV_SINT or XEN_EVTCHN"
            )
        msi = entry.u.msi
        self._check_msi(msi.address_hi)
        return msi.address_lo, msi.address_hi, msi.data

    def _check_msi(self, address_hi: int) -> None:
        if self._map.x2apic_format and address_hi & 0xFF:
            raise kvm_error(errno.EINVAL, f"address_hi: {address_hi:#x}, expected bits 0-7 to be 0")

    def _msi_target(self, msi: Msi) -> _Target:
        apic_map = self._map
        message = msi_message(msi, apic_map.x2apic_format)
        return lambda source, level: apic_map.deliver(message) if level else IRQ_IGNORED

    def _sint_target(self, vp_index: int, sint: int) -> _Target:
        return lambda source, level: self.set_sint(vp_index, sint) if level else IRQ_IGNORED

    def routed_msi(self, gsi: int) -> Msi | None:
        """Return the message that *gsi* is routed to, if it is."""
        return self._msis.get(gsi)

    # Interrupts

    def set_gsi(self, gsi: int, level: int, source_id: int = KVM_USERSPACE_IRQ_SOURCE_ID) -> int:
        """Drive line *gsi* from one source; any thread.

        Returns the status of KVM_IRQ_LINE_STATUS: IRQ_IGNORED (-1) if it is masked or led nowhere, IRQ_COALESCED (0) if
        it is pending already, else to how many processors it went.
        """
        result = IRQ_IGNORED
        for target in self._targets.get(gsi, ()):
            delivered = target(source_id, level)
            if delivered >= 0:
                result = delivered + max(result, 0)
        return result

    def signal_msi(self, msi: kvm_msi) -> int:
        """KVM_SIGNAL_MSI: deliver a message. Positive: delivered; 0: the guest blocks it; -1: there is no target."""
        if msi.flags & ~KVM_MSI_VALID_DEVID:
            raise kvm_error(errno.EINVAL, f"kvm_msi.flags: {msi.flags:#x}, expected at most KVM_MSI_VALID_DEVID (1)")
        self._check_msi(msi.address_hi)
        return self.set_msi(msi.address_lo, msi.address_hi, msi.data)

    def set_msi(self, address_lo: int, address_hi: int, data: int) -> int:
        """Deliver the message that a device would write."""
        return self._map.deliver(msi_message((address_lo, address_hi, data), self._map.x2apic_format))

    # Acknowledgement

    def add_ack_notifier(self, gsi: int, notify: AckNotifier) -> None:
        """Call *notify* at each EOI of *gsi*'s interrupt (``kvm_register_irq_ack_notifier``)."""
        self._ack_notifiers[gsi] = (*self._ack_notifiers.get(gsi, ()), notify)

    def remove_ack_notifier(self, gsi: int, notify: AckNotifier) -> None:
        """Undo :meth:`add_ack_notifier`."""
        left = tuple(other for other in self._ack_notifiers.get(gsi, ()) if other != notify)
        self._ack_notifiers[gsi] = left

    def notify_acked(self, irqchip: int, pin: int) -> None:
        """A pin's interrupt was acknowledged (``kvm_notify_acked_irq``)."""
        self.notify_acked_gsi(self.gsi_of(irqchip, pin))

    def notify_acked_gsi(self, gsi: int) -> None:
        """The interrupt of a GSI was acknowledged (``kvm_notify_acked_gsi``)."""
        for notify in self._ack_notifiers.get(gsi, ()):
            notify()

    def add_mask_notifier(self, gsi: int, notify: MaskNotifier) -> None:
        """Call *notify* when a pin of *gsi* is masked or unmasked (``kvm_register_irq_mask_notifier``)."""
        self._mask_notifiers[gsi] = (*self._mask_notifiers.get(gsi, ()), notify)

    def fire_mask_notifiers(self, irqchip: int, pin: int, masked: bool) -> None:
        """A pin was masked or unmasked (``kvm_fire_mask_notifiers``)."""
        for notify in self._mask_notifiers.get(self.gsi_of(irqchip, pin), ()):
            notify(masked)

    def ioapic_pin(self, gsi: int) -> int:
        """Return the pin of the IOAPIC that *gsi* is routed to, or -1."""
        pins = (pin for (chip, pin), routed in self._gsi_of_pin.items() if (chip, routed) == (KVM_IRQCHIP_IOAPIC, gsi))
        return next(pins, -1)

    def gsi_of(self, irqchip: int, pin: int) -> int:
        """Return the GSI that is routed to a pin, or -1."""
        return self._gsi_of_pin.get((irqchip, pin), -1)
