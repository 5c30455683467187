# SPDX-License-Identifier: Apache-2.0
"""The two cascaded i8259A interrupt controllers of a PC (8259A datasheet; PIIX datasheet for the ELCR).

Not there, as in KVM: single mode, the MCS-80/85 mode, and LTIM (the chip set's edge/level control register rules).
"""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Final

from softkvm.abi import kvm_pic_state
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED, IRQ_IGNORED

PIC_NUM_PINS: Final = 16
_CASCADE: Final = 2  # the master's pin that the slave's output is on

PIC_MASTER_CMD: Final = 0x20
PIC_MASTER_IMR: Final = 0x21
PIC_SLAVE_CMD: Final = 0xA0
PIC_SLAVE_IMR: Final = 0xA1
PIC_MASTER_ELCR: Final = 0x4D0
PIC_SLAVE_ELCR: Final = 0x4D1
PIC_PORTS: Final = (PIC_MASTER_CMD, PIC_MASTER_IMR, PIC_SLAVE_CMD, PIC_SLAVE_IMR, PIC_MASTER_ELCR, PIC_SLAVE_ELCR)
PIC_RANGES: Final = ((PIC_MASTER_CMD, 2), (PIC_SLAVE_CMD, 2), (PIC_MASTER_ELCR, 2))

# Pins that can be level-triggered: not the timer, keyboard, cascade, RTC and FPU
_ELCR_MASKS: Final = (0xF8, 0xDE)

# Bits of the command words
_ICW1: Final = 0x10
_ICW1_ICW4: Final = 0x01
_ICW4_AEOI: Final = 0x02
_ICW4_SFNM: Final = 0x10
_OCW3: Final = 0x08
_OCW3_READ: Final = 0x02
_OCW3_READ_ISR: Final = 0x01
_OCW3_POLL: Final = 0x04
_OCW3_SMM_ENABLE: Final = 0x40
_OCW3_SMM: Final = 0x20

_POLL_INTERRUPT: Final = 0x80


@dataclass(slots=True)
class _Chip:
    """One 8259A. The fields are those of ``kvm_pic_state``; flags are 0 or 1, as in there."""

    elcr_mask: int
    last_irr: int = 0  # the lines' levels, for the edge detector
    irr: int = 0
    imr: int = 0
    isr: int = 0
    priority_add: int = 0  # the pin with the highest priority
    irq_base: int = 0
    read_reg_select: int = 0
    poll: int = 0
    special_mask: int = 0
    init_state: int = 0  # the ICW that is expected next at the odd port: 0 none, 1 ICW2, 2 ICW3, 3 ICW4
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0  # ICW4 comes
    elcr: int = 0

    def first(self, pins: int) -> int:
        """Return the place in the order of priorities, 0..7, of the first of *pins*; 8 for none."""
        add = self.priority_add
        rotated = (pins >> add | pins << 8 - add) & 0xFF
        return (rotated & -rotated).bit_length() - 1 if rotated else 8

    def pending(self, nested_pin: int = -1) -> int:
        """Return the pin whose request may interrupt what is in service, or -1.

        *nested_pin*: the cascade's, in special fully nested mode: its own service doesn't keep it out.
        """
        requests = self.irr & ~self.imr
        if not requests:
            return -1
        place = self.first(requests)
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_fully_nested_mode and nested_pin >= 0:
            in_service &= ~(1 << nested_pin)
        return place + self.priority_add & 7 if place < self.first(in_service) else -1

    def set_line(self, pin: int, level: bool) -> int:
        """Drive a request line (datasheet, "Edge and level triggered modes"). Returns as set_pin does."""
        bit = 1 << pin
        result = 1
        if not level:
            self.last_irr &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit
        else:
            if self.elcr & bit or not self.last_irr & bit:
                result = IRQ_COALESCED if self.irr & bit else 1
                self.irr |= bit
            self.last_irr |= bit
        return IRQ_IGNORED if self.imr & bit else result

    def write_icw1(self, value: int) -> None:
        """Start the initialization sequence (datasheet, "Initialization Command Words")."""
        self.init4 = value & _ICW1_ICW4
        self.last_irr = self.imr = self.isr = 0
        self.irr &= self.elcr  # the edge sense circuit is reset
        self.priority_add = self.special_mask = self.read_reg_select = self.poll = 0
        if not self.init4:
            self.special_fully_nested_mode = self.auto_eoi = 0
        self.rotate_on_auto_eoi = 0
        self.init_state = 1

    def write_odd_port(self, value: int) -> None:
        """Write ICW2, ICW3 or ICW4 as the sequence has it; else OCW1, the mask."""
        match self.init_state:
            case 0:
                self.imr = value
            case 1:
                self.irq_base = value & 0xF8
                self.init_state = 2
            case 2:  # ICW3, the cascade's wiring, is fixed
                self.init_state = 3 if self.init4 else 0
            case _:
                self.special_fully_nested_mode = 1 if value & _ICW4_SFNM else 0
                self.auto_eoi = 1 if value & _ICW4_AEOI else 0
                self.init_state = 0

    def write_ocw3(self, value: int) -> None:
        """Write OCW3: poll, register to read, special mask mode."""
        if value & _OCW3_POLL:
            self.poll = 1
        if value & _OCW3_READ:
            self.read_reg_select = value & _OCW3_READ_ISR
        if value & _OCW3_SMM_ENABLE:
            self.special_mask = 1 if value & _OCW3_SMM else 0


