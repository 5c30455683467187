# SPDX-License-Identifier: Apache-2.0
"""The local APIC's timer (SDM vol. 3, 11.5.4), on a bus of 1 GHz and a clock that stands still."""

import pytest
from tests.support.interrupts import Board, FakeVcpu

from softkvm import abi
from softkvm.kvm import Kvm, Params

LVTT, TMICT, TMCCT, TDCR = 0x320, 0x380, 0x390, 0x3E0
ONE_SHOT, PERIODIC, TSC_DEADLINE = 0 << 17, 1 << 17, 2 << 17
MASKED = 1 << 16
DIVIDE_BY_1 = 0b1011
VECTOR = 0xEF


class TimerBench(Board):
    """One CPU with its timer."""

    @property
    def vcpu(self) -> FakeVcpu:
        return self.vcpus[0]

    def write(self, offset: int, value: int) -> None:
        self.lapic.mmio_write(offset, 4, value)

    def read(self, offset: int) -> int:
        return self.lapic.mmio_read(offset, 4)

    def start(self, mode: int, count: int, divide: int = DIVIDE_BY_1) -> None:
        self.write(LVTT, mode | VECTOR)
        self.write(TDCR, divide)
        self.write(TMICT, count)

    def take(self, ns: int = 0) -> int:
        """Let *ns* pass, then do what the vCPU does on its way into the guest. Returns the vector taken, or -1."""
        self.clock.advance(ns)
        self.lapic.inject_timer_irqs()
        vector = self.lapic.get_interrupt()
        if vector >= 0:
            self.lapic.eoi()
        return vector


@pytest.fixture
def bench() -> TimerBench:
    return TimerBench()


def test_one_shot_fires_once_and_never_early(bench: TimerBench) -> None:
    bench.start(ONE_SHOT, 1000)
    assert bench.vcpu.timer_ns == bench.lapic.next_deadline_ns == bench.clock() + 1000
    assert bench.take(999) == -1
    assert bench.take(1) == VECTOR
    assert bench.read(TMCCT) == 0
    assert bench.read(TMICT) == 1000
    assert bench.take(10_000) == -1
    assert bench.vcpu.timer_ns == 0


@pytest.mark.parametrize(
    ("code", "divisor"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)],
)
def test_divide_configuration(bench: TimerBench, code: int, divisor: int) -> None:
    bench.start(ONE_SHOT, 1000, code)
    assert bench.lapic.next_deadline_ns - bench.clock() == 1000 * divisor
    bench.clock.advance(100 * divisor)
    assert bench.read(TMCCT) == 900


def test_current_count_goes_down(bench: TimerBench) -> None:
    bench.start(ONE_SHOT, 1_000_000)
    assert bench.read(TMCCT) == 1_000_000
    bench.clock.advance(250_000)
    assert bench.read(TMCCT) == 750_000


def test_periodic_does_not_drift(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1_000_000)
    start = bench.clock()
    for period in range(1, 50):
        bench.clock.now_ns = start + period * 1_000_000 + 137 * period
        assert bench.take() == VECTOR
        assert bench.lapic.next_deadline_ns == start + (period + 1) * 1_000_000


def test_missed_periods_are_one_interrupt(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1_000_000)
    start = bench.clock()
    assert bench.take(5_400_000) == VECTOR
    assert bench.take() == -1
    assert bench.lapic.next_deadline_ns == start + 6_000_000
    assert bench.read(TMCCT) == 600_000


def test_shortest_period_is_200_us(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1)
    assert bench.lapic.next_deadline_ns == bench.clock() + 200_000
    bench.start(ONE_SHOT, 1)
    assert bench.lapic.next_deadline_ns == bench.clock() + 1


def test_count_zero_stops(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1_000_000)
    bench.write(TMICT, 0)
    assert bench.vcpu.timer_ns == 0
    assert bench.take(10_000_000) == -1


def test_masked_timer_counts_silently(bench: TimerBench) -> None:
    bench.start(ONE_SHOT | MASKED, 1000)
    assert bench.take(1000) == -1
    bench.write(LVTT, VECTOR)
    assert bench.take(1000) == -1


def test_periodic_to_one_shot_lets_the_count_run_out(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1_000_000)
    bench.clock.advance(400_000)
    bench.write(LVTT, ONE_SHOT | VECTOR)
    assert bench.read(TMCCT) == 600_000
    assert bench.take(600_000) == VECTOR
    assert bench.read(TMCCT) == 0
    bench.write(LVTT, PERIODIC | VECTOR)
    assert bench.read(TMCCT) == 0  # an expired count doesn't start again by itself
    assert bench.take(10_000_000) == -1


def test_one_shot_to_periodic_reloads_from_then_on(bench: TimerBench) -> None:
    bench.start(ONE_SHOT, 1_000_000)
    bench.clock.advance(400_000)
    bench.write(LVTT, PERIODIC | VECTOR)
    assert bench.read(TMCCT) == 600_000
    assert bench.take(600_000) == VECTOR
    assert bench.take(1_000_000) == VECTOR


def test_divisor_changed_while_running_keeps_the_count(bench: TimerBench) -> None:
    bench.start(ONE_SHOT, 1_000_000)
    bench.clock.advance(400_000)
    bench.write(TDCR, 0)
    assert bench.read(TMCCT) == 600_000
    bench.clock.advance(200_000)
    assert bench.read(TMCCT) == 500_000


