# SPDX-License-Identifier: Apache-2.0
"""How signals get along with KVM_RUN when it is code of the process: never in the middle, never lost, nobody else's."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from tests.support.timeouts import OWN_ALARM
from tests.support.tiny import Tiny

from softkvm import abi
from softkvm.kvm import vcpu as general

SPIN = b"\xeb\xfe"


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True).real_mode()
    yield machine
    machine.close()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back the handlers that tests change."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, old in zip(numbers, before, strict=True):
        signal.signal(number, old)


def spin(tiny: Tiny) -> None:
    """KVM_RUN with an endless loop: EINTR."""
    tiny.load(SPIN)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()


def test_a_handler_waits_for_the_end_of_kvm_run(tiny: Tiny) -> None:
    seen: list[int] = []
    at_work: list[list[int]] = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))

    def work() -> None:
        for _ in range(3):  # as if it came while it pends
            signal.raise_signal(signal.SIGUSR1)
        at_work.append(list(seen))

    tiny.vcpu.call_soon(work)
    spin(tiny)
    assert (at_work, seen) == ([[]], [signal.SIGUSR1])


NAME = "test_handlers_in_a_storm_of_signals_never_run_in_the_middle_of_an_exit"
HERE = (NAME, f"{NAME}.<locals>.handle")  # the next signal may interrupt the handler


@contextlib.contextmanager
def signals_by_a_timer() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def signals_that_another_thread_catches() -> Iterator[None]:
    """The interpreter's handler runs there, and Python's on the main thread."""
    done = threading.Event()

    def storm() -> None:
        while not done.wait(0.002):
            signal.pthread_kill(threading.get_ident(), signal.SIGALRM)

    thread = threading.Thread(target=storm)
    thread.start()
    yield
    done.set()
    thread.join()


@OWN_ALARM
@pytest.mark.parametrize("storm", [signals_by_a_timer, signals_that_another_thread_catches])
def test_handlers_in_a_storm_of_signals_never_run_in_the_middle_of_an_exit(
    tiny: Tiny, storm: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    class Storm(Exception):
        pass

    places: set[str] = set()
    inside = False

    def handle(_: int, frame: FrameType | None) -> None:
        assert frame is not None
        if inside:
            places.add(frame.f_code.co_qualname)
            raise Storm

    # Port 0x21 is the PIC's mask: each OUT is an exit that KVM handles in Python.
    tiny.load(bytes.fromhex("b9a00f 31c0 e621 40 49 75fa f4"), rax=0)  # mov cx, 4000; xor ax, ax; out; inc ax; ...
    before = signal.signal(signal.SIGALRM, handle)
    storms = 0
    try:
        with storm():
            while tiny.vcpu.mp_state != abi.KVM_MP_STATE_HALTED:
                try:
                    inside = True
                    tiny.vcpu.run()
                except Storm:
                    storms += 1
                except InterruptedError:
                    pass
                finally:
                    inside = False
    finally:
        signal.signal(signal.SIGALRM, before)
    assert storms
    assert places <= {general.Vcpu.run.__qualname__, *HERE}
    assert tiny.vcpu.get_regs().rax == 4000


def test_a_signal_that_another_thread_catches_ends_the_main_threads_kvm_run(tiny: Tiny) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    entered = threading.Event()

    def catch() -> None:
        assert entered.wait(20)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    thread = threading.Thread(target=catch)
    thread.start()
    tiny.vcpu.call_soon(entered.set)
    spin(tiny)
    assert seen == [signal.SIGUSR1]
    thread.join()


def test_the_vcpu_is_free_for_others_whatever_interrupts_kvm_run(tiny: Tiny) -> None:
    tiny.vcpu.call_soon(_thread.interrupt_main)  # no signal: nothing holds its handler back
    tiny.load(SPIN)
    with pytest.raises(KeyboardInterrupt):
        tiny.vcpu.run()
    registers: list[abi.kvm_regs] = []
    other = threading.Thread(target=lambda: registers.append(tiny.vcpu.get_regs()), daemon=True)
    other.start()
    other.join(20)
    assert registers
    with pytest.raises(KeyboardInterrupt):
        tiny.vcpu.call_soon(_thread.interrupt_main)
        tiny.vcpu.run()


def test_a_handler_may_kick_whatever_it_has_interrupted(tiny: Tiny) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: tiny.vcpu.kick())
    with tiny.vcpu.request_lock:
        signal.raise_signal(signal.SIGUSR1)
    spin(tiny)


def test_c_may_kick_without_the_interpreter(tiny: Tiny) -> None:
    address, argument = tiny.vcpu.cpu.interrupt_function
    kick = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    timer = threading.Timer(0.02, kick, (argument,))
    timer.start()
    spin(tiny)
    timer.join()
    kick(argument)
    kick(argument)
    spin(tiny)  # once for all that came before
    timer = threading.Timer(0.02, kick, (argument,))
    timer.start()
    spin(tiny)
    timer.join()


def test_one_signal_for_a_thread_ends_its_kvm_run_although_the_handler_is_new(tiny: Tiny) -> None:
    ended = threading.Event()
    entered = threading.Event()

    def run() -> None:
        tiny.vcpu.call_soon(entered.set)
        tiny.load(SPIN)
        with pytest.raises(InterruptedError):
            tiny.vcpu.run()
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert entered.wait(20)
        assert thread.ident is not None
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        assert ended.wait(20)
    finally:
        tiny.vcpu.kick()
        thread.join()


def test_signals_with_a_queue_all_come_and_with_their_values(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    number = signal.SIGRTMIN + 5
    libc = ctypes.CDLL(None)
    seen = []
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
    # siginfo_t: si_value is behind signo, errno, code, padding, pid and uid
    handler = handler_type(lambda _, info, __: seen.append(info[3] & 0xFFFF_FFFF))

    class sigaction(ctypes.Structure):
        _fields_ = (
            ("handler", handler_type),
            ("mask", ctypes.c_uint64 * 16),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    old = sigaction()
    assert libc.sigaction(number, ctypes.byref(sigaction(handler, flags=4)), ctypes.byref(old)) == 0  # SA_SIGINFO
    request.addfinalizer(lambda: libc.sigaction(number, ctypes.byref(old), None))
    tiny.vm.create_vcpu(1)  # or nobody has told of a handler of C's

    def work() -> None:
        for value in range(5):
            assert libc.sigqueue(os.getpid(), number, ctypes.c_void_p(value)) == 0
        assert not seen

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    tiny.vcpu.call_soon(work)
    spin(tiny)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own that has a spinning guest in ``tiny``."""
    preamble = """
import faulthandler, os, signal, threading, time
from tests.support.tiny import Tiny
tiny = Tiny().real_mode()
tiny.load(b"\\xeb\\xfe")
def interrupted():
    try: tiny.vcpu.run()
    except InterruptedError: return True
"""
    return subprocess.run(
        [sys.executable, "-c", preamble + code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_signal_that_kvm_run_alone_unblocks_still_ends_a_process_without_a_handler() -> None:
    done = child("""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
tiny.vcpu.set_signal_mask(bytes(8))
threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
assert interrupted()
print("here", flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
print("not here", flush=True)
""")
    assert (done.stdout, done.returncode) == ("here\n", -signal.SIGUSR1), done.stderr


@pytest.mark.parametrize("number", ["SIGCHLD", "SIGWINCH", "SIGURG", "SIGCONT"])
def test_a_signal_that_is_nothing_without_a_handler_stays_nothing(number: str) -> None:
    done = child(f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{number}])
tiny.vcpu.set_signal_mask(bytes(8))
threading.Timer(0.02, os.kill, (os.getpid(), signal.{number})).start()
assert interrupted()
assert signal.sigpending() == {{signal.{number}}}
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.{number}])
print("here")
""")
    assert (done.stdout, done.returncode) == ("here\n", 0), done.stderr


def test_handlers_that_call_the_one_before_them_get_along_with_ours() -> None:
    done = child("""
