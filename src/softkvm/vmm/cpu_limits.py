# SPDX-License-Identifier: Apache-2.0
"""How much of the host's processors a machine gets: in all (``RLIMIT_CPU``), and each vCPU in a period (CFS bandwidth).

Both are made of timers on the vCPUs' CPU time (:mod:`softkvm.cputime`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from softkvm import api
from softkvm.cputime import CpuTimer

if TYPE_CHECKING:
    from softkvm.vmm.vcpu_thread import VcpuThread

PERIOD_NS: Final = 100_000_000
"""The period of a quota, cgroups' default."""

_STEP_NS: Final = 1_000_000


def cpu_times(vcpu: api.Vcpu) -> dict[str, int | None]:
    """Return a vCPU's CPU time and its guest's part of it, None where the KVM doesn't tell, for the statistics file."""
    clock = vcpu.cpu_clock
    try:
        guest_ns: int | None = clock.guest_ns()
    except OSError:
        guest_ns = None
    return {"total_ns": clock.total_ns(), "guest_ns": guest_ns}


class CpuTimeLimit:
    """Calls *passed* once the *vcpus* have used *limit_ns* of CPU time, all together; on the thread of one of them."""

    def __init__(self, vcpus: Sequence[api.Vcpu], limit_ns: int, passed: Callable[[], None]) -> None:
        self._clocks = [vcpu.cpu_clock for vcpu in vcpus]
        self._limit_ns = limit_ns
        self._passed = passed
        for clock in self._clocks:
            self._arm(clock.create_timer(self._expired), limit_ns)

    def _arm(self, timer: CpuTimer, left_ns: int) -> None:
        """Look again when the vCPU has used its part of what is left: before all have, one of them comes."""
        timer.settime(max(left_ns // len(self._clocks), _STEP_NS))

    def _expired(self, timer: CpuTimer) -> None:
        left_ns = self._limit_ns - sum(clock.total_ns() for clock in self._clocks)
        if left_ns > 0:
            self._arm(timer, left_ns)
        else:
            self._passed()


class Bandwidth:
    """A vCPU's quota: CPU time in each period of the wall clock. Who has used it up stands until the next one.

    What it has used above that, for a timer is late, it has less of in the next period; what it has not used is lost.
    """

    def __init__(self, vcpu: api.Vcpu, quota_ns: int, period_ns: int = PERIOD_NS) -> None:
        self._vcpu = vcpu
        self._clock = vcpu.cpu_clock
        self._timer = self._clock.create_timer(self._expired)
        self._quota_ns = quota_ns
        self._period_ns = period_ns
        self._runtime_ns = quota_ns
        self._used_ns = 0
        self._period_end_ns = 0
        self.throttled = False
        """Whether the vCPU's thread has to :meth:`wait` before it goes back."""
        self.nr_periods = 0
        self.nr_throttled = 0
        self.throttled_ns = 0

    def start(self) -> None:
        """Begin the first period."""
        self._period_end_ns = time.monotonic_ns() + self._period_ns
        self._used_ns = self._clock.total_ns()
        self._runtime_ns = self._quota_ns
        self._timer.settime(self._runtime_ns)

    def stop(self) -> None:
        """Limit no more, until the next start."""
        self._timer.settime(0)
        self.throttled = False

    def _refill(self) -> bool:
        """Count what has been used and the periods that have begun; whether there is something left."""
        used, now = self._clock.total_ns(), time.monotonic_ns()
        self._runtime_ns -= used - self._used_ns
        self._used_ns = used
        if now >= self._period_end_ns:
            periods = (now - self._period_end_ns) // self._period_ns + 1
            self._period_end_ns += periods * self._period_ns
            self.nr_periods += periods
            self._runtime_ns = min(self._runtime_ns + periods * self._quota_ns, self._quota_ns)
        return self._runtime_ns > 0

    def _expired(self, timer: CpuTimer) -> None:
        if self._refill():
            timer.settime(self._runtime_ns)
        else:
            self.throttled = True
            self.nr_throttled += 1
            self._vcpu.kick()

    def wait(self, thread: VcpuThread) -> None:
        """Let *thread*, which calls this outside of KVM_RUN, stand until there is CPU time for it, or the end."""
        start = time.monotonic_ns()
        machine = thread.machine
        while not self._refill() and not machine.ended.is_set():
            machine.standstill.stand(thread, self._period_end_ns)
        self.throttled = False
        self.throttled_ns += time.monotonic_ns() - start
        if self._runtime_ns > 0:
            self._timer.settime(self._runtime_ns)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers of a cgroup's ``cpu.stat`` for the statistics file."""
        return {
            "nr_periods": self.nr_periods,
            "nr_throttled": self.nr_throttled,
            "throttled_ns": self.throttled_ns,
        }
