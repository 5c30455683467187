# SPDX-License-Identifier: Apache-2.0
"""Free page hinting (VIRTIO 1.3, 5.5.6.5), driven as Linux's driver does it."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.virtio_driver import Driver, driving

from softkvm import abi
from softkvm.vmm.devices import balloon_hints
from softkvm.vmm.devices.balloon_hints import CMD_ID_DONE, Hinting, unwritten
from softkvm.vmm.devices.virtio_balloon import Balloon
from softkvm.vmm.errors import StateError
from softkvm.vmm.machine import Machine
from softkvm.vmm.memory import MIB, GuestMemory

PAGE = 4096
SIZE = 64 * MIB
AREA = 32 * MIB
BLOCK = 4 * MIB
STOP = 0
HINTS = 3
POISON_VAL, CMD_ID = 12, 8


class LogVm:
    """A VM whose dirty log the test writes."""

    def __init__(self) -> None:
        self.flags = 0
        self.dirty: set[int] = set()
        """Pages, by their numbers."""

    def check_extension(self, cap: int) -> int:
        return 0

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: object) -> None:
        self.flags = region.flags
        self.dirty = set()

    def host_unmapped_ranges(self, ranges: object) -> None:
        pass

    def get_dirty_log(self, slot: int) -> bytes:
        assert self.flags & abi.KVM_MEM_LOG_DIRTY_PAGES
        dirty, self.dirty = self.dirty, set()
        return sum(1 << page for page in dirty).to_bytes(SIZE // PAGE // 8, "little")


class FakeMachine:
    """What hinting asks of a machine."""

    def __init__(self) -> None:
        self.vm = LogVm()
        self.memory = GuestMemory(SIZE)
        self.memory.attach(cast(Any, self.vm))
        self.standing = False
        self.pausing = self

    @contextmanager
    def still(self) -> Iterator[None]:
        self.standing = True
        yield
        self.standing = False


class Guest:
    """A driver that answers commands on the test's thread."""

    def __init__(self, machine: FakeMachine, driver: Driver) -> None:
        self.machine = machine
        self.driver = driver
        self.queue = driver.queues[HINTS] if driver.queues else None
        self.given: list[int] = []
        self.failed: list[StateError] = []

    @property
    def hinting(self) -> Hinting:
        hinting = cast(Balloon, self.driver.device).hinting
        assert hinting is not None
        return hinting

    def command(self) -> int:
        return self.driver.registers.config(CMD_ID, 4)

    def name_id(self, number: int) -> None:
        assert self.queue is not None
        self.queue.request([struct.pack("<I", number)])

    def name_blocks(self, *starts: int, size: int = BLOCK) -> None:
        assert self.queue is not None
        for start in starts:
            self.driver._free_at = AREA + start
            self.queue.request(writable=[size])
            self.driver._free_at = MIB * 16

    def reclaim(self, answer: Callable[[int], object], timeout_s: float = 30) -> int:
        """The host asks, and the driver does *answer* with the command's ID."""

        def ask() -> None:
            try:
                self.given.append(self.hinting.reclaim(timeout_s))
            except StateError as error:
                self.failed.append(error)

        thread = threading.Thread(target=ask)
        before = self.command()
        thread.start()
        self.driver.wait_until(lambda: self.command() != before or not thread.is_alive())
        if thread.is_alive():
            answer(self.command())
        thread.join()
        if self.failed:
            raise self.failed.pop()
        return self.given.pop()

    def empty(self, start: int, size: int = BLOCK) -> bool:
        return self.machine.memory.read(AREA + start, size) == bytes(size)

    def kept(self, start: int, size: int = BLOCK) -> bool:
        return self.machine.memory.read(AREA + start, size) == b"\x01" * size


@contextmanager
def hinting(**options: Any) -> Iterator[Guest]:
    machine = FakeMachine()
    device = Balloon(hinting=Hinting(cast(Machine, machine)))
    with driving(device, memory=machine.memory, **{"queues": 4, **options}) as driver:
        machine.memory.view[AREA:] = b"\x01" * (SIZE - AREA)
        yield Guest(machine, driver)


def test_what_a_guest_names_goes_back_while_the_machine_stands_and_the_guest_hears_that_it_is_done() -> None:
    with hinting() as guest:
        seen: list[bool] = []
        discard = guest.machine.memory.discard_ranges

        def watched(ranges: Any) -> int:
            seen.append(guest.machine.standing)
            return discard(ranges)

        guest.machine.memory.discard_ranges = watched  # type: ignore[method-assign]
        assert guest.command() == CMD_ID_DONE

        def answer(number: int) -> None:
            guest.name_id(number)
            guest.name_blocks(0, 8 * MIB)
            assert guest.kept(0)
            guest.name_id(STOP)

        assert guest.reclaim(answer) == 2 * BLOCK
        assert seen == [True]
        assert guest.empty(0)
        assert guest.kept(4 * MIB)
        assert guest.empty(8 * MIB)
        guest.driver.wait_until(lambda: guest.command() == CMD_ID_DONE)
        assert guest.machine.vm.flags == 0
        assert not guest.machine.memory.logging


