# SPDX-License-Identifier: Apache-2.0
"""Virtio over MMIO (VIRTIO 1.3, section 4.2): a page of registers and an interrupt line, found by ACPI (LNRO0005)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from softkvm import abi, api
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.ids import INTERRUPT_CONFIG, INTERRUPT_QUEUE, VIRTIO_VENDOR
from softkvm.vmm.virtio.transport import Options, Transport
from softkvm.vmm.virtio.worker import Worker

SIZE: Final = 0x1000
MAGIC: Final = 0x74726976  # "virt"
VERSION: Final = 2
CONFIG: Final = 0x100
QUEUE_NOTIFY: Final = 0x50

_NO_REGION: Final = 0xFFFFFFFF  # length and base of a shared memory region that isn't there


class MmioTransport(Transport):
    """Registers at *address*; ``pulse()`` raises the edge-triggered interrupt line."""

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        vm: api.Vm,
        worker: Worker,
        options: Options | None = None,
        *,
        address: int,
        pulse: Callable[[], None],
    ) -> None:
        self.address = address
        self._pulse = pulse
        super().__init__(device, memory, vm, worker, options)

    # -- the bus

    def read(self, offset: int, size: int) -> int:
        """A register (32 bits), or part of the device's configuration space."""
        if offset >= CONFIG:
            return int.from_bytes(self.device.read_config(offset - CONFIG, size), "little")
        register = _READ.get(offset)
        if register is None or size != 4:
            return 0
        return register(self) & 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, or part of the configuration space."""
        if offset >= CONFIG:
            with self.lock:
                self._guarded(self.device.write_config, offset - CONFIG, value.to_bytes(size, "little"))
            return
        register = _WRITE.get(offset)
        if register is not None and size == 4:
            register(self, value)

    # -- registers that are more than a field

    def _queue_field(self, name: str) -> int:
        state = self.selected
        return int(getattr(state, name)) if state is not None else 0

    def _acknowledge(self, value: int) -> None:
        with self._isr_lock:
            self._isr &= ~value

    def _set(self, name: str, value: int) -> None:
        setattr(self, name, value)

    def _ready(self, value: int) -> None:
        if value & 1:
            self.enable_queue()
        else:
            self.disable_queue()

    # -- a transport's

    def notify_address(self, index: int) -> int | None:
        """QueueNotify, where the value written tells the queue."""
        return self.address + QUEUE_NOTIFY

    def _place(self, fd: int, address: int, index: int) -> None:
        self._vm.ioeventfd(fd, address, 4, index)

    def _unplace(self, fd: int, address: int) -> None:
        self._vm.ioeventfd(fd, address, 4, self._kicks.index(fd), abi.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def interrupt_queue(self, index: int) -> None:
        """One line for all."""
        self._raise_isr(INTERRUPT_QUEUE)
        self._pulse()

    def interrupt_config(self) -> None:
        """One line for all."""
        self._raise_isr(INTERRUPT_CONFIG)
        self._pulse()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; an interrupt that was on its way is raised again."""
        super().restore(state)
        if self._isr:
            self._pulse()


_READ: Final[dict[int, Callable[[MmioTransport], int]]] = {
    0x000: lambda self: MAGIC,
    0x004: lambda self: VERSION,
    0x008: lambda self: self.device.type,
    0x00C: lambda self: VIRTIO_VENDOR,
    0x010: lambda self: self.device_features,
    0x034: lambda self: self._queue_field("size_max"),
    0x044: lambda self: self._queue_field("enabled"),
    0x060: lambda self: self._isr,
    0x070: lambda self: self.status,
    0x0B0: lambda self: _NO_REGION,
    0x0B4: lambda self: _NO_REGION,
    0x0B8: lambda self: _NO_REGION,
    0x0BC: lambda self: _NO_REGION,
    0x0FC: lambda self: self._generation,
}

_WRITE: Final[dict[int, Callable[[MmioTransport, int], None]]] = {
    0x014: lambda self, value: self._set("_device_features_select", value),
    0x020: lambda self, value: self._set("driver_features", value),
    0x024: lambda self, value: self._set("_driver_features_select", value),
    0x030: lambda self, value: self._set("_queue_select", value),
    0x038: lambda self, value: self.set_queue_size(value),
    0x044: lambda self, value: self._ready(value),
    0x050: lambda self, value: self.notify(value),
    0x064: lambda self, value: self._acknowledge(value),
    0x070: lambda self, value: self._set("status", value),
    0x080: lambda self, value: self.set_queue_address("descriptors", 0, 32, value),
    0x084: lambda self, value: self.set_queue_address("descriptors", 32, 32, value),
    0x090: lambda self, value: self.set_queue_address("driver", 0, 32, value),
    0x094: lambda self, value: self.set_queue_address("driver", 32, 32, value),
    0x0A0: lambda self, value: self.set_queue_address("device", 0, 32, value),
    0x0A4: lambda self, value: self.set_queue_address("device", 32, 32, value),
}
