# SPDX-License-Identifier: Apache-2.0
"""Signals that come to a vCPU's thread: KVM_RUN ends with EINTR, and their handlers run behind it.

How that is done is in the crate's binding (``cpu/python/src/signals/``): it stands before the process's handlers. It
has to know when there is a new one, and nobody tells that of handlers installed by :func:`signal.signal`. So
``_signal.signal``, which that calls, is replaced by one that does the same and tells.
"""

from __future__ import annotations

import functools
import importlib
import signal
import threading
from typing import Any

from softkvm import _softcpu


@functools.cache
def watch_python_handlers() -> None:
    """Let the binding know of Python's handlers: those there are, and others when they are installed."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            watch(number)
    builtin = importlib.import_module("_signal")
    install = builtin.signal

    @functools.wraps(install)
    def watched(signalnum: int, handler: Any, /) -> Any:
        before = install(signalnum, handler)
        watch(signalnum)
        return before

    builtin.signal = watched  # type: ignore[attr-defined]


def watch(number: int) -> None:
    """Let the binding know that Python has a handler for a signal."""
    main = threading.main_thread().ident
    if main is not None:
        _softcpu.watch_signal(number, main)
