# SPDX-License-Identifier: Apache-2.0
"""The local APIC's timer: one-shot, periodic and TSC-deadline (SDM vol. 3, 11.5.4; APM vol. 2, 16.4.1).

Nothing counts: the timer is a deadline on the machine's clock, and the current count is what is left until then.
The vCPU's own processor timer wakes the vCPU at the deadline, and the vCPU calls :meth:`LapicTimer.expired` on its way
into the guest.
"""

from softkvm.kvm.x86.irqchip.apicdef import (
    APIC_LVT_TIMER_MODE_MASK,
    APIC_LVT_TIMER_ONESHOT,
    APIC_LVT_TIMER_PERIODIC,
    APIC_LVT_TIMER_TSCDEADLINE,
    APIC_TIMER_DIVISORS,
)
from softkvm.kvm.x86.irqchip.seams import ApicVcpu, Clock

_S64_MAX = (1 << 63) - 1


class LapicTimer:
    """The timer of one local APIC. All methods belong to the vCPU's thread, or to one that holds it stopped."""

    __slots__ = (
        "_clock",
        "_vcpu",
        "bus_cycle_ns",
        "deadline_ns",
        "divisor",
        "min_period_ns",
        "mode",
        "period_ns",
        "tmict",
        "tscdeadline",
    )

    def __init__(self, vcpu: ApicVcpu, clock: Clock, bus_cycle_ns: int = 1, min_period_ns: int = 0) -> None:
        self._vcpu = vcpu
        self._clock = clock
        self.bus_cycle_ns = bus_cycle_ns
        self.min_period_ns = min_period_ns  # of a periodic timer
        self.mode = APIC_LVT_TIMER_ONESHOT
        self.divisor = 2
        self.tmict = 0
        self.period_ns = 0  # from the initial count to zero
        self.tscdeadline = 0
        self.deadline_ns = 0  # 0: not running

    def reset(self) -> None:
        """Stop, with all registers zero."""
        self.mode = APIC_LVT_TIMER_ONESHOT
        self.divisor = 2
        self.cancel()

    def cancel(self) -> None:
        """Stop, with the initial count and the TSC deadline zero."""
        self.tmict = self.period_ns = self.tscdeadline = 0
        self._arm(0)

    def _arm(self, deadline_ns: int) -> None:
        if deadline_ns != self.deadline_ns:
            self.deadline_ns = deadline_ns
            self._vcpu.set_apic_timer(deadline_ns)

    def _update_period(self) -> None:
        period = self.tmict * self.divisor * self.bus_cycle_ns
        if self.mode == APIC_LVT_TIMER_PERIODIC and 0 < period < self.min_period_ns:
            period = self.min_period_ns
        self.period_ns = period

    def set_mode(self, lvtt: int) -> None:
        """Take over the mode of the LVT timer register; entering or leaving TSC-deadline mode disarms the timer."""
        mode = lvtt & APIC_LVT_TIMER_MODE_MASK
        if mode == self.mode:
            return
        if APIC_LVT_TIMER_TSCDEADLINE in (mode, self.mode):
            self.cancel()
        self.mode = mode
        self._update_period()

    def set_divide(self, tdcr: int) -> None:
        """Take over the divide configuration register; a running count goes on from where it is."""
        divisor = APIC_TIMER_DIVISORS[tdcr & 0b1011]
        if divisor == self.divisor:
            return
        old, self.divisor = self.divisor, divisor
        self._update_period()
        if self.deadline_ns and not self.tscdeadline:
            now = self._clock()
            self._arm(now + max(self.deadline_ns - now, 0) * divisor // old)

    def set_tmict(self, count: int) -> None:
        """Write the initial count register: start from *count*, or stop with 0. Ignored in TSC-deadline mode."""
        if self.mode == APIC_LVT_TIMER_TSCDEADLINE:
            return
        self.tmict = count
        self._update_period()
        running = self.period_ns and self.mode in (APIC_LVT_TIMER_ONESHOT, APIC_LVT_TIMER_PERIODIC)
        self._arm(self._clock() + self.period_ns if running else 0)

    def restore(self, tmict: int, tmcct: int) -> None:
        """Start with *tmcct* left of the initial count *tmict*; the mode and divisor have been set before.

        One-shot with nothing left, it fires at once, as with the kernel (``set_target_expiration``): its interrupt may
        not have been delivered when the state was saved, and QEMU restores the initial count only.
        """
        if self.mode == APIC_LVT_TIMER_TSCDEADLINE:
            return
        self.set_tmict(tmict)
        if self.deadline_ns and (tmcct or self.mode == APIC_LVT_TIMER_ONESHOT):
            left = min(tmcct * self.divisor * self.bus_cycle_ns, self.period_ns)
            self._arm(self._clock() + left)

    def tmcct(self) -> int:
        """Return the current count register."""
        if not self.deadline_ns or not self.period_ns:
            return 0
        left = self.deadline_ns - self._clock()
        if self.mode == APIC_LVT_TIMER_PERIODIC:
            left %= self.period_ns
        elif left <= 0:
            return 0
        return min(left // (self.divisor * self.bus_cycle_ns), self.tmict)

    def set_tscdeadline(self, tsc: int) -> None:
        """Write IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes."""
        if self.mode != APIC_LVT_TIMER_TSCDEADLINE:
            return
        self.tscdeadline = tsc
        self.tsc_changed()

    def tsc_changed(self) -> None:
        """The guest's TSC got another offset or frequency: find the deadline's place on the clock again."""
        if self.mode == APIC_LVT_TIMER_TSCDEADLINE:
            tsc = self.tscdeadline
            deadline_ns = self._vcpu.tsc_deadline_to_ns(tsc) if tsc else 0
            if deadline_ns < 1:
                deadline_ns = 1 if tsc else 0
            elif deadline_ns > _S64_MAX:
                deadline_ns = _S64_MAX
            self._arm(deadline_ns)

    def expired(self, now_ns: int) -> bool:
        """Return whether the timer is due, and move on: to the next period, or to stopped."""
        deadline = self.deadline_ns
        if not deadline or now_ns < deadline:
            return False
        if self.mode == APIC_LVT_TIMER_PERIODIC and self.period_ns:
            period = self.period_ns
            self._arm(deadline + ((now_ns - deadline) // period + 1) * period)  # what was missed is one interrupt
        else:
            self.tscdeadline = 0
            self._arm(0)
        return True