class Pic:
    """Both i8259s.

    *output* is called, with the lock held, when the master's output rises. Without the lock, *ack_notify* is called
    with the pin (0-15) when its service ends, *mask_notify* with the pin and its mask when that changes.
    """

    def __init__(
        self,
        output: Callable[[], None],
        ack_notify: Callable[[int], None] | None = None,
        mask_notify: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._raise_output = output
        self._ack_notify = ack_notify
        self._mask_notify = mask_notify
        self._lock = threading.Lock()
        self._ended: list[int] = []  # pins whose service ended, to notify after unlocking
        self.reset()

    def reset(self) -> None:
        """Power up."""
        with self._lock:
            self.master, self.slave = self._chips = tuple(_Chip(mask) for mask in _ELCR_MASKS)
            self._irq_states = [0] * PIC_NUM_PINS  # which sources drive the pin
            self.output = False

    # Lines

    def set_pin(self, pin: int, level: int, source_id: int = 0) -> int:
        """Drive *pin* (0-15) from one source. Returns 1, IRQ_COALESCED or IRQ_IGNORED (masked)."""
        with self._lock:
            if level:
                self._irq_states[pin] |= 1 << source_id
            else:
                self._irq_states[pin] &= ~(1 << source_id)
            result = self._chips[pin >> 3].set_line(pin & 7, self._irq_states[pin] != 0)
            self._update()
        return result

    def _update(self) -> None:
        """Bring the slave's output to the master, and the master's to the processor."""
        master = self.master
        if self.slave.pending() >= 0:
            master.irr |= 1 << _CASCADE  # the slave's output falls between requests, so each one is an edge
        output = master.pending(_CASCADE) >= 0
        if output and not self.output:
            self.output = True
            self._raise_output()
        else:
            self.output = output

    def read_irq(self) -> int:
        """Acknowledge, as the processor's two INTA cycles do. Returns the vector; of IRQ 7 or 15 if it is spurious."""
        with self._lock:
            pin = self.master.pending(_CASCADE)
            if pin < 0:
                vector = self.master.irq_base + 7
            else:
                self._intack(0, pin)
                vector = self.master.irq_base + pin
                if pin == _CASCADE:
                    pin = self.slave.pending()
                    if pin < 0:
                        pin = 7
                    else:
                        self._intack(1, pin)
                    vector = self.slave.irq_base + pin
            self._update()
        self._notify_ended()
        return vector

    def _intack(self, index: int, pin: int) -> None:
        chip = self._chips[index]
        bit = 1 << pin
        chip.isr |= bit
        if not chip.elcr & bit:
            chip.irr &= ~bit
        if chip.auto_eoi:
            if chip.rotate_on_auto_eoi:
                chip.priority_add = pin + 1 & 7
            self._end_service(index, pin)

    def _end_service(self, index: int, pin: int) -> None:
        self._chips[index].isr &= ~(1 << pin)
        if self._ack_notify is not None:
            self._ended.append(8 * index + pin)

    def _notify_ended(self) -> None:
        """Call the notifiers for what ended since the last time; the lock isn't held."""
        while self._ended:
            pin = self._ended.pop()
            assert self._ack_notify is not None
            self._ack_notify(pin)

    # Ports

    def io_read(self, port: int, size: int) -> int:
        """Read a port; all of them have 8 bits."""
        if size != 1 or port not in PIC_PORTS:
            return 0
        if port in (PIC_MASTER_ELCR, PIC_SLAVE_ELCR):
            return self._chips[port & 1].elcr
        index = port >> 7
        chip = self._chips[index]
        if chip.poll:
            with self._lock:
                value = self._poll(index)
            self._notify_ended()
            return value
        if port & 1:
            return chip.imr
        return chip.isr if chip.read_reg_select else chip.irr

    def _poll(self, index: int) -> int:
        """Acknowledge by reading (datasheet, "Poll Command")."""
        chip = self._chips[index]
        chip.poll = 0
        pin = chip.pending(-1 if index else _CASCADE)
        if pin < 0:
            return 0
        if index:  # the master would take a request of the slave that is gone for a spurious one
            self.master.irr &= ~(1 << _CASCADE)
        self._intack(index, pin)
        self._update()
        return _POLL_INTERRUPT | pin

    def io_write(self, port: int, size: int, value: int) -> bool:
        """Write a port; all of them have 8 bits."""
        if size != 1 or port not in PIC_PORTS:
            return True
        value &= 0xFF
        masks = self.master.imr | self.slave.imr << 8
        with self._lock:
            if port in (PIC_MASTER_ELCR, PIC_SLAVE_ELCR):
                chip = self._chips[port & 1]
                chip.elcr = value & chip.elcr_mask
            elif port & 1:
                self._chips[port >> 7].write_odd_port(value)
            else:
                self._write_command(port >> 7, value)
            self._update()
        self._notify_ended()
        new_masks = self.master.imr | self.slave.imr << 8
        if masks != new_masks and self._mask_notify is not None:
            for pin in range(PIC_NUM_PINS):
                if (masks ^ new_masks) >> pin & 1:
                    self._mask_notify(pin, new_masks >> pin & 1 != 0)
        return True

    def _write_command(self, index: int, value: int) -> None:
        chip = self._chips[index]
        if value & _ICW1:
            for pin in range(8):
                if chip.isr >> pin & 1:
                    self._end_service(index, pin)
            chip.write_icw1(value)
        elif value & _OCW3:
            chip.write_ocw3(value)
        else:
            self._write_ocw2(index, value)

    def _write_ocw2(self, index: int, value: int) -> None:
        """End of interrupt and rotation (datasheet, "Operation Command Word 2"): bits R, SL and EOI."""
        chip = self._chips[index]
        rotate, specific, eoi = value & 0x80, value & 0x40, value & 0x20
        pin = value & 7
        if not specific:
            if not eoi:
                chip.rotate_on_auto_eoi = 1 if rotate else 0
                return
            place = chip.first(chip.isr)
            if place == 8:
                return
            pin = place + chip.priority_add & 7
        if rotate:
            chip.priority_add = pin + 1 & 7
        if eoi:
            self._end_service(index, pin)

    # Save and restore (KVM API 4.25, 4.26)

    def get_state(self, index: int) -> kvm_pic_state:
        """Return the registers of the master (0) or the slave (1)."""
        with self._lock:
            return kvm_pic_state(**asdict(self._chips[index]))

    def set_state(self, index: int, state: kvm_pic_state) -> None:
        """Load the registers of one chip, the mask of its ELCR too. A priority or step that no chip has is cut."""
        chip = self._chips[index]
        with self._lock:
            for field in fields(chip):
                setattr(chip, field.name, getattr(state, field.name))
            chip.priority_add &= 7
            chip.init_state &= 3
            self._update()
