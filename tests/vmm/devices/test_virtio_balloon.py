# SPDX-License-Identifier: Apache-2.0
"""The balloon device (VIRTIO 1.3, 5.5), driven as a guest's driver does."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest
from tests.support.resident import resident
from tests.support.virtio_driver import NEEDS_RESET, Driver, SplitDriverQueue, driving

from softkvm.vmm.devices.virtio_balloon import STATISTIC_NAMES, Balloon, BalloonSpec, parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import MIB, GuestMemory

PAGE = 4096
SIZE = 64 * MIB
AREA = 32 * MIB  # behind what the driver takes for its queues
STATS_VQ, DEFLATE_ON_OOM, FREE_PAGE_HINT, PAGE_POISON, REPORTING = 1, 2, 3, 4, 5
INFLATE, DEFLATE, STATS = 0, 1, 2


class Rig:
    """A driver, and memory full of ones behind AREA."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.balloon = cast(Balloon, driver.device)
        self.memory.view[AREA:] = b"\x01" * (SIZE - AREA)

    def request(self, queue: int, data: bytes) -> None:
        self.driver.queues[queue].request([data])

    def pages(self, queue: int, *numbers: int) -> None:
        """Tell of pages by their numbers within AREA."""
        self.request(queue, struct.pack(f"<{len(numbers)}I", *(AREA // PAGE + number for number in numbers)))

    def report(self, queue: int, start: int, *sizes: int) -> None:
        """Tell of free memory at AREA + start, in a segment of each size."""
        self.driver._free_at = AREA + start
        self.driver.queues[queue].request(writable=sizes)
        self.driver._free_at = 16 * MIB

    def holds(self) -> int:
        """Bytes behind AREA that the host holds."""
        return resident(self.memory.ranges[0].hva + AREA, SIZE - AREA)

    def ones(self, start: int, size: int) -> bool:
        return self.memory.read(AREA + start, size) == b"\x01" * size

    def zeroes(self, start: int, size: int) -> bool:
        return self.memory.read(AREA + start, size) == bytes(size)


@contextmanager
def rig(device: Balloon | None = None, **options: object) -> Iterator[Rig]:
    with driving(device or Balloon(), **options) as driver:  # type: ignore[arg-type]
        yield Rig(driver)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("packed", [False, True])
def test_pages_that_are_inflated_are_the_hosts_and_empty_when_they_come_back(transport: str, packed: bool) -> None:
    with rig(transport=transport, packed=packed) as guest:
        before = guest.holds()
        guest.pages(INFLATE, 0, 7, 3, 1, 2)
        assert before - guest.holds() == 5 * PAGE
        assert guest.balloon.reclaimed["inflated"] == 5 * PAGE
        guest.pages(DEFLATE, 7, 3)
        assert guest.zeroes(0, 4 * PAGE)
        assert guest.zeroes(7 * PAGE, PAGE)
        assert guest.ones(4 * PAGE, 3 * PAGE)
        assert guest.ones(8 * PAGE, SIZE - AREA - 8 * PAGE)


def test_pages_that_are_no_ram_are_nobodys() -> None:
    with rig() as guest:
        guest.request(INFLATE, struct.pack("<4I", SIZE // PAGE, 0xFFFFFFFF, 0xC0000, AREA // PAGE))
        assert guest.zeroes(0, PAGE)
        assert guest.balloon.reclaimed["inflated"] == PAGE


def test_a_buffer_may_end_within_a_number_or_be_twice_the_same() -> None:
    with rig() as guest:
        guest.request(INFLATE, struct.pack("<2I", AREA // PAGE, AREA // PAGE) + b"\1\0\0")
        assert guest.balloon.reclaimed["inflated"] == PAGE
        guest.request(INFLATE, b"\1")
        assert guest.balloon.reclaimed["inflated"] == PAGE


def test_more_numbers_than_the_limit_need_a_reset(capfd: pytest.CaptureFixture[str]) -> None:
    with rig() as guest:
        guest.pages(INFLATE, *range(4096))
        guest.driver.queues[INFLATE].add([bytes(4 * (1 << 16) + 4)])
        guest.driver.queues[INFLATE].notify()
        guest.driver.wait_until(lambda: guest.driver.registers.status() & NEEDS_RESET)
        assert guest.balloon.reclaimed["inflated"] == 4096 * PAGE
    assert "balloon: the device needs a reset: " in capfd.readouterr().err


def test_what_is_reported_goes_back_in_one_batch() -> None:
    calls: list[list[tuple[int, int]]] = []
    with rig(Balloon(reporting=True), queues=4) as guest:
        discard = guest.memory.discard_ranges

        def watched(ranges: Iterable[tuple[int, int]]) -> int:
            calls.append(list(ranges))
            return discard(calls[-1])

        guest.memory.discard_ranges = watched  # type: ignore[method-assign]
        guest.report(3, 2 * MIB, *[2 * MIB] * 4, PAGE)
        assert calls == [[(AREA + 2 * MIB * n, 2 * MIB) for n in range(1, 5)] + [(AREA + 10 * MIB, PAGE)]]
        assert guest.balloon.reclaimed["reported"] == 8 * MIB + PAGE
        assert guest.ones(0, 2 * MIB)
        assert guest.zeroes(2 * MIB, 8 * MIB + PAGE)
        assert guest.ones(10 * MIB + PAGE, MIB)


def test_only_whole_pages_of_a_report_go() -> None:
    with rig(Balloon(reporting=True), queues=4) as guest:
        guest.report(3, 100 * 16, 3 * PAGE, 16)
        assert guest.balloon.reclaimed["reported"] == 2 * PAGE
        assert guest.ones(0, PAGE)
        assert guest.zeroes(PAGE, 2 * PAGE)
        assert guest.ones(3 * PAGE, PAGE)


@pytest.mark.parametrize("numbering", ["specification", "linux before 6.11"])
@pytest.mark.parametrize("without", [(), (STATS_VQ,)])
def test_queues_are_found_by_either_numbering(numbering: str, without: tuple[int, ...]) -> None:
    with rig(Balloon(reporting=True), start=False) as guest:
        driver, registers = guest.driver, guest.driver.registers
        driver.start(without=without, queues=0)
        registers.set_status(0)
        registers.set_status(1 | 2)
        registers.accept(registers.features() & ~sum(1 << feature for feature in without))
        registers.set_status(1 | 2 | 8)
        wanted = [0, 1] if without else [0, 1, 2]
        wanted.append(4 if numbering == "specification" else len(wanted))
        driver.queues = [SplitDriverQueue(driver, index, 128) for index in wanted]
        registers.set_status(1 | 2 | 8 | 4)
        guest.report(len(wanted) - 1, 0, 2 * MIB)
        assert guest.zeroes(0, 2 * MIB)


def test_memory_that_is_kept_stays_and_the_driver_goes_on() -> None:
    with rig(Balloon(reporting=True), queues=4) as guest:
        guest.memory.keep("a device is assigned")
        guest.report(3, 0, 2 * MIB)
        guest.pages(INFLATE, 0, 1)
        assert guest.ones(0, 4 * MIB)
        assert guest.balloon.reclaimed == {"inflated": 0, "reported": 0, "hinted": 0}


@pytest.mark.parametrize("value", [0xAAAAAAAA, 1])
def test_what_a_guest_fills_free_pages_with_stays_there(value: int) -> None:
    with rig(Balloon(reporting=True), start=False) as guest:
        guest.driver.start(queues=0)
        guest.driver.registers.set_config(12, 4, value)
        assert guest.driver.registers.config(12, 4) == value
        guest.driver.start(queues=4)  # a reset forgets it
        assert guest.driver.registers.config(12, 4) == 0
        guest.driver.registers.set_config(12, 4, value)
        guest.report(3, 0, 2 * MIB)
        assert guest.ones(0, 2 * MIB)
        guest.driver.registers.set_config(12, 4, 0)  # as Linux's init_on_free
        guest.report(3, 0, 2 * MIB)
        assert guest.zeroes(0, 2 * MIB)


def test_a_value_without_the_feature_is_none() -> None:
    with rig(Balloon(reporting=True), start=False) as guest:
        guest.driver.registers.set_config(12, 4, 0xAAAAAAAA)
        guest.driver.start(without=[PAGE_POISON], queues=4)
        guest.report(3, 0, 2 * MIB)
        assert guest.zeroes(0, 2 * MIB)


def test_the_host_sets_the_size_and_the_guest_says_how_far_it_is() -> None:
    with rig() as guest:
        registers = guest.driver.registers
        guest.driver.registers.interrupts()
        guest.balloon.set_target(8 * MIB)
        guest.driver.wait_interrupt(2)
        assert registers.config(0, 4) == 2048
        assert guest.balloon.target == 8 * MIB
        registers.set_config(4, 4, 1024)
        assert guest.balloon.size == 4 * MIB
        registers.set_config(0, 4, 7)  # not the driver's to write
        assert registers.config(0, 4) == 2048
        for wrong in (SIZE + PAGE, -PAGE, 1):
            with pytest.raises(ConfigError, match=f"balloon of {wrong} bytes: expected a multiple of 4096"):
                guest.balloon.set_target(wrong)
        assert guest.balloon.target == 8 * MIB


def test_the_configuration_is_written_byte_by_byte_too_and_ends() -> None:
    with rig(transport="mmio") as guest:
        guest.balloon.write_config(5, b"\2")
        guest.balloon.write_config(6, bytes(64))
        assert guest.balloon.read_config(4, 4) == b"\0\2\0\0"
        assert guest.balloon.read_config(14, 8) == bytes(8)
        assert guest.balloon.read_config(100, 4) == bytes(4)


def statistics(**values: int) -> bytes:
    return b"".join(struct.pack("<HQ", STATISTIC_NAMES.index(name), value) for name, value in values.items())


def test_statistics_are_asked_for_and_answered() -> None:
    with rig() as guest:
        queue = guest.driver.queues[STATS]
        assert guest.balloon.statistics() == {}
        first = queue.add([statistics(free_memory=1000, swap_in=(1 << 64) - 1) + struct.pack("<HQ", 99, 1)])
        queue.notify()
        guest.driver.wait_until(guest.balloon.statistics)
        assert guest.balloon.statistics() == {"free_memory": 1000}
        assert first.written is None  # the driver gets its buffer when new ones are wanted
        found: list[dict[str, int]] = []
        asker = threading.Thread(target=lambda: found.append(guest.balloon.statistics(30)))
        asker.start()
        queue.wait(first)
        queue.add([statistics(free_memory=500, major_faults=3)])
        queue.notify()
        asker.join()
        assert found == [{"free_memory": 500, "major_faults": 3}]


def test_a_buffer_that_is_there_before_the_driver_is_ready_is_taken() -> None:
    """Linux's driver puts its first statistics up, and notifies, before DRIVER_OK."""
    with rig(start=False) as guest:
        driver, registers = guest.driver, guest.driver.registers
        registers.set_status(1 | 2)
        registers.accept(registers.features() & ~(1 << 34))
        registers.set_status(1 | 2 | 8)
        driver.queues = [SplitDriverQueue(driver, index, 128) for index in range(3)]
        driver.queues[STATS].add([statistics(free_memory=7)])
        driver.queues[STATS].notify()
        registers.set_status(1 | 2 | 8 | 4)
        driver.wait_until(guest.balloon.statistics)
        assert guest.balloon.statistics() == {"free_memory": 7}


def test_who_asks_a_guest_that_does_not_answer_gets_what_was_last() -> None:
    with rig() as guest:
        assert guest.balloon.statistics(0.01) == {}


def test_statistics_come_by_themselves_when_a_period_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    balloon = Balloon(stats_s=1)
    balloon.stats_s = 0.01  # type: ignore[assignment]
    with rig(balloon) as guest:
        queue = guest.driver.queues[STATS]
        for value in range(1, 4):
            buffer = queue.add([statistics(free_memory=value)])
            queue.notify()
            queue.wait(buffer)
        assert balloon.statistics() == {"free_memory": 3}


def test_a_second_buffer_for_statistics_and_a_long_one_are_taken() -> None:
    with rig() as guest:
        queue = guest.driver.queues[STATS]
        first = queue.add([statistics(free_memory=1)])
        queue.add([statistics(free_memory=2) * 1000 + b"\0"])
        queue.notify()
        queue.wait(first)
        assert guest.balloon.statistics() == {"free_memory": 2}


def test_a_reset_forgets_the_guest_and_keeps_the_target() -> None:
    with rig() as guest:
        guest.balloon.set_target(8 * MIB)
        guest.driver.registers.set_config(4, 4, 1024)
        guest.driver.queues[STATS].add([statistics(free_memory=1)])
        guest.driver.queues[STATS].notify()
        guest.driver.wait_until(guest.balloon.statistics)
        guest.driver.start()
        assert (guest.balloon.target, guest.balloon.size, guest.balloon.statistics()) == (8 * MIB, 0, {})
        guest.pages(INFLATE, 1)


def test_a_restored_balloon_goes_on_and_has_the_buffer_for_statistics() -> None:
    with rig(Balloon(reporting=True), queues=4) as guest:
        guest.balloon.set_target(8 * MIB)
        guest.driver.registers.set_config(4, 4, 1024)
        queue = guest.driver.queues[STATS]
        buffer = queue.add([statistics(free_memory=1)])
        queue.notify()
        guest.driver.wait_until(guest.balloon.statistics)
        state = guest.driver.transport.save()
        other = Balloon(reporting=True)
        memory = GuestMemory(SIZE)
        memory.view[:] = guest.memory.view
        with driving(other, memory=memory, start=False) as driver:
            driver.transport.restore(state)
            assert (other.target, other.size) == (8 * MIB, 4 * MIB)
            assert other.statistics(0.01) == {"free_memory": 1}  # and the driver has its buffer back
            driver.wait_until(lambda: memory.read(queue.used_ring + 2, 2) == b"\1\0")
            assert struct.unpack("<I", memory.read(queue.used_ring + 4, 4))[0] == buffer.head


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", BalloonSpec()),
        ("64M", BalloonSpec(size=64 * MIB)),
        ("64", BalloonSpec(size=64 * MIB)),
        ("reporting,hinting", BalloonSpec(reporting=True, hinting=True)),
        ("1G,stats=5,deflate-on-oom", BalloonSpec(size=1024 * MIB, stats_s=5, deflate_on_oom=True)),
        ("reporting=off,8192K", BalloonSpec(size=8 * MIB)),
    ],
)
def test_the_option_says_what_is_offered(text: str, expected: BalloonSpec) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("1K", "1K: expected a size such as 64M"),
        ("64M,32M", "one size is enough"),
        ("5X", "5X: expected a size"),
        ("stats=0", "stats=0, expected a number from 1 to 86400"),
        ("fast", "unknown: fast"),
        ("reporting=yes", "reporting=yes, expected on or off"),
    ],
)
def test_an_option_that_is_wrong_says_so(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse(text)


def test_features_are_those_that_were_asked_for() -> None:
    def offered(balloon: Balloon) -> set[int]:
        return {feature for feature in range(24) if balloon.features >> feature & 1}

    assert offered(Balloon()) == {STATS_VQ, PAGE_POISON}
    assert offered(Balloon(reporting=True)) == {STATS_VQ, PAGE_POISON, REPORTING}
    assert offered(Balloon(deflate_on_oom=True)) == {STATS_VQ, PAGE_POISON, DEFLATE_ON_OOM}
