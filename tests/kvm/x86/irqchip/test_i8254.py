# SPDX-License-Identifier: Apache-2.0
"""The PIT against the 8254 datasheet, with a clock that stands still."""

import pytest
from tests.support.interrupts import FakeClock

from softkvm import abi
from softkvm.kvm.x86.irqchip.hrtimer import HrtimerQueue
from softkvm.kvm.x86.irqchip.i8254 import Pit
from softkvm.kvm.x86.irqchip.i8254_channel import KVM_PIT_FREQ

CONTROL = 0x43
SPEAKER = 0x61
OUT2 = 0x20


def clocks_ns(clocks: int) -> int:
    """Return the time of so many input clocks, rounded up."""
    return -(-clocks * 1_000_000_000 // KVM_PIT_FREQ)


class PitBench:
    """A PIT whose interrupt line is a list of the times it rose."""

    def __init__(self, *, auto_ack: bool = True) -> None:
        self.clock = FakeClock()
        self.queue = HrtimerQueue(self.clock)
        self.rises: list[int] = []
        self.auto_ack = auto_ack
        self.pit = Pit(self.queue, self._set_irq)

    def _set_irq(self, level: int) -> int:
        if level:
            self.rises.append(self.clock())
        elif self.auto_ack:
            self.pit.irq_acked()
        return 1

    def out(self, port: int, *values: int) -> None:
        for value in values:
            assert self.pit.io_write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.pit.io_read(port, 1)

    def word(self, port: int) -> int:
        return self.inb(port) | self.inb(port) << 8

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.out(CONTROL, channel << 6 | 0x30 | mode << 1 | bcd)
        self.out(0x40 + channel, count & 0xFF, count >> 8)

    def out2(self) -> int:
        return self.inb(SPEAKER) >> 5 & 1

    def advance(self, ns: int) -> None:
        """Let time pass with the timers running when they are due."""
        end = self.clock.now_ns + ns
        while 0 < (deadline := self.queue.next_deadline_ns()) <= end:
            self.clock.now_ns = max(deadline, self.clock.now_ns)
            self.queue.run()
        self.clock.now_ns = end


@pytest.fixture
def bench() -> PitBench:
    return PitBench()


def test_counter_counts_down_at_1193182_hz(bench: PitBench) -> None:
    bench.program(0, 2, 0xFFFF)
    assert bench.word(0x40) == 0xFFFF
    bench.clock.advance(clocks_ns(0x1000))
    assert bench.word(0x40) == 0xEFFF


def test_count_zero_is_the_largest(bench: PitBench) -> None:
    bench.program(2, 2, 0)
    bench.out(SPEAKER, 1)
    bench.clock.advance(clocks_ns(1))
    assert bench.word(0x42) == 0xFFFF


def test_mode_0_output_rises_at_the_terminal_count_and_counting_goes_on(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 0, 100)
    bench.clock.advance(clocks_ns(99))
    assert bench.out2() == 0
    bench.clock.advance(clocks_ns(1))
    assert bench.out2() == 1
    bench.clock.advance(clocks_ns(4))
    assert bench.word(0x42) in (0xFFFB, 0xFFFC)


def test_mode_0_gate_holds_the_count(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 0, 100)
    bench.clock.advance(clocks_ns(50))
    bench.out(SPEAKER, 0)
    bench.clock.advance(clocks_ns(1000))
    assert bench.word(0x42) == 50
    bench.out(SPEAKER, 1)
    bench.clock.advance(clocks_ns(20))
    assert bench.word(0x42) == 30


def test_mode_0_first_byte_stops_the_count(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 0, 100)
    bench.clock.advance(clocks_ns(200))
    bench.out(0x42, 10)
    assert bench.out2() == 0
    bench.out(0x42, 0)
    bench.clock.advance(clocks_ns(10))
    assert bench.out2() == 1


def test_mode_1_pulse_is_started_by_the_gate(bench: PitBench) -> None:
    bench.out(SPEAKER, 0)
    bench.program(2, 1, 10)
    bench.clock.advance(clocks_ns(50))
    assert bench.out2() == 1
    bench.out(SPEAKER, 1)
    assert bench.out2() == 0
    bench.clock.advance(clocks_ns(10))
    assert bench.out2() == 1
    bench.out(SPEAKER, 0)
    bench.out(SPEAKER, 1)
    assert bench.out2() == 0


def test_mode_2_output_is_low_for_the_last_clock_of_each_period(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 2, 4)
    start, wave = bench.clock.now_ns, []
    for clock in range(8):
        bench.clock.now_ns = start + clocks_ns(clock)
        wave.append(bench.out2())
    assert wave == [1, 1, 1, 0] * 2


@pytest.mark.parametrize(("count", "expected"), [(6, [1, 1, 1, 0, 0, 0]), (5, [1, 1, 1, 0, 0])])
def test_mode_3_is_a_square_wave_with_the_odd_clock_high(bench: PitBench, count: int, expected: list[int]) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 3, count)
    start, wave = bench.clock.now_ns, []
    for clock in range(2 * count):
        bench.clock.now_ns = start + clocks_ns(clock)
        wave.append(bench.out2())
    assert wave == expected * 2


