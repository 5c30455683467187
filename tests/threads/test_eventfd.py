# SPDX-License-Identifier: Apache-2.0
"""Event files: an irqfd sees events before anybody else, and takes them; whoever comes behind has the others."""

from __future__ import annotations

import errno
import os
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from tests.support.eventfds import machine_with_chips, new_eventfd
from tests.support.forks import in_child
from tests.support.threads import beside, until
from tests.support.tiny import Tiny

from softkvm import abi
from softkvm.kvm.irq.eventfd import Irqfd
from softkvm.kvm.irq.eventfile import EventFile
from softkvm.kvm.irq.wait import WaitEntry, WaitQueue

EVENTS = 1_000_000
MMIO = 0x1000_0000
GSI = 20


tiny = pytest.fixture(machine_with_chips)
fd = pytest.fixture(new_eventfd)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What irqfds take, event by event."""
    counts: list[int] = []
    wake = Irqfd.wake

    def count(self: Irqfd, events: int) -> bool:
        if not wake(self, events):
            return False
        counts.append(events)
        return True

    def last(self: Irqfd, left: int) -> None:
        shut_down(self, left)
        counts.append(left)

    shut_down = Irqfd.shut_down
    monkeypatch.setattr(Irqfd, "wake", count)
    monkeypatch.setattr(Irqfd, "shut_down", last)
    return counts


def counter(fd: int) -> int:
    with suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


def edge_to(tiny: Tiny, vector: int) -> None:
    """Have the pin raise a vector, and the APIC take it."""
    state = tiny.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    state.chip.ioapic.redirtbl[GSI].bits = vector
    tiny.vm.set_irqchip(state)
    assert tiny.vcpu.apic is not None
    tiny.vcpu.apic.set_spiv(0x1FF)


class Pollers:
    """Threads of user space's that poll an eventfd, and read what they find."""

    def __init__(self, fd: int, threads: int = 2) -> None:
        self._fd = fd
        self._stop = os.eventfd(0)
        self.wakeups = 0
        self.read = 0
        self._lock = threading.Lock()
        self.threads = [threading.Thread(target=self._main) for _ in range(threads)]

    def _main(self) -> None:
        with select.epoll() as epoll:
            epoll.register(self._fd, select.EPOLLIN)
            epoll.register(self._stop, select.EPOLLIN)
            while True:
                ready = [fd for fd, _ in epoll.poll()]
                if self._fd in ready:
                    count = counter(self._fd)
                    with self._lock:
                        self.wakeups += 1
                        self.read += count
                elif self._stop in ready:
                    return

    @contextmanager
    def polling(self) -> Iterator[Pollers]:
        with beside(*self.threads):
            try:
                yield self
            finally:
                os.eventfd_write(self._stop, 1)
        os.close(self._stop)


def in_threads(count: int, work: Callable[[], None]) -> None:
    """Do work on some threads, and wait for them."""
    with beside(*(threading.Thread(target=work) for _ in range(count))):
        pass


# --- the queue -----------------------------------------------------------------------------------------


class Waiter:
    """A waiter that notes when it is woken."""

    def __init__(self, name: str, log: list[str], *, answer: bool = True) -> None:
        self.answer = answer
        self._name, self._log = name, log
        self.entry = WaitEntry(self._woken)

    def _woken(self, count: int) -> bool:
        self._log.append(self._name)
        return self.answer


def test_waiters_are_woken_in_the_order_of_their_kinds() -> None:
    queue, log = WaitQueue(), list[str]()
    waiters = {name: Waiter(name, log) for name in ("exclusive 1", "exclusive 2", "old", "new", "first")}
    waiters["first"].answer = False  # it lets everything pass
    for name in ("exclusive 1", "exclusive 2"):
        queue.add_exclusive(waiters[name].entry)
    queue.add(waiters["old"].entry)
    queue.add_priority(waiters["first"].entry)
    queue.add(waiters["new"].entry)  # in the kernel, too, before those that wait already
    assert not queue.offer(1)
    queue.wake_up(1)
    assert log == ["first", "new", "old", "exclusive 1"]
    log.clear()
    waiters["exclusive 1"].answer = False  # that has not woken it: it is the next one's turn
    queue.wake_up(1)
    assert log == ["new", "old", "exclusive 1", "exclusive 2"]
    log.clear()
    waiters["exclusive 1"].answer = True
    queue.wake_up(1, exclusive=0)
    assert log == ["new", "old", "exclusive 1", "exclusive 2"]


