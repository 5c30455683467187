# SPDX-License-Identifier: Apache-2.0
"""The high precision event timer, expected values from IA-PC HPET specification 1.0a, section 2.3."""

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hpet import Model

from softkvm.vmm.devices import hpet
from softkvm.vmm.devices.hpet import COMPARATOR_0, CONFIGURATION, COUNTER, INTERRUPT_STATUS


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns


def test_counter_runs_at_100_mhz_while_it_is_enabled() -> None:
    clock = Clock()
    timer = hpet.Hpet(clock_ns=clock)
    assert timer.read(hpet.CAPABILITIES, 8) >> 32 == 10_000_000  # femtoseconds
    clock.now_ns += 500
    assert timer.read(hpet.COUNTER, 8) == 0
    timer.write(hpet.CONFIGURATION, 8, hpet.ENABLE)
    clock.now_ns += 500
    assert timer.read(hpet.COUNTER, 8) == 50
    timer.write(hpet.CONFIGURATION, 4, 0)
    clock.now_ns += 500
    assert timer.read(hpet.COUNTER, 4) == 50
    timer.write(hpet.COUNTER, 8, 1 << 40)
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE)
    clock.now_ns += 20
    assert timer.read(hpet.COUNTER + 4, 4) == 1 << 8
    assert timer.read(hpet.COUNTER, 4) == 2


Lines = list[tuple[int, int]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> Lines:
    return []


@pytest.fixture
def timer(clock: Clock, lines: Lines) -> hpet.Hpet:
    """A timer without a thread: the test is the clock's hand."""
    timer = hpet.Hpet(lambda line, level: lines.append((line, level)), clock)
    timer.close()
    return timer


def run(timer: hpet.Hpet, clock: Clock, ticks: int) -> None:
    """Let the counter tick, and the timer look at each tick."""
    for _ in range(ticks):
        clock.now_ns += 10
        timer.read(INTERRUPT_STATUS, 4)


def comparator(timer: hpet.Hpet, index: int, config: int, value: int) -> None:
    base = hpet.COMPARATOR_0 + hpet.COMPARATOR_STRIDE * index
    timer.write(base, 8, config)
    timer.write(base + hpet.COMPARATOR_VALUE, 8, value)


def test_comparator_pulses_its_line_when_the_counter_gets_there() -> None:
    clock = Clock()
    pulses: list[tuple[int, int]] = []
    timer = hpet.Hpet(lambda line, level: pulses.append((line, level)), clock)
    timer._timer.close()  # the test is the clock's hand
    comparator(timer, 1, hpet.INT_ENABLE | 20 << hpet.ROUTE_SHIFT, 100)
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE)
    clock.now_ns += 990
    timer._expired()
    assert not pulses
    clock.now_ns += 10
    timer._expired()
    assert pulses == [(20, 1), (20, 0)]


def test_level_interrupt_stays_until_its_status_is_cleared() -> None:
    clock = Clock()
    pulses: list[tuple[int, int]] = []
    timer = hpet.Hpet(lambda line, level: pulses.append((line, level)), clock)
    timer._timer.close()
    comparator(timer, 2, hpet.INT_ENABLE | hpet.LEVEL | 16 << hpet.ROUTE_SHIFT, 0)
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE)
    timer._expired()
    assert timer.read(hpet.INTERRUPT_STATUS, 4) == 1 << 2
    assert pulses == [(16, 1)]
    timer.write(hpet.INTERRUPT_STATUS, 4, 1 << 2)
    assert pulses == [(16, 1), (16, 0)]
    assert timer.read(hpet.INTERRUPT_STATUS, 4) == 0


def test_periodic_comparator_goes_on_from_its_own_value() -> None:
    clock = Clock()
    pulses: list[tuple[int, int]] = []
    timer = hpet.Hpet(lambda line, level: pulses.append((line, level)), clock)
    timer._timer.close()
    config = hpet.INT_ENABLE | hpet.PERIODIC | hpet.SET_VALUE
    comparator(timer, 0, config, 100)
    timer.write(hpet.COMPARATOR_0 + hpet.COMPARATOR_VALUE, 8, 50)  # the period
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE | hpet.LEGACY)
    clock.now_ns += 1000 + 1230
    timer._expired()
    assert pulses == [(0, 1), (0, 0)]
    assert timer.read(hpet.COMPARATOR_0 + hpet.COMPARATOR_VALUE, 8) == 250


