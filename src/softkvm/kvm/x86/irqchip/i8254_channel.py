# SPDX-License-Identifier: Apache-2.0
"""One counter of an i8254 (8254 datasheet, "Mode Definitions" and "Read/Write Operations").

A new count takes effect at once in every mode, where the chip waits for the end of a period in modes 2 and 3.
"""

from typing import Final

from softkvm.abi import kvm_pit_channel_state
from softkvm.kvm.x86.irqchip.seams import Clock

KVM_PIT_FREQ: Final = 1_193_182
NSEC_PER_SEC: Final = 1_000_000_000
UNPROGRAMMED: Final = 0xFF  # the mode before the first control word

RW_STATE_LSB: Final = 1
RW_STATE_MSB: Final = 2
RW_STATE_WORD0: Final = 3
RW_STATE_WORD1: Final = 4

_LEVEL_GATED = (0, 2, 3, 4)  # modes that count only while the gate is high
_RESTARTED_BY_GATE = (1, 2, 3, 5)
_TRIGGERED = (1, 5)  # modes that wait for a rising gate

_STORED = ("latched_count", "count_latched", "status_latched", "status", "read_state", "write_state", "write_latch")


def _from_bcd(value: int) -> int:
    """Return the number of four decimal digits; a digit above 9 counts for what it is."""
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))


