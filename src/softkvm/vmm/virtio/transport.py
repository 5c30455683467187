# SPDX-License-Identifier: Apache-2.0
"""What both transports have in common: status, features, queues, interrupts, how a device is notified.

A transport's registers are accessed on vCPU threads. What changes the device's status or its queues is done under the
worker's lock, so that the device isn't in the middle of a batch. The interrupt's state has a lock of its own, which is
held for a moment only: a guest's handler must not wait for a batch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from softkvm import abi, api
from softkvm.vmm.errors import complain, show_traceback, unexpected
from softkvm.vmm.virtio.ids import (
    DEVICE_NEEDS_RESET,
    DRIVER_OK,
    FEATURES_OK,
    VIRTIO_F_RING_EVENT_IDX,
    VIRTIO_F_RING_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
    bit,
)
from softkvm.vmm.virtio.packed import PackedQueue
from softkvm.vmm.virtio.queue import Queue, QueueError, SplitQueue
from softkvm.vmm.virtio.worker import ONCE, READ, Worker

if TYPE_CHECKING:
    from softkvm.vmm.memory import GuestMemory
    from softkvm.vmm.virtio.device import VirtioDevice

NO_VECTOR: Final = 0xFFFF
_TRANSPORT_FEATURES: Final = bit(VIRTIO_F_VERSION_1, VIRTIO_F_RING_INDIRECT_DESC, VIRTIO_F_RING_EVENT_IDX)


@dataclass(slots=True)
class QueueState:
    """A queue's registers."""

    size_max: int
    size: int
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    enabled: bool = False
    vector: int = NO_VECTOR


@dataclass(frozen=True, slots=True)
class Options:
    """How a device is shown to the guest, whatever device it is."""

    packed: bool = False
    """Whether packed rings are offered."""
    event_idx: bool = True
    indirect: bool = True
    ioeventfd: bool = True
    """Whether notifications go by an eventfd, and not by an exit."""

    def features(self) -> int:
        """The feature bits of these options."""
        features = _TRANSPORT_FEATURES
        if not self.event_idx:
            features &= ~bit(VIRTIO_F_RING_EVENT_IDX)
        if not self.indirect:
            features &= ~bit(VIRTIO_F_RING_INDIRECT_DESC)
        return features | (bit(VIRTIO_F_RING_PACKED) if self.packed else 0)


class _Locks:
    """Several locks that are taken together, always in the same order."""

    def __init__(self, locks: list[AbstractContextManager[Any]]) -> None:
        self._locks = locks

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.__enter__()

    def __exit__(self, *reason: Any) -> None:
        for lock in reversed(self._locks):
            lock.__exit__(None, None, None)


