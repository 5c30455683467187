# SPDX-License-Identifier: Apache-2.0
"""Threads that a library starts in somebody else's process, and what becomes of their work when that forks."""

from __future__ import annotations

import errno
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from softkvm import _softcpu

#: All signals but those that an instruction raises: they cannot wait.
_ASYNCHRONOUS: Final = signal.valid_signals() - {
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip


class Forkable(Protocol):
    """An object that is not the same in a forked child."""

    def after_fork(self) -> None:
        """Called in the child, whose only thread is the one that forked: locks may be held for ever."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell_after_fork(object: Forkable) -> None:
    """Call *object*'s ``after_fork`` in children that are forked while it is there."""
    _forkables.add(object)


def _after_fork() -> None:
    for object in list(_forkables):
        object.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def inherited_error() -> OSError:
    """Return the error for using what a child has inherited: EIO, as the kernel has it (``kvm_vm_ioctl``)."""
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: it belongs to the process that this one was forked from")


class _Thread(threading.Thread):
    """A thread of which no sanitizer of the process's owner sees anything: what makes it ready allocates, too."""

    def _bootstrap(self) -> None:
        _softcpu.unseen(super()._bootstrap)  # type: ignore[misc]


def start_quiet(target: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Start a daemon thread that takes no signals, and return it.

    A signal for the process goes to any thread that doesn't block it. One that a program blocks in all of its own
    threads, to wait for it, must not end the program because a library has one more.
    """
    thread = _Thread(target=target, args=args, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASYNCHRONOUS)
        thread.start()  # which inherits the mask
    finally:
        # Not the mask from before: in a client's request it has signals of the C library's, which Python warns of.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASYNCHRONOUS - before)
    return thread
