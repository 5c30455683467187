# SPDX-License-Identifier: Apache-2.0
"""Requests to a vCPU: each is acted on, by a vCPU that runs and by one that halts, and none takes another with it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.tiny import CODE, DATA, PAGE_TABLES, Tiny

from softkvm import abi
from softkvm.kvm import requests as general
from softkvm.kvm.memfd import sealed_memfd
from softkvm.kvm.memory.dirty_ring import RING_OFFSET, DirtyRing
from softkvm.kvm.x86 import requests
from softkvm.kvm.x86.hyperv.vp import vp_of
from softkvm.kvm.x86.mmu.root_tdp import INVALID_PAGE
from softkvm.kvm.x86.paravirt import steal_time

HANDLER = CODE + 0x100
_KVM_REQ: dict[str, int] = {
    name: bit for module in (general, requests) for name, bit in vars(module).items() if name.startswith("KVM_REQ_")
}
#: A page that the guest reads after the request, and where it is moved to by then.
_WINDOW, _OLD, _NEW = 0x60_0000, 0x1_0000, 0x1_1000
_CLOCK, _STEAL = DATA + 0x2000, DATA + 0x3000
_SECOND_NS = 1_000_000_000


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """A 64-bit guest that says 1 at port 0x10, reads the window, says that at port 0x11 and halts."""
    machine = Tiny(8 << 20, irqchip=True).long_mode()
    machine.memory.write(PAGE_TABLES + 0x2000 + 8 * (_WINDOW >> 21), struct.pack("<Q", PAGE_TABLES + 0x3000 | 7))
    machine.memory.write(PAGE_TABLES + 0x3000, struct.pack("<Q", _OLD | 7))
    machine.memory.write(_OLD, b"\xaa")
    machine.memory.write(_NEW, b"\xbb")
    machine.memory.write(HANDLER, b"\xe6\xe9\xf4")  # out 0xe9, al; hlt
    for vector in (2, 0x40):
        machine.gate64(vector, HANDLER)
    # mov al, [window]; out 0x10, al; mov al, [window]; out 0x11, al; hlt; jmp back to it
    machine.load(bytes.fromhex("8a0425 00006000 e610 8a0425 00006000 e611 f4 ebfd"), rflags=0x202)
    clock = {abi.MSR_KVM_SYSTEM_TIME_NEW: _CLOCK | abi.KVM_MSR_ENABLED}
    machine.vcpu.set_msrs({**clock, abi.MSR_KVM_STEAL_TIME: _STEAL | abi.KVM_MSR_ENABLED})
    delays = iter(range(_SECOND_NS, 100 * _SECOND_NS, _SECOND_NS))
    monkeypatch.setattr(steal_time, "run_delay_ns", lambda: next(delays))
    monkeypatch.setattr(steal_time, "check", lambda vcpu: None)
    assert _port(machine) == 0x10
    yield machine
    machine.close()


def _run(tiny: Tiny) -> int:
    """KVM_RUN; returns the exit reason. A guest that halts for good has not got what it waits for."""
    with watchdog(tiny.vcpu, 20) as barked:
        try:
            return tiny.run()
        except InterruptedError:
            assert not barked.is_set(), "nothing happens"
            raise


def _port(tiny: Tiny) -> int:
    """Run to the next OUT; returns its port, -1 when it is another exit."""
    return tiny.vcpu.kvm_run.io.port if _run(tiny) == abi.KVM_EXIT_IO else -1


def _al(tiny: Tiny) -> int:
    return tiny.vcpu.get_regs().rax & 0xFF


def _refused(tiny: Tiny, number: int) -> None:
    with pytest.raises(OSError) as caught:
        _run(tiny)
    assert caught.value.errno == number


class _Case:
    """How a request comes about, and what shows that it was acted on."""

    def __init__(self, ask: Callable[[Tiny], object], check: Callable[[Tiny], None]) -> None:
        self.ask = ask
        self.check = check


def _move_window(tiny: Tiny) -> None:
    tiny.memory.write(PAGE_TABLES + 0x3000, struct.pack("<Q", _NEW | 7))
    tiny.vm.make_all_cpus_request(general.KVM_REQ_TLB_FLUSH)


def _window_is_new(tiny: Tiny) -> None:
    assert (_port(tiny), _al(tiny)) == (0x11, 0xBB)


def _clock_ns(tiny: Tiny) -> int:
    return abi.pvclock_vcpu_time_info.from_buffer_copy(tiny.memory.read(_CLOCK, 32)).system_time


def _clock_is_set(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert 1000 * _SECOND_NS <= _clock_ns(tiny) < 2000 * _SECOND_NS


def _stolen_ns(tiny: Tiny) -> int:
    return int.from_bytes(tiny.memory.read(_STEAL, 8), "little")


def _steal_has_grown(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert _stolen_ns(tiny) == 2 * _SECOND_NS  # one by the fixture


def _handler_runs(tiny: Tiny) -> None:
    assert _port(tiny) == 0xE9


def _shuts_down(tiny: Tiny) -> None:
    assert _run(tiny) == abi.KVM_EXIT_SHUTDOWN


def _dies(tiny: Tiny) -> None:
    _refused(tiny, errno.EIO)
    _refused(tiny, errno.EIO)


def _is_interrupted_once(tiny: Tiny) -> None:
    _refused(tiny, errno.EINTR)
    assert _port(tiny) == 0x11


_done: list[int] = []


def _work_is_done(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert _done == [1]
    _done.clear()


def _enable_apic(tiny: Tiny) -> None:
    lapic = tiny.vcpu.get_lapic()
    lapic.regs[0xF0:0xF2] = [0xFF, 1]  # SPIV: enabled
    tiny.vcpu.set_lapic(lapic)
    tiny.vcpu.take_request(requests.KVM_REQ_EVENT)


def _interrupt(tiny: Tiny) -> None:
    _enable_apic(tiny)
    tiny.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x40))


def _eoi(tiny: Tiny) -> None:
    tiny.vcpu.pending_ioapic_eoi = 0x51
    tiny.vcpu.make_request(requests.KVM_REQ_IOAPIC_EOI_EXIT)


def _eoi_is_userspaces(tiny: Tiny) -> None:
    assert _run(tiny) == abi.KVM_EXIT_IOAPIC_EOI
    assert tiny.vcpu.kvm_run.eoi.vector == 0x51
    assert _port(tiny) == 0x11


def _access_tpr(tiny: Tiny) -> None:
    """As an instruction's access does; userspace's of the x2APIC register, too."""
    assert tiny.vcpu.apic is not None
    tiny.vcpu.tpr_access_reporting(1)
    tiny.vcpu.apic.mmio_read(0x80, 4)


def _access_is_reported(tiny: Tiny) -> None:
    assert _run(tiny) == abi.KVM_EXIT_TPR_ACCESS
    assert _port(tiny) == 0x11


def _expire_stimer(tiny: Tiny) -> None:
    """A synthetic timer whose time has passed, by an interrupt of its own; its registers are restored by userspace."""
    _enable_apic(tiny)
    tiny.vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC2, 0)
    config = abi.HV_STIMER_ENABLE | abi.HV_STIMER_DIRECT_MODE | 0x40 << abi.HV_STIMER_APIC_VECTOR_SHIFT
    count, control = abi.HV_X64_MSR_STIMER0_COUNT, abi.HV_X64_MSR_STIMER0_CONFIG
    assert tiny.vcpu.set_msrs({count: 1, control: config}) == 2


def _ask_userspace(request: int) -> Callable[[Tiny], object]:
    def ask(tiny: Tiny) -> None:
        vp_of(tiny.vcpu).exit = abi.kvm_hyperv_exit(type=abi.KVM_EXIT_HYPERV_SYNIC)
        tiny.vcpu.make_request(request)

    return ask


def _leaves_for(name: str) -> Callable[[Tiny], None]:
    def check(tiny: Tiny) -> None:
        assert _run(tiny) == _HYPERV_EXITS[name]
        assert _port(tiny) == 0x11

    return check


_HYPERV_EXITS = {
    "KVM_REQ_HV_EXIT": abi.KVM_EXIT_HYPERV,
    "KVM_REQ_HV_CRASH": abi.KVM_EXIT_SYSTEM_EVENT,
    "KVM_REQ_HV_RESET": abi.KVM_EXIT_SYSTEM_EVENT,
}


def _fill_ring(tiny: Tiny) -> None:
    """The vCPU gets a ring of dirty pages, and writes until it is nearly full."""
    fd = sealed_memfd("ring", RING_OFFSET + 4096)
    vcpu = tiny.vcpu
    vcpu.dirty_ring = DirtyRing(fd, 4096)
    os.close(fd)
    while not vcpu.dirty_ring.soft_full():
        vcpu.dirty_ring.push(0, 1)
    vcpu.make_request(general.KVM_REQ_DIRTY_RING_SOFT_FULL)


def _ring_is_full_until_it_is_reset(tiny: Tiny) -> None:
    for _ in range(2):
        assert _run(tiny) == abi.KVM_EXIT_DIRTY_RING_FULL
    _reset_ring(tiny)
    assert _port(tiny) == 0x11
    assert not tiny.vcpu.requests & general.KVM_REQ_DIRTY_RING_SOFT_FULL


def _reset_ring(tiny: Tiny) -> None:
    ring = tiny.vcpu.dirty_ring
    assert ring is not None
    entries = memoryview(ring._mapping).cast("I")
    for at in range(0, len(entries), 4):
        entries[at] |= abi.KVM_DIRTY_GFN_F_RESET
    assert len(ring.take_collected()) == 192


def _lose_root(tiny: Tiny) -> None:
    tiny.vcpu.load_root_tdp(INVALID_PAGE)
    tiny.vcpu.make_request(requests.KVM_REQ_LOAD_MMU_PGD)


def _has_root(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert tiny.vcpu.root_tdp == tiny.vm.mmu.root_address


def _halt_for_page(tiny: Tiny) -> None:
    """A page has come, so that the halt ends at once."""
    tiny.vcpu.apf.wake_all(lambda: None)
    tiny.vcpu.make_request(requests.KVM_REQ_APF_HALT)


def _page_has_come(tiny: Tiny) -> None:
    tiny.vcpu.apf.wake_all(lambda: tiny.vcpu.make_request(requests.KVM_REQ_APF_READY))


def _port_is_next(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert not tiny.vcpu.apf.halted


def _nothing_is_waited_for(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert tiny.vcpu.apf.queued == 0


def _change_counter(tiny: Tiny) -> None:
    """The counter's event is no longer what its register says."""
    pmu = tiny.vcpu.pmu
    pmu.gp[0].eventsel = 0x42_00C0  # instructions of the kernel's
    pmu.request_reprogram(1)


