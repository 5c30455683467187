# SPDX-License-Identifier: Apache-2.0
"""Waiting: in HLT, awake and asleep, and on locks (PAUSE)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from tests.support.tiny import CODE, Tiny

from softkvm import _softcpu, abi
from softkvm.kvm import Params, halt_poll
from softkvm.kvm.state import BLOCKING
from softkvm.kvm.x86.svm import vmcb as V

MS = 1_000_000
HANDLER = 0x2000


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


class Halting:
    """A vCPU that halts again and again, woken by NMIs, on a thread of its own."""

    def __init__(self, params: Params) -> None:
        self.tiny = Tiny(irqchip=True, params=params).real_mode()
        self.vcpu = self.tiny.vcpu
        self.tiny.memory.write(4 * 2, HANDLER.to_bytes(4, "little"))
        self.tiny.memory.write(HANDLER, b"\xcf")  # iret
        self.tiny.load(b"\xf4\xeb\xfd")  # hlt; jmp to it
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with pytest.raises(InterruptedError):
            self.vcpu.run()

    def __enter__(self) -> Halting:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.vcpu.kick()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.tiny.close()

    def halted(self, times: int) -> None:
        until(lambda: self.stats()["halt_exits"] == times)

    def nmi(self) -> None:
        """Send an NMI as an MSI: KVM_NMI would wait for the end of KVM_RUN."""
        assert self.tiny.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=4 << 8)) == 1

    def stats(self) -> dict[str, int]:
        return self.vcpu.stats()


@pytest.fixture(autouse=True)
def two_host_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halt_poll, "_HOST_CPUS", 2)


def test_a_halted_vcpu_waits_awake_once_halts_have_been_short() -> None:
    second = 1000 * MS
    with Halting(Params(halt_poll_ns=60 * second, halt_poll_ns_grow_start=60 * second)) as guest:
        guest.halted(1)
        assert guest.stats()["halt_attempted_poll"] == 0, "the first halt has no past"
        guest.nmi()
        guest.halted(2)
        until(lambda: guest.vcpu.halt_polling)
        guest.nmi()
        guest.halted(3)
        stats = guest.stats()
        assert (stats["halt_attempted_poll"], stats["halt_successful_poll"]) == (1, 1)
        assert stats["halt_poll_success_ns"] > 0
        assert stats["halt_poll_fail_ns"] == 0
        until(lambda: guest.vcpu.halt_polling)  # the kick that ends this finds it so


def test_a_wait_that_was_in_vain_ends_asleep() -> None:
    with Halting(Params(halt_poll_ns=60_000 * MS, halt_poll_ns_grow_start=MS)) as guest:
        guest.halted(1)
        guest.nmi()
        guest.halted(2)
        until(lambda: guest.stats()["halt_poll_fail_ns"] >= MS)
        guest.nmi()
        guest.halted(3)
        assert guest.stats()["halt_successful_poll"] == 0
        assert guest.stats()["halt_wait_ns"] > 0
        # The third halt may have waited awake, too, by now.
        assert 1 <= sum(guest.vcpu.stat_halt_poll_fail_hist) <= guest.stats()["halt_attempted_poll"] <= 2
        assert sum(guest.vcpu.stat_halt_wait_hist) == 2
        assert sum(guest.vcpu.stat_halt_poll_success_hist) == 0


@pytest.mark.parametrize("limit", [0, None])
def test_without_a_limit_nobody_waits_awake(limit: int | None) -> None:
    params = Params(halt_poll_ns=60_000 * MS if limit == 0 else 0, halt_poll_ns_grow_start=MS)
    guest = Halting(params)
    if limit is not None:
        guest.tiny.vm.enable_cap(abi.KVM_CAP_HALT_POLL, limit)
    with guest:
        for halts in range(1, 4):
            guest.halted(halts)
            guest.nmi()
        assert guest.stats()["halt_attempted_poll"] == 0


@pytest.mark.parametrize(
    # virt/kvm/kvm_main.c, kvm_vcpu_halt: the poll is from the beginning to its end, sleep from there on, and what the
    # next poll is adapted to is both.
    ("clock", "reasons", "stats", "halt_ns"),
    [
        pytest.param([1007, 1025, 1032], [True], (1, 18, 0, 0), 25, id="woken while it polls"),
        pytest.param([1007, 11_007, 11_020, 21_111], [False, True], (0, 0, 10_013, 10_091), 20_104, id="woken asleep"),
    ],
)
def test_the_times_of_a_halt_add_up(
    monkeypatch: pytest.MonkeyPatch,
    clock: list[int],
    reasons: list[bool],
    stats: tuple[int, int, int, int],
    halt_ns: int,
) -> None:
    tiny = Tiny(params=Params(halt_poll_ns=10_000))
    adapted: list[int] = []
    monkeypatch.setattr("softkvm._softcpu.clock_ns", iter(clock).__next__)
    monkeypatch.setattr(type(tiny.vcpu), "arch_check_block", lambda _: reasons.pop(0))
    monkeypatch.setattr(halt_poll, "adapt", lambda _, ns: adapted.append(ns))
    tiny.vcpu.halt_poll_ns = 10_000
    tiny.vcpu.halt_and_wait()
    found = tiny.vcpu.stats()
    names = ("halt_successful_poll", "halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns")
    assert tuple(found[name] for name in names) == stats
    assert found["halt_attempted_poll"] == 1
    assert adapted == [halt_ns]
    monkeypatch.undo()
    tiny.close()


def test_the_wait_grows_and_shrinks_as_documented() -> None:
    # Documentation/virt/kvm/halt-polling.rst
    params = Params(halt_poll_ns=35_000, halt_poll_ns_grow=2, halt_poll_ns_grow_start=10_000, halt_poll_ns_shrink=2)
    tiny = Tiny(params=params)
    vcpu = tiny.vcpu
    waits = []
    for halt_ns in (30_000, 30_000, 35_000, 30_000, 20_000, 36_000, 36_000, 36_000):
        halt_poll.adapt(vcpu, halt_ns)
        waits.append(vcpu.halt_poll_ns)
    assert waits == [10_000, 20_000, 20_000, 35_000, 35_000, 17_500, 0, 0]
    params.halt_poll_ns_shrink = 0
    vcpu.halt_poll_ns = 35_000
    halt_poll.adapt(vcpu, 36_000)
    assert vcpu.halt_poll_ns == 0
    params.halt_poll_ns_grow = 0
    halt_poll.adapt(vcpu, 30_000)
    assert vcpu.halt_poll_ns == 0
    tiny.close()


def test_nobody_waits_awake_when_other_vcpus_want_the_hosts_processors() -> None:
    tiny = Tiny(params=Params(halt_poll_ns=10_000), vcpus=3)
    tiny.vcpu.halt_poll_ns = 10_000
    assert halt_poll.interval(tiny.vcpu) == 0  # two others outside of HLT, two processors
    tiny.vm.create_vcpu(3)
    tiny.close()


@pytest.mark.parametrize(
    ("params", "yielded_ns", "exits"),
    [
        # An exit comes after the count's PAUSEs with the next one, which is skipped (APM vol. 2, 15.14.4):
        # 101 + 201 + 401 + 801 + 1601 + 3201 + 6401 of 20000 are done when the 7th comes
        (Params(pause_filter_count=100), 0, 7),
        (Params(pause_filter_count=100, pause_filter_count_grow=0), 0, 20_000 // 101),
        # 101 + 151 + 151 + ...
        (Params(pause_filter_count=100, pause_filter_count_max=150), 0, 1 + (20_000 - 101) // 151),
        # a factor that is no less than the count is added: 101 + 201 + 301 + ... + 1901 of 20000
        (Params(pause_filter_count=100, pause_filter_count_grow=100), 0, 19),
        (Params(pause_filter_count=100, pause_filter_count_grow=1), 0, 20_000 // 101),
        # the host's processor is wanted: the lock's holder may be waiting for it
        (Params(pause_filter_count=100), 1_000_000, 20_000 // 101),
        # from one PAUSE to the next there are three instructions
        (Params(pause_filter_count=100, pause_filter_count_grow=0, pause_filter_thresh=3), 0, 20_000 // 101),
        (Params(pause_filter_count=100, pause_filter_count_grow=0, pause_filter_thresh=2), 0, 0),
        # kvm_amd's svm_vm_init(): without one of the two there is no intercept
        (Params(pause_filter_count=100, pause_filter_thresh=0), 0, 0),
        (Params(pause_filter_count=0), 0, 0),
    ],
)
def test_a_guest_that_spins_leaves_ever_more_rarely_unless_others_want_the_processor(
    monkeypatch: pytest.MonkeyPatch, params: Params, yielded_ns: int, exits: int
) -> None:
    monkeypatch.setattr("softkvm._softcpu.sched_yield", lambda: yielded_ns)
    tiny = Tiny(params=params).real_mode()
    tiny.load(b"\xf3\x90\x49\x75\xfb\xf4", rcx=20_000)  # pause; dec cx; jnz; hlt
    assert tiny.run_to_halt().rip == CODE + 6
    assert tiny.vcpu.exit_counts.get(V.EXIT_PAUSE, 0) == exits
    tiny.close()


def test_the_pause_filter_is_set_up_as_kvm_amd_does() -> None:
    # Linux, arch/x86/kvm/x86.h: KVM_DEFAULT_PLE_GAP, KVM_SVM_DEFAULT_PLE_WINDOW and its maximum, USHRT_MAX
    tiny = Tiny()
    assert (tiny.vcpu.w[V.PAUSE_FILTER_COUNT], tiny.vcpu.w[V.PAUSE_FILTER_THRESH]) == (3000, 128)
    assert tiny.vcpu.d[V.INTERCEPT_WORD3] & V.PAUSE
    params = tiny.vm.params
    assert (params.pause_filter_count_grow, params.pause_filter_count_shrink) == (2, 0)
    assert params.pause_filter_count_max == 0xFFFF
    tiny.close()


@pytest.mark.parametrize(
    ("shrink", "before", "after"), [(0, 900, 100), (1, 900, 900), (4, 900, 225), (4, 300, 100), (100, 900, 800)]
)
def test_the_pause_filter_shrinks_as_kvm_does(shrink: int, before: int, after: int) -> None:
    tiny = Tiny(params=Params(pause_filter_count=100, pause_filter_count_shrink=shrink))
    tiny.vcpu.w[V.PAUSE_FILTER_COUNT] = before
    tiny.vcpu.arch_slept()
    assert tiny.vcpu.w[V.PAUSE_FILTER_COUNT] == after
    tiny.close()


def test_pause_that_stays_in_the_guest_is_not_counted() -> None:
    tiny = Tiny(params=Params(pause_filter_count=100, pause_filter_thresh=0)).real_mode()
    tiny.vcpu.arch_slept()
    assert tiny.vcpu.w[V.PAUSE_FILTER_COUNT] == 0
    tiny.close()


@pytest.mark.parametrize("in_kvm_run", [False, True])
def test_a_kick_for_another_is_held_back_only_while_its_sender_is_in_kvm_run(in_kvm_run: bool) -> None:
    # Outside, as when userspace writes the ICR, nothing would send it.
    tiny = Tiny(irqchip=True, vcpus=2)
    sender, halted = tiny.vcpus
    halted.mode = BLOCKING
    sender.running = in_kvm_run
    halted.vcpu_kick(sender)
    assert halted.cpu.clear_kick() is not in_kvm_run
    _softcpu.Run(sender.cpu, lambda _vcpu, _told: None, sender).run()
    assert halted.cpu.clear_kick() is in_kvm_run
    tiny.close()
