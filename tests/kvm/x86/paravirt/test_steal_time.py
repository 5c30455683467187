# SPDX-License-Identifier: Apache-2.0
"""Steal time (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME)."""

from __future__ import annotations

import os
import struct
import threading

import pytest
from tests.support.threads import beside
from tests.support.tiny import DATA, Tiny

from softkvm import abi
from softkvm.kvm.x86.paravirt import steal_time


def test_steal_time_is_the_delay_of_the_vcpus_thread_whoever_restores_the_register(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = Tiny()
    asked: list[int] = []
    delay = steal_time.run_delay_ns

    def run_delay_ns() -> int:
        asked.append(threading.get_ident())
        return delay()

    monkeypatch.setattr(steal_time, "run_delay_ns", run_delay_ns)
    assert tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED}) == 1
    tiny.protected_mode().load(b"\xf4")
    thread = threading.Thread(target=tiny.run)
    with beside(thread):
        pass
    assert set(asked) == {thread.ident}
    tiny.close()


def test_stolen_time_does_not_go_back_when_another_thread_runs_the_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny()
    delays = iter((1000, 1700, 300, 450))
    monkeypatch.setattr(steal_time, "run_delay_ns", lambda: next(delays))
    tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED})
    seen = []
    for _ in range(4):
        steal_time.record(tiny.vcpu)
        seen.append(int.from_bytes(tiny.memory.read(DATA, 8), "little"))
    assert seen == [1000, 1700, 1700, 1850]
    tiny.close()


@pytest.mark.parametrize("irqchip", [False, True])
def test_time_is_looked_at_by_every_kvm_run_that_comes_after_a_while(
    monkeypatch: pytest.MonkeyPatch, irqchip: bool
) -> None:
    tiny = Tiny(irqchip=irqchip)
    stolen = 0
    now = 1_000_000_000
    monkeypatch.setattr(steal_time, "run_delay_ns", lambda: stolen)
    monkeypatch.setattr(steal_time, "clock_ns", lambda: now)
    tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED})
    tiny.protected_mode().load(b"\xe6\x10" * 10 + b"\xf4")  # out 0x10, al
    seen = []
    for step_ns in (0, 100_000, 20, 99_979, 1, 10_000_000):
        stolen += 10
        now += step_ns
        assert tiny.run() == abi.KVM_EXIT_IO
        seen.append(int.from_bytes(tiny.memory.read(DATA, 8), "little"))
    assert seen == [10, 20, 20, 20, 50, 60]
    tiny.close()


def test_a_delay_of_a_tenth_of_a_millisecond_is_told_at_the_next_kvm_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which can't have taken less; without one the guest's memory stays as it is."""
    tiny = Tiny()
    stolen, now = 0, 1_000_000_000
    monkeypatch.setattr(steal_time, "run_delay_ns", lambda: stolen)
    monkeypatch.setattr(steal_time, "clock_ns", lambda: now)
    tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED})
    tiny.protected_mode().load(b"\xe6\x10" * 10 + b"\xf4")  # out 0x10, al
    seen = []
    for delay_ns, other_ns in ((0, 0), (200_000, 0), (100_000, 50), (0, 500_000)):
        stolen += delay_ns
        now += delay_ns + other_ns
        assert tiny.run() == abi.KVM_EXIT_IO
        steal, version = struct.unpack("<QI", tiny.memory.read(DATA, 12))
        seen.append((steal, version))
    assert seen == [(0, 2), (200_000, 4), (300_000, 6), (300_000, 6)]
    tiny.close()


def test_nothing_is_written_after_init(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny()
    monkeypatch.setattr(steal_time, "run_delay_ns", lambda: 1000)
    tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED})
    tiny.vcpu.vcpu_reset(True)
    steal_time.check(tiny.vcpu)
    steal_time.record(tiny.vcpu)
    assert tiny.memory.read(DATA, 12) == bytes(12)
    tiny.close()


def test_the_delay_is_that_of_the_calling_thread() -> None:
    def own(thread: int) -> int:
        with open(f"/proc/self/task/{thread}/schedstat") as f:
            return int(f.read().split()[1])

    found = []

    def look() -> None:
        thread = threading.get_native_id()
        for _ in range(2):  # opened, then kept
            before = own(thread)
            found.append((before, steal_time.run_delay_ns(), own(thread)))

    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("the host's kernel has no scheduler statistics")
    look()
    other = threading.Thread(target=look)
    with beside(other):
        pass
    assert len(found) == 4
    assert all(before <= delay <= after for before, delay, after in found)


def test_a_threads_file_is_closed_when_it_ends() -> None:
    descriptors: list[int] = []

    def look() -> None:
        steal_time.run_delay_ns()
        descriptors.append(steal_time._thread.stat.fd)

    other = threading.Thread(target=look)
    with beside(other):
        pass
    if descriptors[0] >= 0:
        with pytest.raises(OSError):
            os.pread(descriptors[0], 64, 0)


def test_a_guest_that_begins_while_xens_interfaces_end_is_told() -> None:
    tiny = Tiny(irqchip=True)
    vcpu = tiny.vcpu
    guest = threading.Thread(target=lambda: steal_time.set_msr(vcpu, DATA | abi.KVM_MSR_ENABLED, host=True))

    class Values(dict[int, int]):
        def get(self, key: int, default: int = 0) -> int:  # type: ignore[override]
            value = super().get(key, default)
            if not guest.ident:
                guest.start()
                guest.join(0.2)  # it can't have ended by then, as it has to wait for who looks here
            return value

    vcpu.msr_values = Values(vcpu.msr_values)
    steal_time.account(vcpu)
    guest.join()
    assert vcpu.steal_enabled
    assert vcpu.run_begins
    tiny.close()
