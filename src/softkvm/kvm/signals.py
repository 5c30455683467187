# SPDX-License-Identifier: Apache-2.0
"""Signals that come to a vCPU's thread: KVM_RUN ends with EINTR, and their handlers run behind it.

How that is done is in the crate's binding (``cpu/python/src/signals.rs``): it stands before the process's handlers. It
has to know when there is a new one, and nobody tells that of handlers installed by :func:`signal.signal`. So
``_signal.signal``, which that calls, is replaced by one that does the same and tells.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from softkvm import _softcpu


@functools.cache
def watch_python_handlers() -> None:
    """Let the binding know of Python's handlers when they are installed, from now on."""
    builtin = importlib.import_module("_signal")
    install = builtin.signal

    @functools.wraps(install)
    def signal(signalnum: int, handler: Any, /) -> Any:
        before = install(signalnum, handler)
        _softcpu.watch_signal(signalnum)
        return before

    builtin.signal = signal  # type: ignore[attr-defined]