def test_what_is_taken_with_priority_nobody_else_hears_of(fd: int) -> None:
    log: list[str] = []
    first, other = Waiter("first", log), Waiter("other", log)
    file = EventFile.of(fd)
    file.queue.add(other.entry)
    file.queue.add_priority(first.entry)
    file.signal(3)
    assert (log, counter(fd)) == (["first"], 0)
    first.answer = False
    file.signal(3)
    assert (log, counter(fd)) == (["first", "first", "other"], 3)
    file.queue.remove(first.entry)
    file.signal(2)
    assert (log[3:], counter(fd)) == (["other"], 2)
    file.queue.remove(other.entry)
    assert not file.queue


def test_one_object_stands_for_all_descriptors_of_an_eventfd(fd: int) -> None:
    other = os.dup(fd)
    file = EventFile.of(fd)
    assert EventFile.of(other) is file
    os.close(other)
    file.signal()
    assert select.select([file], [], [], 0)[0] == [file]
    assert counter(fd) == 1


# --- irqfds --------------------------------------------------------------------------------------------


def test_pollers_see_nothing_of_what_a_guest_signals_to_an_irqfd(tiny: Tiny, fd: int, taken: list[int]) -> None:
    edge_to(tiny, 0x45)
    tiny.vm.irqfd(fd, GSI)
    tiny.vm.ioeventfd(fd, MMIO, 4)
    # mov dword [MMIO], 1 a thousand times; then a port that is nobody's
    tiny.protected_mode().load(bytes.fromhex("b9e8030000 c7050000001001000000 e2f4 e610"))
    with Pollers(fd).polling() as pollers:
        assert tiny.run() == abi.KVM_EXIT_IO
    assert (sum(taken), len(taken)) == (1000, 1000)
    assert (pollers.wakeups, counter(fd)) == (0, 0)
    assert tiny.vcpu.apic is not None and tiny.vcpu.apic.irr == 1 << 0x45