def _counter_counts(tiny: Tiny) -> None:
    assert _port(tiny) == 0x11
    assert tiny.vcpu.pmu.gp[0].read() > 0


_CASES = {
    "KVM_REQ_APF_HALT": _Case(_halt_for_page, _port_is_next),
    "KVM_REQ_APF_READY": _Case(_page_has_come, _nothing_is_waited_for),
    "KVM_REQ_DIRTY_RING_SOFT_FULL": _Case(_fill_ring, _ring_is_full_until_it_is_reset),
    "KVM_REQ_PMU": _Case(_change_counter, _counter_counts),
    "KVM_REQ_LOAD_MMU_PGD": _Case(_lose_root, _has_root),
    "KVM_REQ_TLB_FLUSH": _Case(_move_window, _window_is_new),
    "KVM_REQ_VM_DEAD": _Case(lambda tiny: tiny.vcpu.make_request(general.KVM_REQ_VM_DEAD), _dies),
    "KVM_REQ_TRIPLE_FAULT": _Case(lambda tiny: tiny.vcpu.make_request(requests.KVM_REQ_TRIPLE_FAULT), _shuts_down),
    "KVM_REQ_EVENT": _Case(_interrupt, _handler_runs),
    "KVM_REQ_CLOCK_UPDATE": _Case(
        lambda tiny: tiny.vm.set_clock(abi.kvm_clock_data(clock=1000 * _SECOND_NS)), _clock_is_set
    ),
    "KVM_REQ_STEAL_UPDATE": _Case(lambda tiny: tiny.vcpu.make_request(requests.KVM_REQ_STEAL_UPDATE), _steal_has_grown),
    "KVM_REQ_NMI": _Case(lambda tiny: tiny.vcpu.nmi(), _handler_runs),
    "KVM_REQ_SIGNAL": _Case(lambda tiny: tiny.vcpu.kick(), _is_interrupted_once),
    "KVM_REQ_TASK_WORK": _Case(lambda tiny: tiny.vcpu.call_soon(lambda: _done.append(1)), _work_is_done),
    "KVM_REQ_IOAPIC_EOI_EXIT": _Case(_eoi, _eoi_is_userspaces),
    "KVM_REQ_REPORT_TPR_ACCESS": _Case(_access_tpr, _access_is_reported),
    "KVM_REQ_HV_STIMER": _Case(_expire_stimer, _handler_runs),
    **{name: _Case(_ask_userspace(_KVM_REQ[name]), _leaves_for(name)) for name in _HYPERV_EXITS},
}