def test_mode_3_counts_by_two(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 3, 1000)
    bench.clock.advance(clocks_ns(10))
    assert bench.word(0x42) == 980
    bench.clock.advance(clocks_ns(500))
    assert bench.word(0x42) == 980


def test_mode_4_strobes_low_for_one_clock(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 4, 3)
    start, wave = bench.clock.now_ns, []
    for clock in range(6):
        bench.clock.now_ns = start + clocks_ns(clock)
        wave.append(bench.out2())
    assert wave == [1, 1, 1, 0, 1, 1]


def test_mode_5_waits_for_the_gate(bench: PitBench) -> None:
    bench.out(SPEAKER, 0)
    bench.program(2, 5, 3)
    bench.clock.advance(clocks_ns(3))
    assert bench.out2() == 1
    bench.out(SPEAKER, 1)
    bench.clock.advance(clocks_ns(3))
    assert bench.out2() == 0


def test_bcd_counter(bench: PitBench) -> None:
    bench.out(SPEAKER, 1)
    bench.program(2, 2, 0x1000, bcd=1)
    bench.clock.advance(clocks_ns(1))
    assert bench.word(0x42) == 0x0999
    bench.program(2, 2, 0, bcd=1)
    bench.clock.advance(clocks_ns(1))
    assert bench.word(0x42) == 0x9999


def test_latched_count_holds_until_read(bench: PitBench) -> None:
    bench.program(0, 2, 0x8000)
    bench.out(CONTROL, 0x00)
    bench.clock.advance(clocks_ns(100))
    bench.out(CONTROL, 0x00)  # an unread latch isn't overwritten
    assert bench.word(0x40) == 0x8000
    assert bench.word(0x40) == 0x8000 - 100


def test_single_byte_access(bench: PitBench) -> None:
    bench.out(CONTROL, 0x14)  # counter 0, low byte, mode 2
    bench.out(0x40, 0x80)
    assert bench.inb(0x40) == 0x80
    bench.out(CONTROL, 0x24)  # high byte
    bench.out(0x40, 0x12)
    assert bench.inb(0x40) == 0x12


def test_read_back_gives_status_before_count(bench: PitBench) -> None:
    bench.program(0, 3, 1000)
    bench.out(CONTROL, 0xC2)
    status = bench.inb(0x40)
    assert status == 0x80 | 0x30 | 3 << 1  # output high, word access, mode 3
    assert bench.word(0x40) == 1000


def test_status_has_null_count_until_one_is_written(bench: PitBench) -> None:
    bench.out(CONTROL, 0x30)
    bench.out(CONTROL, 0xE2)
    assert bench.inb(0x40) == 0x40 | 0x30
    bench.out(0x40, 1, 1)
    bench.out(CONTROL, 0xE2)
    assert bench.inb(0x40) == 0x30


def test_port_61_refresh_bit_toggles(bench: PitBench) -> None:
    seen = set()
    for _ in range(4):
        seen.add(bench.inb(SPEAKER) & 0x10)
        bench.clock.advance(15_085)
    assert seen == {0, 0x10}


def test_port_61_keeps_gate_and_speaker(bench: PitBench) -> None:
    bench.out(SPEAKER, 0xFF)
    assert bench.inb(SPEAKER) & 3 == 3
    bench.out(SPEAKER, 0)
    assert bench.inb(SPEAKER) & 3 == 0


def test_periodic_ticks_do_not_drift_and_are_never_early(bench: PitBench) -> None:
    bench.program(0, 2, 1193)
    start = bench.clock()
    bench.advance(1_000_000_000)
    assert len(bench.rises) == KVM_PIT_FREQ // 1193
    for tick, time_ns in enumerate(bench.rises, 1):
        assert time_ns - start == clocks_ns(1193 * tick)


