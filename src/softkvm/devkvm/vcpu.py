# SPDX-License-Identifier: Apache-2.0
"""A vCPU descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from threading import get_native_id
from typing import TYPE_CHECKING

from softkvm import abi, api
from softkvm.abi import checks
from softkvm.cputime import CpuClock
from softkvm.devkvm.cputime import ThreadTime
from softkvm.devkvm.ioctl import Descriptor, add_requests
from softkvm.devkvm.kick import install_handler, signal_thread
from softkvm.devkvm.stats import read_stats
from softkvm.threads import tell_after_fork

#: Work that queues itself would keep KVM_RUN, which ends behind it, from ever ending.
_TASK_WORK_ROUNDS = 16
_IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset  # type: ignore[attr-defined]


class Vcpu(Descriptor):
    """:class:`softkvm.api.Vcpu` on a descriptor of KVM_CREATE_VCPU."""

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()
        self._inherited = False
        tell_after_fork(self)
        install_handler()
        self._map = mmap.mmap(fd, mmap_size)
        self.shared = memoryview(self._map)
        self.kvm_run = abi.kvm_run.from_buffer(self._map)
        libc = ctypes.CDLL(None, use_errno=True)
        self._ioctl = libc.ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
        self._interrupted = False
        self._immediate_exit = 0  # the client's own value while an interruption occupies the field
        self._task_work: list[Callable[[], None]] = []
        self._time = ThreadTime()
        self._clock: CpuClock | None = None
        self._native_id = 0  # the thread that is in run(), or 0

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> None:
            """What :meth:`close` has taken away."""
            if name == "kvm_run":
                raise checks.kvm_error(errno.EBADF, "it has been closed")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def shared_fd(self) -> int:
        return self.fd

    def run(self) -> None:
        self._native_id = get_native_id()
        result = self._ioctl(self.fd, abi.KVM_RUN, 0)
        self._native_id = 0
        if result < 0:
            self._run_failed(ctypes.get_errno())

    def _run_failed(self, error: int) -> None:
        """Take back an interruption's immediate_exit, do what was called for, then raise the error of KVM_RUN."""
        if error == errno.EINTR:
            with self._lock:
                if self._interrupted:
                    self._interrupted = False
                    self.shared[_IMMEDIATE_EXIT] = self._immediate_exit
            if self._clock is not None and self._time.tid not in (0, get_native_id()):
                self._time.account()
                self._clock.moved()
            self._run_task_work()
        raise OSError(error, os.strerror(error))

    def _run_task_work(self) -> None:
        """Do what is queued, and what that queues; from some rounds on the rest is for the next KVM_RUN."""
        try:
            for _ in range(_TASK_WORK_ROUNDS):
                for _ in range(len(self._task_work)):
                    self._task_work.pop(0)()
        finally:
            with self._lock:
                if self._task_work:  # the rest is for the next KVM_RUN
                    self._interrupt()

    def after_fork(self) -> None:
        """In a child the vCPU is its parent's, and the lock's holder, if there is one, too."""
        self._inherited = True
        self._lock = threading.Lock()

    def kick(self) -> None:
        with self._lock:
            self._interrupt()

    def call_soon(self, work: Callable[[], None]) -> None:
        """Have :meth:`run` call ``work`` on its thread before the guest is entered again.

        The device knows no work of ours: ``run`` raises InterruptedError behind it.
        """
        with self._lock:
            self._task_work.append(work)
            self._interrupt()

    @property
    def cpu_clock(self) -> CpuClock:
        with self._lock:
            if self._clock is not None:
                return self._clock
        clock = CpuClock(self._time, self.call_soon)
        with self._lock:
            self._clock = self._clock or clock
            return self._clock

    def _interrupt(self) -> None:
        """Make KVM_RUN return EINTR, now or at its next call; the lock is held."""
        if self.fd < 0 or self._inherited:  # there is nobody to end, and the parent shares immediate_exit
            return
        if not self._interrupted:
            self._interrupted = True
            self._immediate_exit = self.shared[_IMMEDIATE_EXIT]
        # immediate_exit catches a thread that is on its way into the kernel, the signal one that is inside
        self.shared[_IMMEDIATE_EXIT] = 1
        native_id = self._native_id
        if native_id:
            signal_thread(native_id)

    def close(self) -> None:
        clock = vars(self).get("_clock")
        if clock is not None:
            clock.close()
        with self._lock:
            super().close()
            if "kvm_run" in vars(self):
                del self.kvm_run
                self.shared.release()
                with contextlib.suppress(BufferError):  # somebody has a view of his own
                    self._map.close()

    def stats(self) -> dict[str, int]:
        """KVM_GET_STATS_FD: the kernel's counters for this vCPU, by the kernel's names."""
        return read_stats(self.fd)


add_requests(Vcpu, abi.File.VCPU, api.Vcpu)
