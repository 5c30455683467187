# SPDX-License-Identifier: Apache-2.0
"""Forked children: what a function does in one."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

TIMEOUT_S = 30.0


def in_child(*functions: Callable[[], object]) -> None:
    """Call *functions* in a forked child; AssertionError if one raises there or doesn't come to its end."""
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for function in functions:
                function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + TIMEOUT_S
    while True:
        done, wait_status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert not wait_status, f"the child ended with {wait_status:#x}"
            return
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.002)
