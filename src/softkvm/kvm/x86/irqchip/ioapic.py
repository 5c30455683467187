# SPDX-License-Identifier: Apache-2.0
"""The IOAPIC: 24 pins, each with an entry that says where its interrupt goes (82093AA datasheet, chapter 3).

``irr`` is the levels of the pins as KVM has them: set while a line is asserted. A level-triggered pin sends when it is
set, unmasked and without Remote IRR; an edge-triggered pin sends when it becomes set.

One lock guards the registers. Delivery to local APICs happens under it; notifiers are called without it.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from softkvm.abi import KVM_IOAPIC_NUM_PINS, kvm_ioapic_state
from softkvm.kvm.x86.irqchip.apic_map import ApicMap
from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_EXTINT
from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer, HrtimerQueue
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED, IRQ_IGNORED, LapicIrq

IOAPIC_DEFAULT_BASE_ADDRESS: Final = 0xFEC00000
IOAPIC_MEM_LENGTH: Final = 0x100
IOAPIC_VERSION_ID: Final = 0x11
_VERSION_REGISTER: Final = (KVM_IOAPIC_NUM_PINS - 1) << 16 | IOAPIC_VERSION_ID

# Direct registers
IOAPIC_REG_SELECT: Final = 0x00
IOAPIC_REG_WINDOW: Final = 0x10

# Indirect registers
IOAPIC_REG_APIC_ID: Final = 0x00
IOAPIC_REG_VERSION: Final = 0x01
IOAPIC_REG_ARB_ID: Final = 0x02
_REDIRECTION_TABLE: Final = 0x10

# Redirection entry
_MODE: Final = 7 << 8
_LOGICAL: Final = 1 << 11
_DELIVERY_STATUS: Final = 1 << 12
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASK: Final = 1 << 16
_READ_ONLY: Final = _DELIVERY_STATUS | _REMOTE_IRR
_WRITABLE: Final = 0xFF << 56 | 0x1FFFF & ~_READ_ONLY

# A level-triggered line that nobody lowers is served this often in a row, then it has to wait.
IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT: Final = 10_000
_SUCCESSIVE_IRQ_DELAY_NS: Final = 10_000_000


def _message(entry: int) -> LapicIrq:
    """Return what a redirection entry makes the IOAPIC send."""
    return LapicIrq(
        vector=entry & 0xFF,
        delivery_mode=entry & _MODE,
        logical=entry & _LOGICAL != 0,
        level_triggered=entry & _LEVEL != 0,
        dest=entry >> 56,
    )


class IoApic:
    """The in-kernel IOAPIC.

    *eoi_notify* is called with the pin at each EOI, *mask_notify* with the pin and its mask when that changes; *timers*
    delay an interrupt storm.
    """

    def __init__(
        self,
        apic_map: ApicMap,
        eoi_notify: Callable[[int], None] | None = None,
        mask_notify: Callable[[int, bool], None] | None = None,
        timers: HrtimerQueue | None = None,
    ) -> None:
        self._map = apic_map
        self._eoi_notify = eoi_notify
        self._mask_notify = mask_notify
        self._lock = threading.Lock()
        self._timers = timers
        self._delayed = Hrtimer(timers, self._end_delay) if timers is not None else None
        self.base_address = IOAPIC_DEFAULT_BASE_ADDRESS
        self.handled_vectors = 0
        self.reset()

    def reset(self) -> None:
        """Power up: all pins masked."""
        with self._lock:
            self._ioregsel = 0
            self._id = 0
            self._irr = 0
            self._delivered = 0  # edge-triggered pins whose set irr has been sent
            self._redirtbl = [_MASK] * KVM_IOAPIC_NUM_PINS
            self._irq_states = [0] * KVM_IOAPIC_NUM_PINS  # which sources drive the pin
            self._successive_eois = [0] * KVM_IOAPIC_NUM_PINS
            self._table_changed()

    def _table_changed(self) -> None:
        """Collect which vector comes from which pins; a broadcast EOI of another vector is nothing to us."""
        self._messages: dict[int, LapicIrq] = {}
        pins: defaultdict[int, list[int]] = defaultdict(list)
        handled = 0
        for pin, entry in enumerate(self._redirtbl):
            if not entry & _MASK or entry & _REMOTE_IRR:
                pins[entry & 0xFF].append(pin)
                handled |= 1 << (entry & 0xFF)
        self._pins_of_vector = dict(pins)
        self.handled_vectors = handled

    # Lines

    def set_pin(self, pin: int, level: int, source_id: int = 0) -> int:
        """Drive *pin* from one source. Returns how many local APICs got it, IRQ_COALESCED or IRQ_IGNORED."""
        bit = 1 << pin
        with self._lock:
            if level:
                self._irq_states[pin] |= 1 << source_id
            else:
                self._irq_states[pin] &= ~(1 << source_id)
            if not self._irq_states[pin]:
                self._irr &= ~bit
                self._delivered &= ~bit
                return 1
            return self._assert(pin)

    def _assert(self, pin: int) -> int:
        """Set the pin's irr and send, if that is due."""
        bit = 1 << pin
        was_set = self._irr & bit
        entry = self._redirtbl[pin]
        if not entry & _LEVEL:
            if was_set:
                return IRQ_COALESCED
            self._irr |= bit
            result = self._service(pin)
            if result > 0:
                self._delivered |= bit
            return result
        self._irr |= bit
        return self._service(pin)

    def _service(self, pin: int) -> int:
        """Send the pin's interrupt to the local APICs its entry names. The lock is held."""
        entry = self._redirtbl[pin]
        level = entry & _LEVEL != 0
        if entry & _MASK or (level and entry & _REMOTE_IRR) or entry & _MODE == APIC_DM_EXTINT:
            return IRQ_IGNORED
        message = self._messages.get(entry)
        if message is None:
            message = self._messages[entry] = _message(entry)
        result = self._map.deliver(message)
        if level and result > 0:
            self._redirtbl[pin] = entry | _REMOTE_IRR
        return result

    def edge_message(self, pin: int) -> LapicIrq | None:
        """Return what a pin sends, if it is unmasked and edge-triggered; None for no pin (-1), too."""
        entry = self._redirtbl[pin] if pin >= 0 else _MASK
        return None if entry & (_MASK | _LEVEL) else _message(entry)

    def update_eoi(self, vector: int, level_triggered: bool, vcpu_id: int = 0) -> None:
        """A local APIC ended the service of *vector*: tell the notifiers, and send again what is still asserted."""
        for pin in self._pins_of_vector.get(vector, ()):
            if self._eoi_notify is not None:
                self._eoi_notify(pin)
            if level_triggered:
                self._update_eoi_pin(pin)

    def _update_eoi_pin(self, pin: int) -> None:
        with self._lock:
            entry = self._redirtbl[pin]
            if not entry & _LEVEL:
                return
            self._redirtbl[pin] = entry & ~_REMOTE_IRR
            if entry & _MASK:
                self._table_changed()  # it was kept for this EOI
            elif self._irr >> pin & 1:
                self._successive_eois[pin] += 1
                if self._successive_eois[pin] == IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT and self._delayed is not None:
                    # The guest's handler doesn't lower the line; let the guest do something else for a while.
                    self._successive_eois[pin] = 0
                    assert self._timers is not None
                    self._delayed.start(self._timers.clock() + _SUCCESSIVE_IRQ_DELAY_NS)
                else:
                    self._service(pin)
            else:
                self._successive_eois[pin] = 0

    def _end_delay(self, now_ns: int) -> int:
        with self._lock:
            for pin in range(KVM_IOAPIC_NUM_PINS):
                if self._irr >> pin & 1 and self._redirtbl[pin] & _LEVEL:
                    self._service(pin)
        return 0

    # Registers

    def io_read(self, address: int, size: int) -> int:
        """Read *size* bytes of the direct register at *address*."""
        register = address & 0xF0
        if register == IOAPIC_REG_SELECT:
            value = self._ioregsel
        elif register == IOAPIC_REG_WINDOW:
            with self._lock:
                value = self._read_indirect()
        else:
            value = 0
        return value & (1 << 8 * size) - 1

    def io_write(self, address: int, size: int, value: int) -> bool:
        """Write the direct register at *address*; the window register takes 32 bits at once."""
        register = address & 0xF0
        if register == IOAPIC_REG_SELECT:
            self._ioregsel = value & 0xFF
        elif register == IOAPIC_REG_WINDOW:
            self._write_indirect(value & 0xFFFFFFFF)
        return True

    def _read_indirect(self) -> int:
        select = self._ioregsel
        if select in (IOAPIC_REG_APIC_ID, IOAPIC_REG_ARB_ID):
            return self._id << 24
        if select == IOAPIC_REG_VERSION:
            return _VERSION_REGISTER
        pin = select - _REDIRECTION_TABLE >> 1
        if 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return self._redirtbl[pin] >> 32 * (select & 1) & 0xFFFFFFFF
        return 0

    def _write_indirect(self, value: int) -> None:
        select = self._ioregsel
        if select == IOAPIC_REG_APIC_ID:
            self._id = value >> 24 & 0xF
            return
        pin = select - _REDIRECTION_TABLE >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        with self._lock:
            old = self._redirtbl[pin]
            if select & 1:
                entry = old & 0xFFFFFFFF | value << 32 & _WRITABLE
            else:
                entry = old & ~0xFFFFFFFF | value & _WRITABLE | old & _READ_ONLY
            if not entry & _LEVEL:
                entry &= ~_REMOTE_IRR  # the datasheet leaves it undefined; guests clear it by way of edge mode
            self._redirtbl[pin] = entry
            self._table_changed()
        if (old ^ entry) & _MASK and self._mask_notify is not None:
            self._mask_notify(pin, entry & _MASK != 0)
        with self._lock:
            if self._irr >> pin & 1 and self._redirtbl[pin] & _LEVEL:
                self._service(pin)

    # Save and restore (KVM API 4.25, 4.26)

    def get_state(self) -> kvm_ioapic_state:
        """Return the registers; lines that an edge-triggered pin has sent already aren't in ``irr``."""
        with self._lock:
            state = kvm_ioapic_state(
                base_address=self.base_address,
                ioregsel=self._ioregsel,
                id=self._id,
                irr=self._irr & ~self._delivered,
            )
            for pin, entry in enumerate(self._redirtbl):
                state.redirtbl[pin].bits = entry
        return state

    def set_state(self, state: kvm_ioapic_state) -> None:
        """Load the registers, then send what ``irr`` says is asserted; bits that have no pin are nothing."""
        with self._lock:
            self.base_address = state.base_address
            self._ioregsel = state.ioregsel & 0xFF
            self._id = state.id & 0xF
            self._redirtbl = [state.redirtbl[p].bits & (_WRITABLE | _READ_ONLY) for p in range(KVM_IOAPIC_NUM_PINS)]
            self._irr = self._delivered = 0
            self._table_changed()
            for pin in range(KVM_IOAPIC_NUM_PINS):
                if state.irr >> pin & 1:
                    self._assert(pin)
