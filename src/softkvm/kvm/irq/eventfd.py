# SPDX-License-Identifier: Apache-2.0
"""irqfd and ioeventfd (KVM API, KVM_IRQFD and KVM_IOEVENTFD).

An irqfd waits with priority in its eventfd's queue (:mod:`.eventfile`) for what this process signals. One thread per VM
takes what others write into the descriptors, at once. An ioeventfd is a device on a bus whose write signals.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Final

from softkvm import _softcpu, abi
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.eventfile import EventFile
from softkvm.kvm.irq.irqchip import KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID
from softkvm.kvm.irq.wait import WaitEntry
from softkvm.threads import start_quiet

if TYPE_CHECKING:
    from softkvm.kvm.irq.io_bus import IoBus
    from softkvm.kvm.irq.irqchip import Irqchip
    from softkvm.kvm.vm import Vm

_LENGTHS: Final = (0, 1, 2, 4, 8)


class Resampler:
    """The irqfds with a resample eventfd of one GSI: they share an interrupt source."""

    __slots__ = ("_chips", "gsi", "irqfds")

    def __init__(self, chips: Irqchip, gsi: int) -> None:
        self._chips = chips
        self.gsi = gsi
        self.irqfds: tuple[Irqfd, ...] = ()
        chips.add_ack_notifier(gsi, self.acknowledged)

    def set_line(self, level: int) -> None:
        """Drive the GSI."""
        self._chips.set_gsi(self.gsi, level, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)

    def acknowledged(self) -> None:
        """The guest ended the interrupt: lower the line, then tell userspace to look at its devices again.

        Once for all: lowering the line after somebody was told could undo what it raised already.
        """
        self.set_line(0)
        for irqfd in self.irqfds:
            assert irqfd.resample_file is not None
            irqfd.resample_file.signal()

    def close(self) -> None:
        """Leave the GSI, which nobody holds up any more."""
        self._chips.remove_ack_notifier(self.gsi, self.acknowledged)
        self.set_line(0)


class Irqfd:
    """An eventfd that raises a GSI. It waits with priority for what this process signals, and takes what others write.

    What came is counted first and delivered second, so that whoever delivers does it for all.
    """

    __slots__ = (
        "_active",
        "_chips",
        "_count",
        "_delivering",
        "_lock",
        "entry",
        "file",
        "gsi",
        "resample_file",
        "resampler",
    )

    def __init__(self, chips: Irqchip, file: EventFile, gsi: int, resample_file: EventFile | None) -> None:
        self._chips = chips
        self.file = file
        self.gsi = gsi
        self.resample_file = resample_file
        self.resampler: Resampler | None = None
        self.entry = WaitEntry(self.wake)
        self._lock = threading.Lock()
        self._count = 0
        self._active = False
        #: Held while the line is driven. It is one thread's for all that this may lead to.
        self._delivering = threading.RLock()

    def begin(self) -> None:
        """Take what comes, from now on."""
        with self._lock:
            self._active = True

    def wake(self, count: int) -> bool:
        """Take events (``irqfd_wakeup``); False before and behind its time: they are others'."""
        with self._lock:
            if not self._active:
                return False
            self._count += count
        self.deliver()
        return True

    def deliver(self) -> None:
        """Drive the line if anything came: a pulse for all, or up until acknowledged with a resample eventfd."""
        with self._delivering:
            with self._lock:
                count, self._count = self._count, 0
            if not count:
                return
            if self.resampler is not None:
                self.resampler.set_line(1)
            else:
                self._chips.set_gsi(self.gsi, 1)
                self._chips.set_gsi(self.gsi, 0)

    def shut_down(self, left: int) -> None:
        """Take nothing from now on. What was taken, ``left`` of it from the descriptor, is delivered before the end."""
        with self._lock:
            self._active = False
            self._count += left
        self.file.queue.remove(self.entry)
        self.deliver()


class Ioeventfd:
    """A guest address whose writes signal an eventfd."""

    __slots__ = ("address", "bus", "datamatch", "file", "length")

    def __init__(self, file: EventFile, bus: IoBus, address: int, length: int, datamatch: int | None) -> None:
        self.file = file
        self.bus = bus
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
        self.file.signal()
        return True

    def collides(self, other: Ioeventfd) -> bool:
        """Tell whether a write could match both."""
        return (
            self.bus is other.bus
            and self.address == other.address
            and (not self.length or not other.length or self.length == other.length)
            and (self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch)
        )

    def is_same(self, other: Ioeventfd) -> bool:
        """Tell whether *other* describes this one."""
        return (
            self.bus is other.bus
            and (self.address, self.length, self.datamatch) == (other.address, other.length, other.datamatch)
            and self.file.same(other.file)
        )


