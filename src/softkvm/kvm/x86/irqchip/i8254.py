# SPDX-License-Identifier: Apache-2.0
"""The i8254 timer of a PC: three counters, and port 61h (8254 datasheet).

Counters don't count: what they hold is computed from the time since they were loaded, see
:mod:`.i8254_channel`. Counter 0 has a timer, which pulses GSI 0 when its output rises.
"""

import threading
from collections.abc import Callable
from ctypes import Array
from typing import Final

from softkvm.abi import (
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    kvm_pit_channel_state,
    kvm_pit_state,
    kvm_pit_state2,
)
from softkvm.kvm.x86.irqchip.hrtimer import Hrtimer, HrtimerQueue
from softkvm.kvm.x86.irqchip.i8254_channel import KVM_PIT_FREQ, NSEC_PER_SEC, PitChannel

PIT_RANGE: Final = (0x40, 4)
SPEAKER_PORT: Final = 0x61
PIT_GSI: Final = 0
_CONTROL_PORT: Final = 0x43
_READ_BACK: Final = 3  # in the control word, in place of a counter's number
_ONE_SHOT_MODES: Final = (0, 1, 4)
_PERIODIC_MODES: Final = (2, 3)
_REFRESH_SHIFT: Final = 14  # the refresh bit of port 61h turns every 2**14 ns


