# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI, modern devices only (VIRTIO 1.3, section 4.1).

Base address register 0 is memory with all structures, 1 has the MSI-X table. The structures can be reached through
configuration space as well (4.1.4.9), which is what firmware does that has not mapped the registers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from softkvm import api
from softkvm.vmm.devices.pci import (
    COMMAND_INTX_DISABLE,
    STATUS,
    STATUS_INTERRUPT,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    Bar,
    Function,
)
from softkvm.vmm.devices.pci_msix import Msix
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import INTERRUPT_CONFIG, INTERRUPT_QUEUE, VIRTIO_VENDOR
from softkvm.vmm.virtio.transport import NO_VECTOR, Options, Transport
from softkvm.vmm.virtio.worker import Worker

PCI_DEVICE_BASE: Final = 0x1040
REVISION: Final = 1

COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
COMMON_AT: Final = 0x0000
ISR_AT: Final = 0x1000
DEVICE_AT: Final = 0x2000
NOTIFY_AT: Final = 0x3000
STRUCTURE_SIZE: Final = 0x1000
BAR_SIZE: Final = 0x4000
NOTIFY_MULTIPLIER: Final = 4
COMMON_SIZE: Final = 64

CAP_VENDOR: Final = 0x09
_CAP: Final = struct.Struct("<BBBB2xII")  # length, type, register, id, offset, length
_PCI_CFG_DATA: Final = 16  # of its capability: where data are read and written

MSIX_BAR: Final = 1