class Transport(ABC):
    """Shows *device* to the guest; the device's functions are called on *worker*."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, vm: api.Vm, worker: Worker, options: Options | None = None
    ) -> None:
        self.device = device
        self.memory = memory
        self.worker = worker
        self._vm = vm
        self._options = options or Options()
        self.offered = device.features | self._options.features()
        self.queues = [QueueState(size, size) for size in device.queue_sizes]
        self._status = 0
        self._generation = 0
        self._queue_select = 0
        self._device_features_select = 0
        self._driver_features_select = 0
        self._driver_features = 0
        self._isr = 0
        self._isr_lock = threading.Lock()
        self._complained = False
        self._kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.queues]
        self._placed: list[tuple[int, int]] = []  # ioeventfds: descriptor, address
        device.attach(self, memory, worker)
        self._queue_workers = device.queue_workers or [worker] * len(self._kicks)
        self.lock = _Locks([other.lock for other in dict.fromkeys([worker, *self._queue_workers])])
        """No function of the device's runs while this is held."""
        for index, fd in enumerate(self._kicks):
            self._queue_workers[index].add(fd, READ | ONCE, self._kicked(index))

    def close(self) -> None:
        """Give back the eventfds and the device."""
        for worker, fd in zip(self._queue_workers, self._kicks, strict=True):
            worker.remove(fd)
        with self.lock:
            self._remove_ioeventfds()
        for fd in self._kicks:
            os.close(fd)
        self._kicks = []
        self.device.close()

    # -- what a kind of transport adds

    @abstractmethod
    def notify_address(self, index: int) -> int | None:
        """Where in guest physical memory the driver notifies of queue *index*; None while that is nowhere."""

    @abstractmethod
    def interrupt_queue(self, index: int) -> None:
        """Tell the driver of used buffers."""

    @abstractmethod
    def interrupt_config(self) -> None:
        """Tell the driver of another configuration."""

    # -- notifications

    def notify(self, index: int) -> None:
        """The driver has notified of queue *index*, by an exit."""
        if index < len(self._kicks):
            os.eventfd_write(self._kicks[index], 1)

    def _kicked(self, index: int) -> Callable[[int], None]:
        device = self.device

        def kicked(events: int) -> None:
            if self._status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK:
                self._guarded(device.notified, index)

        return kicked

    def _guarded(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function of the device's; what it raises leaves the device in need of a reset."""
        try:
            function(*arguments)
        except QueueError as error:
            self.needs_reset(str(error))
        except Exception as error:
            show_traceback(error)
            self.needs_reset(unexpected(error))

    def _place_ioeventfds(self) -> None:
        """Let KVM signal notifications, if it can."""
        if not self._options.ioeventfd or not self._status & DRIVER_OK:
            return
        any_length = self._vm.check_extension(abi.KVM_CAP_IOEVENTFD_ANY_LENGTH)
        for index, fd in enumerate(self._kicks):
            address = self.notify_address(index)
            if address is None or not self.queues[index].enabled or not any_length:
                continue
            with contextlib.suppress(OSError):  # a KVM without: an exit does it as well
                self._place(fd, address, index)
                self._placed.append((fd, address))

    def _place(self, fd: int, address: int, index: int) -> None:
        self._vm.ioeventfd(fd, address, 0)

    def _unplace(self, fd: int, address: int) -> None:
        self._vm.ioeventfd(fd, address, 0, flags=abi.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _remove_ioeventfds(self) -> None:
        placed, self._placed = self._placed, []
        for fd, address in placed:
            with contextlib.suppress(OSError):  # the VM may be closed
                self._unplace(fd, address)

    def moved(self) -> None:
        """The registers are at another place of guest physical memory."""
        with self.lock:
            self._remove_ioeventfds()
            self._place_ioeventfds()

    # -- features

    @property
    def device_features(self) -> int:
        """The half of the offered features that is selected."""
        select = self._device_features_select
        return self.offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    @property
    def driver_features(self) -> int:
        """The selected half of what the driver accepts."""
        select = self._driver_features_select
        return self._driver_features >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    @driver_features.setter
    def driver_features(self, value: int) -> None:
        select = self._driver_features_select
        if self._status & FEATURES_OK or select > 1:
            return
        mask = 0xFFFFFFFF << 32 * select
        self._driver_features = self._driver_features & ~mask | value << 32 * select & mask

    # -- status

    @property
    def status(self) -> int:
        """The device status."""
        return self._status

    @status.setter
    def status(self, value: int) -> None:
        with self.lock:
            if not value:
                self.reset()
                return
            if value & FEATURES_OK and not self._status & FEATURES_OK:
                accepted = self._driver_features
                if accepted & ~self.offered or not accepted & bit(VIRTIO_F_VERSION_1):
                    value &= ~FEATURES_OK  # the driver reads that back (3.1.1)
            if value & DRIVER_OK and not value & FEATURES_OK:
                value &= ~DRIVER_OK
            begins = value & DRIVER_OK and not self._status & DRIVER_OK
            with self._isr_lock:
                self._status = value | self._status & DEVICE_NEEDS_RESET
            if begins:
                self._activate()

    def _activate(self) -> None:
        self.device.driver_features = self._driver_features
        try:
            self.device.queues = [self._queue(index) for index in range(len(self.queues))]
        except QueueError as error:
            self.needs_reset(str(error))
            return
        self._guarded(self.device.activate)
        self._place_ioeventfds()
        self._guarded(self._notify_early)

    def _notify_early(self) -> None:
        """Some drivers of Linux's notify before DRIVER_OK (balloon's statistics), which they must not (3.1.1)."""
        for queue in self.device.queues:
            if queue.ready and queue.available():
                self.notify(queue.index)

    def _queue(self, index: int) -> Queue:
        state = self.queues[index]
        if not state.enabled:
            return self.device.no_queues()[index]
        accepted = self._driver_features
        format = PackedQueue if accepted >> VIRTIO_F_RING_PACKED & 1 else SplitQueue
        queue: Queue = format(
            self.memory,
            index,
            state.size,
            (state.descriptors, state.driver, state.device),
            event_idx=bool(accepted >> VIRTIO_F_RING_EVENT_IDX & 1),
            indirect=bool(accepted >> VIRTIO_F_RING_INDIRECT_DESC & 1),
            interrupt=lambda: self.interrupt_queue(index),
        )
        queue.again = lambda: self.notify(index)
        return queue

    def reset(self) -> None:
        """Reset the device: as the driver does it by writing 0 to the status (2.4)."""
        with self.lock:
            self._remove_ioeventfds()
            self._status = 0
            self._driver_features = 0
            self._queue_select = self._device_features_select = self._driver_features_select = 0
            for state in self.queues:
                state.size = state.size_max
                state.descriptors = state.driver = state.device = 0
                state.enabled = False
                state.vector = NO_VECTOR
            with self._isr_lock:
                self._isr = 0
                self._isr_changed()
            self._complained = False
            self.device.queues = self.device.no_queues()
            self.device.driver_features = 0
            try:
                self.device.reset()
            except Exception as error:
                show_traceback(error)
                complain(f"{self.device.name}: reset: {unexpected(error)}")

    def needs_reset(self, why: str) -> None:
        """Set DEVICE_NEEDS_RESET (2.1.2); one line of warning. On a worker of the device's: its lock alone is held."""
        with self._isr_lock:
            if self._status & DEVICE_NEEDS_RESET:
                return
            told = self._status & DRIVER_OK
            self._status |= DEVICE_NEEDS_RESET
            complains, self._complained = not self._complained, True
        if complains:
            complain(f"{self.device.name}: the device needs a reset: {why}")
        if told:
            self.config_changed()

    def config_changed(self) -> None:
        """The configuration is another one."""
        with self._isr_lock:
            self._generation = self._generation + 1 & 0xFF
        if self._status & DRIVER_OK:
            self.interrupt_config()

    # -- queues

    @property
    def selected(self) -> QueueState | None:
        """The queue whose registers are seen; None if there is no such queue."""
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def set_queue_size(self, size: int) -> None:
        """The driver's choice: what is out of range has no effect."""
        state = self.selected
        if state is not None and not state.enabled and 0 < size <= state.size_max:
            state.size = size

    def set_queue_address(self, name: str, shift: int, bits: int, value: int) -> None:
        """Set *bits* bits at *shift* of an address: ``descriptors``, ``driver`` or ``device``."""
        state = self.selected
        if state is not None and not state.enabled:
            mask = (1 << bits) - 1 << shift
            setattr(state, name, getattr(state, name) & ~mask | value << shift & mask)

    def enable_queue(self) -> None:
        """The driver has set the queue up."""
        state = self.selected
        if state is not None and not self._status & DRIVER_OK:
            state.enabled = True

    def disable_queue(self) -> None:
        """The driver takes the queue away (4.2.2.2): nothing of it is used any more when this returns."""
        with self.lock:
            state = self.selected
            if state is not None and state.enabled:
                state.enabled = False
                self.device.queues[self._queue_select] = self.device.no_queues()[self._queue_select]

    # -- interrupts

    def _raise_isr(self, bits: int) -> None:
        with self._isr_lock:
            self._isr |= bits
            self._isr_changed()

    def _isr_changed(self) -> None:  # noqa: B027
        """The interrupt status is another: with its lock held. A transport with a level drives it here."""

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """Registers, queues and the device; the worker is paused."""
        with self.lock:
            return {
                "status": self._status,
                "driver_features": self._driver_features,
                "select": [self._queue_select, self._device_features_select, self._driver_features_select],
                "isr": self._isr,
                "generation": self._generation,
                "queues": [
                    {
                        "size": state.size,
                        "addresses": [state.descriptors, state.driver, state.device],
                        "enabled": state.enabled,
                        "vector": state.vector,
                        "place": queue.save(),
                    }
                    for state, queue in zip(self.queues, self.device.queues, strict=True)
                ],
                "device": self.device.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; ValueError if it is not of such a device."""
        with self.lock:
            if len(state["queues"]) != len(self.queues) or state["driver_features"] & ~self.offered:
                raise ValueError(f"{self.device.name}: the saved state is of a device with other queues or features")
            self.reset()
            self._driver_features = state["driver_features"]
            self._queue_select, self._device_features_select, self._driver_features_select = state["select"]
            self._generation = state["generation"]
            for queue, saved in zip(self.queues, state["queues"], strict=True):
                queue.size = saved["size"]
                queue.descriptors, queue.driver, queue.device = saved["addresses"]
                queue.enabled, queue.vector = saved["enabled"], saved["vector"]
            self._restore_device(state)
            with self._isr_lock:
                self._isr = state["isr"]
                self._isr_changed()

    def _restore_device(self, state: dict[str, Any]) -> None:
        """The device goes on where it was; what the driver may have notified of meanwhile is looked at."""
        self._status = state["status"]
        active = bool(self._status & DRIVER_OK)
        self.device.driver_features = self._driver_features if active else 0
        if active and not self._status & DEVICE_NEEDS_RESET:
            try:
                queues = [self._queue(index) for index in range(len(self.queues))]
            except QueueError as error:
                raise ValueError(f"{self.device.name}: {error}") from None
            for queue, saved in zip(queues, state["queues"], strict=True):
                queue.restore(saved["place"])
            self.device.queues = queues
        self.device.restore(state["device"])
        if active and not self._status & DEVICE_NEEDS_RESET:
            self._guarded(self.device.activate)
            self._place_ioeventfds()
            for index in range(len(self.queues)):
                self.notify(index)
