# SPDX-License-Identifier: Apache-2.0
"""Queues of both formats, driven as a driver does it: expected values are VIRTIO 1.3's (2.7 and 2.8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.virtio_driver import (
    EVENT_IDX,
    INDIRECT_DESC,
    NEEDS_RESET,
    NEXT,
    RING_PACKED,
    Driver,
    PackedDriverQueue,
    driving,
)

from softkvm.vmm.memory import MIB, GuestMemory
from softkvm.vmm.virtio.device import VirtioDevice
from softkvm.vmm.virtio.queue import Chain

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Echo(VirtioDevice):
    """Writes what it has read; holds back what begins with ``hold``."""

    type = 42
    name = "echo"
    queue_sizes = (8, 256)

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.held: list[Chain] = []

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        self.batches.append(0)
        for chain in queue.drain():
            self.batches[-1] += 1
            data = chain.read()
            if data.startswith(b"hold"):
                self.held.append(chain)
                continue
            chain.write(data)
            queue.push(chain)

    def release(self, index: int = 0) -> None:
        for chain in self.held:
            chain.write(b"released")
            self.queues[index].push(chain)
        self.held = []
        self.queues[index].flush()

    def save(self) -> dict[str, Any]:
        return {"held": [chain.save() for chain in self.held]}

    def restore(self, state: dict[str, Any]) -> None:
        self.held = [self.queues[0].chain(saved) for saved in state["held"]]


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with driving(Echo(), packed=request.param) as driver:
        yield driver


def test_segments_are_joined_and_scattered(driver: Driver) -> None:
    queue = driver.queues[0]
    for indirect in (False, True):
        queue.indirect = indirect
        assert queue.request([b"abc", b"defg"], [2, 1, 100]) == b"abcdefg"
        assert queue.request([], [5]) == b""
        assert queue.request([b"to be cut"], [2, 3]) == b"to be"
        assert queue.request([b"x"], []) == b""


def test_rings_wrap(driver: Driver) -> None:
    """Indices of 16 bits go round after 65536 buffers, packed rings' wrap counters all the time."""
    queue = driver.queues[1]
    queue.indirect = False
    done = 0
    while done < (3000 if isinstance(queue, PackedDriverQueue) else (1 << 16) + 1000):
        buffers = [(queue.add([b"%d" % (done + n), b"!"], [10]), done + n) for n in range(queue.size // 3)]
        queue.notify()
        for buffer, number in buffers:
            assert queue.wait(buffer).data() == b"%d!" % number
        done += len(buffers)


def test_a_batch_is_one_interrupt_and_no_notification_is_asked_for_meanwhile(driver: Driver) -> None:
    queue, echo = driver.queues[1], driver.device
    assert isinstance(echo, Echo)
    with driver.transport.worker.lock:  # the device does nothing
        buffers = [queue.add([b"x"], [1]) for _ in range(50)]
        queue.notify()
    for buffer in buffers:
        queue.wait(buffer)
    assert echo.batches == [50]
    assert driver.vm.messages == [2]  # the vector of queue 1


def test_buffers_come_back_in_any_order(driver: Driver) -> None:
    queue, echo = driver.queues[0], driver.device
    assert isinstance(echo, Echo)
    held = [queue.add([b"hold", b"-"], [8]) for _ in range(2)]
    assert queue.request([b"quick"], [8]) == b"quick"
    assert [buffer.written for buffer in held] == [None, None]
    driver.device.call(echo.release)
    assert [queue.wait(buffer).data() for buffer in held] == [b"released"] * 2


@pytest.mark.parametrize("event_idx", [True, False])
def test_split_interrupts_come_when_the_driver_asks_for_them(event_idx: bool) -> None:
    """2.7.7.1, 2.7.10: used_event with event index, a flag without."""
    with driving(Echo(), without=[] if event_idx else [EVENT_IDX]) as driver:
        queue = driver.queues[0]

        def interrupts() -> int:
            before = len(driver.vm.messages)
            queue.request([b"x"], [1])
            with driver.transport.worker.lock:
                return len(driver.vm.messages) - before

        if event_idx:
            queue.set_used_event(0)
            assert interrupts() == 1
            assert interrupts() == 0  # used index 1 to 2, and it wants to know when it passes 0
            queue.set_used_event(3)
            assert [interrupts(), interrupts(), interrupts()] == [0, 1, 0]
        else:
            assert interrupts() == 1
            queue.set_no_interrupt(1)
            assert interrupts() == 0
            queue.set_no_interrupt(0)
            assert interrupts() == 1


@pytest.mark.parametrize("event_idx", [True, False])
def test_packed_interrupts_come_when_the_driver_asks_for_them(event_idx: bool) -> None:
    """2.8.10: enable, disable, or a place in the ring with its wrap counter."""
    with driving(Echo(), packed=True, without=[] if event_idx else [EVENT_IDX]) as driver:
        queue = driver.queues[0]  # of 8

        def interrupts() -> int:
            before = len(driver.vm.messages)
            queue.request([], [1])
            with driver.transport.worker.lock:
                return len(driver.vm.messages) - before

        assert interrupts() == 1  # place 0
        queue.set_driver_events(0, 1)
        assert interrupts() == 0  # place 1
        if not event_idx:
            return
        queue.set_driver_events(3 | 1 << 15, 2)
        assert [interrupts() for _ in range(3)] == [0, 1, 0]  # places 2, 3, 4
        queue.set_driver_events(1, 2)  # in the next round: its wrap counter is 0
        assert [interrupts() for _ in range(6)] == [0, 0, 0, 0, 1, 0]  # 5, 6, 7, 0, 1, 2


def test_split_notifications_are_asked_for_as_the_format_says() -> None:
    with driving(Echo()) as driver:
        queue = driver.queues[0]
        for count in (1, 2, 3):
            queue.request([b"x"], [1])
            with driver.transport.worker.lock:
                assert queue.avail_event() == count
        assert queue.used_flags() == 0
    with driving(Echo(), without=[EVENT_IDX]) as driver:
        queue = driver.queues[0]
        queue.request([b"x"], [1])
        driver.wait_until(lambda: queue.used_flags() == 0)


def test_packed_notifications_are_asked_for_as_the_format_says() -> None:
    with driving(Echo(), packed=True) as driver:
        queue = driver.queues[0]
        queue.request([b"x"], [1])  # takes 2 of 8 places

        def events() -> bytes:
            return driver.memory.read(queue.device_events, 4)

        driver.wait_until(lambda: events() == bytes([2, 0x80, 2, 0]))  # DESC, place 2, wrap counter 1
        for _ in range(3):
            queue.request([b"x"], [1])
        driver.wait_until(lambda: events() == bytes([0, 0, 2, 0]))  # place 0, wrap counter 0


@PACKED
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_device_goes_on_where_it_was_saved(packed: bool, transport: str) -> None:
    with driving(Echo(), packed=packed, transport=transport) as driver:
        queue = driver.queues[0]
        for number in range(5):
            queue.request([b"%d" % number], [4])
        held = queue.add([b"hold"], [8])
        queue.notify()
        echo = driver.device
        assert isinstance(echo, Echo)
        driver.wait_until(lambda: echo.held)
        late = queue.add([b"late"], [8])  # available, and never notified of
        driver.transport.worker.pause()
        state = driver.transport.save()
        driver.transport.reset()
        assert driver.registers.status() == 0
        driver.transport.restore(state)
        driver.transport.worker.resume()
        assert driver.registers.status() == 15
        assert queue.wait(late).data() == b"late"
        driver.device.call(echo.release)
        assert queue.wait(held).data() == b"released"
        assert queue.request([b"and on"], [8]) == b"and on"
        assert driver.registers.interrupts() & 1


@PACKED
@pytest.mark.parametrize("event_idx", [True, False])
def test_all_that_a_device_writes_is_marked_as_written(packed: bool, event_idx: bool) -> None:
    """For dirty logs: data, used descriptors and indices, requests for notifications."""
    marked: list[tuple[int, int]] = []
    without = [] if event_idx else [EVENT_IDX]
    with driving(Echo(), packed=packed, memory=GuestMemory(2 * MIB), without=without) as driver:
        memory, queue = driver.memory, driver.queues[0]
        memory.mark_written = lambda gpa, size: marked.append((gpa, size))  # type: ignore[method-assign]
        memory.logging = True
        for number in range(20):
            queue.indirect = number % 2 == 1
            buffers = [queue.add([b"some" * (number + 1)], [3, 50, 200]) for _ in range(2)]
            before = memory.read(0, memory.size)
            marked.clear()
            queue.notify()
            for buffer in buffers:
                queue.wait(buffer)
            with driver.transport.worker.lock:
                after = bytearray(memory.read(0, memory.size))
            assert after != before
            for gpa, size in marked:
                after[gpa : gpa + size] = before[gpa : gpa + size]
            assert after == before, "what is not marked has changed"
            assert sum(size for _, size in marked) < 2000
        memory.logging = False


@PACKED
def test_a_state_of_another_device_is_refused(packed: bool) -> None:
    with driving(Echo(), packed=packed) as driver:
        state = driver.transport.save()
        nowhere = [{**state["queues"][0], "addresses": [1 << 60, 0, 0]}, *state["queues"][1:]]
        with pytest.raises(ValueError, match="a ring at"):
            driver.transport.restore({**state, "queues": nowhere})
        for wrong in ({**state, "queues": state["queues"][:1]}, {**state, "driver_features": 1 << 50}):
            with pytest.raises(ValueError, match="other queues or features"):
                driver.transport.restore(wrong)


# -- what no driver may do: the device needs a reset, and works again after one


def _loop(queue: Any) -> None:
    queue.write_descriptor(0, 1 << 20, 16, NEXT, 1)
    queue.write_descriptor(1, 1 << 20, 16, NEXT, 0)
    queue.make_available(0)


def _beyond(queue: Any) -> None:
    queue.write_descriptor(0, queue.memory.end - 8, 16, 0)
    queue.make_available(0)


def _nothing(queue: Any) -> None:
    queue.write_descriptor(0, 1 << 20, 0, 0)
    queue.make_available(0)


def _no_descriptor(queue: Any) -> None:
    queue.make_available(queue.size)


def _next_beyond(queue: Any) -> None:
    queue.write_descriptor(0, 1 << 20, 16, NEXT, queue.size)
    queue.make_available(0)


def _index_jumps(queue: Any) -> None:
    queue._avail_idx += queue.size
    queue.make_available(0)


def _readable_last(queue: Any) -> None:
    queue.write_descriptor(0, 1 << 20, 16, NEXT | 2, 1)
    queue.write_descriptor(1, 1 << 20, 16, 0)
    queue.make_available(0)


def _table(queue: Any, size: int, *entries: bytes, flags: int = 4) -> None:
    at = queue.driver.allocate(64)
    queue.memory.write(at, b"".join(entries).ljust(64, b"\0"))
    queue.write_descriptor(0, at, size, flags)
    queue.make_available(0)


def _entry(flags: int, following: int = 0) -> bytes:
    import struct

    return struct.pack("<QIHH", 1 << 20, 16, flags, following)


WRONG: dict[str, Callable[[Any], None]] = {
    "loop": _loop,
    "beyond memory": _beyond,
    "no bytes": _nothing,
    "no such descriptor": _no_descriptor,
    "no such next": _next_beyond,
    "the index jumps": _index_jumps,
    "readable behind writable": _readable_last,
    "table of no whole entries": lambda queue: _table(queue, 20, _entry(0)),
    "empty table": lambda queue: _table(queue, 0),
    "table in a table": lambda queue: _table(queue, 16, _entry(4)),
    "loop in a table": lambda queue: _table(queue, 32, _entry(NEXT, 1), _entry(NEXT, 0)),
    "out of the table": lambda queue: _table(queue, 16, _entry(NEXT, 1)),
    "table and next": lambda queue: _table(queue, 16, _entry(0), flags=4 | NEXT),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_driver_may_do_ends_in_needs_reset(wrong: str, capfd: pytest.CaptureFixture[str]) -> None:
    with driving(Echo()) as driver:
        WRONG[wrong](driver.queues[0])
        driver.queues[0].notify()
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)
        driver.wait_interrupt(2)
        driver.queues[0].notify()  # nothing comes of it
        driver.start()
        assert driver.queues[0].request([b"again"], [8]) == b"again"
        assert capfd.readouterr().err.count("needs a reset") == 1


def test_packed_chains_that_never_end_need_a_reset() -> None:
    with driving(Echo(), packed=True) as driver:
        queue = driver.queues[0]
        for at in reversed(range(queue.size)):
            queue.write_descriptor(at, 1 << 20, 16, 0, NEXT | 1 << 7)
        queue.notify()
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)


def test_tables_that_were_not_negotiated_need_a_reset() -> None:
    with driving(Echo(), without=[INDIRECT_DESC]) as driver:
        driver.queues[0].indirect = True
        driver.queues[0].add([b"x"], [1])
        driver.queues[0].notify()
        driver.wait_until(lambda: driver.registers.status() & NEEDS_RESET)


@PACKED
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("address", [1, (1 << 64) - 16, 0xFFFF0000, (64 << 20) - 2])
def test_rings_where_no_memory_is_need_a_reset(packed: bool, place: int, address: int) -> None:
    with driving(Echo(), packed=packed, start=False) as driver:
        registers = driver.registers
        registers.set_status(0)
        registers.set_status(3)
        registers.accept(registers.features())
        registers.set_status(11)
        addresses = [1 << 20, 2 << 20, 3 << 20]
        addresses[place] = address
        registers.set_up(0, 8, (addresses[0], addresses[1], addresses[2]))
        registers.set_status(15)
        assert registers.status() & NEEDS_RESET
        registers.set_status(0)
        assert registers.status() == 0


def test_packed_rings_have_any_size_split_ones_powers_of_two() -> None:
    with driving(Echo(), packed=True, queue_size=7) as driver:
        for number in range(40):
            assert driver.queues[0].request([b"%d" % number], [4]) == b"%d" % number
    with driving(Echo(), queue_size=7) as driver:
        assert driver.registers.status() & NEEDS_RESET


def test_packed_is_offered_when_asked_for() -> None:
    for packed in (False, True):
        with driving(Echo(), packed=packed, start=False) as driver:
            assert driver.registers.features() >> RING_PACKED & 1 == packed


class Quiet(VirtioDevice):
    """Shows what it has used, and tells of it when a test says so."""

    type = 42
    name = "quiet"
    queue_sizes = (8,)

    def notified(self, index: int) -> None:
        for chain in self.queues[0].drain(interrupt=False):
            self.queues[0].push(chain)


@PACKED
def test_what_is_shown_is_used_and_one_flush_tells_of_all(packed: bool) -> None:
    """2.7.10, 2.8.10: whether the driver wants an interrupt is looked at for all that was used since the last time."""
    with driving(Quiet(), packed=packed) as driver:
        queue = driver.queues[0]
        for _ in range(3):
            queue.request([b"x"])
        assert not driver.registers.interrupts()
        queue.request([b"x"])  # behind the first, for which the driver wants one
        driver.device.call(driver.device.queues[0].flush)
        driver.wait_interrupt()
        with driver.transport.lock:
            driver.device.queues[0].flush()  # nothing new
        queue.request([b"x"])
        assert not driver.registers.interrupts()
