# SPDX-License-Identifier: Apache-2.0
"""Event files: eventfds as KVM has them, with a wait queue of their own (``fs/eventfd.c``).

In the kernel an irqfd waits in the eventfd's queue with priority: it takes what comes before anybody else is woken. A
process has no place in that queue. So there are two ways to it:

- What comes from inside of this process (ioeventfds, resample eventfds, connections of Hyper-V's) comes by
  :meth:`EventFile.signal`, which asks our own queue first. An irqfd takes it on the spot, on the signalling thread;
  the counter is never written, so nobody who reads or polls the descriptor sees anything.
- What others write(2) into the descriptor the kernel wakes everybody for. A thread takes the counter as soon as it
  runs (:class:`softkvm._softcpu.EventPoller`). What a poller of the client's takes before is the client's, and the
  irqfd has it not: each event goes to one of the two, once. A client that polls an eventfd which is an irqfd may be
  woken for nothing, or take an event away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
import weakref

from softkvm import _softcpu
from softkvm.kvm import procfs
from softkvm.kvm.errors import kvm_error
from softkvm.kvm.irq.wait import WaitQueue


class EventFile:
    """An eventfd that stays open beyond its owner's close: until nobody refers to the object any more.

    Whoever is about to signal it when it is taken away still has it, so its number is nobody else's meanwhile. The
    open file is the client's, who may want to block in it: O_NONBLOCK is a property of the file, so it is not set, and
    each access makes sure by itself that it doesn't wait.
    Raises ``OSError``: EBADF for no descriptor, EINVAL for another kind of file.
    """

    __slots__ = ("__weakref__", "fd", "id", "queue")

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.fd = _softcpu.own_descriptor(os.dup(ctypes.c_int32(fd).value))  # the structures have it unsigned
        try:
            kind = procfs.link_of_own(f"fd/{self.fd}")
        except OSError:
            kind = ""
        if kind != "anon_inode:[eventfd]":
            raise kvm_error(errno.EINVAL, f"fd={fd} is {kind or 'unknown'}, expected an eventfd")
        #: The eventfd's own number, the same for all its descriptors.
        self.id = _eventfd_id(self.fd)
        #: Who waits for it in this process.
        self.queue = WaitQueue()

    @classmethod
    def of(cls, fd: int) -> EventFile:
        """Return the eventfd that a descriptor is of: one object for all its descriptors (``eventfd_ctx_fdget``)."""
        file = cls(fd)
        with _registry_lock:
            return _registry.setdefault(file.id, file)

    def __del__(self) -> None:
        if self.fd >= 0:
            _softcpu.close_own_descriptor(self.fd)

    def fileno(self) -> int:
        """Return our descriptor, to poll or read."""
        return self.fd

    def signal(self, count: int = 1) -> None:
        """Bring ``count`` events: to who waits with priority, if he takes them, else to the counter and all others.

        A full counter is signalled already.
        """
        if not self.queue:
            self._add(count)
        elif not self.queue.offer(count):
            self._add(count)
            self.queue.wake_up(count)

    def _add(self, count: int) -> None:
        room = select.poll()
        room.register(self.fd, select.POLLOUT)
        if room.poll(0):
            try:
                os.write(self.fd, struct.pack("=Q", count))
            except BlockingIOError:  # the client's O_NONBLOCK: somebody has filled it meanwhile
                pass

    def consume(self) -> int:
        """Take the counter; 0 if it was that."""
        taken = bytearray(8)
        try:
            # The client may have read it since it was found readable.
            os.preadv(self.fd, (taken,), -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return self._consume_if_readable()
        return int.from_bytes(taken, "little")

    def _consume_if_readable(self) -> int:
        """Take the counter on kernels before 5.8, which know no RWF_NOWAIT for eventfds."""
        readable = select.poll()
        readable.register(self.fd, select.POLLIN)
        if not readable.poll(0):
            return 0
        return int.from_bytes(os.read(self.fd, 8), "little")

    def same(self, other: EventFile) -> bool:
        """Tell whether two descriptors are one eventfd."""
        return self.id == other.id


def _eventfd_id(fd: int) -> str:
    """Return the number that fdinfo gives an eventfd. It is nobody else's while a descriptor of it is open."""
    try:
        for line in procfs.read_own(f"fdinfo/{fd}").decode().splitlines():
            if line.startswith("eventfd-id:"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return f"fd {fd}"


_registry: weakref.WeakValueDictionary[str, EventFile] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


def _after_fork() -> None:
    """In a child nobody waits: what the parent's VMs have is the parent's. The lock may have been held."""
    global _registry, _registry_lock
    for file in list(_registry.values()):
        file.queue.clear()
    _registry, _registry_lock = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