def test_of_a_million_events_of_this_process_an_irqfd_has_all(tiny: Tiny, fd: int, taken: list[int]) -> None:
    tiny.vm.irqfd(fd, GSI)
    file = EventFile.of(fd)

    def signal() -> None:
        for _ in range(EVENTS // 4):
            file.signal()

    with Pollers(fd).polling() as pollers:
        in_threads(4, signal)
    assert (sum(taken), pollers.wakeups, counter(fd)) == (EVENTS, 0, 0)


def test_of_a_million_events_of_others_each_goes_to_one(tiny: Tiny, fd: int, taken: list[int]) -> None:
    tiny.vm.irqfd(fd, GSI)

    def write() -> None:
        for _ in range(EVENTS // 2):
            os.eventfd_write(fd, 1)

    with Pollers(fd).polling() as pollers:
        in_threads(2, write)
        until(lambda: sum(taken) + pollers.read >= EVENTS)
    assert sum(taken) + pollers.read == EVENTS
    assert counter(fd) == 0


def test_irqfds_that_come_and_go_lose_nothing_and_take_nothing_twice(tiny: Tiny, fd: int, taken: list[int]) -> None:
    file = EventFile.of(fd)
    numbers = random.Random(2)
    done = threading.Event()
    sent, read = [0, 0], [0]

    def write() -> None:
        while not done.is_set():
            os.eventfd_write(fd, 1)
            sent[0] += 1

    def signal() -> None:
        while not done.is_set():
            file.signal(2)
            sent[1] += 2

    with beside(threading.Thread(target=write), threading.Thread(target=signal)):
        for _ in range(200):
            tiny.vm.irqfd(fd, GSI)
            before = sum(taken)
            until(lambda before=before: sum(taken) > before)  # type: ignore[misc]
            tiny.vm.irqfd(fd, GSI, abi.KVM_IRQFD_FLAG_DEASSIGN)
            if numbers.random() < 0.5:
                until(lambda: select.select([fd], [], [], 0)[0])  # they are given back
                read[0] += counter(fd)
        done.set()
    left = counter(fd)
    assert read[0] > 0
    assert sum(taken) + left + read[0] == sum(sent)


def test_a_deassigned_irqfd_takes_and_delivers_nothing_any_more(
    tiny: Tiny, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven: list[tuple[int, int]] = []
    assert tiny.vm.chips is not None

    def drive(gsi: int, level: int, source: int = 0) -> int:
        driven.append((gsi, level))
        return 1

    monkeypatch.setattr(tiny.vm.chips, "set_gsi", drive)
    file = EventFile.of(fd)
    for n in range(300):
        tiny.vm.irqfd(fd, GSI)
        os.eventfd_write(fd, 1)
        if n % 3 == 0:
            until(lambda: len(driven) == 2)
        tiny.vm.irqfd(fd, GSI, abi.KVM_IRQFD_FLAG_DEASSIGN)
        # The event was taken, and delivered before the end, or it is there for the next reader.
        left = counter(fd)
        assert (len(driven), left) in ((2, 0), (0, 1))
        before = len(driven)
        os.eventfd_write(fd, 1)
        file.signal()
        assert (counter(fd), len(driven)) == (2, before)
        driven.clear()


def test_what_had_come_before_raises_the_line_at_once(tiny: Tiny, fd: int, taken: list[int]) -> None:
    edge_to(tiny, 0x45)
    os.eventfd_write(fd, 7)
    tiny.vm.irqfd(fd, GSI)
    until(lambda: tiny.vcpu.apic is not None and tiny.vcpu.apic.irr == 1 << 0x45)
    assert (taken, counter(fd)) == ([7], 0)


def test_an_eventfd_is_one_irqfd_whoever_asks(tiny: Tiny, fd: int) -> None:
    with ExitStack() as stack:
        other = Tiny(irqchip=True)
        stack.callback(other.close)
        copy = os.dup(fd)
        stack.callback(os.close, copy)
        tiny.vm.irqfd(fd, GSI)
        for machine, descriptor in ((tiny, fd), (tiny, copy), (other, fd), (other, copy)):
            with pytest.raises(OSError) as info:
                machine.vm.irqfd(descriptor, GSI)
            assert info.value.errno == errno.EBUSY
        tiny.vm.irqfd(copy, GSI, abi.KVM_IRQFD_FLAG_DEASSIGN)
        other.vm.irqfd(fd, GSI)
    tiny.vm.irqfd(fd, GSI)  # the other VM is no more


def test_a_resample_eventfd_may_be_another_irqfd(tiny: Tiny, fd: int, taken: list[int]) -> None:
    edge_to(tiny, 0x8045)  # level triggered
    second = os.eventfd(0, os.EFD_NONBLOCK)
    tiny.vm.irqfd(fd, GSI, abi.KVM_IRQFD_FLAG_RESAMPLE, second)
    tiny.vm.irqfd(second, 5)
    os.eventfd_write(fd, 1)
    apic = tiny.vcpu.apic
    assert apic is not None
    until(lambda: apic.irr)
    assert apic.get_interrupt() == 0x45
    taken.clear()
    apic.eoi()
    assert (taken, counter(second)) == ([1], 0)
    assert tiny.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr >> 5 & 1
    os.close(second)


def test_in_a_child_events_are_the_counters(tiny: Tiny, fd: int, taken: list[int]) -> None:
    tiny.vm.irqfd(fd, GSI)
    file = EventFile.of(fd)
    other = os.eventfd(0, os.EFD_NONBLOCK)

    def child() -> None:
        assert not file.queue
        own = Tiny(irqchip=True)
        own.vm.irqfd(other, GSI)
        EventFile.of(other).signal(5)
        assert taken == [5]
        own.close()

    in_child(child)
    file.signal(4)
    assert (taken, counter(fd), counter(other)) == ([4], 0, 0)
    os.close(other)