# TSC-deadline


def test_tsc_deadline_fires_when_the_guests_tsc_gets_there(bench: TimerBench) -> None:
    bench.vcpu.tsc_offset = -500
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    bench.lapic.set_tsc_deadline(bench.clock() - 500 + 1000)
    assert bench.lapic.tsc_deadline == bench.clock() + 500
    assert bench.take(999) == -1
    assert bench.take(1) == VECTOR
    assert bench.lapic.tsc_deadline == 0


def test_deadline_in_the_past_fires_at_once(bench: TimerBench) -> None:
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    bench.lapic.set_tsc_deadline(1)
    assert bench.lapic.has_interrupt() == VECTOR
    assert bench.lapic.tsc_deadline == 0


def test_deadline_zero_disarms_and_the_farthest_one_is_fine(bench: TimerBench) -> None:
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    bench.lapic.set_tsc_deadline(2**64 - 1)
    assert bench.vcpu.timer_ns == 2**63 - 1
    bench.lapic.set_tsc_deadline(0)
    assert bench.vcpu.timer_ns == 0
    assert bench.take(10**12) == -1


def test_deadline_is_ignored_in_other_modes_and_the_count_in_this_one(bench: TimerBench) -> None:
    bench.write(LVTT, ONE_SHOT | VECTOR)
    bench.lapic.set_tsc_deadline(bench.clock() + 1000)
    assert bench.lapic.tsc_deadline == 0
    assert bench.vcpu.timer_ns == 0
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    bench.write(TMICT, 1000)
    assert bench.read(TMICT) == bench.read(TMCCT) == 0
    assert bench.vcpu.timer_ns == 0


@pytest.mark.parametrize("mode", [ONE_SHOT, PERIODIC])
def test_switching_to_and_from_deadline_mode_disarms(bench: TimerBench, mode: int) -> None:
    bench.start(mode, 1_000_000)
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    assert bench.vcpu.timer_ns == 0
    bench.lapic.set_tsc_deadline(bench.clock() + 1000)
    bench.write(LVTT, mode | VECTOR)
    assert bench.vcpu.timer_ns == bench.lapic.tsc_deadline == bench.read(TMICT) == 0
    assert bench.take(10_000_000) == -1


def test_moved_tsc_moves_the_deadline(bench: TimerBench) -> None:
    bench.write(LVTT, TSC_DEADLINE | VECTOR)
    bench.lapic.set_tsc_deadline(bench.clock() + 1000)
    bench.vcpu.tsc_offset = 400
    bench.lapic.timer.tsc_changed()
    assert bench.vcpu.timer_ns == bench.clock() + 600


def test_reserved_mode_does_not_count(bench: TimerBench) -> None:
    bench.start(3 << 17, 1000)
    assert bench.take(10_000) == -1


# State


def test_running_timer_is_restored_with_what_was_left() -> None:
    bench = TimerBench()
    bench.start(PERIODIC, 1_000_000)
    bench.clock.advance(300_000)
    other = TimerBench()
    other.clock.advance(12_345)
    other.lapic.set_state(bench.lapic.get_state())
    assert other.read(TMCCT) == 700_000
    assert other.take(699_999) == -1
    assert other.take(1) == VECTOR
    assert other.take(1_000_000) == VECTOR


@pytest.mark.parametrize("delivered", [True, False])
def test_one_shot_restored_with_nothing_left_fires_at_once(delivered: bool) -> None:
    """As the kernel's: whether the interrupt had been delivered when the state was saved, the state does not say."""
    bench = TimerBench()
    bench.start(ONE_SHOT, 1000)
    if delivered:
        assert bench.take(1000) == VECTOR
    else:
        bench.clock.advance(1000)
    state = bench.lapic.get_state()
    other = TimerBench()
    other.lapic.set_state(state)
    assert other.read(TMICT) == 1000
    assert other.take(0) == VECTOR
    assert other.vcpu.timer_ns == 0


def test_periodic_timer_restored_with_nothing_left_starts_a_period() -> None:
    """What QEMU restores has no current count."""
    bench = TimerBench()
    bench.start(PERIODIC, 1_000_000)
    state = bytearray(bench.lapic.get_state())
    state[TMCCT : TMCCT + 4] = bytes(4)
    other = TimerBench()
    other.lapic.set_state(bytes(state))
    assert other.take(999_999) == -1
    assert other.take(1) == VECTOR


def test_disabling_the_apic_stops_the_timer(bench: TimerBench) -> None:
    bench.start(PERIODIC, 1_000_000)
    bench.lapic.set_base(0xFEE00100)
    assert bench.vcpu.timer_ns == 0


@pytest.mark.parametrize("split", [False, True])
def test_the_shortest_period_is_the_module_parameters(split: bool) -> None:
    with Kvm(Params(min_timer_period_us=50)) as kvm, kvm.create_vm() as vm:
        if split:
            vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
        else:
            vm.create_irqchip()
        vm.create_vcpu(0)
        assert vm.chips is not None
        (lapic,) = vm.chips.apic_map.lapics
        lapic.mmio_write(0xF0, 4, 0x1FF)
        for offset, value in ((LVTT, PERIODIC | VECTOR), (TDCR, DIVIDE_BY_1), (TMICT, 1)):
            lapic.mmio_write(offset, 4, value)
        assert lapic.timer.period_ns == 50_000
