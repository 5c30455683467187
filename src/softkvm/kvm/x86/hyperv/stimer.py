# SPDX-License-Identifier: Apache-2.0
"""Synthetic timers, four for each virtual processor (TLFS, 12.4): messages of the SynIC, or interrupts (direct mode).

Times are those of the reference counter. A timer of the machine's queue only marks a synthetic one as pending; what has
to be done happens on the vCPU's thread (KVM_REQ_HV_STIMER).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from softkvm import abi
from softkvm.kvm.x86.hyperv.clock import reference_counter
from softkvm.kvm.x86.irqchip.apicdef import APIC_DM_FIXED
from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer
from softkvm.kvm.x86.requests import KVM_REQ_HV_STIMER

if TYPE_CHECKING:
    from softkvm.kvm.x86.hyperv.vp import VirtualProcessor
    from softkvm.kvm.x86.state import VcpuState as Vcpu

_TICK_NS: Final = 1_000_000_000 // abi.HV_CLOCK_HZ
_PAYLOAD_SIZE: Final = ctypes.sizeof(abi.hv_timer_message_payload)
_HEADER_SIZE: Final = abi.HV_MESSAGE_SIZE - abi.HV_MESSAGE_PAYLOAD_BYTE_COUNT


class Stimer:
    """One synthetic timer; its vCPU's thread only."""

    def __init__(self, vcpu: Vcpu, index: int) -> None:
        self._vcpu = vcpu
        self.index = index
        self.config = 0
        self.count = 0
        #: When it expires; 0 while it does not run.
        self.expiration_time = 0
        #: It has expired, but its message found no room.
        self.message_pending = False
        self._timer: Hrtimer | None = None

    @property
    def sint(self) -> int:
        """The source that its messages are for."""
        return self.config >> abi.HV_STIMER_SINT_SHIFT & 0xF

    @property
    def _vp(self) -> VirtualProcessor:
        vp = self._vcpu.hyperv
        assert vp is not None
        return vp

    # --- MSRs (False stands for #GP) -----------------------------------------------------------------

    def write_config(self, config: int, host: bool) -> bool:
        """HV_X64_MSR_STIMERn_CONFIG. One that runs and is given neither a source nor direct mode is disabled."""
        vp = self._vp
        if not vp.synic.may_write(config, host):
            return False
        direct = config & abi.HV_STIMER_DIRECT_MODE
        if direct and not host and vp.enforce_cpuid:
            if not vp.features.features_edx & abi.HV_STIMER_DIRECT_MODE_AVAILABLE:
                return False
        self.stop()
        if self.config & abi.HV_STIMER_ENABLE and not direct and not config >> abi.HV_STIMER_SINT_SHIFT & 0xF:
            config &= ~abi.HV_STIMER_ENABLE
        self.config = config
        if config & abi.HV_STIMER_ENABLE:
            self.mark_pending()
        return True

    def write_count(self, count: int, host: bool) -> bool:
        """HV_X64_MSR_STIMERn_COUNT: a period, or a time. 0 disables, and another one may enable (auto-enable)."""
        if not self._vp.synic.may_write(count, host):
            return False
        self.stop()
        self.count = count
        if not host:
            if not count:
                self.config &= ~abi.HV_STIMER_ENABLE
            elif self.config & abi.HV_STIMER_AUTOENABLE:
                self.config |= abi.HV_STIMER_ENABLE
        if self.config & abi.HV_STIMER_ENABLE:
            self.mark_pending()
        return True

    # --- running -------------------------------------------------------------------------------------

    def mark_pending(self, *, kick: bool = False) -> None:
        """Have the vCPU's thread look at the timer; any thread."""
        vcpu = self._vcpu
        with vcpu.request_lock:
            self._vp.stimers_pending |= 1 << self.index
            vcpu.requests |= KVM_REQ_HV_STIMER
        if kick:
            vcpu.vcpu_kick()

    def stop(self) -> None:
        """Forget what was started."""
        if self._timer is not None:
            self._timer.cancel()
        with self._vcpu.request_lock:
            self._vp.stimers_pending &= ~(1 << self.index)
        self.message_pending = False
        self.expiration_time = 0

    def process(self) -> None:
        """Expire if it is time, then go on: to the next period, or to stopped."""
        if not self.config & abi.HV_STIMER_ENABLE:
            return
        if self.expiration_time and reference_counter(self._vcpu.vm) >= self.expiration_time:
            self._expire()
        if self.config & abi.HV_STIMER_ENABLE and self.count:
            if not self.message_pending:
                self._start()
        else:
            self.stop()

    def _start(self) -> None:
        now = reference_counter(self._vcpu.vm)
        if self.config & abi.HV_STIMER_PERIODIC:
            if not self.expiration_time:
                self.expiration_time = now + self.count
            elif now >= self.expiration_time:  # periods that were missed are lost
                self.expiration_time = now + self.count - (now - self.expiration_time) % self.count
        else:
            self.expiration_time = self.count
            if now >= self.count:  # "it will expire immediately"
                self.mark_pending()
                return
        chips = self._vcpu.chips
        assert chips is not None  # an active SynIC has a local APIC
        if self._timer is None:
            self._timer = Hrtimer(chips.timers, self._fired)
        self._timer.start(chips.timers.clock() + (self.expiration_time - now) * _TICK_NS)

    def _fired(self, now_ns: int) -> int:
        self.mark_pending(kick=True)
        return 0

    def _expire(self) -> None:
        self.message_pending = True
        if self.config & abi.HV_STIMER_DIRECT_MODE:
            done = self._interrupt()
        else:
            # Messages of a periodic timer don't pile up: one that finds no room is lost.
            retry = not self.config & abi.HV_STIMER_PERIODIC
            done = self._vp.synic.deliver_message(self.sint, self._message(), retry=retry)
        if done:
            self.message_pending = False
            if not self.config & abi.HV_STIMER_PERIODIC:
                self.config &= ~abi.HV_STIMER_ENABLE

    def _interrupt(self) -> bool:
        apic = self._vcpu.apic
        vector = self.config >> abi.HV_STIMER_APIC_VECTOR_SHIFT & 0xFF
        return apic is None or bool(apic.accept_irq(APIC_DM_FIXED, vector))

    def _message(self) -> bytes:
        header = abi.hv_message(message_type=abi.HVMSG_TIMER_EXPIRED, payload_size=_PAYLOAD_SIZE)
        payload = abi.hv_timer_message_payload(
            timer_index=self.index,
            expiration_time=self.expiration_time,
            delivery_time=reference_counter(self._vcpu.vm),
        )
        return bytes(header)[:_HEADER_SIZE] + bytes(payload)


def process(vcpu: Vcpu) -> None:
    """KVM_REQ_HV_STIMER: look at the timers that are pending, after the clocks have been brought up to date."""
    vp = vcpu.hyperv
    if vp is None:
        return
    with vcpu.request_lock:
        pending, vp.stimers_pending = vp.stimers_pending, 0
    for timer in vp.stimers:
        if pending >> timer.index & 1:
            timer.process()
