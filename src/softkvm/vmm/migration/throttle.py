# SPDX-License-Identifier: Apache-2.0
"""Slows vCPUs down that write faster than memory can be sent (QEMU: auto-converge), by their quota of CPU time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from softkvm.vmm.cpu_limits import PERIOD_NS, Bandwidth
from softkvm.vmm.vcpu_thread import VcpuThread

STEPS: Final = (80, 60, 40, 20, 10, 5, 2)
"""Percent of a processor that a vCPU keeps, one step after the other."""


class Throttle:
    """The vCPUs of one machine; :meth:`end` gives each the quota back that it had."""

    def __init__(self, threads: Sequence[VcpuThread]) -> None:
        self._before = [(thread, thread.bandwidth) for thread in threads]
        self._step = -1

    @property
    def percent(self) -> int:
        """What the vCPUs keep."""
        return 100 if self._step < 0 else STEPS[self._step]

    def tighten(self) -> None:
        """Take the next step, if there is one."""
        if self._step + 1 < len(STEPS):
            self._step += 1
            for thread, before in self._before:
                if before is not None:
                    before.stop()
                self._set(thread, Bandwidth(thread.vcpu, PERIOD_NS * self.percent // 100))

    def end(self) -> None:
        """Let all run as before."""
        if self._step >= 0:
            self._step = -1
            for thread, before in self._before:
                self._set(thread, before)

    @staticmethod
    def _set(thread: VcpuThread, quota: Bandwidth | None) -> None:
        now = thread.bandwidth
        if now is not None:
            now.stop()
        thread.bandwidth = quota
        if quota is not None:
            quota.start()
