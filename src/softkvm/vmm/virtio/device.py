# SPDX-License-Identifier: Apache-2.0
"""What all virtio devices have in common; a device's module has the rest (VIRTIO 1.3, section 2).

``activate()``, ``reset()``, ``notified()``, ``write_config()``, ``save()`` and ``restore()`` are called under the
worker's lock, one at a time, on whatever thread; ``read_config()`` on vCPU threads at any time, and it must be quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.virtio.queue import NoQueue, Queue
from softkvm.vmm.virtio.worker import Worker


class Attachment(Protocol):
    """What a device asks of its transport."""

    def config_changed(self) -> None:
        """Raise the configuration interrupt; the generation is another."""

    def needs_reset(self, why: str) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver and the user."""


class VirtioDevice:
    """A device towards its transport. Subclasses set the class's attributes and override what they need."""

    type: int = 0
    """The device ID (section 5)."""
    name: str = "virtio"
    features: int = 0
    """What the device offers; the transport adds what rings and transports have."""
    queue_sizes: tuple[int, ...] = ()
    """The largest size of each queue."""
    config: bytes | bytearray = b""
    """The configuration space, for a device without a :meth:`read_config` of its own."""
    pci_class: int = 0xFF0000
    """The class code of the PCI function."""

    memory: GuestMemory
    worker: Worker

    def __init__(self) -> None:
        self.driver_features = 0
        """What the driver has accepted; set before :meth:`activate`."""
        self.queues: list[Queue] = []
        self.queue_workers: list[Worker] = []
        """For each queue the worker that :meth:`notified` is called on, if it isn't the device's: set before it is
        attached. Different queues are served at the same time then, and all of these workers' locks are held where the
        device's is."""
        self.transport: Attachment | None = None

    def attach(self, transport: Attachment, memory: GuestMemory, worker: Worker) -> None:
        """Become *transport*'s, which calls this once."""
        self.transport, self.memory, self.worker = transport, memory, worker
        self.queues = self.no_queues()

    def no_queues(self) -> list[Queue]:
        """Return the queues as they are before a driver has made them ready."""
        return [NoQueue(self.memory, index) for index in range(len(self.queue_sizes))]

    def negotiated(self, feature: int) -> bool:
        """Whether the driver has accepted a feature bit."""
        return bool(self.driver_features >> feature & 1)

    # -- what a device overrides

    def activate(self) -> None:
        """DRIVER_OK: the queues are ready. After a restore of a device that was active, too."""

    def reset(self) -> None:
        """The driver resets the device, or the machine does: forget everything of the driver's."""

    def notified(self, index: int) -> None:
        """The driver has put buffers into queue *index*."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Return *size* bytes of the configuration space; what is behind its end reads as zeroes."""
        return bytes(self.config[offset : offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space: nothing comes of it where nothing is writable."""

    def save(self) -> dict[str, Any]:
        """The device's own state; transport and queues save themselves."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the queues are ready, and :meth:`activate` comes next."""

    def files(self) -> list[str]:
        """The files whose contents the guest sees: a snapshot is of the machine with what is in them."""
        return []

    def let_go_of_files(self) -> None:
        """The machine stands, and may go on in another process: let that one have the files."""

    def take_files_back(self) -> None:
        """It goes on here, after all. What can't be had any more is the guest's error, and none of ours."""

    def new_identity(self, number: int) -> None:
        """The machine is clone *number* of one that was restored: take addresses that no other has. 0: it is alone."""

    def close(self) -> None:
        """Give back what the device holds; the worker calls nothing of it any more."""

    # -- what it calls

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        if self.transport is not None:
            self.transport.config_changed()

    def needs_reset(self, why: str) -> None:
        """Stop: the driver, or something behind the device, is in a state that only a reset ends."""
        if self.transport is not None:
            self.transport.needs_reset(why)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call *function* on the device's worker, soon; from any thread."""
        self.worker.call(function, *arguments)
