# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers whose behaviour the device cannot be asked for."""

from __future__ import annotations

import sys
import threading

import pytest
from tests.support.tiny import DATA, Tiny

from softkvm import abi
from softkvm.kvm.x86.paravirt import kvmclock
from softkvm.kvm.x86.tsc import TscSynchronizer


def test_the_patch_level_is_in_the_lower_half_as_on_amds_processors() -> None:
    tiny = Tiny()
    tiny.protected_mode().load(b"\x0f\x32\xf4", rcx=0x8B)  # rdmsr; hlt
    regs = tiny.run_to_halt()
    assert (regs.rdx, regs.rax) == (0, 0x0100_0065)
    assert tiny.kvm.get_msrs([0x8B]) == [0x0100_0065]
    tiny.close()


def test_what_the_lfence_register_is_set_to_it_keeps() -> None:
    tiny = Tiny()
    de_cfg = 0xC001_1029
    assert tiny.vcpu.get_msrs([de_cfg]) == [2]
    assert tiny.vcpu.set_msrs({de_cfg: 0}) == 1
    assert tiny.vcpu.get_msrs([de_cfg]) == [0]
    assert tiny.vcpu.set_msrs({de_cfg: 4}) == 0
    tiny.close()


def test_steal_time_is_the_delay_of_the_vcpus_thread_whoever_restores_the_register(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = Tiny()
    asked: list[int] = []
    delay = kvmclock.run_delay_ns

    def run_delay_ns() -> int:
        asked.append(threading.get_ident())
        return delay()

    monkeypatch.setattr(kvmclock, "run_delay_ns", run_delay_ns)
    assert tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED}) == 1
    tiny.protected_mode().load(b"\xf4")
    thread = threading.Thread(target=tiny.run)
    thread.start()
    thread.join()
    assert set(asked) == {thread.ident}
    tiny.close()


def test_stolen_time_does_not_go_back_when_another_thread_runs_the_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny()
    delays = iter((1000, 1700, 300, 450))
    monkeypatch.setattr(kvmclock, "run_delay_ns", lambda: next(delays))
    tiny.vcpu.set_msrs({abi.MSR_KVM_STEAL_TIME: DATA | abi.KVM_MSR_ENABLED})
    seen = []
    for _ in range(4):
        kvmclock.record_steal_time(tiny.vcpu)
        seen.append(int.from_bytes(tiny.memory.read(DATA, 8), "little"))
    assert seen == [1000, 1700, 1700, 1850]
    tiny.close()


def test_counters_written_to_the_same_value_on_several_threads_agree() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            tsc = TscSynchronizer()
            offsets: list[int] = []
            barrier = threading.Barrier(4)

            def write(tsc: TscSynchronizer, barrier: threading.Barrier, offsets: list[int]) -> None:
                barrier.wait()
                offsets.append(tsc.write(5_000_000_000, 1_000_000))

            threads = [threading.Thread(target=write, args=(tsc, barrier, offsets)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(offsets)) == 1
    finally:
        sys.setswitchinterval(interval)
