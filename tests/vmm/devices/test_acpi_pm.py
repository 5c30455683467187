# SPDX-License-Identifier: Apache-2.0
"""ACPI fixed hardware, expected values from the ACPI specification, section 4.8."""

import time

import pytest

from softkvm.vmm.devices import acpi_pm
from softkvm.vmm.devices.acpi_pm import GPE0_EN, GPE0_STS, PM1_CNT, PM1_EN, PM1_STS, PM_TMR, AcpiPm, ResetRegister


class Clock:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_s5_powers_off_and_other_states_do_not() -> None:
    calls: list[str] = []
    pm = AcpiPm(lambda: calls.append("off"))
    pm.write(PM1_CNT, 2, 5 << 10)  # SLP_TYP alone
    pm.write(PM1_CNT, 2, 1 << 13 | 1 << 10)  # another state
    assert calls == []
    pm.write(PM1_CNT, 2, 1 << 13 | 5 << 10)
    assert calls == ["off"]


def test_s5_by_bytes() -> None:
    calls: list[str] = []
    pm = AcpiPm(lambda: calls.append("off"))
    pm.write(PM1_CNT + 1, 1, 1 << 5 | 5 << 2)
    assert calls == ["off"]


def test_sci_en_reads_one_and_slp_en_zero() -> None:
    pm = AcpiPm()
    pm.write(PM1_CNT, 2, 1 << 13 | 3 << 10)
    assert pm.read(PM1_CNT, 2) == 3 << 10 | 1


def test_power_button_raises_sci_and_status_is_cleared_by_writing_one() -> None:
    levels: list[int] = []
    pm = AcpiPm(set_irq=levels.append)
    pm.write(PM1_EN, 2, 1 << 8)
    pm.press_power_button()
    assert pm.read(PM1_STS, 2) == 1 << 8
    assert levels == [1]
    pm.write(PM1_STS, 2, 0)
    assert levels == [1]
    pm.write(PM1_STS, 2, 1 << 8)
    assert pm.read(PM1_STS, 2) == 0
    assert levels == [1, 0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_timer_runs_at_3_579545_mhz_and_is_read_only(size: int) -> None:
    clock = Clock()
    pm = AcpiPm(clock_ns=clock)
    clock.now_ns = 1_000_000_000
    pm.write(PM_TMR, 4, 0)
    assert pm.read(PM_TMR, size) == 3_579_545 & (1 << 8 * size) - 1


def test_timer_status_follows_the_highest_bit() -> None:
    clock = Clock()
    pm = AcpiPm(clock_ns=clock)
    clock.now_ns = 599 * 10**9
    assert pm.read(PM1_STS, 2) & 1 == 0
    clock.now_ns = 600 * 10**9  # 2**31 ticks are 599.93 s
    assert pm.read(PM1_STS, 2) & 1 == 1
    pm.write(PM1_STS, 2, 1)
    assert pm.read(PM1_STS, 2) & 1 == 0


def test_timer_interrupt_arrives_on_its_own() -> None:
    levels: list[int] = []
    pm = AcpiPm(set_irq=levels.append)
    elapsed_ns = (2**31 - 100_000) * 10**9 // 3_579_545
    pm.restore({**pm.save(), "en": 1, "elapsed_ns": elapsed_ns})
    deadline = time.monotonic() + 5
    while not levels and time.monotonic() < deadline:
        time.sleep(0.005)
    pm.close()
    assert levels == [1]


def test_unused_bytes_read_zero_at_any_size() -> None:
    pm = AcpiPm()
    assert pm.read(0x6, 2) == 0
    assert pm.read(0xF, 4) == 0


def test_reset_register_value_of_the_fadt_resets() -> None:
    calls: list[str] = []
    register = ResetRegister(lambda: calls.append("reset"))
    register.write(0, 1, 0x02)
    assert (calls, register.read(0)) == ([], 0x02)
    register.write(0, 1, acpi_pm.RESET_VALUE)
    assert calls == ["reset"]


def test_save_and_restore_carry_the_timer_on() -> None:
    clock = Clock()
    pm = AcpiPm(clock_ns=clock)
    clock.now_ns = 2_000_000_000
    state = pm.save()
    clock.now_ns = 10_000_000_000
    other = AcpiPm(clock_ns=clock)
    other.restore(state)
    assert other.read(PM_TMR, 4) == 2 * 3_579_545
    clock.now_ns += 1_000_000_000
    assert other.read(PM_TMR, 4) == 3 * 3_579_545


def test_sleep_type_3_calls_sleep_and_an_enabled_rtc_alarm_wakes() -> None:
    slept: list[int] = []
    pm = AcpiPm(sleep=lambda: slept.append(1))
    pm.write(PM1_CNT, 2, 1 << 13 | 1 << 10)
    assert slept == [1]
    pm.rtc_alarm()
    assert not pm.wait_for_wake_up(0)
    pm.write(PM1_EN, 2, 1 << 10)
    assert pm.wait_for_wake_up(0)
    assert pm.read(PM1_STS, 2) == 1 << 15 | 1 << 10
    pm.write(PM1_STS, 2, 1 << 15 | 1 << 10)
    assert pm.read(PM1_STS, 2) == 0


def test_the_power_button_wakes_without_being_enabled() -> None:
    pm = AcpiPm()
    pm.press_power_button()
    assert pm.wait_for_wake_up(0)


def test_general_purpose_events_raise_the_sci_where_they_are_enabled() -> None:
    levels: list[int] = []
    pm = AcpiPm(set_irq=levels.append)
    pm.raise_event(5)
    assert pm.read(GPE0_STS, 2) == 1 << 5
    assert levels == []
    pm.write(GPE0_EN, 1, 1 << 5)  # byte by byte, as ACPICA does
    pm.write(GPE0_EN + 1, 1, 1 << 2)
    assert pm.read(GPE0_EN, 2) == 1 << 5 | 1 << 10
    assert levels == [1]
    state = pm.save()
    pm.write(GPE0_STS, 1, 1 << 4)
    assert levels == [1]
    pm.write(GPE0_STS, 1, 1 << 5)
    assert levels == [1, 0]
    pm.raise_event(10)
    assert levels == [1, 0, 1]
    other = AcpiPm()
    other.restore(state)
    assert (other.read(GPE0_STS, 2), other.read(GPE0_EN, 2)) == (1 << 5, 1 << 5 | 1 << 10)
