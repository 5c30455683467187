# SPDX-License-Identifier: Apache-2.0
"""Notices that a machine has halted for good: that no vCPU can be woken by anything that there is.

It is how a guest stops that has no way to power off: Linux says "System halted" and leaves every processor halted with
interrupts disabled. KVM does not tell when its interrupt chips are its own (KVM API, 5: KVM_EXIT_HLT), so a thread
looks, whenever the vCPUs have used no processor time for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from softkvm.vmm.standstill import Standstill
from softkvm.vmm.vcpu_thread import VcpuThread

PERIOD_S = 0.5
_QUIET_NS = 5_000_000
"""A vCPU that used no more of a processor in a period may have been halted all the time."""
_STAND_S = 1.0


class HaltWatch:
    """Calls *halted* once if *threads* are found to have *halted_for_good*, which is asked while all of them stand.

    It has a thread of its own, which ends with the machine.
    """

    def __init__(
        self,
        threads: Sequence[VcpuThread],
        standstill: Standstill,
        halted_for_good: Callable[[], bool],
        ended: threading.Event,
        halted: Callable[[], None],
    ) -> None:
        self._threads = threads
        self._standstill = standstill
        self._halted_for_good = halted_for_good
        self._ended = ended
        self._halted = halted
        self._thread = threading.Thread(target=self._watch, name="halt watch", daemon=True)

    def start(self) -> None:
        """Watch; the vCPU threads run."""
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread; the machine has ended."""
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        before = self._cpu_times()
        looked_at: list[int] | None = None
        while not self._ended.wait(PERIOD_S):
            now = self._cpu_times()
            quiet = all(later - earlier <= _QUIET_NS for earlier, later in zip(before, now, strict=True))
            before = now
            if not quiet or now == looked_at or self._standstill.held:
                continue
            if self._look():
                self._halted()
                return
            before = looked_at = self._cpu_times()

    def _look(self) -> bool:
        with self._standstill.hold():
            if not self._standstill.wait(self._threads, _STAND_S):
                return False
            return self._halted_for_good()

    def _cpu_times(self) -> list[int]:
        return [_thread_cpu_time_ns(thread.thread) for thread in self._threads]


def _thread_cpu_time_ns(thread: threading.Thread) -> int:
    """Return the processor time of *thread*, 0 if it has ended (clock_getcpuclockid(3): a thread's clock by its ID)."""
    if thread.native_id is None:
        return 0
    try:
        return time.clock_gettime_ns(~thread.native_id << 3 | 6)
    except OSError:
        return 0
