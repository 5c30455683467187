# SPDX-License-Identifier: Apache-2.0
"""Signals and KVM_RUN (KVM API 4.10 KVM_RUN: "EINTR: an unmasked signal is pending"; 4.22 KVM_SET_SIGNAL_MASK)."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from tests.support.conformance import CODE, Guest, refused, watchdog

from softkvm import abi

ALIVE = 0x6000
SPIN = "fe060060 ebfe"  # inc byte [ALIVE]; jmp to itself
HALT = "fe060060 fb f4 ebfc"  # inc byte [ALIVE]; sti; hlt; jmp to the sti
NONE_BLOCKED = bytes(8)


def mask(*signals: int) -> bytes:
    """A signal set as the kernel has it: bit n - 1 for signal n."""
    return sum(1 << (number - 1) for number in signals).to_bytes(8, "little")


@contextmanager
def handler(number: int, function: Callable[[], object]) -> Iterator[list[int]]:
    """Install a handler that notes the signals it gets and calls *function*."""
    seen: list[int] = []

    def handle(got: int, _: object) -> None:
        seen.append(got)
        function()

    before = signal.signal(number, handle)
    try:
        yield seen
    finally:
        signal.signal(number, before)


@contextmanager
def once_running(guest: Guest, function: Callable[[], object]) -> Iterator[None]:
    """Call *function* on another thread when the guest has started."""
    guest.write(ALIVE, b"\0")
    over = threading.Event()

    def wait() -> None:
        while not guest.word(ALIVE, 1):
            if over.wait(0.001):
                return
        if not over.wait(0.02):
            function()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def to_the_process(number: int) -> Callable[[], None]:
    """Return what sends a signal to the process."""
    return partial(os.kill, os.getpid(), number)


def to_this_thread(number: int) -> Callable[[], None]:
    """Return what sends a signal to the thread that has called this."""
    return partial(signal.pthread_kill, threading.get_ident(), number)


@contextmanager
def blocked(number: int) -> Iterator[None]:
    """Block a signal on this thread; what pends at the end is dropped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        while signal.sigtimedwait([number], 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interrupted(guest: Guest) -> None:
    """KVM_RUN that ends with EINTR, and not because the test has lost its patience."""
    with watchdog(guest.cpu, 20) as barked, pytest.raises(InterruptedError) as caught:
        guest.cpu.run()
    assert not barked.is_set()
    assert caught.value.errno == errno.EINTR
    assert caught.value.__context__ is None
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_INTR


@pytest.mark.parametrize("code", [SPIN, HALT])
def test_a_signal_ends_kvm_run_and_its_handler_has_run_then(make: Callable[..., Guest], code: str) -> None:
    guest = make(irqchip=code == HALT)
    guest.real(code)
    with handler(signal.SIGUSR2, lambda: None) as seen, once_running(guest, to_the_process(signal.SIGUSR2)):
        interrupted(guest)
        assert seen == [signal.SIGUSR2]


@pytest.mark.parametrize("code", [SPIN, HALT])
def test_what_a_handler_raises_comes_out_of_kvm_run(make: Callable[..., Guest], code: str) -> None:
    guest = make(irqchip=code == HALT)
    guest.real(code)
    with (
        handler(signal.SIGINT, _interrupt),
        watchdog(guest.cpu, 20),
        once_running(guest, to_the_process(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        guest.cpu.run()
    guest.cpu.kick()
    with pytest.raises(InterruptedError):  # the vCPU is as good as before
        guest.cpu.run()
    assert CODE + 4 <= guest.cpu.get_regs().rip < CODE + 8


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("code", [SPIN, HALT])
def test_a_signal_ends_kvm_run_on_the_thread_that_it_is_sent_to(make: Callable[..., Guest], code: str) -> None:
    guest = make(irqchip=code == HALT)
    guest.real(code)
    ended: list[int | None] = []

    def run() -> None:
        try:
            guest.cpu.run()
            ended.append(0)
        except OSError as error:
            ended.append(error.errno)

    with handler(signal.SIGUSR1, lambda: None) as seen:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            end = time.monotonic() + 20
            # Again and again: it may come before KVM_RUN has begun.
            while thread.is_alive() and time.monotonic() < end:
                assert thread.ident is not None
                signal.pthread_kill(thread.ident, signal.SIGUSR1)
                thread.join(0.01)
            assert not thread.is_alive()
        finally:
            guest.cpu.kick()
            thread.join()
        assert seen
    assert ended == [errno.EINTR]


def test_a_signal_that_is_handled_before_kvm_run_does_not_end_it(guest: Guest) -> None:
    guest.real("f4")
    with handler(signal.SIGUSR1, lambda: None) as seen:
        signal.raise_signal(signal.SIGUSR1)
        guest.expect(abi.KVM_EXIT_HLT)
    assert seen == [signal.SIGUSR1]


@pytest.mark.parametrize("when", ["before", "while the guest runs", "while it halts"])
def test_a_signal_that_only_kvm_run_unblocks_ends_it_and_stays_pending(make: Callable[..., Guest], when: str) -> None:
    # 4.22: "the signal will only be delivered if not blocked by the original signal mask". It has no handler here: it
    # would end the process.
    guest = make(irqchip=when == "while it halts")
    guest.real(HALT if when == "while it halts" else SPIN)
    guest.cpu.set_signal_mask(NONE_BLOCKED)
    with blocked(signal.SIGUSR1):
        send = to_this_thread(signal.SIGUSR1)
        if when == "before":
            send()
            interrupted(guest)
        else:
            with once_running(guest, send):
                interrupted(guest)
        assert signal.sigpending() == {signal.SIGUSR1}
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        interrupted(guest)  # and again, as long as it pends
        info = signal.sigtimedwait([signal.SIGUSR1], 0)
        assert info is not None
        assert (info.si_signo, info.si_pid) == (signal.SIGUSR1, os.getpid())
        guest.real("f4")
        if when != "while it halts":
            guest.expect(abi.KVM_EXIT_HLT)


def test_a_signal_that_kvm_run_blocks_waits_for_its_end(guest: Guest) -> None:
    guest.real(SPIN)
    guest.cpu.set_signal_mask(mask(signal.SIGUSR2, signal.SIGKILL, signal.SIGSTOP))
    with handler(signal.SIGUSR2, lambda: None) as seen:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        counts: list[int] = []
        send = to_this_thread(signal.SIGUSR2)  # another might take what is for the process

        def send_then_kick() -> None:
            send()
            time.sleep(0.1)
            counts.append(len(seen))
            guest.cpu.kick()

        with once_running(guest, send_then_kick):
            interrupted(guest)
        assert counts == [0]
        assert seen == [signal.SIGUSR2]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    guest.cpu.set_signal_mask(None)
    guest.real(SPIN)
    with handler(signal.SIGUSR2, lambda: None) as seen, once_running(guest, to_the_process(signal.SIGUSR2)):
        interrupted(guest)
        assert seen == [signal.SIGUSR2]


def test_a_signal_set_has_the_kernels_size(guest: Guest) -> None:
    for size in (0, 4, 7, 9, 128):
        refused(errno.EINVAL, partial(guest.cpu.set_signal_mask, bytes(size)))
