# SPDX-License-Identifier: Apache-2.0
"""Task work and CPU timers: what a vCPU's thread does in KVM_RUN before it enters the guest.

The device knows no work of ours: KVM_RUN ends with EINTR behind it, and is called again.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
from tests.support.conformance import Guest, watchdog

from softkvm import abi

SPIN = "ebfe"  # jmp $
MS = 1_000_000


def test_work_runs_on_the_thread_of_kvm_run_before_the_guest_goes_on(guest: Guest, kind: str) -> None:
    guest.real("f4")
    ran: list[tuple[int, int]] = []
    guest.cpu.call_soon(lambda: ran.append((threading.get_ident(), guest.cpu.get_regs().rip)))
    assert ran == []
    start = guest.cpu.get_regs().rip
    if kind == "device":
        with contextlib.suppress(InterruptedError):
            guest.cpu.run()
    else:
        guest.expect(abi.KVM_EXIT_HLT)
    assert ran == [(threading.get_ident(), start)]
    if kind == "device":
        guest.expect(abi.KVM_EXIT_HLT)


def test_a_timer_on_a_vcpus_time_interrupts_a_guest_that_never_leaves(guest: Guest) -> None:
    guest.real(SPIN)
    clock = guest.cpu.cpu_clock
    expired: list[int] = []

    class Expired(Exception):
        pass

    def notify(_: object) -> None:
        expired.append(clock.total_ns())
        raise Expired

    clock.create_timer(notify).settime(5 * MS)
    with contextlib.suppress(Expired):
        while not expired:
            with contextlib.suppress(InterruptedError):
                guest.cpu.run()
    assert expired[0] >= 5 * MS


def test_work_that_queues_itself_keeps_neither_a_kick_nor_other_work_waiting(guest: Guest) -> None:
    guest.real(SPIN)
    ran: list[str] = []

    def again() -> None:
        ran.append("again")
        if len(ran) > 10_000_000:
            raise AssertionError("KVM_RUN does not end")
        guest.cpu.call_soon(again)

    guest.cpu.call_soon(again)
    for _ in range(3):
        guest.cpu.call_soon(lambda: ran.append("once"))
        before = len(ran)
        with watchdog(guest.cpu, 0.05), pytest.raises(InterruptedError):
            guest.cpu.run()
        assert "again" in ran[before:] and ran[before:].count("once") == 1
    assert ran.count("once") == 3