class PitChannel:
    """A counter: its registers, its gate and what its output is now."""

    __slots__ = (
        "_clock", "_loaded", "_stopped_ns", "bcd", "count", "count_latched", "count_load_time", "gate", "latched_count",
        "mode", "read_state", "rw_mode", "status", "status_latched", "write_latch", "write_state",
    )  # fmt: skip

    def __init__(self, clock: Clock, gate: int) -> None:
        self._clock = clock
        self.gate = gate
        self.mode = UNPROGRAMMED
        self.bcd = 0
        self.count = 0x10000
        self.count_load_time = clock()
        self._loaded = True
        self._stopped_ns: int | None = None  # time since the start, where the gate holds it
        self.rw_mode = 0
        self.read_state = self.write_state = self.write_latch = 0
        self.latched_count = self.count_latched = self.status = self.status_latched = 0

    # What it holds

    def elapsed(self) -> int:
        """Return the input clocks counted since the start."""
        stopped = self._stopped_ns
        ns = self._clock() - self.count_load_time if stopped is None else stopped
        return ns * KVM_PIT_FREQ // NSEC_PER_SEC

    def value(self) -> int:
        """Return the counter's contents, as 16 bits."""
        count, clocks = self.count, self.elapsed()
        if self.mode == 2:
            value = count - clocks % count
        elif self.mode == 3:  # by two, from the even count, once for each half of the wave
            place = clocks % count
            high = (count + 1) // 2
            value = (count & ~1) - 2 * (place if place < high else place - high)
        else:
            value = count - clocks
        return _to_bcd(value % 10_000) if self.bcd else value & 0xFFFF

    def out(self) -> int:
        """Return the output pin's level."""
        if self.mode == UNPROGRAMMED or not self._loaded:
            return 0 if self.mode == 0 else 1
        count, clocks = self.count, self.elapsed()
        match self.mode:
            case 0:
                return int(clocks >= count)
            case 1:
                return int(clocks >= count)
            case 2:
                return int(not self.gate or clocks % count != count - 1)
            case 3:
                return int(not self.gate or clocks % count < (count + 1) // 2)
            case _:
                return int(clocks != count)

    # Gate and count

    def set_gate(self, gate: int) -> None:
        """Drive the gate input (datasheet, "Gate pin operations summary")."""
        if gate == self.gate:
            return
        now = self._clock()
        self.gate = gate
        if gate:
            if self.mode in _RESTARTED_BY_GATE:
                self.count_load_time = now
            elif self._stopped_ns is not None:
                self.count_load_time = now - self._stopped_ns
            self._stopped_ns = None
        elif self.mode in _LEVEL_GATED:
            self._stopped_ns = now - self.count_load_time

    def load(self, value: int) -> None:
        """Start from *value* as written: 0 is the largest count, 65536 or in BCD 10000."""
        if self.bcd:
            self.count = _from_bcd(value) or 10_000
        else:
            self.count = value or 0x10000
        self.start()

    def start(self) -> None:
        """Start the count anew."""
        self._loaded = True
        self.count_load_time = self._clock()
        if self.mode in _TRIGGERED:
            self._stopped_ns = self.count * NSEC_PER_SEC  # output high, until the gate rises
        else:
            self._stopped_ns = 0 if not self.gate and self.mode in _LEVEL_GATED else None

    # Bus

    def control(self, word: int) -> None:
        """Take a control word, or latch the count where its RW bits are 0."""
        access = word >> 4 & 3
        if access == 0:
            self.latch_count()
            return
        self.rw_mode = self.read_state = self.write_state = access
        mode = word >> 1 & 7
        self.mode = mode if mode <= 5 else mode - 4
        self.bcd = word & 1
        self.count_latched = self.status_latched = 0
        self._loaded = False

    def latch_count(self) -> None:
        """Hold the count for reading, unless an earlier one is still held."""
        if not self.count_latched:
            self.latched_count = self.value()
            self.count_latched = self.rw_mode

    def latch_status(self) -> None:
        """Hold the status byte for reading, unless an earlier one is still held (datasheet, "Read-Back Command")."""
        if not self.status_latched:
            null_count = 0 if self._loaded else 0x40
            self.status = self.out() << 7 | null_count | self.rw_mode << 4 | (self.mode & 7) << 1 | self.bcd
            self.status_latched = 1

    def read(self) -> int:
        """Read the counter's port."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            if self.count_latched == RW_STATE_WORD0:
                self.count_latched = RW_STATE_MSB
                return self.latched_count & 0xFF
            low = self.count_latched == RW_STATE_LSB
            self.count_latched = 0
            return self.latched_count & 0xFF if low else self.latched_count >> 8
        value = self.value()
        if self.read_state == RW_STATE_WORD0:
            self.read_state = RW_STATE_WORD1
            return value & 0xFF
        if self.read_state == RW_STATE_WORD1:
            self.read_state = RW_STATE_WORD0
        return value & 0xFF if self.read_state == RW_STATE_LSB else value >> 8

    def write(self, value: int) -> bool:
        """Write the counter's port. Returns whether that loaded a count."""
        match self.write_state:
            case 1:  # RW_STATE_LSB
                self.load(value)
            case 2:  # RW_STATE_MSB
                self.load(value << 8)
            case 3:  # RW_STATE_WORD0
                self.write_latch = value
                self.write_state = RW_STATE_WORD1
                if self.mode == 0:
                    self._loaded = False  # the first byte stops the count
                return False
            case 4:  # RW_STATE_WORD1
                self.write_state = RW_STATE_WORD0
                self.load(self.write_latch | value << 8)
            case _:  # no control word yet
                return False
        return True

    # Save and restore

    def get_state(self) -> kvm_pit_channel_state:
        """Return the counter as KVM_GET_PIT2 does."""
        state = kvm_pit_channel_state(
            count=self.count, rw_mode=self.rw_mode, mode=self.mode, bcd=self.bcd, gate=self.gate,
            count_load_time=self.count_load_time,
        )  # fmt: skip
        for field in _STORED:
            setattr(state, field, getattr(self, field))
        return state

    def set_state(self, state: kvm_pit_channel_state) -> None:
        """Load the registers and start the count anew, as KVM_SET_PIT2 does."""
        for field in _STORED:
            setattr(self, field, getattr(state, field))
        for field in ("read_state", "write_state", "count_latched"):
            if getattr(self, field) > RW_STATE_WORD1:
                setattr(self, field, 0)
        self.rw_mode = state.rw_mode & 3
        self.mode = state.mode if state.mode <= 5 else UNPROGRAMMED
        self.bcd = state.bcd & 1
        self.gate = 1 if state.gate else 0
        self.count = min(state.count, 0x10000) or 0x10000
        self.start()
