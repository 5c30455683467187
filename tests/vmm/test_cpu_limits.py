# SPDX-License-Identifier: Apache-2.0
"""CPU time of whole machines: a limit in all, and a quota of each vCPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.support.machines import KVMS, open_soft

from softkvm import api
from softkvm.cputime import CpuTimer, Setting
from softkvm.vmm.cpu_limits import Bandwidth, CpuTimeLimit
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.outcome import End, Outcome

MS = 1_000_000
SPIN = b"\xeb\xfe"
IDLE = bytes.fromhex("fb f4 ebfc")  # sti; hlt; jmp


@contextmanager
def machine(kind: str, code: bytes, **config: Any) -> Iterator[Machine]:
    with KVMS[kind]() as kvm, Machine(kvm, Config(32 * MIB, **config)) as made:
        made.load(code, raw=True)
        yield made


@pytest.mark.parametrize("kind", sorted(KVMS))
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_limit_ends_the_machine_once_it_is_used_up(kind: str, vcpus: int) -> None:
    with machine(kind, SPIN, vcpus=vcpus, cpu_time_limit_s=0.2) as made:
        outcome = made.run(60)
        assert (outcome.end, str(outcome)) == (End.CPU_TIME, "CPU time limit: 0.2 s")
        stats = made.stats()["vcpus"]
        assert sum(vcpu["cpu_ns"] for vcpu in stats) >= 200 * MS
        assert sum(vcpu["cpu_time"]["total_ns"] for vcpu in stats) >= 200 * MS
        for vcpu in stats:
            total, guest = vcpu["cpu_time"].values()
            assert (guest is None) == (kind == "device")
            assert (guest or 0) <= total <= vcpu["cpu_ns"]
        assert kind == "device" or stats[0]["cpu_time"]["guest_ns"] > 0


def test_a_guest_that_idles_does_not_come_to_its_limit() -> None:
    with machine("soft", IDLE, cpu_time_limit_s=0.5) as made:
        assert made.run(1.5).end is End.TIMEOUT


@pytest.mark.parametrize("kind", sorted(KVMS))
def test_a_vcpu_gets_no_more_than_its_quota(kind: str) -> None:
    with machine(kind, SPIN, cpu_quota=10.0) as made:
        made.run(1.5)
        stats = made.stats()
        used, quota = stats["vcpus"][0]["cpu_ns"], stats["vcpus"][0]["cpu_quota"]
        assert used < stats["wall_ns"] / 2  # ten percent, and what a busy host lets a timer be late by
        assert quota["nr_throttled"] > 0
        assert quota["nr_periods"] >= 10
        assert 0 < quota["throttled_ns"] <= stats["wall_ns"]


def test_a_throttled_machine_ends_when_it_is_told_to_and_its_vcpus_stand() -> None:
    with machine("soft", SPIN, cpu_quota=1.0) as made:
        made.start()
        bandwidth = made.vcpus[0].bandwidth
        assert bandwidth is not None
        while not bandwidth.nr_throttled:
            time.sleep(0.001)
        with made.standstill.hold():
            assert made.standstill.wait(made.vcpus, 30)
        made.end(Outcome(End.STOPPED))
        assert made.wait(30).end is End.STOPPED


@pytest.mark.parametrize("name", ["cpu_time_limit_s", "cpu_quota"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True])
def test_limits_that_are_none_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Config(32 * MIB, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cpu_quota"):
        Config(32 * MIB, cpu_quota=101)


# --- the arithmetic, on clocks of the test's own ---------------------------------------------------------


class FakeClock:
    """CPU time that the test gives, and the timer on it."""

    def __init__(self) -> None:
        self.used = 0
        self.left = 0
        self.notify: Callable[[Any], None] = lambda _: None

    def total_ns(self) -> int:
        return self.used

    def create_timer(self, notify: Callable[[CpuTimer], None]) -> FakeClock:
        self.notify = notify
        return self

    def settime(self, value_ns: int) -> Setting:
        self.left = value_ns
        return Setting(0, 0)

    def run(self, ns: int) -> None:
        """Use CPU time; the timer is late if that is more than it was set to."""
        self.used += ns
        if ns >= self.left:
            self.notify(self)


class FakeVcpu:
    def __init__(self) -> None:
        self.cpu_clock = FakeClock()
        self.kicks = 0

    def kick(self) -> None:
        self.kicks += 1


def test_a_limit_is_for_all_vcpus_together() -> None:
    vcpus = [FakeVcpu() for _ in range(4)]
    passed: list[int] = []
    fakes: list[Any] = list(vcpus)
    CpuTimeLimit(fakes, 400 * MS, lambda: passed.append(1))
    first, second = vcpus[0].cpu_clock, vcpus[1].cpu_clock
    assert first.left == 100 * MS
    first.run(100 * MS)
    assert first.left == 75 * MS  # 300 ms for the four
    second.run(100 * MS)
    assert second.left == 50 * MS
    while not passed:
        first.run(first.left)
    assert 400 * MS <= first.used + second.used < 402 * MS


def test_what_was_used_above_the_quota_is_missing_in_the_next_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000 * MS]
    monkeypatch.setattr("softkvm.vmm.cpu_limits.time.monotonic_ns", lambda: now[0])
    vcpu: Any = FakeVcpu()
    clock = vcpu.cpu_clock
    bandwidth = Bandwidth(vcpu, 20 * MS, 100 * MS)
    bandwidth.start()
    assert clock.left == 20 * MS
    now[0] += 65 * MS
    clock.run(65 * MS)  # so late was the timer
    assert bandwidth.throttled and vcpu.kicks == 1

    stood: list[int] = []

    class Standstill:
        def stand(self, thread: object, until_ns: int) -> None:
            stood.append(until_ns)
            now[0] = until_ns

    class Thread:
        class machine:
            standstill = Standstill()

            class ended:
                is_set = staticmethod(lambda: False)

    thread: Any = Thread()
    bandwidth.wait(thread)
    # 45 ms of debt are two periods' quota and a quarter: in the third there are 15 ms.
    assert [until - 1_000_000 * MS for until in stood] == [100 * MS, 200 * MS, 300 * MS]
    assert (clock.left, bandwidth.throttled) == (15 * MS, False)
    assert bandwidth.as_dict() == {"nr_periods": 3, "nr_throttled": 1, "throttled_ns": 235 * MS}
    # Ten periods of idleness are no credit.
    now[0] += 1000 * MS
    clock.run(15 * MS)
    assert (clock.left, bandwidth.throttled, vcpu.kicks) == (20 * MS, False, 1)


def test_a_vcpu_is_asked_for_its_clock_only_where_there_is_a_limit() -> None:
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB)) as made:
        vcpu: api.Vcpu = made.vcpus[0].vcpu
        assert getattr(vcpu, "accounted", "none") is None
