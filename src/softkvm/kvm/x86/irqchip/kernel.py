# SPDX-License-Identifier: Apache-2.0
"""The in-kernel interrupt chips of a virtual machine, wired up (KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2).

chips = KernelIrqchip(clock)
lapic = Lapic(vcpu, chips.apic_map)        # for each vCPU
chips.set_gsi(gsi, level)                  # any thread
if chips.cpu_has_interrupt(lapic):         # on the vCPU's thread, when the guest takes interrupts
    vector = chips.cpu_get_interrupt(lapic)
"""

import errno
from collections.abc import Callable

from softkvm.abi import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip,
)
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.irq.irqchip import KVM_USERSPACE_IRQ_SOURCE_ID, AckNotifier
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.hrtimer import HrtimerQueue, HrtimerThread
from softkvm.kvm.x86.irqchip.i8254 import PIT_GSI, PIT_RANGE, SPEAKER_PORT, Pit
from softkvm.kvm.x86.irqchip.i8259 import PIC_RANGES, Pic
from softkvm.kvm.x86.irqchip.ioapic import IOAPIC_DEFAULT_BASE_ADDRESS, IOAPIC_MEM_LENGTH, IoApic
from softkvm.kvm.x86.irqchip.irq_comm import IrqRouting, default_routing, msi_message
from softkvm.kvm.x86.irqchip.lapic import Lapic
from softkvm.kvm.x86.irqchip.seams import KVM_PIT_IRQ_SOURCE_ID, Clock


class _UserspaceIoapic:
    """Stands for the IOAPIC of a split irqchip: its pins are the MSI routes of the reserved GSIs."""

    def __init__(self, routing: IrqRouting, pins: int, eoi_exit: Callable[[int, int], None] | None) -> None:
        self.handled_vectors = 0
        self._routing = routing
        self._pins = pins
        self._eoi_exit = eoi_exit
        routing.on_change.append(self._scan_routes)

    def _scan_routes(self) -> None:
        handled = 0
        for gsi in range(self._pins):
            msi = self._routing.routed_msi(gsi)
            if msi is not None and msi_message(msi, False).level_triggered:
                handled |= 1 << msi_message(msi, False).vector
        self.handled_vectors = handled

    def update_eoi(self, vector: int, level_triggered: bool, vcpu_id: int) -> None:
        """Let userspace know of the EOI."""
        if self._eoi_exit is not None:
            self._eoi_exit(vcpu_id, vector)