def test_every_request_has_a_case() -> None:
    assert _CASES.keys() == _KVM_REQ.keys()


@pytest.mark.parametrize("name", _CASES)
def test_a_request_is_acted_on(tiny: Tiny, name: str) -> None:
    _CASES[name].ask(tiny)
    if name == "KVM_REQ_SIGNAL":
        assert tiny.vcpu.cpu.interrupted  # the vCPU's thread makes the request of it
    else:
        assert tiny.vcpu.requests & _KVM_REQ[name]
    _CASES[name].check(tiny)


@pytest.mark.parametrize("name", _CASES.keys() - {"KVM_REQ_SIGNAL", "KVM_REQ_VM_DEAD"})  # the dead say that alone
def test_a_kick_takes_no_other_request_with_it(tiny: Tiny, name: str) -> None:
    _CASES[name].ask(tiny)
    tiny.vcpu.kick()
    _refused(tiny, errno.EINTR)
    _CASES[name].check(tiny)


_ENDS = {"KVM_REQ_TRIPLE_FAULT", "KVM_REQ_SIGNAL", "KVM_REQ_VM_DEAD", "KVM_REQ_DIRTY_RING_SOFT_FULL"}


@pytest.mark.parametrize("name", _CASES.keys() - _ENDS - {"KVM_REQ_REPORT_TPR_ACCESS"})
def test_an_exit_for_userspace_takes_no_other_request_with_it(tiny: Tiny, name: str) -> None:
    _CASES[name].ask(tiny)
    tiny.vcpu.make_request(requests.KVM_REQ_TRIPLE_FAULT)
    _shuts_down(tiny)
    _CASES[name].check(tiny)