def test_a_block_that_was_taken_back_and_written_meanwhile_stays() -> None:
    """By the guest, which KVM's log has, or by a device."""
    with hinting() as guest:

        def answer(number: int) -> None:
            guest.name_id(number)
            guest.name_blocks(0, 4 * MIB, 8 * MIB)
            guest.machine.vm.dirty.add((AREA + BLOCK - PAGE) // PAGE)
            guest.machine.memory.write(AREA + 8 * MIB, b"\1")
            guest.name_id(STOP)

        assert guest.reclaim(answer) == BLOCK
        assert guest.kept(0)
        assert guest.empty(4 * MIB)
        assert guest.kept(8 * MIB)


def test_blocks_of_an_older_command_are_ignored_and_each_command_has_its_own_id() -> None:
    with hinting() as guest:
        numbers: list[int] = []

        def answer(number: int) -> None:
            numbers.append(number)
            guest.name_id(number - 1)
            guest.name_blocks(0)
            guest.name_id(STOP)
            guest.name_id(number)
            guest.name_blocks(4 * MIB)
            guest.name_id(STOP)

        assert guest.reclaim(answer) == BLOCK
        assert guest.kept(0)
        guest.driver.wait_until(lambda: guest.command() == CMD_ID_DONE)
        assert guest.reclaim(answer) == BLOCK  # named once more, free once more
        assert len(set(numbers)) == 2
        assert min(numbers) >= 2


def test_the_array_of_blocks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon_hints.BLOCKS, "most", 2)
    with hinting() as guest:

        def answer(number: int) -> None:
            guest.name_id(number)
            guest.name_blocks(0, 4 * MIB, 8 * MIB)
            guest.name_id(STOP)

        assert guest.reclaim(answer) == 2 * BLOCK
        assert guest.kept(8 * MIB)


def test_a_driver_that_does_not_answer_is_given_up() -> None:
    with hinting() as guest:
        with pytest.raises(StateError, match=r"has not named its free pages within 0\.05 s"):
            guest.reclaim(lambda number: guest.name_id(number), timeout_s=0.05)
        guest.driver.wait_until(lambda: guest.command() == CMD_ID_DONE)
        assert guest.machine.vm.flags == 0
        assert not guest.machine.memory.logging


def test_a_reset_in_the_middle_keeps_everything() -> None:
    with hinting() as guest:

        def answer(number: int) -> None:
            guest.name_id(number)
            guest.name_blocks(0)
            guest.driver.registers.set_status(0)

        with pytest.raises(StateError, match="the guest's driver has been reset"):
            guest.reclaim(answer)
        assert guest.kept(0)


def test_a_block_of_zeroes_goes_although_it_was_written() -> None:
    """A guest that clears what it allocates: only a block that has something else in it stays."""
    with hinting() as guest:
        memory, vm = guest.machine.memory, guest.machine.vm

        def answer(number: int) -> None:
            memory.clear(AREA, 3 * BLOCK)
            memory.write(AREA + 2 * BLOCK - 1, b"\1")
            memory.write(AREA + 2 * BLOCK, b"\1")
            vm.dirty |= {AREA // PAGE + page for page in range(3 * BLOCK // PAGE)}
            guest.name_id(number)
            guest.name_blocks(0, BLOCK, 2 * BLOCK)
            guest.name_id(STOP)

        assert guest.reclaim(answer) == BLOCK
        assert memory.read(AREA + 2 * BLOCK - 1, 2) == b"\1\1"


def test_what_was_written_before_a_stop_is_known_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks come in batches; each has the log cleared."""
    monkeypatch.setattr(balloon_hints, "_BATCH", 1)
    with hinting() as guest:

        def answer(number: int) -> None:
            guest.name_id(number)
            guest.machine.vm.dirty.add((AREA + 8 * MIB) // PAGE)
            guest.name_blocks(0)
            guest.driver.wait_until(lambda: guest.empty(0))
            guest.name_blocks(8 * MIB, 12 * MIB)
            guest.name_id(STOP)

        assert guest.reclaim(answer) == 2 * BLOCK
        assert guest.kept(8 * MIB)


def test_without_a_driver_that_hints_it_cannot_be() -> None:
    with hinting(without=[3]) as guest, pytest.raises(StateError, match="no driver that tells of free pages"):
        guest.reclaim(lambda number: None)


def test_memory_that_is_kept_poisoned_or_logged_is_not_asked_for() -> None:
    with hinting() as guest:
        guest.driver.registers.set_config(POISON_VAL, 4, 0xAAAAAAAA)
        with pytest.raises(StateError, match="page poisoning"):
            guest.reclaim(lambda number: None)
        guest.driver.registers.set_config(POISON_VAL, 4, 0)
        guest.machine.memory.logging = True
        with pytest.raises(StateError, match="memory is being watched already"):
            guest.reclaim(lambda number: None)
        guest.machine.memory.logging = False
        guest.machine.memory.keep("a device is assigned")
        with pytest.raises(StateError, match="a device is assigned"):
            guest.reclaim(lambda number: None)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=8),
    st.sets(st.integers(0, 50), max_size=12),
)
def test_a_block_is_free_exactly_if_no_page_of_it_was_written(blocks: list[tuple[int, int]], pages: set[int]) -> None:
    written = [(page, 1) for page in sorted(pages)]
    expected = [(start, size) for start, size in blocks if not pages & set(range(start, start + size))]
    assert unwritten(blocks, written) == expected
