# SPDX-License-Identifier: Apache-2.0
"""Threads that a library starts in somebody else's process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, Final

#: All signals but those that an instruction raises: they cannot wait.
_ASYNCHRONOUS: Final = signal.valid_signals() - {
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip


def start_quiet(target: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Start a daemon thread that takes no signals, and return it.

    A signal for the process goes to any thread that doesn't block it. One that a program blocks in all of its own
    threads, to wait for it, must not end the program because a library has one more.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASYNCHRONOUS)
        thread.start()  # which inherits the mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
