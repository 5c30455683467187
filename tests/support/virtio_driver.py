# SPDX-License-Identifier: Apache-2.0
"""A virtual driver: lays queues out in guest memory and drives a device through its transport's registers.

There is no vCPU and no KVM: a test takes milliseconds::

    with driving(Rng()) as driver:                       # or driving(device, transport="mmio", packed=True)
        queue = driver.queues[0]
        assert len(queue.request(writable=[64])) == 64

Written after the specification (VIRTIO 1.3), and not after the device's side.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from softkvm import abi
from softkvm.vmm.memory import MIB, GuestMemory
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.mmio import MmioTransport
from softkvm.vmm.virtio.pci import PciTransport
from softkvm.vmm.virtio.transport import Options, Transport
from softkvm.vmm.virtio.worker import Worker

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED = 28, 29, 32, 34
NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15

MEMORY_SIZE = 64 * MIB
PATIENCE_S = 30.0


class FakeVm:
    """What transports ask of a VM: interrupts are counted, notifications come by exits."""

    def __init__(self) -> None:
        self.raised = threading.Condition()
        self.messages: list[int] = []
        """Data of the MSIs sent."""
        self.levels: list[tuple[int, int]] = []

    def check_extension(self, cap: int) -> int:
        return 0

    def signal_msi(self, msi: abi.kvm_msi) -> int:
        with self.raised:
            self.messages.append(msi.data)
            self.raised.notify_all()
        return 1

    def irq_line(self, irq: int, level: int) -> None:
        with self.raised:
            self.levels.append((irq, level))
            self.raised.notify_all()

    def ioeventfd(self, fd: int, addr: int, len: int, datamatch: int | None = None, flags: int = 0) -> None:
        raise OSError(38, "no ioeventfd here")


class Registers(Protocol):
    """The registers that both transports have."""

    @property
    def transport(self) -> Transport: ...
    def features(self) -> int: ...
    def accept(self, features: int) -> None: ...
    def status(self) -> int: ...
    def set_status(self, value: int) -> None: ...
    def set_up(self, index: int, size: int, addresses: tuple[int, int, int]) -> None: ...
    def size_max(self, index: int) -> int: ...
    def notify(self, index: int) -> None: ...
    def config(self, offset: int, size: int) -> int: ...
    def set_config(self, offset: int, size: int, value: int) -> None: ...
    def generation(self) -> int: ...
    def interrupts(self) -> int: ...


class MmioRegisters:
    """Section 4.2.2."""

    def __init__(self, transport: MmioTransport) -> None:
        self.transport = transport

    def _read(self, offset: int) -> int:
        return self.transport.read(offset, 4)

    def _write(self, offset: int, value: int) -> None:
        self.transport.write(offset, 4, value)

    def features(self) -> int:
        halves = []
        for select in (0, 1):
            self._write(0x14, select)
            halves.append(self._read(0x10))
        return halves[0] | halves[1] << 32

    def accept(self, features: int) -> None:
        for select in (0, 1):
            self._write(0x24, select)
            self._write(0x20, features >> 32 * select & 0xFFFFFFFF)

    def status(self) -> int:
        return self._read(0x70)

    def set_status(self, value: int) -> None:
        self._write(0x70, value)

    def size_max(self, index: int) -> int:
        self._write(0x30, index)
        return self._read(0x34)

    def set_up(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        self._write(0x30, index)
        self._write(0x38, size)
        for register, address in zip((0x80, 0x90, 0xA0), addresses, strict=True):
            self._write(register, address & 0xFFFFFFFF)
            self._write(register + 4, address >> 32)
        self._write(0x44, 1)

    def notify(self, index: int) -> None:
        self._write(0x50, index)

    def config(self, offset: int, size: int) -> int:
        return self.transport.read(0x100 + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.transport.write(0x100 + offset, size, value)

    def generation(self) -> int:
        return self._read(0xFC)

    def interrupts(self) -> int:
        """Take the interrupt status: 1 for queues, 2 for the configuration."""
        status = self._read(0x60)
        self._write(0x64, status)
        return status


class PciRegisters:
    """Section 4.1: the places of all structures are read from the function's capabilities."""

    def __init__(self, transport: PciTransport, *, msix: bool = True) -> None:
        self.transport = transport
        self._vm: FakeVm = transport.msix._vm  # type: ignore[assignment]
        function = transport.function
        function.write(0x04, 2, 0x6)  # memory space, bus master
        self.at: dict[int, int] = {}
        self.capabilities: list[int] = []
        at = function.read(0x34, 1)
        while at:
            identifier, kind = function.read(at, 1), function.read(at + 3, 1)
            self.capabilities.append(identifier)
            if identifier == 9 and kind != 5:
                assert function.read(at + 4, 1) == 0
                self.at[kind] = function.read(at + 8, 4)
                if kind == 2:
                    self.multiplier = function.read(at + 16, 4)
            if identifier == 9 and kind == 5:
                self.window = at
            if identifier == 0x11:
                self.msix = at
                self.vectors = (function.read(at + 2, 2) & 0x7FF) + 1
            at = function.read(at + 1, 1)
        self._seen = 0
        self.uses_msix = msix
        if msix:
            for vector in range(self.vectors):  # address, data: the vector itself
                table = transport.msix
                table.write(16 * vector, 4, 0xFEE00000)
                table.write(16 * vector + 4, 4, 0)
                table.write(16 * vector + 8, 4, vector)
                table.write(16 * vector + 12, 4, 0)
            function.write(self.msix + 2, 2, 0x8000)

    def _read(self, offset: int, size: int) -> int:
        return self.transport.read(self.at[1] + offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self.transport.write(self.at[1] + offset, size, value)

    def features(self) -> int:
        halves = []
        for select in (0, 1):
            self._write(0, 4, select)
            halves.append(self._read(4, 4))
        return halves[0] | halves[1] << 32

    def accept(self, features: int) -> None:
        for select in (0, 1):
            self._write(8, 4, select)
            self._write(12, 4, features >> 32 * select & 0xFFFFFFFF)

    def status(self) -> int:
        return self._read(20, 1)

    def set_status(self, value: int) -> None:
        self._write(20, 1, value)

    def size_max(self, index: int) -> int:
        self._write(22, 2, index)
        return self._read(24, 2)

    def set_up(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        if self.uses_msix:
            self._write(16, 2, 0)
        self._write(22, 2, index)
        self._write(24, 2, size)
        if self.uses_msix:
            self._write(26, 2, index + 1)
        for register, address in zip((32, 40, 48), addresses, strict=True):
            self._write(register, 4, address & 0xFFFFFFFF)
            self._write(register + 4, 4, address >> 32)
        self._write(28, 2, 1)

    def notify(self, index: int) -> None:
        self._write(22, 2, index)
        self.transport.write(self.at[2] + self._read(30, 2) * self.multiplier, 2, index)

    def config(self, offset: int, size: int) -> int:
        return self.transport.read(self.at[4] + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.transport.write(self.at[4] + offset, size, value)

    def generation(self) -> int:
        return self._read(21, 1)

    def interrupts(self) -> int:
        """Take what has come since: 1 for queues, 2 for the configuration."""
        if not self.uses_msix:
            return self.transport.read(self.at[3], 1)
        with self._vm.raised:
            new, self._seen = self._vm.messages[self._seen :], len(self._vm.messages)
        return (1 if any(new) else 0) | (2 if 0 in new else 0)


class Buffer:
    """A buffer that the driver has made available."""

    def __init__(self, memory: GuestMemory, head: int, writable: list[tuple[int, int]], count: int) -> None:
        self._memory = memory
        self.head = head
        self.writable = writable
        self.count = count
        self.written: int | None = None
        """The used length, once it has been used."""

    def data(self) -> bytes:
        """What the device has written."""
        assert self.written is not None
        return b"".join(self._memory.read(at, size) for at, size in self.writable)[: self.written]


class DriverQueue:
    """A queue, as the driver sees it."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.index = index
        self.size = size
        self.indirect = False
        self.buffers: dict[int, Buffer] = {}
        self.addresses = self._lay_out()
        driver.registers.set_up(index, size, self.addresses)

    def _lay_out(self) -> tuple[int, int, int]:
        raise NotImplementedError

    def _place(
        self, readable: Iterable[bytes], writable: Iterable[int]
    ) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
        parts = []
        for data in readable:
            at = self.driver.allocate(len(data))
            self.memory.write(at, data)
            parts.append((at, len(data), 0))
        room = [(self.driver.allocate(size), size) for size in writable]
        return parts + [(at, size, WRITE) for at, size in room], room

    def add(self, readable: Iterable[bytes] = (), writable: Iterable[int] = ()) -> Buffer:
        """Make a buffer available: what the device may read, and how much it may write."""
        raise NotImplementedError

    def notify(self) -> None:
        """Notify the device, whether it wants that or not."""
        self.driver.registers.notify(self.index)

    def used(self) -> list[Buffer]:
        """Take what the device has used."""
        raise NotImplementedError

    def wait(self, buffer: Buffer) -> Buffer:
        """Wait until the device has used *buffer*."""
        until = time.monotonic() + PATIENCE_S
        while buffer.written is None:
            self.used()
            if buffer.written is None:
                if self.driver.registers.status() & NEEDS_RESET:
                    raise AssertionError("the device needs a reset")
                assert time.monotonic() < until, "the device has not used the buffer"
                time.sleep(0.0005)
        return buffer

    def request(self, readable: Iterable[bytes] = (), writable: Iterable[int] = ()) -> bytes:
        """Make a buffer available, notify, wait, return what was written."""
        buffer = self.add(readable, writable)
        self.notify()
        return self.wait(buffer).data()


class SplitDriverQueue(DriverQueue):
    """Section 2.7."""

    def _lay_out(self) -> tuple[int, int, int]:
        self._avail_idx = self._used_idx = 0
        self._free = list(range(self.size))
        allocate = self.driver.allocate
        self.desc = allocate(16 * self.size)
        self.avail = allocate(6 + 2 * self.size)
        self.used_ring = allocate(6 + 8 * self.size)
        return self.desc, self.avail, self.used_ring

    def write_descriptor(self, at: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * at, struct.pack("<QIHH", address, length, flags, following))

    def make_available(self, head: int) -> None:
        """Put *head* into the available ring."""
        self.memory.write(self.avail + 4 + 2 * (self._avail_idx % self.size), struct.pack("<H", head))
        self._avail_idx = self._avail_idx + 1 & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self._avail_idx))

    def add(self, readable: Iterable[bytes] = (), writable: Iterable[int] = ()) -> Buffer:
        parts, room = self._place(readable, writable)
        if self.indirect:
            table = self.driver.allocate(16 * len(parts))
            for number, (at, size, flags) in enumerate(parts):
                more = NEXT if number + 1 < len(parts) else 0
                self.memory.write(table + 16 * number, struct.pack("<QIHH", at, size, flags | more, number + 1))
            parts = [(table, 16 * len(parts), INDIRECT)]
        places = [self._free.pop(0) for _ in parts]
        for number, (at, size, flags) in enumerate(parts):
            last = number + 1 == len(parts)
            self.write_descriptor(
                places[number], at, size, flags | (0 if last else NEXT), 0 if last else places[number + 1]
            )
        buffer = Buffer(self.memory, places[0], room, len(parts))
        self._places = {**getattr(self, "_places", {}), places[0]: places}
        self.buffers[places[0]] = buffer
        self.make_available(places[0])
        return buffer

    def set_used_event(self, value: int) -> None:
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", value & 0xFFFF))

    def set_no_interrupt(self, flag: int) -> None:
        self.memory.write(self.avail, struct.pack("<H", flag))

    def avail_event(self) -> int:
        return int.from_bytes(self.memory.read(self.used_ring + 4 + 8 * self.size, 2), "little")

    def wants_notification(self) -> Callable[[], bool]:
        """Return what tells whether the device, with event index, asked to be notified of what is added until then."""
        old = self._avail_idx
        return lambda: (self._avail_idx - self.avail_event() - 1) & 0xFFFF < (self._avail_idx - old) & 0xFFFF

    def used_flags(self) -> int:
        return int.from_bytes(self.memory.read(self.used_ring, 2), "little")

    def used(self) -> list[Buffer]:
        found = []
        index = int.from_bytes(self.memory.read(self.used_ring + 2, 2), "little")
        while self._used_idx != index:
            entry = self.memory.read(self.used_ring + 4 + 8 * (self._used_idx % self.size), 8)
            head, written = struct.unpack("<II", entry)
            buffer = self.buffers.pop(head)
            self._free += self._places.pop(head)
            buffer.written = written
            found.append(buffer)
            self._used_idx = self._used_idx + 1 & 0xFFFF
        return found


class PackedDriverQueue(DriverQueue):
    """Section 2.8."""

    def _lay_out(self) -> tuple[int, int, int]:
        self._next, self._wrap = 0, 1
        self._used_at, self._used_wrap = 0, 1
        self._ids = list(range(self.size))
        allocate = self.driver.allocate
        self.ring = allocate(16 * self.size)
        self.driver_events = allocate(4)
        self.device_events = allocate(4)
        return self.ring, self.driver_events, self.device_events

    def write_descriptor(self, at: int, address: int, length: int, identifier: int, flags: int) -> None:
        self.memory.write(self.ring + 16 * at, struct.pack("<QIHH", address, length, identifier, flags))

    def add(self, readable: Iterable[bytes] = (), writable: Iterable[int] = ()) -> Buffer:
        parts, room = self._place(readable, writable)
        if self.indirect:
            table = self.driver.allocate(16 * len(parts))
            for number, (at, size, flags) in enumerate(parts):
                self.memory.write(table + 16 * number, struct.pack("<QIHH", at, size, 0, flags))
            parts = [(table, 16 * len(parts), INDIRECT)]
        identifier = self._ids.pop(0)
        descriptors = []
        for number, (at, size, flags) in enumerate(parts):
            flags |= NEXT if number + 1 < len(parts) else 0
            flags |= AVAIL if self._wrap else USED
            descriptors.append((self._next, at, size, identifier, flags))
            self._next += 1
            if self._next == self.size:
                self._next, self._wrap = 0, self._wrap ^ 1
        for descriptor in reversed(descriptors):  # the first last
            self.write_descriptor(*descriptor)
        buffer = Buffer(self.memory, identifier, room, len(parts))
        self.buffers[identifier] = buffer
        return buffer

    def wants_notification(self) -> Callable[[], bool]:
        """Return what tells whether the device, with event index, asked to be notified of what is added until then."""
        old, old_wrap = self._next, self._wrap

        def wanted() -> bool:
            place, kind = struct.unpack("<HH", self.memory.read(self.device_events, 4))
            if kind != 2:
                return bool(kind == 0)
            event, new = place & 0x7FFF, self._next
            if place >> 15 != self._wrap:
                event -= self.size
            added = new - old + (self.size if self._wrap != old_wrap else 0)
            return bool((new - event - 1) & 0xFFFF < added)

        return wanted

    def set_driver_events(self, place: int, flags: int) -> None:
        self.memory.write(self.driver_events, struct.pack("<HH", place, flags))

    def used(self) -> list[Buffer]:
        found: list[Buffer] = []
        while True:
            entry = self.memory.read(self.ring + 16 * self._used_at, 16)
            _, written, identifier, flags = struct.unpack("<QIHH", entry)
            if bool(flags & AVAIL) != bool(self._used_wrap) or bool(flags & USED) != bool(self._used_wrap):
                return found
            buffer = self.buffers.pop(identifier)
            self._ids.append(identifier)
            buffer.written = written
            found.append(buffer)
            self._used_at += buffer.count
            if self._used_at >= self.size:
                self._used_at, self._used_wrap = self._used_at - self.size, self._used_wrap ^ 1


class Driver:
    """A driver of *registers*; :meth:`start` takes it as far as DRIVER_OK."""

    def __init__(self, registers: Registers, memory: GuestMemory, vm: FakeVm) -> None:
        self.registers = registers
        self.transport = registers.transport
        self.device = registers.transport.device
        self.memory = memory
        self.vm = vm
        self.queues: list[Any] = []
        """The queues, which are :class:`SplitDriverQueue` or :class:`PackedDriverQueue`."""
        self._free_at = MIB

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Return the address of *size* bytes of guest memory that nobody has."""
        at = (self._free_at + alignment - 1) & -alignment
        self._free_at = at + size
        if self._free_at > self.memory.end:
            self._free_at, at = MIB + size, MIB  # a long test: what was first is done by now
        return at

    def start(self, *, without: Sequence[int] = (), queue_size: int | None = None, queues: int | None = None) -> Driver:
        """Reset, negotiate all features but *without*, set all queues up (or the first *queues*), DRIVER_OK."""
        registers = self.registers
        registers.set_status(0)
        registers.set_status(ACKNOWLEDGE | DRIVER)
        features = registers.features() & ~sum(1 << feature for feature in without)
        registers.accept(features)
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert registers.status() & FEATURES_OK
        kind = PackedDriverQueue if features >> RING_PACKED & 1 else SplitDriverQueue
        count = len(self.device.queue_sizes) if queues is None else queues
        self.queues = [
            kind(self, index, min(queue_size or 1 << 15, registers.size_max(index)))
            for index in range(count)
            if registers.size_max(index)
        ]
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self

    def wait_interrupt(self, kind: int = 1) -> None:
        """Wait for an interrupt: 1 of a queue, 2 of the configuration."""
        until = time.monotonic() + PATIENCE_S
        while not self.registers.interrupts() & kind:
            assert time.monotonic() < until, "there is no interrupt"
            time.sleep(0.0005)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for *condition*."""
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until, "it never came"
            time.sleep(0.0005)


def connect(
    device: VirtioDevice,
    memory: GuestMemory,
    worker: Worker,
    vm: FakeVm,
    *,
    transport: str = "pci",
    packed: bool = False,
    msix: bool = True,
) -> Driver:
    """Put *device* behind a transport, and return a driver of it that hasn't started."""
    options = Options(packed=packed)
    registers: Registers
    if transport == "mmio":

        def pulse() -> None:
            vm.irq_line(16, 1)
            vm.irq_line(16, 0)

        behind = MmioTransport(device, memory, vm, worker, options, address=0xFEC10000, pulse=pulse)  # type: ignore[arg-type]
        registers = MmioRegisters(behind)
    else:
        function = PciTransport(
            device,
            memory,
            vm,  # type: ignore[arg-type]
            worker,
            options,
            address=0xFE000000,
            msix_address=0xFE007000,
            line=10,
            set_irq=lambda level: vm.irq_line(10, level),
        )
        registers = PciRegisters(function, msix=msix)
    return Driver(registers, memory, vm)


@contextmanager
def driving(
    device: VirtioDevice,
    *,
    transport: str = "pci",
    packed: bool = False,
    msix: bool = True,
    start: bool = True,
    memory: GuestMemory | None = None,
    **options: Any,
) -> Iterator[Driver]:
    """A driver of *device* behind a transport of its own, started with *options* of :meth:`Driver.start`."""
    memory = memory or GuestMemory(MEMORY_SIZE)
    worker = Worker("test devices")
    driver = connect(device, memory, worker, FakeVm(), transport=transport, packed=packed, msix=msix)
    try:
        yield driver.start(**options) if start else driver
    finally:
        driver.transport.close()
        worker.close()
        memory.close()