seen = []
out = open(os.devnull, "w")
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
faulthandler.register(signal.SIGUSR1, out, chain=True)
time.sleep(0.05)  # until somebody looks
for n in range(3):
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert interrupted()
    assert len(seen) == n + 1, seen
signal.signal(signal.SIGUSR1, lambda *_: seen.append(2))
os.kill(os.getpid(), signal.SIGUSR1)
assert seen == [1, 1, 1, 2], seen
print("here")
""")
    assert (done.stdout, done.returncode) == ("here\n", 0), done.stderr


def test_a_kvm_run_that_does_not_end_keeps_a_signal_for_a_second_at_most() -> None:
    done = child("""
def give_up(*_): raise SystemExit(7)
signal.signal(signal.SIGALRM, give_up)
def hang():
    while True: pass
tiny.vcpu.call_soon(hang)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.5)
tiny.vcpu.run()
""")
    assert done.returncode == 7, done.stderr


def test_the_librarys_threads_take_no_signals() -> None:
    tiny = Tiny(irqchip=True)
    tiny.vm.create_pit2()
    eventfd = os.eventfd(0)
    try:
        before = set(os.listdir("/proc/self/task"))
        tiny.vm.irqfd(eventfd, 5)
        tiny.vcpu.cpu.set_timer(time.monotonic_ns() + 10**9)
        # The PIT's channel 0 runs: out 0x43, 0x34; out 0x40, 0; out 0x40, 0; then an exit
        tiny.real_mode().load(bytes.fromhex("b034 e643 30c0 e640 e640 e680"))
        assert tiny.run() == abi.KVM_EXIT_IO
        end = time.monotonic() + 20
        while "softcpu-timer" not in {name(task) for task in os.listdir("/proc/self/task")}:
            assert time.monotonic() < end  # it gives itself its name
        assert len(set(os.listdir("/proc/self/task")) - before) >= 2
        for task in os.listdir("/proc/self/task"):
            if name(task) == "softcpu-timer" or task not in before:
                assert signal_mask(task) | unblockable() == (1 << 64) - 1, name(task)
    finally:
        tiny.close()
        os.close(eventfd)


def name(task: str) -> str:
    with open(f"/proc/self/task/{task}/comm") as file:
        return file.read().strip()


def signal_mask(task: str) -> int:
    with open(f"/proc/self/task/{task}/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))


def unblockable() -> int:
    """Signals that instructions raise, that cannot be blocked, and the C library's own."""
    instructions = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS)
    return sum(1 << (n - 1) for n in (*instructions, signal.SIGTRAP, signal.SIGKILL, signal.SIGSTOP, 32, 33))
