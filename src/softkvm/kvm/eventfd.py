# SPDX-License-Identifier: Apache-2.0
"""irqfd and ioeventfd (KVM API, KVM_IRQFD and KVM_IOEVENTFD).

One thread per VM polls the eventfds that raise interrupts; it consumes each counter and drives the line. An
ioeventfd is a device on a bus whose write adds one to a counter.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.x86.irq_seams import KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

_ONE: Final = struct.pack("=Q", 1)
_LENGTHS: Final = (0, 1, 2, 4, 8)


def signal_eventfd(fd: int) -> None:
    """Add one to an eventfd's counter; a full counter is signalled already."""
    try:
        os.write(fd, _ONE)
    except BlockingIOError:
        pass


def _duplicate(fd: int) -> int:
    """Keep an eventfd open beyond its owner's close; EBADF for no descriptor, EINVAL for another kind of file."""
    copy = os.dup(fd)
    try:
        kind = os.readlink(f"/proc/self/fd/{copy}")
    except OSError:
        kind = ""
    if kind != "anon_inode:[eventfd]":
        os.close(copy)
        raise kvm_error(errno.EINVAL, f"fd={fd} is {kind or 'unknown'}, expected an eventfd")
    os.set_blocking(copy, False)
    return copy


class Irqfd:
    """An eventfd that raises a GSI."""

    __slots__ = ("_vm", "active", "fd", "gsi", "resample_fd", "user_fd")

    def __init__(self, vm: Vm, user_fd: int, fd: int, gsi: int, resample_fd: int) -> None:
        self._vm = vm
        self.user_fd = user_fd
        self.fd = fd
        self.gsi = gsi
        self.resample_fd = resample_fd
        self.active = True

    def consume(self) -> None:
        """Take the counter and drive the line: a pulse, or up until acknowledged with a resample eventfd."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return
        chips = self._vm.chips
        if chips is None or not self.active:
            return
        if self.resample_fd >= 0:
            chips.set_irq(self.gsi, 1, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)
        else:
            chips.set_irq(self.gsi, 1)
            chips.set_irq(self.gsi, 0)

    def acknowledged(self) -> None:
        """The guest ended the interrupt: lower the line, tell userspace to look at its device again."""
        chips = self._vm.chips
        if chips is not None and self.active:
            chips.set_irq(self.gsi, 0, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)
            signal_eventfd(self.resample_fd)


class Ioeventfd:
    """A guest address whose writes signal an eventfd."""

    __slots__ = ("address", "bus_name", "datamatch", "fd", "length", "user_fd")

    def __init__(self, user_fd: int, fd: int, bus_name: str, address: int, length: int, datamatch: int | None) -> None:
        self.user_fd = user_fd
        self.fd = fd
        self.bus_name = bus_name
        self.address = address
        self.length = length
        self.datamatch = datamatch

    def io_read(self, address: int, size: int) -> int | None:
        """Reads are for someone else."""
        return None

    def io_write(self, address: int, size: int, value: int) -> bool:
        """Signal if address, length and data match."""
        if address != self.address or (self.length and size != self.length):
            return False
        if self.datamatch is not None and value != self.datamatch:
            return False
        signal_eventfd(self.fd)
        return True

    def collides(self, other: Ioeventfd) -> bool:
        """Tell whether a write could match both."""
        return (
            self.bus_name == other.bus_name
            and self.address == other.address
            and (not self.length or not other.length or self.length == other.length)
            and (self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch)
        )


class Eventfds:
    """All irqfds and ioeventfds of a VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._irqfds: dict[int, Irqfd] = {}
        self._ioeventfds: list[Ioeventfd] = []
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._stopping = False

    # --- irqfd -------------------------------------------------------------------------------------

    def irqfd(self, fd: int, gsi: int, flags: int, resamplefd: int) -> None:
        """KVM_IRQFD: EINVAL for flags or no chips, EBUSY for an eventfd in use."""
        if flags & ~(abi.KVM_IRQFD_FLAG_DEASSIGN | abi.KVM_IRQFD_FLAG_RESAMPLE):
            raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected KVM_IRQFD_FLAG_DEASSIGN or _RESAMPLE")
        if flags & abi.KVM_IRQFD_FLAG_DEASSIGN:
            self._deassign(fd, gsi)
            return
        if self._vm.chips is None:
            raise kvm_error(errno.EINVAL, "there is no in-kernel irqchip")
        copy = _duplicate(fd)
        resample = -1
        try:
            if flags & abi.KVM_IRQFD_FLAG_RESAMPLE:
                resample = _duplicate(resamplefd)
            with self._lock:
                if any(_same_file(irqfd.fd, copy) for irqfd in self._irqfds.values()):
                    raise kvm_error(errno.EBUSY, f"fd={fd} is an irqfd already")
                irqfd = Irqfd(self._vm, fd, copy, gsi, resample)
                if resample >= 0:
                    self._vm.chips.routing.add_ack_notifier(gsi, irqfd.acknowledged)
                self._start()
                assert self._epoll is not None
                self._irqfds[copy] = irqfd
                self._epoll.register(copy, select.EPOLLIN)
        except BaseException:
            os.close(copy)
            if resample >= 0:
                os.close(resample)
            raise

    def _deassign(self, fd: int, gsi: int) -> None:
        with self._lock:
            for copy, irqfd in list(self._irqfds.items()):
                if irqfd.gsi == gsi and _same_file(copy, fd):
                    self._drop(irqfd)

    def _drop(self, irqfd: Irqfd) -> None:
        irqfd.active = False
        assert self._epoll is not None
        self._epoll.unregister(irqfd.fd)
        del self._irqfds[irqfd.fd]
        if irqfd.resample_fd >= 0 and self._vm.chips is not None:
            self._vm.chips.routing.remove_ack_notifier(irqfd.gsi, irqfd.acknowledged)
            os.close(irqfd.resample_fd)
        os.close(irqfd.fd)

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._main, name="kvm-irqfd", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        while not self._stopping:
            for fd, _ in epoll.poll():
                with self._lock:
                    irqfd = self._irqfds.get(fd)
                    if irqfd is not None:
                        irqfd.consume()

    # --- ioeventfd ---------------------------------------------------------------------------------

    def ioeventfd(self, fd: int, addr: int, length: int, datamatch: int | None, flags: int) -> None:
        """KVM_IOEVENTFD: EINVAL for flags, length or wrapping address, EEXIST for a collision, ENOENT on removal."""
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        valid = abi.KVM_IOEVENTFD_FLAG_DATAMATCH | abi.KVM_IOEVENTFD_FLAG_PIO | abi.KVM_IOEVENTFD_FLAG_DEASSIGN
        if flags & ~valid:
            raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected DATAMATCH, PIO or DEASSIGN")
        if length not in _LENGTHS:
            raise kvm_error(errno.EINVAL, f"len={length}, expected 0, 1, 2, 4 or 8")
        if addr + length >= 1 << 64:
            raise kvm_error(errno.EINVAL, f"addr={addr:#x} plus len wraps around")
        if not length and flags & abi.KVM_IOEVENTFD_FLAG_DATAMATCH:
            raise kvm_error(errno.EINVAL, "len=0 can't be combined with a datamatch")
        bus_name = "pio" if flags & abi.KVM_IOEVENTFD_FLAG_PIO else "mmio"
        match = datamatch if flags & abi.KVM_IOEVENTFD_FLAG_DATAMATCH else None
        with self._lock:
            if flags & abi.KVM_IOEVENTFD_FLAG_DEASSIGN:
                self._remove(fd, bus_name, addr, length, match)
                return
            copy = _duplicate(fd)
            new = Ioeventfd(fd, copy, bus_name, addr, length, match)
            if any(new.collides(other) for other in self._ioeventfds):
                os.close(copy)
                raise kvm_error(errno.EEXIST, f"addr={addr:#x} len={length} has an eventfd already")
            self._ioeventfds.append(new)
            self._bus(bus_name).add(addr, length or 8, new)
            if not length:
                for size in (1, 2, 4):
                    self._bus(bus_name).add(addr, size, new)

    def _bus(self, name: str):  # type: ignore[no-untyped-def]
        return self._vm.pio_bus if name == "pio" else self._vm.mmio_bus

    def _remove(self, fd: int, bus_name: str, addr: int, length: int, match: int | None) -> None:
        for entry in self._ioeventfds:
            if (entry.bus_name, entry.address, entry.length, entry.datamatch) == (
                bus_name,
                addr,
                length,
                match,
            ) and _same_file(entry.fd, fd):
                self._bus(bus_name).remove(entry)
                self._ioeventfds.remove(entry)
                os.close(entry.fd)
                return
        raise kvm_error(errno.ENOENT, f"addr={addr:#x} len={length}: there is no such ioeventfd")

    def close(self) -> None:
        """Stop the thread and let go of every descriptor."""
        self._stopping = True
        if self._thread is not None:
            signal_eventfd(self._wake)
            if self._thread is not threading.current_thread():
                self._thread.join()
            with self._lock:
                for irqfd in list(self._irqfds.values()):
                    self._drop(irqfd)
            assert self._epoll is not None
            self._epoll.close()
            os.close(self._wake)
            self._thread = None
        for entry in self._ioeventfds:
            os.close(entry.fd)
        self._ioeventfds = []


def _same_file(a: int, b: int) -> bool:
    """Tell whether two descriptors are the same eventfd (each has its own id in fdinfo)."""
    return _eventfd_id(a) == _eventfd_id(b)


def _eventfd_id(fd: int) -> str:
    try:
        with open(f"/proc/self/fdinfo/{fd}") as f:
            for line in f:
                if line.startswith("eventfd-id:"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
    return f"fd {fd}"