class Eventfds:
    """All irqfds and ioeventfds of a VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._irqfds: dict[int, Irqfd] = {}
        self._resamplers: dict[int, Resampler] = {}
        self._ioeventfds: list[Ioeventfd] = []
        self._thread: threading.Thread | None = None
        self._poller: _softcpu.EventPoller | None = None
        self._stopping = False

    # --- irqfd -------------------------------------------------------------------------------------

    def irqfd(self, fd: int, gsi: int, flags: int, resamplefd: int) -> None:
        """KVM_IRQFD: EINVAL for flags, no chips, or resampling without an IOAPIC; EBUSY for an eventfd in use."""
        if flags & ~(abi.KVM_IRQFD_FLAG_DEASSIGN | abi.KVM_IRQFD_FLAG_RESAMPLE):
            raise kvm_error(errno.EINVAL, f"flags={flags:#x}, expected KVM_IRQFD_FLAG_DEASSIGN or _RESAMPLE")
        if flags & abi.KVM_IRQFD_FLAG_DEASSIGN:
            self._deassign(EventFile.of(fd), gsi)
            return
        chips = self._vm.arch_irqchip()
        if chips is None:
            raise kvm_error(errno.EINVAL, "there is no in-kernel irqchip")
        resample = bool(flags & abi.KVM_IRQFD_FLAG_RESAMPLE)
        if resample and not chips.can_resample:
            raise kvm_error(errno.EINVAL, "KVM_IRQFD_FLAG_RESAMPLE: the in-kernel chips have no pins")
        irqfd = Irqfd(chips, EventFile.of(fd), gsi, EventFile.of(resamplefd) if resample else None)
        with self._lock:
            poller = self._start()
            try:
                irqfd.file.queue.add_priority(irqfd.entry)
            except OSError:
                raise kvm_error(errno.EBUSY, f"fd={fd} is an irqfd already") from None
            try:
                # The thread looks for the irqfd under the lock, so not before all is in place.
                poller.add(irqfd.file.fd)
            except OSError:
                irqfd.file.queue.remove(irqfd.entry)
                raise
            if resample:
                resampler = self._resamplers.get(gsi)
                if resampler is None:
                    resampler = self._resamplers[gsi] = Resampler(chips, gsi)
                resampler.irqfds = (*resampler.irqfds, irqfd)
                irqfd.resampler = resampler
            self._irqfds[irqfd.file.fd] = irqfd
            irqfd.begin()

    def _deassign(self, file: EventFile, gsi: int) -> None:
        with self._lock:
            for irqfd in list(self._irqfds.values()):
                if irqfd.gsi == gsi and irqfd.file.same(file):
                    self._drop(irqfd)

    def _drop(self, irqfd: Irqfd) -> None:
        """Shut an irqfd down: events are its eventfd's readers' from now on, and nothing is delivered any more."""
        assert self._poller is not None
        irqfd.shut_down(self._poller.remove(irqfd.file.fd))
        del self._irqfds[irqfd.file.fd]
        resampler = irqfd.resampler
        if resampler is not None:
            resampler.irqfds = tuple(other for other in resampler.irqfds if other is not irqfd)
            if not resampler.irqfds:
                del self._resamplers[irqfd.gsi]
                resampler.close()

    def _start(self) -> _softcpu.EventPoller:
        """Return what takes events, starting its thread with the first irqfd; EBADF if the VM has been closed."""
        if self._stopping:
            raise kvm_error(errno.EBADF, "the VM is closed")
        if self._poller is None:
            with contextlib.ExitStack() as undo:
                wake = _softcpu.own_descriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                undo.callback(_softcpu.close_own_descriptor, wake)
                poller = _softcpu.EventPoller(wake)
                undo.callback(poller.close)
                thread = start_quiet(self._main, "kvm-irqfd", poller)
                undo.pop_all()
            self._poller, self._thread = poller, thread
        return self._poller

    def _main(self, poller: _softcpu.EventPoller) -> None:
        while not self._stopping:
            for fd in poller.wait():
                with self._lock:
                    irqfd = self._irqfds.get(fd)
                    if irqfd is not None:  # one that was shut down meanwhile has had what was taken
                        irqfd.wake(poller.take(fd))

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
        bus = self._vm.pio_bus if flags & abi.KVM_IOEVENTFD_FLAG_PIO else self._vm.mmio_bus
        match = (datamatch or 0) if flags & abi.KVM_IOEVENTFD_FLAG_DATAMATCH else None
        new = Ioeventfd(EventFile.of(fd), bus, addr, length, match)
        with self._lock:
            if flags & abi.KVM_IOEVENTFD_FLAG_DEASSIGN:
                self._remove(new)
                return
            if self._stopping:
                raise kvm_error(errno.EBADF, "the VM is closed")
            if any(new.collides(other) for other in self._ioeventfds):
                raise kvm_error(errno.EEXIST, f"addr={addr:#x} len={length} has an eventfd already")
            self._ioeventfds.append(new)
            bus.add(addr, length or 8, new, counts=False)

    def _remove(self, described: Ioeventfd) -> None:
        for entry in self._ioeventfds:
            if entry.is_same(described):
                entry.bus.remove(entry)
                self._ioeventfds.remove(entry)
                return
        raise kvm_error(errno.ENOENT, f"addr={described.address:#x} len={described.length}: there is no such ioeventfd")

    def close_inherited(self) -> None:
        """Close a child's descriptors. The epoll's files are polled for the parent, too: nothing is unregistered."""
        self._stopping = True
        self._irqfds, self._resamplers, self._ioeventfds = {}, {}, []
        self._close_poller()

    def close(self) -> None:
        """Stop the thread and let go of every eventfd."""
        with self._lock:
            self._stopping = True
        if self._thread is not None:
            assert self._poller is not None
            os.eventfd_write(self._poller.wake, 1)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None
        with self._lock:
            for irqfd in list(self._irqfds.values()):
                self._drop(irqfd)
            for entry in self._ioeventfds:
                entry.bus.remove(entry)
            self._ioeventfds = []
            self._close_poller()

    def _close_poller(self) -> None:
        if self._poller is not None:
            self._poller.close()
            _softcpu.close_own_descriptor(self._poller.wake)
            self._poller = None
