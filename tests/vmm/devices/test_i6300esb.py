# SPDX-License-Identifier: Apache-2.0
"""The watchdog by its data sheet's registers (Intel 300641, chapter 16), as Linux's driver and others use them."""

from __future__ import annotations

import threading

import pytest

from softkvm.vmm.bus import Bus
from softkvm.vmm.devices.i6300esb import I6300Esb

SECOND = 1_000_000_000
MEMORY_ADDRESS = 0xFE008000
TICK_1KHZ = (1 << 15) / 33e6  # seconds


class Rig:
    """The function on a bus, with a clock that the test sets and a timer that fires when the test says."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.expiries = 0
        self.device = I6300Esb(self._expired, MEMORY_ADDRESS, lambda: self.now_ns)
        self.device._timer.close()  # the test is the timer
        self.mmio = Bus("memory", 52)
        self.device.connect(Bus("I/O port", 16), self.mmio)

    def _expired(self) -> None:
        self.expiries += 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.mmio.write(MEMORY_ADDRESS + offset, size, value)

    def read(self, offset: int, size: int) -> int:
        return self.mmio.read(MEMORY_ADDRESS + offset, size)

    def unlock(self) -> None:
        self.write(0xC, 2, 0x80)
        self.write(0xC, 2, 0x86)

    def heartbeat(self, seconds: int) -> None:
        """What Linux's driver does: half of the time for each counter."""
        for offset in (0, 4):
            self.unlock()
            self.write(offset, 4, seconds << 9)
        self.reload()

    def reload(self) -> None:
        self.unlock()
        self.write(0xC, 2, 0x100)

    def enable(self, bits: int = 2) -> None:
        self.device.write(0x60, 2, 0x0003)  # no interrupt, 1 kHz, output on
        self.device.write(0x68, 1, bits)

    def later(self, seconds: float) -> int:
        """Let time pass; how often it has expired so far."""
        self.now_ns += int(seconds * SECOND)
        self.device._ran_out()
        return self.expiries


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_is_the_function_that_drivers_look_for(rig: Rig) -> None:
    assert rig.device.read(0, 4) == 0x25AB8086
    assert rig.device.read(8, 4) >> 8 == 0x088000


def test_it_expires_behind_both_counters(rig: Rig) -> None:
    rig.heartbeat(4)
    rig.enable()
    first = 4 * 512 * TICK_1KHZ
    assert rig.later(first - 0.001) == 0
    assert rig.later(0.002) == 0  # the second counter begins
    assert rig.later(first - 0.002) == 0
    assert rig.later(0.003) == 1
    assert not rig.device.running
    assert rig.read(0xC, 2) == 0x200
    rig.unlock()
    rig.write(0xC, 2, 0x200)
    assert rig.read(0xC, 2) == 0


def test_a_reload_begins_anew(rig: Rig) -> None:
    rig.heartbeat(2)
    rig.enable()
    for _ in range(5):
        assert rig.later(1.5) == 0  # behind the first counter, before the second's end
        rig.reload()
    assert rig.later(1.1) == 0
    assert rig.later(1.1) == 1


@pytest.mark.parametrize("sequence", [(), (0x80,), (0x86,), (0x86, 0x80), (0x80, 0x80), (0x80, 1, 0x86)])
def test_registers_that_are_not_unlocked_stay(rig: Rig, sequence: tuple[int, ...]) -> None:
    for value in sequence:
        rig.write(0xC, 2, value)
    rig.write(0, 4, 7)
    assert rig.read(0, 4) == 0xFFFFF


def test_an_unlocking_is_for_one_write(rig: Rig) -> None:
    rig.write(0xC, 2, 0x80)
    rig.write(0xC, 2, 0x80)
    rig.write(0xC, 2, 0x86)
    rig.write(0, 4, 0xFFF0_0007)
    rig.write(4, 4, 8)
    assert (rig.read(0, 4), rig.read(4, 4)) == (7, 0xFFFFF)


def test_the_lock_keeps_it_enabled(rig: Rig) -> None:
    rig.enable(3)
    rig.device.write(0x68, 1, 0)
    assert rig.device.read(0x68, 1) == 3
    assert rig.device.running


def test_what_is_disabled_does_not_count(rig: Rig) -> None:
    rig.heartbeat(2)
    rig.enable()
    rig.device.write(0x68, 1, 0)
    assert rig.later(100) == 0
    assert not rig.device.running


def test_the_output_can_be_off(rig: Rig) -> None:
    rig.heartbeat(2)
    rig.enable()
    rig.device.write(0x60, 2, 0x20)
    rig.later(2)
    assert rig.read(8, 4) == 1  # the warning's status, as its interrupt isn't off
    rig.write(8, 4, 1)
    assert rig.read(8, 4) == 0
    assert rig.later(2) == 0


def test_in_free_running_mode_it_goes_on_and_not_faster_than_a_millisecond(rig: Rig) -> None:
    for offset in (0, 4):
        rig.unlock()
        rig.write(offset, 4, 0)
    rig.enable(6)
    for n in range(1, 4):
        rig.later(0.0011)
        assert rig.later(0.0011) == n
    assert rig.later(0.0005) == 3


def test_the_fast_clock_counts_megahertz(rig: Rig) -> None:
    rig.enable()
    rig.device.write(0x60, 2, 4)
    rig.reload()
    whole = 0xFFFFF * 32 / 33e6
    assert rig.later(whole + 0.001) == 0
    assert rig.later(whole - 0.01) == 0
    assert rig.later(0.02) == 1


def test_it_stands_while_the_machine_is_paused_and_goes_on_where_it_was(rig: Rig) -> None:
    rig.heartbeat(4)
    rig.enable()
    rig.later(1)
    rig.device.pause()
    rig.now_ns += 100 * SECOND
    state = rig.device.save()
    other = Rig()
    other.device.restore(state)
    rig.device.resume()
    for one in (rig, other):
        assert one.device.running
        assert one.later(1.0) == 0
        assert one.later(2.03) == 0
        assert one.later(2.1) == 1
        assert one.read(0, 4) == 2048


def test_a_reset_stops_it_and_keeps_only_that_it_has_expired(rig: Rig) -> None:
    rig.heartbeat(2)
    rig.enable(3)
    rig.later(1.1)
    rig.later(1.1)
    rig.reload()
    rig.device.reset()
    assert not rig.device.running
    assert (rig.device.read(0x68, 1), rig.device.read(0x60, 2)) == (0, 0)
    assert rig.read(0, 4) == 0xFFFFF
    assert rig.read(0xC, 2) == 0x200
    rig.enable()
    assert rig.device.running


def test_with_its_own_timer_it_really_fires() -> None:
    fired = threading.Event()
    device = I6300Esb(fired.set, MEMORY_ADDRESS)
    for offset in (0, 4):
        device.write_register(0xC, 0x80)
        device.write_register(0xC, 0x86)
        device.write_register(offset, 1)
    device.write(0x68, 1, 2)
    assert fired.wait(30)
    device.close()