def test_one_shot_ticks_once(bench: PitBench) -> None:
    bench.program(0, 0, 11932)
    start = bench.clock()
    bench.advance(1_000_000_000)
    assert [time_ns - start for time_ns in bench.rises] == [clocks_ns(11932)]


def test_control_word_stops_the_ticks(bench: PitBench) -> None:
    bench.program(0, 2, 1193)
    bench.out(CONTROL, 0x30)
    bench.advance(1_000_000_000)
    assert bench.rises == []


def test_shortest_period_is_200_us(bench: PitBench) -> None:
    bench.program(0, 2, 1)
    bench.advance(10_000_000)
    assert 45 <= len(bench.rises) <= 50


def test_missed_ticks_are_given_at_each_acknowledgement() -> None:
    bench = PitBench(auto_ack=False)
    bench.program(0, 2, 11932)  # 10 ms
    bench.advance(50_500_000)
    assert len(bench.rises) == 1
    for owed in range(2, 6):
        bench.pit.irq_acked()
        assert len(bench.rises) == owed
    bench.pit.irq_acked()
    assert len(bench.rises) == 5


def test_ticks_that_the_host_ran_late_are_owed_too() -> None:
    bench = PitBench()
    bench.program(0, 2, 11932)
    bench.clock.advance(50_500_000)
    bench.queue.run()
    assert len(bench.rises) == 5


def test_without_reinjection_ticks_coalesce() -> None:
    bench = PitBench(auto_ack=False)
    bench.pit.set_reinject(False)
    bench.program(0, 2, 11932)
    bench.clock.advance(50_500_000)
    bench.queue.run()
    assert len(bench.rises) == 1
    bench.advance(10_000_000)
    assert len(bench.rises) == 2


def test_unmasking_forgets_what_was_owed() -> None:
    bench = PitBench(auto_ack=False)
    bench.program(0, 2, 11932)
    bench.advance(50_500_000)
    bench.pit.irq_masked(False)
    bench.advance(10_000_000)
    assert len(bench.rises) == 2
    bench.pit.irq_acked()
    assert len(bench.rises) == 2


def test_hpet_legacy_flag_takes_the_line_away(bench: PitBench) -> None:
    bench.program(0, 2, 11932)
    state = bench.pit.get_state()
    state.flags = abi.KVM_PIT_FLAGS_HPET_LEGACY
    bench.pit.set_state(state)
    bench.advance(100_000_000)
    assert bench.rises == []
    assert bench.pit.get_state().flags == abi.KVM_PIT_FLAGS_HPET_LEGACY
    state.flags = 0
    bench.pit.set_state(state)
    bench.advance(15_000_000)
    assert len(bench.rises) == 1


def test_state_round_trip(bench: PitBench) -> None:
    bench.out(SPEAKER, 3)
    bench.program(0, 2, 0x1234)
    bench.program(2, 3, 0x0100)
    bench.out(0x42, 0x55)  # half a word
    bench.out(CONTROL, 0xC2)
    state = bench.pit.get_state()
    assert (state.channels[0].count, state.channels[0].mode, state.channels[0].rw_mode) == (0x1234, 2, 3)
    assert state.flags == abi.KVM_PIT_FLAGS_SPEAKER_DATA_ON
    other = PitBench()
    other.pit.set_state(state)
    assert bytes(other.pit.get_state()) == bytes(state)
    assert other.inb(0x40) & 0x3F == 0x34  # status
    assert other.word(0x40) == 0x1234
    other.advance(1_000_000_000)
    assert len(other.rises) == KVM_PIT_FREQ // 0x1234


def test_never_programmed_pit_stays_silent(bench: PitBench) -> None:
    bench.pit.set_state(bench.pit.get_state())
    bench.advance(1_000_000_000)
    assert bench.rises == []


def test_any_state_is_survived(bench: PitBench) -> None:
    state = abi.kvm_pit_state2.from_buffer_copy(b"\xff" * 112)
    bench.pit.set_state(state)
    for port in (0x40, 0x41, 0x42, 0x43, 0x61):
        for value in (0, 0xFF, 0x36, 0xC2):
            bench.pit.io_write(port, 1, value)
            bench.pit.io_read(port, 1)


def test_the_shortest_period_is_the_module_parameters() -> None:
    queue = HrtimerQueue(FakeClock())
    pit = Pit(queue, lambda level: 1, min_timer_period_us=5000)
    pit.io_write(CONTROL, 1, 0x34)
    pit.io_write(0x40, 1, 1)
    pit.io_write(0x40, 1, 0)
    assert queue.next_deadline_ns() - queue.clock() >= 5_000_000
