# SPDX-License-Identifier: Apache-2.0
"""The signal that makes KVM_RUN return EINTR.

The handler must be harmless on any thread, at any instant, and must not need the interpreter: it is libc's ``abs``, a
function of one int that touches nothing. KVM_RUN is never restarted, so no SA_RESTART subtleties arise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal

KICK_SIGNAL = signal.SIGRTMIN + 4

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def install_handler() -> None:
    """Install the no-op handler, once per process."""
    _libc.signal.restype = ctypes.c_void_p
    _libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    if _libc.signal(KICK_SIGNAL, ctypes.cast(_libc.abs, ctypes.c_void_p)) == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def signal_thread(native_id: int) -> None:
    """Send the signal to a thread of this process; a thread that is gone needs none."""
    _libc.tgkill(os.getpid(), native_id, KICK_SIGNAL)
