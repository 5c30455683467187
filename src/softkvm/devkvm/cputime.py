# SPDX-License-Identifier: Apache-2.0
"""The CPU time of a thread that runs a vCPU of the device's. What of it was the guest's the kernel keeps for itself."""

from __future__ import annotations

import threading
import time


def thread_clock(tid: int) -> int:
    """Return the number of a thread's clock (clock_getcpuclockid(3)), by the thread's native identifier."""
    return ~tid << 3 | 6


class ThreadTime:
    """The CPU time of a vCPU's thread, and of those that it had before."""

    def __init__(self) -> None:
        self.tid = 0
        self._ahead = 0
        self._last = 0

    def account(self) -> None:
        """Begin, or go on, on the calling thread."""
        before = self.cpu_times()[0]
        self.tid = threading.get_native_id()
        self._ahead = before - time.thread_time_ns()

    def cpu_times(self) -> tuple[int, None]:
        """Return the time in ns; of a thread that has ended, what was last known."""
        if self.tid:
            try:
                self._last = max(self._last, self._ahead + time.clock_gettime_ns(thread_clock(self.tid)))
            except OSError:
                self.tid = 0
        return self._last, None

    def cpu_thread(self) -> tuple[int, int]:
        """Return the thread, 0 for none, and by how much the account is ahead of its clock."""
        self.cpu_times()
        return self.tid, self._ahead