class KernelIrqchip:
    """PICs, IOAPIC, routing and the bus of the local APICs; with *split* only the last two (KVM_CAP_SPLIT_IRQCHIP).

    With *split*, userspace has the IOAPIC. At each EOI that it must be told of (KVM_EXIT_IOAPIC_EOI), *eoi_exit* is
    called with the vCPU's ID and the vector, on the vCPU's thread: for level-triggered messages that are routed from
    the GSIs below *reserved_pins*.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        apic_map: ApicMap | None = None,
        *,
        split: bool = False,
        reserved_pins: int = 24,
        eoi_exit: Callable[[int, int], None] | None = None,
        min_timer_period_us: int = 200,
        thread: bool = True,
    ) -> None:
        self.apic_map = apic_map or ApicMap()
        self.apic_map.min_timer_period_us = min_timer_period_us
        self.timers = HrtimerQueue(clock)
        self._thread = HrtimerThread(self.timers) if thread else None
        self.pic: Pic | None = None
        self.ioapic: IoApic | None = None
        self.pit: Pit | None = None
        if not split:
            self.pic = Pic(self._pic_output, self._pic_acked, self._pic_masked)
            self.ioapic = IoApic(self.apic_map, self._ioapic_acked, self._ioapic_masked, self.timers)
            self.apic_map.eoi_target = self.ioapic
        self.routing = IrqRouting(self.apic_map, self.pic, self.ioapic)
        if split:
            self.apic_map.directed_eoi = True
            self.apic_map.eoi_target = _UserspaceIoapic(self.routing, reserved_pins, eoi_exit)
        else:
            self.routing.set_routing(default_routing())

    def attach(self, pio_bus: IoBus, mmio_bus: IoBus) -> None:
        """Put the chips on the buses."""
        if self.pic is not None and self.ioapic is not None:
            for start, length in PIC_RANGES:
                pio_bus.add(start, length, self.pic)
            mmio_bus.add(IOAPIC_DEFAULT_BASE_ADDRESS, IOAPIC_MEM_LENGTH, self.ioapic)

    def create_pit(self, flags: int, pio_bus: IoBus) -> Pit:
        """KVM_CREATE_PIT2: EEXIST for a second one, ENOENT without chips to drive."""
        if self.pit is not None:
            raise kvm_error(errno.EEXIST, "the PIT exists")
        if self.pic is None or self.ioapic is None:
            raise kvm_error(errno.ENOENT, "there is no in-kernel PIC and IOAPIC")
        pit = self.pit = Pit(
            self.timers, self._pit_irq, self._nmi_watchdog, self.apic_map.min_timer_period_us, self._pit_eoi_unseen
        )
        self.routing.add_ack_notifier(PIT_GSI, pit.irq_acked)
        self.routing.add_mask_notifier(PIT_GSI, pit.irq_masked)
        pio_bus.add(*PIT_RANGE, pit)
        if flags & KVM_PIT_SPEAKER_DUMMY:
            pio_bus.add(SPEAKER_PORT, 1, pit)
        return pit

    def close(self) -> None:
        """Stop the timers; no callback runs after this."""
        if self._thread is not None:
            self._thread.stop()

    # The wiring

    def _pic_output(self) -> None:
        """The PIC wants the processor that its output reaches."""
        for lapic in self.apic_map.lapics:
            if lapic.accept_pic_intr():
                lapic.vcpu.request_event()
                return

    def _pic_acked(self, pin: int) -> None:
        self.routing.notify_acked(KVM_IRQCHIP_PIC_MASTER + pin // 8, pin % 8)

    def _pic_masked(self, pin: int, masked: bool) -> None:
        self.routing.fire_mask_notifiers(KVM_IRQCHIP_PIC_MASTER + pin // 8, pin % 8, masked)

    def _ioapic_acked(self, pin: int) -> None:
        self.routing.notify_acked(KVM_IRQCHIP_IOAPIC, pin)

    def _ioapic_masked(self, pin: int, masked: bool) -> None:
        self.routing.fire_mask_notifiers(KVM_IRQCHIP_IOAPIC, pin, masked)

    def _pit_irq(self, level: int) -> int:
        return self.routing.set_gsi(PIT_GSI, level, KVM_PIT_IRQ_SOURCE_ID)

    def _pit_eoi_unseen(self) -> bool:
        """Whether the PIT's last interrupt has ended in a local APIC that doesn't tell (see :class:`.Pit`)."""
        message = None if self.ioapic is None else self.ioapic.edge_message(self.routing.ioapic_pin(PIT_GSI))
        if message is None:
            return False
        targets = self.apic_map.destinations(message.dest, message.logical, False)
        open_ = any((lapic.irr | lapic.isr) >> message.vector & 1 for lapic in targets)
        return not open_ and any(lapic.apicv_active for lapic in targets)

    def _nmi_watchdog(self) -> None:
        for lapic in self.apic_map.lapics:
            lapic.nmi_watchdog_deliver()

    # Lines (any thread)

    def set_gsi(self, gsi: int, level: int, source: int = KVM_USERSPACE_IRQ_SOURCE_ID) -> int:
        """Drive a line; see :meth:`IrqRouting.set_gsi <softkvm.kvm.x86.irqchip.irq_comm.IrqRouting.set_gsi>`."""
        return self.routing.set_gsi(gsi, level, source)

    # Interrupts for a vCPU (its own thread)

    @property
    def can_resample(self) -> bool:
        """Resampling needs pins whose EOI is seen here."""
        return self.ioapic is not None

    def add_ack_notifier(self, gsi: int, notifier: AckNotifier) -> None:
        """Call ``notifier`` when the guest acknowledges the GSI."""
        self.routing.add_ack_notifier(gsi, notifier)

    def remove_ack_notifier(self, gsi: int, notifier: AckNotifier) -> None:
        """Stop calling it."""
        self.routing.remove_ack_notifier(gsi, notifier)

    def has_extint(self, lapic: Lapic) -> bool:
        """Whether the PIC has an interrupt for this processor."""
        pic = self.pic
        return pic is not None and pic.output and lapic.accept_pic_intr()

    def cpu_has_interrupt(self, lapic: Lapic) -> bool:
        """Whether the processor would take an interrupt now, RFLAGS.IF permitting."""
        return lapic.has_interrupt() >= 0 or self.has_extint(lapic)

    def cpu_has_injectable_intr(self, lapic: Lapic) -> bool:
        """Whether KVM would inject one: those of a virtualized APIC the processor takes by itself."""
        return lapic.has_injectable() >= 0 or self.has_extint(lapic)

    def cpu_get_interrupt(self, lapic: Lapic) -> int:
        """Acknowledge the next interrupt. Returns its vector, or -1."""
        if self.has_extint(lapic):
            assert self.pic is not None
            return self.pic.read_irq()
        return lapic.get_interrupt()

    # KVM_GET_IRQCHIP and KVM_SET_IRQCHIP

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """Return the state of one chip; EINVAL for an unknown one, ENXIO with a split irqchip."""
        pic, ioapic = self._chips()
        result = kvm_irqchip(chip_id=chip_id)
        if chip_id in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
            result.chip.pic = pic.get_state(chip_id)
        elif chip_id == KVM_IRQCHIP_IOAPIC:
            result.chip.ioapic = ioapic.get_state()
        else:
            raise kvm_error(errno.EINVAL, f"chip_id: {chip_id}, expected 0 to 2")
        return result

    def set_irqchip(self, state: kvm_irqchip) -> None:
        """Load the state of one chip; errors as :meth:`get_irqchip`."""
        pic, ioapic = self._chips()
        if state.chip_id in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
            pic.set_state(state.chip_id, state.chip.pic)
        elif state.chip_id == KVM_IRQCHIP_IOAPIC:
            ioapic.set_state(state.chip.ioapic)
        else:
            raise kvm_error(errno.EINVAL, f"chip_id: {state.chip_id}, expected 0 to 2")

    def _chips(self) -> tuple[Pic, IoApic]:
        if self.pic is None or self.ioapic is None:
            raise kvm_error(errno.ENXIO, "there is no in-kernel PIC and IOAPIC")
        return self.pic, self.ioapic