def test_a_full_ring_goes_first_and_takes_no_other_request_with_it(tiny: Tiny) -> None:
    _fill_ring(tiny)
    tiny.vcpu.make_request(requests.KVM_REQ_TRIPLE_FAULT)
    assert _run(tiny) == abi.KVM_EXIT_DIRTY_RING_FULL
    _reset_ring(tiny)
    _shuts_down(tiny)


@pytest.mark.parametrize("name", (_CASES.keys() - _ENDS - {"KVM_REQ_REPORT_TPR_ACCESS"}) | {"KVM_REQ_TRIPLE_FAULT"})
def test_a_report_of_a_tpr_access_takes_no_other_request_with_it(tiny: Tiny, name: str) -> None:
    _CASES[name].ask(tiny)
    _access_tpr(tiny)
    assert _run(tiny) == abi.KVM_EXIT_TPR_ACCESS
    _CASES[name].check(tiny)


@pytest.mark.parametrize("name", _CASES.keys() - {"KVM_REQ_EVENT", "KVM_REQ_NMI"})
def test_a_request_that_ends_no_halt_is_not_lost_by_one(tiny: Tiny, name: str) -> None:
    """The vCPU halts, the request comes, an NMI ends the halt: the request is, or has been, acted on."""
    vcpu = tiny.vcpu
    mp_state = vcpu.get_mp_state()
    mp_state.mp_state = abi.KVM_MP_STATE_HALTED
    vcpu.set_mp_state(mp_state)
    _CASES[name].ask(tiny)
    vcpu.call_soon(vcpu.nmi)  # when the halt has begun
    if name == "KVM_REQ_SIGNAL":
        _refused(tiny, errno.EINTR)
    elif name == "KVM_REQ_VM_DEAD":
        _dies(tiny)
        return
    elif name == "KVM_REQ_TRIPLE_FAULT":
        _shuts_down(tiny)
    elif name == "KVM_REQ_DIRTY_RING_SOFT_FULL":
        assert _run(tiny) == abi.KVM_EXIT_DIRTY_RING_FULL
        _reset_ring(tiny)
    elif name == "KVM_REQ_IOAPIC_EOI_EXIT":
        assert _run(tiny) == abi.KVM_EXIT_IOAPIC_EOI
    elif name == "KVM_REQ_REPORT_TPR_ACCESS":
        assert _run(tiny) == abi.KVM_EXIT_TPR_ACCESS
    elif name in _HYPERV_EXITS:
        assert _run(tiny) == _HYPERV_EXITS[name]
    _handler_runs(tiny)
    if name == "KVM_REQ_CLOCK_UPDATE":
        assert 1000 * _SECOND_NS <= _clock_ns(tiny) < 2000 * _SECOND_NS
    elif name == "KVM_REQ_STEAL_UPDATE":
        assert _stolen_ns(tiny) == 2 * _SECOND_NS
    elif name == "KVM_REQ_TLB_FLUSH":
        tiny.memory.write(HANDLER, bytes.fromhex("e6e9 8a0425 00006000 e612 f4"))
        tiny.vm.machine.notify_write(tiny.memory.address + HANDLER, 16)
        assert (_port(tiny), _al(tiny)) == (0x12, 0xBB)
    elif name == "KVM_REQ_TASK_WORK":
        assert _done == [1]
        _done.clear()


