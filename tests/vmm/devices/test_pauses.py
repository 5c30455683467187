# SPDX-License-Identifier: Apache-2.0
"""Devices that rest: nothing comes of them, and what came due meanwhile comes when they go on."""

from __future__ import annotations

import threading
import time

from softkvm.vmm.devices import acpi_pm, hpet, serial
from softkvm.vmm.devices.timer import Timer

FAR_S = 30


def test_a_timer_that_rests_expires_when_it_goes_on() -> None:
    expired = threading.Event()
    timer = Timer("test", time.monotonic_ns, expired.set)
    timer.pause()
    timer.arm(time.monotonic_ns() + 1_000_000)
    assert not expired.wait(0.05)
    timer.resume()
    assert expired.wait(FAR_S)
    timer.close()


def test_a_pause_waits_for_the_callback_that_runs() -> None:
    inside, go, paused = threading.Event(), threading.Event(), threading.Event()

    def expire() -> None:
        inside.set()
        assert go.wait(FAR_S)

    timer = Timer("test", time.monotonic_ns, expire)
    timer.arm(0)
    assert inside.wait(FAR_S)

    def pause() -> None:
        timer.pause()
        paused.set()

    thread = threading.Thread(target=pause)
    thread.start()
    assert not paused.wait(0.05)
    go.set()
    assert paused.wait(FAR_S)
    thread.join()
    timer.close()


def test_a_callback_may_rest_its_own_timer() -> None:
    calls: list[int] = []
    came = threading.Event()

    def expire() -> None:
        calls.append(1)
        timer.pause()
        timer.arm(0)
        came.set()

    timer = Timer("test", time.monotonic_ns, expire)
    timer.arm(1)
    assert came.wait(FAR_S)
    time.sleep(0.02)
    assert len(calls) == 1
    timer.close()


def test_a_timer_that_rests_can_be_closed() -> None:
    timer = Timer("test", time.monotonic_ns, lambda: None)
    timer.arm(1 << 62)
    timer.pause()
    timer.close()


def test_input_waits_on_the_line_of_a_uart_that_rests() -> None:
    levels: list[int] = []
    uart = serial.Serial(set_irq=levels.append)
    uart.write(serial.MCR, 1, serial.MCR_RTS | serial.MCR_OUT2)
    uart.write(serial.IER, 1, serial.IER_RDI)
    uart.pause()
    uart.feed(b"a")
    assert levels == []
    assert not uart.read(serial.LSR) & serial.LSR_DR
    assert uart.pending_input == 1
    uart.resume()
    assert levels == [1]
    assert uart.read(serial.RBR) == ord("a")
    uart.close()


def test_a_break_waits_too() -> None:
    uart = serial.Serial()
    uart.write(serial.MCR, 1, serial.MCR_RTS | serial.MCR_OUT2)
    uart.write(serial.IER, 1, serial.IER_RDI | serial.IER_RLSI)
    uart.pause()
    uart.send_break()
    assert not uart.read(serial.LSR) & serial.LSR_BI
    uart.resume()
    assert uart.read(serial.LSR) & serial.LSR_BI
    uart.close()


def test_a_power_button_pressed_in_a_pause_is_seen_behind_it() -> None:
    levels: list[int] = []
    pm = acpi_pm.AcpiPm(set_irq=levels.append)
    pm.write(acpi_pm.PM1_EN, 2, acpi_pm.STS_PWRBTN)
    pm.pause()
    pm.press_power_button()
    assert levels == []
    pm.resume()
    assert levels == [1]
    pm.close()


def test_an_event_timer_that_rests_interrupts_nobody() -> None:
    lines: list[tuple[int, int]] = []
    timer = hpet.Hpet(lambda line, level: lines.append((line, level)))
    timer.write(hpet.COMPARATOR_0, 8, hpet.INT_ENABLE | 2 << hpet.ROUTE_SHIFT)
    timer.pause()
    timer.write(hpet.COMPARATOR_0 + hpet.COMPARATOR_VALUE, 8, 100_000)  # a millisecond
    timer.write(hpet.CONFIGURATION, 8, hpet.ENABLE)
    time.sleep(0.05)
    assert lines == []
    timer.resume()
    deadline = time.monotonic() + FAR_S
    while lines != [(0, 1), (0, 0)]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    timer.close()