def test_state_survives() -> None:
    clock = Clock()
    timer = hpet.Hpet(clock_ns=clock)
    comparator(timer, 0, 1 << 6 | hpet.PERIODIC, 77)
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE)
    clock.now_ns += 5000
    state = timer.save()
    other = hpet.Hpet(clock_ns=clock)
    other.restore(state)
    clock.now_ns += 1000
    assert other.read(hpet.COUNTER, 8) == timer.read(hpet.COUNTER, 8) == 600
    assert other.save() == timer.save()


def test_timer_thread_fires_by_itself() -> None:
    fired = threading.Event()
    timer = hpet.Hpet(lambda line, level: fired.set())
    comparator(timer, 0, hpet.INT_ENABLE | 16 << hpet.ROUTE_SHIFT, 100_000)
    timer.write(hpet.CONFIGURATION, 4, hpet.ENABLE)
    assert fired.wait(5)
    timer.close()


VALUE_0 = COMPARATOR_0 + 8
ON = hpet.INT_ENABLE | 16 << hpet.ROUTE_SHIFT
PULSE = [(16, 1), (16, 0)]


def test_it_starts_as_section_3_1_says(timer: hpet.Hpet) -> None:
    assert timer.read(CONFIGURATION, 8) == timer.read(COUNTER, 8) == timer.read(INTERRUPT_STATUS, 8) == 0
    assert [timer.read(VALUE_0 + 0x20 * n, 8) for n in range(3)] == [(1 << 64) - 1] * 3
    capabilities = timer.read(hpet.CAPABILITIES, 8)
    assert capabilities >> 8 & 0x1F == 2  # the last timer
    assert 0 < capabilities >> 32 <= 0x05F5E100
    assert capabilities & 0xFF != 0


def test_usage_model_of_periodic_mode(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    """Section 2.3.9.2.2: clear the enable bit and the counter, set VAL_SET, write the value once, enable."""
    timer.write(CONFIGURATION, 8, 0)
    timer.write(COUNTER, 8, 0)
    timer.write(COMPARATOR_0, 8, ON | hpet.PERIODIC | hpet.SET_VALUE)
    timer.write(VALUE_0, 8, 0x123)
    assert timer.read(COMPARATOR_0, 8) & hpet.SET_VALUE == 0  # "it automatically clears"
    timer.write(CONFIGURATION, 8, 1)
    seen = []
    for _ in range(3):
        run(timer, clock, 0x122)
        assert not lines
        run(timer, clock, 1)
        assert lines == PULSE
        lines.clear()
        seen.append(timer.read(VALUE_0, 8))
    assert seen == [0x246, 0x369, 0x48C]


def test_period_written_later_is_added_at_the_next_match(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    timer.write(COMPARATOR_0, 8, ON | hpet.PERIODIC | hpet.SET_VALUE)
    timer.write(VALUE_0, 8, 100)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 50)
    timer.write(VALUE_0, 8, 30)
    assert timer.read(VALUE_0, 8) == 100  # "a write will not immediately be loaded into the comparator"
    run(timer, clock, 50)
    assert timer.read(VALUE_0, 8) == 130
    run(timer, clock, 30)
    assert lines == PULSE * 2


def test_linux_sets_up_a_32_bit_timer_with_two_writes(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    """arch/x86/kernel/hpet.c, hpet_clkevt_set_state_periodic: the counter runs, the second write is the period."""
    timer.write(COUNTER, 8, (1 << 32) - 10)
    timer.write(CONFIGURATION, 4, 1)
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE | hpet.MODE_32)
    timer.write(VALUE_0, 4, 20)  # behind the end of 32 bits
    timer.write(VALUE_0, 4, 25)
    run(timer, clock, 29)
    assert not lines
    run(timer, clock, 1)
    assert lines == PULSE
    assert timer.read(VALUE_0, 8) == 45
    run(timer, clock, 25)
    assert lines == PULSE * 2


def test_32_bit_comparator_wraps_through_0(timer: hpet.Hpet, clock: Clock) -> None:
    """Section 2.3.9.1: FFFF0000h plus 20000h is 00010000h."""
    timer.write(COUNTER, 8, 0xFFFE_FFFF)
    timer.write(COMPARATOR_0, 8, ON | hpet.PERIODIC | hpet.SET_VALUE | hpet.MODE_32)
    timer.write(VALUE_0, 8, 0xFFFF_0000)
    timer.write(VALUE_0, 8, 0x2_0000)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 1)
    assert timer.read(VALUE_0, 8) == 0x1_0000