class PciTransport(Transport):
    """The structures of a virtio device behind *function*, which this makes."""

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        vm: api.Vm,
        worker: Worker,
        options: Options | None = None,
        *,
        address: int,
        msix_address: int,
        line: int,
        set_irq: Callable[[int], None],
    ) -> None:
        self._config_vector = NO_VECTOR
        self._set_irq = set_irq
        self._level = 0
        self.function = _VirtioFunction(self, device)
        self.function.set_interrupt(line)
        self.bar = Bar(BAR_SIZE, self, False, device.name)
        self.function.add_bar(0, self.bar, address)
        self.msix = Msix(self.function, vm, len(device.queue_sizes) + 1, MSIX_BAR, msix_address, device.name)
        super().__init__(device, memory, vm, worker, options)

    # -- the bus

    def read(self, offset: int, size: int) -> int:
        """Bytes of one of the structures; zeroes where there is none."""
        structure, at = offset & -STRUCTURE_SIZE, offset & STRUCTURE_SIZE - 1
        if structure == DEVICE_AT:
            return int.from_bytes(self.device.read_config(at, size), "little")
        if structure == ISR_AT:
            return self._take_isr() if at == 0 else 0
        if structure == COMMON_AT and at + size <= COMMON_SIZE:
            field = _FIELDS.get(at)
            if field is not None and field[0] == size:
                return field[1](self)
            return self._common_bytes(at, size)
        return 0

    def _common_bytes(self, at: int, size: int) -> int:
        """Any bytes of the common configuration."""
        value = 0
        for start, (width, get, _) in _FIELDS.items():
            if start < at + size and at < start + width:
                value |= get(self) << 8 * start >> 8 * at if start >= at else get(self) >> 8 * (at - start)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a field, part of the device's configuration, or notify."""
        structure, at = offset & -STRUCTURE_SIZE, offset & STRUCTURE_SIZE - 1
        if structure == NOTIFY_AT:
            if not at % NOTIFY_MULTIPLIER:
                self.notify(at // NOTIFY_MULTIPLIER)
        elif structure == DEVICE_AT:
            with self.lock:
                self._guarded(self.device.write_config, at, value.to_bytes(size, "little"))
        elif structure == COMMON_AT:
            if size == 8 and at in _ADDRESSES:
                self._write_field(at, 4, value & 0xFFFFFFFF)
                self._write_field(at + 4, 4, value >> 32)
            else:
                self._write_field(at, size, value)

    def _write_field(self, at: int, size: int, value: int) -> None:
        field = _FIELDS.get(at)
        if field is not None and field[0] == size and field[2] is not None:
            field[2](self, value)

    def _take_isr(self) -> int:
        """Reading the status clears it and lowers the line (4.1.4.5)."""
        with self._isr_lock:
            value, self._isr = self._isr, 0
            self._isr_changed()
        return value

    @property
    def has_interrupt(self) -> bool:
        """Whether the interrupt status is not 0."""
        return bool(self._isr)

    # -- fields

    def _queue_field(self, name: str, shift: int = 0, mask: int = 0xFFFFFFFF) -> int:
        state = self.selected
        return int(getattr(state, name)) >> shift & mask if state is not None else 0

    def _set(self, name: str, value: int) -> None:
        setattr(self, name, value)

    def _vector(self, value: int) -> int:
        return value if value < self.msix.vectors else NO_VECTOR

    def _set_queue_vector(self, value: int) -> None:
        state = self.selected
        if state is not None:
            state.vector = self._vector(value)

    def _enable(self, value: int) -> None:
        if value == 1:
            self.enable_queue()

    # -- a transport's

    def notify_address(self, index: int) -> int | None:
        """The queue's own place in the notification structure."""
        base = self.bar.mapped_at
        return None if base is None else base + NOTIFY_AT + NOTIFY_MULTIPLIER * index

    def interrupt_queue(self, index: int) -> None:
        """MSI-X, or INTx."""
        if self.msix.enabled:
            self.msix.trigger(self.queues[index].vector)
        else:
            self._raise_isr(INTERRUPT_QUEUE)

    def interrupt_config(self) -> None:
        """MSI-X, or INTx."""
        if self.msix.enabled:
            self.msix.trigger(self._config_vector)
        else:
            self._raise_isr(INTERRUPT_CONFIG)

    def _isr_changed(self) -> None:
        level = int(bool(self._isr) and not self.msix.enabled and not self.function.command & COMMAND_INTX_DISABLE)
        if level != self._level:
            self._level = level
            self._set_irq(level)

    def reset(self) -> None:
        """Reset the device; MSI-X stays as the function's driver has set it up."""
        with self.lock:
            super().reset()
            self._config_vector = NO_VECTOR

    def config_written(self) -> None:
        """The function's configuration space is another."""
        self.msix.changed()
        with self._isr_lock:
            self._isr_changed()

    def save(self) -> dict[str, Any]:
        """The transport's part, the configuration space, MSI-X."""
        return {
            **super().save(),
            "config_vector": self._config_vector,
            "function": self.function.save(),
            "msix": self.msix.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        with self.lock:
            self.function.restore(state["function"])
            self.msix.restore(state["msix"])
            super().restore(state)

    def _restore_device(self, state: dict[str, Any]) -> None:
        self._config_vector = state["config_vector"]
        super()._restore_device(state)


class _VirtioFunction(Function):
    """The PCI function: identity, and a capability for each structure."""

    def __init__(self, transport: PciTransport, device: VirtioDevice) -> None:
        super().__init__(VIRTIO_VENDOR, PCI_DEVICE_BASE + device.type, device.pci_class, REVISION)
        self._transport = transport
        struct.pack_into("<H", self._config, SUBSYSTEM_VENDOR_ID, VIRTIO_VENDOR)
        struct.pack_into("<H", self._config, SUBSYSTEM_ID, PCI_DEVICE_BASE + device.type)
        for kind, at, size, more in (
            (COMMON_CFG, COMMON_AT, COMMON_SIZE, b""),
            (NOTIFY_CFG, NOTIFY_AT, STRUCTURE_SIZE, struct.pack("<I", NOTIFY_MULTIPLIER)),
            (ISR_CFG, ISR_AT, 1, b""),
            (DEVICE_CFG, DEVICE_AT, STRUCTURE_SIZE, b""),
        ):
            self.add_capability(CAP_VENDOR, _CAP.pack(16 + len(more), kind, 0, 0, at, size) + more)
        # the driver sets register, offset and length, and then reads or writes the data behind them
        writable = bytearray(_CAP.size + 4)
        writable[2] = 0xFF
        writable[6:14] = bytes([0xFF]) * 8
        self._window = self.add_capability(CAP_VENDOR, _CAP.pack(20, PCI_CFG, 0, 0, 0, 0) + bytes(4), bytes(writable))

    def read(self, register: int, size: int) -> int:
        """Read configuration space; the window's data are what it shows."""
        if register == self._window + _PCI_CFG_DATA:
            place = self._shown(size)
            return (1 << 8 * size) - 1 if place is None else self._transport.read(place, size)
        return super().read(register, size) | self._interrupt_status(register, size)

    def write(self, register: int, size: int, value: int) -> None:
        """Write configuration space, or through the window."""
        if register == self._window + _PCI_CFG_DATA:
            place = self._shown(size)
            if place is not None:
                self._transport.write(place, size, value)
            return
        super().write(register, size, value)
        self._transport.config_written()

    def _shown(self, size: int) -> int | None:
        """The offset in register 0 that the window shows, if it is right for an access of *size* bytes."""
        bar, place, length = struct.unpack_from("<B3xII", self._config, self._window + 4)
        if bar or length != size or size not in (1, 2, 4) or place % size or place + size > BAR_SIZE:
            return None
        return int(place)

    def _interrupt_status(self, register: int, size: int) -> int:
        """Whether INTA# would be asserted, where *register* has that bit."""
        if not register <= STATUS < register + size or not self._transport.has_interrupt:
            return 0
        return STATUS_INTERRUPT << 8 * (STATUS - register)

    def moved(self, index: int) -> None:
        """The structures are elsewhere: so are the places for notifications."""
        if index == 0 and hasattr(self._transport, "lock"):
            self._transport.moved()


_Get = Callable[[PciTransport], int]
_Set = Callable[[PciTransport, int], None]


def _address(name: str) -> tuple[tuple[int, _Get, _Set], tuple[int, _Get, _Set]]:
    """The two halves of a ring's address."""
    return (
        (
            4,
            lambda self: self._queue_field(name),
            lambda self, value: self.set_queue_address(name, 0, 32, value),
        ),
        (
            4,
            lambda self: self._queue_field(name, 32),
            lambda self, value: self.set_queue_address(name, 32, 32, value),
        ),
    )


_DESCRIPTORS, _DRIVER, _DEVICE = _address("descriptors"), _address("driver"), _address("device")
_ADDRESSES: Final = (32, 40, 48)

#: The common configuration (4.1.4.3): offset: bytes, how it is read, how it is written.
_FIELDS: Final[dict[int, tuple[int, _Get, _Set | None]]] = {
    0: (4, lambda self: self._device_features_select, lambda self, value: self._set("_device_features_select", value)),
    4: (4, lambda self: self.device_features, None),
    8: (4, lambda self: self._driver_features_select, lambda self, value: self._set("_driver_features_select", value)),
    12: (4, lambda self: self.driver_features, lambda self, value: self._set("driver_features", value)),
    16: (
        2,
        lambda self: self._config_vector,
        lambda self, value: self._set("_config_vector", self._vector(value)),
    ),
    18: (2, lambda self: len(self.queues), None),
    20: (1, lambda self: self.status, lambda self, value: self._set("status", value)),
    21: (1, lambda self: self._generation, None),
    22: (2, lambda self: self._queue_select, lambda self, value: self._set("_queue_select", value)),
    24: (2, lambda self: self._queue_field("size"), lambda self, value: self.set_queue_size(value)),
    26: (
        2,
        lambda self: NO_VECTOR if self.selected is None else self.selected.vector,
        lambda self, value: self._set_queue_vector(value),
    ),
    28: (2, lambda self: self._queue_field("enabled"), lambda self, value: self._enable(value)),
    30: (2, lambda self: self._queue_select if self.selected is not None else 0, None),
    32: _DESCRIPTORS[0],
    36: _DESCRIPTORS[1],
    40: _DRIVER[0],
    44: _DRIVER[1],
    48: _DEVICE[0],
    52: _DEVICE[1],
}