class Pit:
    """The in-kernel PIT.

    *set_irq* drives the interrupt line, *nmi_watchdog* tells the local APICs of a tick. With ``reinject``
    (KVM_REINJECT_CONTROL) ticks that the guest was too slow for are given to it later, one at each acknowledgement;
    without it they coalesce.

    No acknowledgement of an edge-triggered interrupt comes from a local APIC that the processor virtualizes.
    *eoi_unseen* tells that the last one went to such, and is neither requested nor in service there any more: it is
    asked at each tick, and while ticks are owed a few times in between.
    """

    def __init__(
        self,
        timers: HrtimerQueue,
        set_irq: Callable[[int], int],
        nmi_watchdog: Callable[[], None] | None = None,
        min_timer_period_us: int = 200,
        eoi_unseen: Callable[[], bool] | None = None,
    ) -> None:
        self._min_periodic_count = -(-min_timer_period_us * KVM_PIT_FREQ // 1_000_000)
        self._clock = timers.clock
        self._set_irq = set_irq
        self._nmi_watchdog = nmi_watchdog
        self._eoi_unseen = eoi_unseen
        self._timer = Hrtimer(timers, self._expired)
        self._reinjection = Hrtimer(timers, self._reinject)
        self._lock = threading.Lock()
        self.reinject = True
        self.reset()

    def reset(self) -> None:
        """Power up: nothing is programmed, the timer doesn't run."""
        with self._lock:
            self._timer.cancel()
            self._reinjection.cancel()
            self.channels = [PitChannel(self._clock, gate=int(number != 2)) for number in range(3)]
            self.flags = 0
            self.speaker_data_on = 0
            self._period_count = 0  # input clocks from tick to tick, 0: one tick only
            self._ticks = 0  # since the count was loaded
            self._pending = 0  # ticks that the guest has not acknowledged
            self._irq_ack = True

    # Counter 0's interrupt

    def _start_timer(self) -> None:
        """Counter 0 was loaded: find when its output rises. The lock is held."""
        channel = self.channels[0]
        self._timer.cancel()
        self._ticks = self._pending = self._period_count = 0
        self._irq_ack = True
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            return  # the HPET drives the line
        if channel.mode in _PERIODIC_MODES:
            self._period_count = max(channel.count, self._min_periodic_count)
            self._timer.start(self._tick_ns(self._period_count))
        elif channel.mode in _ONE_SHOT_MODES:
            self._timer.start(self._tick_ns(channel.count))

    def _tick_ns(self, clocks: int) -> int:
        """Return the time when counter 0 has counted *clocks*, rounded up: from its start, so that nothing drifts."""
        return self.channels[0].count_load_time - (-clocks * NSEC_PER_SEC // KVM_PIT_FREQ)

    def _expired(self, now_ns: int) -> int:
        """The timer is due; returns its next deadline."""
        with self._lock:
            period, deadline, new = self._period_count, 0, 1
            if period:
                ticks = (now_ns - self.channels[0].count_load_time) * KVM_PIT_FREQ // NSEC_PER_SEC // period
                new, self._ticks = max(ticks - self._ticks, 1), ticks
                deadline = self._tick_ns((ticks + 1) * period)
            self._pending += new
        self._acked_unseen()
        self._inject()
        with self._lock:
            if self.reinject and period and self._pending > 1 and self._eoi_unseen is not None:
                self._reinjection.start(now_ns + self._reinjection_ns(period))
        return deadline

    def _reinjection_ns(self, clocks: int) -> int:
        """Return how long after one look for an unseen EOI the next one is: a quarter of the ticks' period."""
        return clocks * NSEC_PER_SEC // KVM_PIT_FREQ // 4

    def _reinject(self, now_ns: int) -> int:
        """Ticks are owed: give the next one if the last has been served unseen. Returns the next deadline."""
        if self._acked_unseen():
            self._inject()
        with self._lock:
            again = self.reinject and self._period_count and self._pending > 1
            return now_ns + self._reinjection_ns(self._period_count) if again else 0

    def _acked_unseen(self) -> bool:
        """Take an acknowledgement that nobody has told of; whether there was one."""
        with self._lock:
            if self._irq_ack or not self.reinject:
                return False
        if self._eoi_unseen is None or not self._eoi_unseen():
            return False
        with self._lock:
            self._irq_ack = True
            self._pending = max(self._pending - 1, 0)
        return True

    def _inject(self) -> None:
        """Pulse the line, unless the guest still owes an acknowledgement."""
        with self._lock:
            if self.reinject:
                if not self._irq_ack:
                    return
                self._irq_ack = False
            else:
                self._pending = 0
        self._set_irq(1)
        self._set_irq(0)
        if self._nmi_watchdog is not None:
            self._nmi_watchdog()

    def irq_acked(self) -> None:
        """GSI 0 was acknowledged (an ack notifier): give the next tick that is owed."""
        with self._lock:
            self._irq_ack = True
            if self._pending:
                self._pending -= 1
            again = self.reinject and self._pending > 0
        if again:
            self._inject()

    def irq_masked(self, masked: bool) -> None:
        """GSI 0 was masked or unmasked (a mask notifier): what was owed before is void."""
        if not masked:
            with self._lock:
                self._pending = 0
                self._irq_ack = True

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        with self._lock:
            self.reinject = reinject
            self._pending = 0
            self._irq_ack = True

    # Ports

    def io_read(self, port: int, size: int) -> int:
        """Read a counter's port, or port 61h."""
        if port == SPEAKER_PORT:
            return self._read_speaker()
        if port == _CONTROL_PORT:
            return 0  # can't be read
        with self._lock:
            return self.channels[port & 3].read()

    def io_write(self, port: int, size: int, value: int) -> bool:
        """Write a counter's port, the control word, or port 61h."""
        value &= 0xFF
        with self._lock:
            if port == SPEAKER_PORT:
                self._write_speaker(value)
            elif port == _CONTROL_PORT:
                self._control(value)
            elif self.channels[port & 3].write(value) and port & 3 == 0:
                self._start_timer()
        return True

    def _control(self, word: int) -> None:
        number = word >> 6
        if number == _READ_BACK:
            for channel_number, channel in enumerate(self.channels):
                if word >> 1 + channel_number & 1:
                    if not word & 0x20:
                        channel.latch_count()
                    if not word & 0x10:
                        channel.latch_status()
            return
        self.channels[number].control(word)
        if number == 0 and word & 0x30:
            self._timer.cancel()  # until a count is written

    def _read_speaker(self) -> int:
        """Read port 61h: gate and output of counter 2, speaker data, and the refresh bit that just turns."""
        with self._lock:
            channel = self.channels[2]
            refresh = self._clock() >> _REFRESH_SHIFT & 1
            return self.speaker_data_on << 1 | channel.gate | channel.out() << 5 | refresh << 4

    def _write_speaker(self, value: int) -> None:
        """Write port 61h: bit 0 is counter 2's gate, bit 1 the speaker data."""
        self.speaker_data_on = value >> 1 & 1
        self.channels[2].set_gate(value & 1)

    # Save and restore (KVM API 4.71, 4.72)

    def get_state(self) -> kvm_pit_state2:
        """Return the state as KVM_GET_PIT2 does."""
        with self._lock:
            state = kvm_pit_state2(flags=self.flags)
            if self.speaker_data_on:
                state.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON
            for number, channel in enumerate(self.channels):
                state.channels[number] = channel.get_state()
        return state

    def set_state(self, state: kvm_pit_state2) -> None:
        """Load the state as KVM_SET_PIT2 does: all counts start anew."""
        with self._lock:
            self.flags = state.flags & KVM_PIT_FLAGS_HPET_LEGACY
            self.speaker_data_on = 1 if state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON else 0
            self._load_channels(state.channels)

    def set_channels(self, state: kvm_pit_state) -> None:
        """Load the channels alone as KVM_SET_PIT does: all counts start anew."""
        with self._lock:
            self._load_channels(state.channels)

    def _load_channels(self, channels: Array[kvm_pit_channel_state]) -> None:
        for number, channel in enumerate(self.channels):
            channel.set_state(channels[number])
        self._start_timer()