@pytest.mark.parametrize("halves", [((0, 0x2000_0000), (4, 5)), ((4, 5), (0, 0x2000_0000))])
def test_64_bit_value_in_halves_sets_value_and_period(timer: hpet.Hpet, halves: tuple[tuple[int, int], ...]) -> None:
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE)
    for offset, half in halves:
        timer.write(VALUE_0 + offset, 4, half)
    assert timer.read(VALUE_0, 8) == 5 << 32 | 0x2000_0000
    timer.write(VALUE_0, 4, 1000)  # the period: 32 bits are all of it
    state = timer.save()["comparators"][0]
    assert state[1:3] == [5 << 32 | 0x2000_0000, 1000]


def test_intels_way_to_set_a_64_bit_value_in_halves(timer: hpet.Hpet) -> None:
    """Atom C2000 data sheet, 28.4.1: VAL_SET before either half."""
    for offset, half in ((0, 77), (4, 3)):
        timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE)
        timer.write(VALUE_0 + offset, 4, half)
    assert timer.save()["comparators"][0][1:3] == [3 << 32 | 77] * 2


def test_64_bit_period_in_halves(timer: hpet.Hpet) -> None:
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE)
    timer.write(VALUE_0, 8, 9 << 32 | 9)
    timer.write(VALUE_0, 4, 5)
    timer.write(VALUE_0 + 4, 4, 1)
    assert timer.save()["comparators"][0][1:3] == [9 << 32 | 9, 1 << 32 | 5]


def test_32_bit_mode_drops_upper_halves(timer: hpet.Hpet) -> None:
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE)
    timer.write(VALUE_0, 8, 9 << 32 | 9)
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.MODE_32)
    assert timer.save()["comparators"][0][1:3] == [9, 9]


def test_periodic_timer_without_a_period_stays_where_it_is(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    timer.write(COMPARATOR_0, 4, ON | hpet.PERIODIC | hpet.SET_VALUE)
    timer.write(VALUE_0, 8, 5)
    timer.write(VALUE_0, 8, 0)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 20)
    assert lines == PULSE
    assert timer.read(VALUE_0, 8) == 5


def test_edge_on_a_line_that_is_held_changes_nothing(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    comparator(timer, 0, ON | hpet.LEVEL, 5)
    comparator(timer, 1, ON, 10)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 20)
    assert lines == [(16, 1)]


def test_one_shot_beside_a_periodic_timer_comes_once(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    comparator(timer, 1, hpet.INT_ENABLE | 20 << hpet.ROUTE_SHIFT, 35)
    comparator(timer, 0, ON | hpet.PERIODIC | hpet.SET_VALUE, 10)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 200)
    assert lines.count((20, 1)) == 1
    assert lines.count((16, 1)) == 20


def test_value_that_the_counter_has_passed_is_missed(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    """The warning of section 2.3.9.2.1; drivers read the counter afterwards."""
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 50)
    comparator(timer, 0, ON, 49)
    run(timer, clock, 500)
    assert not lines


def test_one_shot_in_32_bit_mode_comes_again_after_the_counter_wrapped(
    timer: hpet.Hpet, clock: Clock, lines: Lines
) -> None:
    comparator(timer, 0, ON | hpet.MODE_32, 5)
    comparator(timer, 1, hpet.INT_ENABLE | 20 << hpet.ROUTE_SHIFT, 5)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 10)
    clock.now_ns += 10 << 32
    run(timer, clock, 1)
    assert (lines.count((16, 1)), lines.count((20, 1))) == (2, 1)


