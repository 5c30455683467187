# SPDX-License-Identifier: Apache-2.0
"""``vcpu->mutex``: one thread at a time is in a vCPU's requests (``kvm_vcpu_ioctl``)."""

from __future__ import annotations

import errno
import inspect
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest
from tests.support.threads import beside, running, until
from tests.support.tiny import CODE, Tiny

from softkvm import abi
from softkvm.kvm.state import IN_GUEST_MODE

SPIN = b"\xeb\xfe"
OUTS = b"\xee\xeb\xfd"  # out dx, al; jmp to it


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True).real_mode()
    yield machine
    machine.close()


def test_another_threads_request_waits_for_the_end_of_kvm_run(tiny: Tiny) -> None:
    def change() -> None:
        about.set()
        tiny.registers(rip=CODE, rax=2)

    def look() -> None:
        other.start()
        assert about.wait(20)
        time.sleep(0.05)  # if it doesn't wait it has done it now
        seen.append(tiny.vcpu.get_regs().rax)
        tiny.vcpu.kick()

    about, seen = threading.Event(), list[int]()
    other = threading.Thread(target=change)
    tiny.load(SPIN, rax=1)
    tiny.vcpu.call_soon(look)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    other.join(20)
    assert seen == [1]
    assert tiny.vcpu.get_regs().rax == 2


def test_a_second_kvm_run_waits_for_the_first(tiny: Tiny) -> None:
    tiny.load(SPIN)
    with running(tiny.vcpu) as first:
        until(lambda: tiny.vcpu.mode == IN_GUEST_MODE)
        with running(tiny.vcpu) as second:
            tiny.vcpu.kick()
            assert isinstance(first.wait(), InterruptedError)
            until(lambda: tiny.vcpu.mode == IN_GUEST_MODE)
            tiny.vcpu.kick()
            assert isinstance(second.wait(), InterruptedError)


def test_kvm_run_in_the_middle_of_a_request_of_the_same_thread_is_refused(tiny: Tiny) -> None:
    # A mutex that its owner waits for would be waited for ever.
    codes = []

    def run() -> None:
        with pytest.raises(OSError) as caught:
            tiny.vcpu.run()
        codes.append(caught.value.errno)
        tiny.vcpu.kick()

    tiny.load(SPIN)
    tiny.vcpu.call_soon(run)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert codes == [errno.EBUSY]


def test_a_request_gets_its_turn_beside_a_loop_of_kvm_run(tiny: Tiny) -> None:
    over = threading.Event()

    def loop() -> None:
        while not over.is_set():
            tiny.vcpu.run()

    tiny.load(OUTS, rdx=0x3FF)
    with beside(threading.Thread(target=loop)):
        try:
            for _ in range(200):
                assert tiny.vcpu.get_regs().rip in (CODE, CODE + 1)
        finally:
            over.set()


def test_registers_set_by_many_threads_at_once_are_one_threads(tiny: Tiny) -> None:
    def change(value: int) -> None:
        regs = tiny.vcpu.get_regs()
        regs.rax = regs.rbx = regs.rsi = regs.r15 = value
        for _ in range(200):
            tiny.vcpu.set_regs(regs)
            now = tiny.vcpu.get_regs()
            if not now.rax == now.rbx == now.rsi == now.r15:
                torn.append(now)

    torn: list[abi.kvm_regs] = []
    with beside(*(threading.Thread(target=change, args=(n,)) for n in range(1, 4))):
        pass
    assert not torn


class GivenUp(Exception):
    """What a signal's handler raises."""


def give_up(*_: object) -> NoReturn:
    raise GivenUp


def test_a_handler_of_a_signal_may_end_the_wait(tiny: Tiny) -> None:
    before = signal.signal(signal.SIGUSR1, give_up)
    tiny.load(SPIN)
    try:
        with running(tiny.vcpu) as other:
            until(lambda: tiny.vcpu.mode == IN_GUEST_MODE)
            for request in (tiny.vcpu.get_regs, tiny.vcpu.run):
                soon = threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
                with pytest.raises(GivenUp):
                    soon.start()
                    request()
                soon.join()
            assert other.thread.is_alive()
            tiny.vcpu.kick()
            assert isinstance(other.wait(), InterruptedError)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert tiny.vcpu.get_regs().rip == CODE  # nobody has the mutex


def test_what_has_waited_for_a_closed_vcpu_is_done(tiny: Tiny) -> None:
    # The kernel's request has a reference of its own to the file.
    def change() -> None:
        set_regs(abi.kvm_regs(rip=CODE, rflags=2))
        done.append(1)

    def close() -> None:
        other.start()
        time.sleep(0.05)  # it is there, or not yet: both is well
        tiny.vcpu.close()
        tiny.vcpu.kick()

    done: list[int] = []
    set_regs = tiny.vcpu.set_regs
    other = threading.Thread(target=change)
    tiny.load(SPIN)
    tiny.vcpu.call_soon(close)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    other.join(20)
    assert done == [1]
    with pytest.raises(OSError) as caught:
        tiny.vcpu.get_regs()
    assert caught.value.errno == errno.EBADF


class Taken(Exception):
    """The mutex was asked for."""


class Mutex:
    """In the place of the processor, which has the mutex."""

    def request(self, *_: object) -> NoReturn:
        raise Taken


def test_every_request_takes_the_mutex_and_looks_as_it_was_written(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.vcpu, "cpu", Mutex())
    methods = [getattr(tiny.vcpu, abi.method_name(name), None) for name in abi.requests_of(abi.File.VCPU)]
    found = [method for method in methods if method is not None and method.__name__ != "run"]
    assert len(found) > 30
    for method in found:
        parameters = inspect.signature(method).parameters.values()
        assert method.__doc__ and method.__doc__.startswith(f"KVM_{method.__name__.upper()}")
        assert inspect.unwrap(method.__func__).__qualname__ == method.__qualname__
        with pytest.raises(Taken):
            method(*[0 for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD])
    monkeypatch.undo()