def test_a_request_that_waits_for_a_halted_vcpu_leaves_it_asleep(tiny: Tiny) -> None:
    vcpu = tiny.vcpu
    mp_state = vcpu.get_mp_state()
    mp_state.mp_state = abi.KVM_MP_STATE_HALTED
    vcpu.set_mp_state(mp_state)
    for name in (
        "KVM_REQ_TRIPLE_FAULT",
        "KVM_REQ_IOAPIC_EOI_EXIT",
        "KVM_REQ_EVENT",
        "KVM_REQ_DIRTY_RING_SOFT_FULL",
    ):
        vcpu.make_request(_KVM_REQ[name])
    assert not vcpu.arch_check_block()


@pytest.mark.parametrize("name", ["KVM_REQ_TLB_FLUSH", "KVM_REQ_CLOCK_UPDATE", "KVM_REQ_STEAL_UPDATE"])
def test_what_is_served_in_a_halt_is_done_and_takes_no_other_request_with_it(tiny: Tiny, name: str) -> None:
    vcpu = tiny.vcpu
    vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_HALTED))
    _CASES[name].ask(tiny)
    waiting = _KVM_REQ["KVM_REQ_TRIPLE_FAULT"] | _KVM_REQ["KVM_REQ_IOAPIC_EOI_EXIT"] | _KVM_REQ["KVM_REQ_EVENT"]
    vcpu.make_request(waiting)
    vcpu.arch_block()
    assert (vcpu.mp_state, vcpu.requests) == (abi.KVM_MP_STATE_HALTED, waiting)
    vcpu.take_request(waiting)
    vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
    _CASES[name].check(tiny)