def test_status_is_set_without_the_interrupt_enabled_and_holds_the_line_once_it_is(
    timer: hpet.Hpet, clock: Clock, lines: Lines
) -> None:
    """Section 2.3.8, INT_ENB_CNF: "the timer will still operate and generate appropriate status bits"."""
    comparator(timer, 0, ON & ~hpet.INT_ENABLE | hpet.LEVEL, 5)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 10)
    assert timer.read(INTERRUPT_STATUS, 8) == 1
    assert not lines
    timer.write(COMPARATOR_0, 4, ON | hpet.LEVEL)
    assert lines == [(16, 1)]
    timer.write(INTERRUPT_STATUS + 4, 4, 1)  # the other half
    assert lines == [(16, 1)]
    timer.write(CONFIGURATION, 4, 0)  # "disable all timer interrupts"
    assert lines == [(16, 1), (16, 0)]
    assert timer.read(INTERRUPT_STATUS, 8) == 1


def test_two_level_interrupts_share_a_line(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    for index in (0, 1):
        comparator(timer, index, ON | hpet.LEVEL, 5)
    timer.write(CONFIGURATION, 8, 1)
    run(timer, clock, 10)
    timer.write(INTERRUPT_STATUS, 4, 1)
    assert lines == [(16, 1)]
    timer.write(INTERRUPT_STATUS, 4, 2)
    assert lines == [(16, 1), (16, 0)]


@pytest.mark.parametrize("route", [0, 3, 8, 15, 24, 31])
def test_route_that_is_not_offered_is_not_taken(timer: hpet.Hpet, route: int) -> None:
    """Section 2.3.8, INT_ROUTE_CNF: "the value read back will not match what is written"."""
    timer.write(COMPARATOR_0, 4, 17 << hpet.ROUTE_SHIFT)
    timer.write(COMPARATOR_0, 4, route << hpet.ROUTE_SHIFT)
    config = timer.read(COMPARATOR_0, 8)
    assert config >> hpet.ROUTE_SHIFT & 31 == 17
    assert not config >> 32 + route & 1


def test_other_accesses_than_of_4_or_8_aligned_bytes_write_nothing(timer: hpet.Hpet) -> None:
    for offset, size in ((0xF0, 1), (0xF0, 2), (0xF2, 4), (0xF4, 8)):
        timer.write(offset, size, 0xFF)
    assert timer.read(COUNTER, 8) == 0


def test_legacy_replacement_silences_pit_and_rtc(clock: Clock, lines: Lines) -> None:
    """Section 2.4.2.1, in force while both bits are set (2.3.5)."""
    replaced: list[bool] = []
    timer = hpet.Hpet(lambda line, level: lines.append((line, level)), clock, replaced.append)
    timer.close()
    timer.rtc_irq(1)
    comparator(timer, 0, ON, 100)  # routed to 16, without effect
    comparator(timer, 1, ON, 200)
    timer.write(CONFIGURATION, 4, hpet.LEGACY)
    assert (replaced, lines) == ([], [(8, 1)])
    timer.write(CONFIGURATION, 4, hpet.LEGACY | hpet.ENABLE)
    assert (replaced, lines) == ([True], [(8, 1), (8, 0)])
    lines.clear()
    timer.rtc_irq(0)
    timer.rtc_irq(1)
    run(timer, clock, 300)
    assert lines == [(0, 1), (0, 0), (8, 1), (8, 0)]
    timer.write(CONFIGURATION, 4, hpet.ENABLE)
    assert replaced == [True, False]
    assert lines[4:] == [(8, 1)]  # the clock's own interrupt is seen again


def test_timer_thread_is_not_kept_busy_by_a_short_period(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = hpet.Hpet(clock_ns=clock)
    armed: list[int | None] = []
    monkeypatch.setattr(timer._timer, "arm", armed.append)
    comparator(timer, 0, ON | hpet.PERIODIC | hpet.SET_VALUE, 1)
    timer.write(CONFIGURATION, 4, hpet.ENABLE)
    clock.now_ns += 10
    timer._expired()
    assert armed[-1] == clock.now_ns + hpet.MIN_PERIOD_NS


def test_nothing_matches_while_the_counter_stands(timer: hpet.Hpet, clock: Clock, lines: Lines) -> None:
    comparator(timer, 0, ON, 0)
    run(timer, clock, 10)
    assert not lines
    timer.write(CONFIGURATION, 4, hpet.ENABLE)
    run(timer, clock, 10)
    assert lines == PULSE


def test_timer_thread_sleeps_while_a_level_interrupt_waits(
    timer: hpet.Hpet, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[int | None] = []
    monkeypatch.setattr(timer._timer, "arm", armed.append)
    comparator(timer, 0, ON | hpet.LEVEL | hpet.PERIODIC | hpet.SET_VALUE, 10)
    timer.write(CONFIGURATION, 4, hpet.ENABLE)
    clock.now_ns += 100
    timer._expired()
    assert armed[-1] is None
    timer.write(INTERRUPT_STATUS, 4, 1)
    assert armed[-1] is not None


@dataclass
class Tick:
    count: int


@dataclass
class Write:
    register: int
    value: int


@dataclass
class Arm:
    """Configure a comparator, and let it match so many ticks from now."""

    base: int
    config: int
    ticks: int


near = st.one_of(
    st.integers(0, 300), st.integers((1 << 32) - 40, (1 << 32) + 40), st.integers((1 << 64) - 40, (1 << 64) - 1)
)
bits = st.sets(st.sampled_from([1, 2, 3, 6, 8])).map(lambda chosen: sum(1 << bit for bit in chosen))
configs = st.tuples(bits, st.sampled_from([0, 2, 16, 16, 17, 31])).map(lambda pair: pair[0] | 1 << 2 | pair[1] << 9)
comparators = st.sampled_from([0x100, 0x120, 0x140])
steps = st.one_of(
    st.builds(Tick, st.integers(1, 60)),
    st.builds(Arm, comparators, configs, st.integers(0, 30)),
    st.builds(Write, st.just(0x10), st.sampled_from([0, 1, 1, 3, 3])),
    st.builds(Write, st.just(0x20), st.integers(0, 7)),
    st.builds(Write, st.just(0xF0), near),
    st.builds(Write, comparators, configs),
    st.builds(lambda base, value: Write(base + 8, value), comparators, near),
)


@given(st.lists(steps, max_size=30))
@settings(max_examples=200)
def test_it_is_the_timer_of_the_specification(program: list[Tick | Write | Arm]) -> None:
    """Against one that is simulated tick by tick."""
    clock, lines, model = Clock(), Lines(), Model()
    timer = hpet.Hpet(lambda line, level: lines.append((line, level)), clock)
    timer.close()

    def compare(step: Tick | Write | Arm) -> None:
        assert timer.read(INTERRUPT_STATUS, 8) == model.status, step
        assert timer.read(COUNTER, 8) == model.count
        for index, expected in enumerate(model.comparators):
            assert timer.read(COMPARATOR_0 + 0x20 * index, 4) == expected.config
            assert timer.read(VALUE_0 + 0x20 * index, 8) == expected.value
        assert sorted(lines) == sorted(model.irqs)
        lines.clear()
        model.irqs.clear()

    def write(register: int, value: int) -> None:
        timer.write(register, 8, value)
        timer.read(INTERRUPT_STATUS, 8)  # as its thread would at once
        model.write(register, value)

    write(CONFIGURATION, 1)
    for step in program:
        if isinstance(step, Write):
            write(step.register, step.value)
        elif isinstance(step, Arm):
            write(step.base, step.config)
            write(step.base + 8, model.count + step.ticks & (1 << 64) - 1)
        else:
            for _ in range(step.count):
                clock.now_ns += 10
                model.tick()
                compare(step)
        compare(step)


@given(
    st.lists(st.one_of(st.builds(Arm, comparators, configs, st.integers(1, 30)), st.builds(Tick, st.integers(1, 60))))
)
def test_late_looks_find_what_timely_ones_do(program: list[Arm | Tick]) -> None:
    """The registers do not depend on when the host got to it."""
    clock = Clock()
    timely, late = hpet.Hpet(clock_ns=clock), hpet.Hpet(clock_ns=clock)
    for timer in (timely, late):
        timer.close()
        timer.write(CONFIGURATION, 4, 1)
    for step in program:
        if isinstance(step, Arm):
            value = timely.read(COUNTER, 8) + step.ticks
            for timer in (timely, late):
                timer.write(step.base, 4, step.config)
                timer.write(step.base + 8, 4, value)
        else:
            run(timely, clock, step.count)
    assert late.save() == timely.save()
