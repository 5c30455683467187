# SPDX-License-Identifier: Apache-2.0
"""A driver that keeps to nothing, against every virtio device of the command line's table.

Whatever it writes to queues, registers and configuration spaces: the device goes on or needs a reset, works after one,
and neither its worker nor the machine comes to an end. An exception that isn't a QueueError is a bug of the device's.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.support.machines import open_soft
from tests.support.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    RING_PACKED,
    VERSION_1,
    MmioRegisters,
    PciRegisters,
)

from softkvm.cli.devices import DEVICE_OPTIONS
from softkvm.vmm.block.files import create_qcow2
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB
from softkvm.vmm.virtio import transport as transports
from softkvm.vmm.virtio import worker as workers
from softkvm.vmm.virtio.pci import PciTransport
from softkvm.vmm.virtio.transport import Transport

#: Texts that options of the table are tried with, for each device another; a new option needs one.
TEXTS: dict[str, list[Callable[[Path], str]]] = {
    "--disk": [lambda path: f"{_file(path, 'disk')},queues=2", lambda path: f"{_qcow2(path)},format=qcow2"],
    "--disk-overlay": [lambda path: _file(path, "below")],
    "--net": [lambda path: "user"],
    "--rng": [lambda path: ""],
    "--vsock": [lambda path: f"path={path}/vsock"],
    "--share": [lambda path: f"{_directory(path)}:tag,fs=9p", lambda path: f"{_directory(path)}:tag,fs=virtiofs"],
    "--balloon": [lambda path: "16M,reporting,hinting,stats=1"],
    "--port": [lambda path: f"tests.port=file:{path}/port"],
}
#: Those that add no virtio device.
OTHERS = {"--watchdog", "--pvpanic"}

MEMORY = 64 * MIB
AREA = 0x100000  # rings and buffers of the driver's
RINGS = 0x10000  # of each queue


def _file(path: Path, name: str) -> str:
    file = path / name
    file.write_bytes(bytes(1 << 20))
    return str(file)


def _qcow2(path: Path) -> str:
    file = path / "disk.qcow2"
    create_qcow2(str(file), 1 << 20, cluster_bits=9)
    return str(file)


def _directory(path: Path) -> str:
    directory = path / "shared"
    directory.mkdir()
    (directory / "file").write_bytes(b"contents")
    return str(directory)


def test_every_option_of_the_table_is_tried() -> None:
    assert {option.flag for option in DEVICE_OPTIONS} == set(TEXTS) | OTHERS


class Target:
    """A device of a machine whose processors never run."""

    def __init__(self, machine: Machine, transport: Transport) -> None:
        self.machine = machine
        self.transport = transport
        self.memory = machine.memory
        self.registers = (
            PciRegisters(transport) if isinstance(transport, PciTransport) else MmioRegisters(transport)  # type: ignore[arg-type]
        )

    def write_register(self, offset: int, size: int, value: int) -> None:
        limit = 0x4000 if isinstance(self.transport, PciTransport) else 0x1000
        self.transport.write(offset % (limit - 8), size, value & (1 << 8 * size) - 1)  # type: ignore[attr-defined]
        self.transport.read(offset % (limit - 8), size)  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Wait until the workers have done what they had to."""
        for worker in {self.transport.worker, *self.transport._queue_workers}:
            done = threading.Event()
            worker.call(done.set)
            assert done.wait(60), f"worker {worker.name} does nothing any more"

    def works(self) -> None:
        """After a reset the device can be set up, and stays so."""
        registers = self.registers
        registers.set_status(0)
        assert registers.status() == 0
        registers.set_status(ACKNOWLEDGE | DRIVER)
        registers.accept(registers.features())
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert registers.status() & FEATURES_OK
        for index in range(len(self.transport.queues)):
            at = AREA + index * RINGS
            self.memory.clear(at, RINGS)
            registers.set_up(index, min(registers.size_max(index), 64), (at, at + 0x1000, at + 0x2000))
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        self.settle()
        assert registers.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        registers.set_status(0)


SHAPES = [
    (option, number, transport)
    for option in DEVICE_OPTIONS
    for number in range(len(TEXTS.get(option.flag, [])))
    for transport in ("pci", "mmio", "packed")
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0].flag[2:]}-{shape[1]}-{shape[2]}")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    option, number, kind = request.param
    text = TEXTS[option.flag][number](tmp_path_factory.mktemp("device"))
    text += {"pci": "", "mmio": ",transport=mmio", "packed": ",packed"}[kind]
    with open_soft() as kvm, Machine(kvm, Config(MEMORY, device_specs=(option.parse(text),))) as machine:
        (transport,) = machine.board.virtio.transports.values()
        yield Target(machine, transport)


@pytest.fixture
def bugs(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The exceptions that devices have raised and that aren't the driver's doing."""
    found: list[BaseException] = []
    monkeypatch.setattr(transports, "show_traceback", found.append)
    monkeypatch.setattr(workers, "show_traceback", found.append)
    monkeypatch.setattr(transports, "complain", lambda text: None)
    monkeypatch.setattr(workers, "complain", lambda text: None)
    return found


def now_and_then(usual: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual value, and one of *other* once in ten times."""
    return st.integers(0, 9).flatmap(lambda number: other if number == 9 else st.just(usual))


ADDRESSES = st.one_of(
    st.integers(0, 63).map(lambda n: AREA + 0x200000 + n * 0x1000),
    st.sampled_from([0, 1, MEMORY - 1, MEMORY - 512, MEMORY, 0xFEE00000, 1 << 32, (1 << 64) - 1, (1 << 64) - 4096]),
    st.integers(0, (1 << 64) - 1),
)
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 4, 8, 12, 16, 20, 24, 44, 64, 512, 4096, 65536, 1 << 20, 1 << 31, (1 << 32) - 1]),
    st.integers(0, (1 << 32) - 1),
)
SMALL = st.integers(0, 20)
FLAGS = st.one_of(st.sampled_from([0, 1, 2, 3, 4]), st.integers(0, 0xFFFF))
PAYLOADS = st.one_of(
    st.binary(max_size=128),
    st.lists(SMALL | st.integers(0, 0xFFFFFFFF), min_size=4, max_size=16).map(
        lambda words: struct.pack(f"<{len(words)}I", *words)
    ),
    st.lists(SMALL | st.integers(0, 0xFFFF), min_size=8, max_size=32).map(
        lambda words: struct.pack(f"<{len(words)}H", *words)
    ),
)
GOOD_PLACE = st.integers(0, 63)
CHAINS = st.tuples(
    st.just("chain"),
    SMALL,
    st.lists(st.tuples(st.integers(16, 256), PAYLOADS), min_size=1, max_size=3)
    | st.lists(st.tuples(st.integers(1, 4096), PAYLOADS), max_size=3),
    st.lists(st.sampled_from([1, 1, 8, 64, 1024, 4096]), max_size=3),
)
OTHER_ACTIONS = st.one_of(
    st.tuples(st.just("descriptor"), SMALL, SMALL, ADDRESSES, LENGTHS, FLAGS, SMALL),
    st.tuples(st.just("available"), SMALL, SMALL, st.sampled_from([1, 1, 1, 2, 64, 40000])),
    st.tuples(st.just("payload"), GOOD_PLACE, PAYLOADS),
    st.tuples(st.just("notify"), SMALL | st.just(0xFFFF)),
    st.tuples(st.just("notify"), SMALL),
    st.tuples(st.just("config"), st.integers(0, 4095), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
    st.tuples(
        st.just("register"), st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)
    ),
    st.tuples(st.just("register"), st.integers(0, 0x3F), st.sampled_from([1, 2, 4]), SMALL),
    st.tuples(st.just("function"), st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("msix"), st.integers(0, 0xFFF), st.sampled_from([4, 8]), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("status"), st.integers(0, 255)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("settle")),
)
ACTIONS = st.lists(st.booleans().flatmap(lambda right: CHAINS if right else OTHER_ACTIONS), min_size=8, max_size=30)


class Hostile:
    """Does what it likes to the queues and registers of *target*."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.memory = target.memory
        self.registers = target.registers
        self.available: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.next_place = 0
        self.packed = False

    def start(self, features: int, sizes: list[int], places: list[tuple[int, int, int] | None]) -> None:
        registers = self.registers
        registers.set_status(0)
        registers.set_status(ACKNOWLEDGE | DRIVER)
        accepted = registers.features() & features | 1 << VERSION_1
        self.packed = bool(accepted >> RING_PACKED & 1)
        registers.accept(accepted)
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.available, self.taken = {}, {}
        self.places = []
        for index in range(len(self.target.transport.queues)):
            at = AREA + index * RINGS
            self.memory.clear(at, RINGS)
            place = places[index % len(places)] or (at, at + 0x1000, at + 0x2000)
            self.places.append((at, at + 0x1000, at + 0x2000))
            registers.set_up(index, sizes[index % len(sizes)], place)
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def queue(self, number: int) -> int:
        return number % max(1, len(self.target.transport.queues))

    def descriptor(self, number: int, at: int, address: int, length: int, flags: int, following: int) -> None:
        table = self.places[self.queue(number)][0] + 16 * at
        if self.packed:
            self.memory.write(table, struct.pack("<QIHH", address, length, following, flags ^ 1 << 7))
        else:
            self.memory.write(table, struct.pack("<QIHH", address, length, flags & 7, following))

    def chain(self, number: int, readable: list[tuple[int, bytes]], writable: list[int]) -> None:
        """A chain that is right: of readable segments with a payload each, and writable ones."""
        parts = []
        for length, payload in readable:
            at = self.place()
            self.memory.write(at, payload)
            parts.append((at, max(1, min(length, 2 * len(payload))), 0))
        parts += [(self.place(), length, 2) for length in writable]
        queue = self.queue(number)
        first = self.taken.get(queue, 0)
        if first + len(parts) > 64:
            first = 0
        self.taken[queue] = first + len(parts)
        for at, (address, length, flags) in reversed(list(enumerate(parts))):
            more = 1 if at + 1 < len(parts) else 0
            self.descriptor(number, first + at, address, length, flags | more, first + at + 1)
        if parts and not self.packed:
            self.make_available(number, first, 1)
        self.registers.notify(queue)

    def place(self) -> int:
        self.next_place = (self.next_place + 1) % 64
        return AREA + 0x200000 + self.next_place * 0x1000

    def make_available(self, number: int, head: int, count: int) -> None:
        queue = self.queue(number)
        ring = self.places[queue][1]
        index = self.available.get(queue, 0)
        self.memory.write(ring + 4 + 2 * (index % 64), struct.pack("<H", head))
        self.available[queue] = index + count & 0xFFFF
        self.memory.write(ring + 2, struct.pack("<H", self.available[queue]))

    def act(self, action: tuple[Any, ...]) -> None:
        kind, *arguments = action
        target, registers = self.target, self.registers
        if kind == "descriptor":
            self.descriptor(*arguments)
        elif kind == "chain":
            self.chain(*arguments)
        elif kind == "available":
            self.make_available(*arguments)
        elif kind == "payload":
            self.memory.write(AREA + 0x200000 + arguments[0] * 0x1000, arguments[1])
        elif kind == "notify":
            target.transport.notify(arguments[0])
        elif kind == "config":
            offset, size, value = arguments
            registers.set_config(offset % 0x800, size, value & (1 << 8 * size) - 1)
            registers.config(offset % 0x800, size)
        elif kind == "register":
            target.write_register(*arguments)
        elif kind == "function" and isinstance(target.transport, PciTransport):
            register, size, value = arguments
            target.transport.function.write(register, size, value & (1 << 8 * size) - 1)
            target.transport.function.read(register, size)
        elif kind == "msix" and isinstance(target.transport, PciTransport):
            target.transport.msix.write(arguments[0], arguments[1], arguments[2] & (1 << 8 * arguments[1]) - 1)
        elif kind == "status":
            registers.set_status(arguments[0])
        elif kind == "reset":
            registers.set_status(0)
        elif kind == "settle":
            target.settle()


DEADLY = {"register", "status", "reset", "notify"}
OK = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

PLACES = st.lists(st.none() | st.tuples(ADDRESSES, ADDRESSES, ADDRESSES), min_size=1, max_size=3)
SIZES = st.lists(st.sampled_from([64, 64, 64, 64, 8, 1, 0, 3, 65535]), min_size=1, max_size=3)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    features=now_and_then((1 << 64) - 1, st.just(0) | st.integers(0, (1 << 64) - 1)),
    sizes=now_and_then([64], SIZES),
    places=now_and_then([None], PLACES),
    actions=ACTIONS,
)
def test_nothing_that_a_driver_does_is_more_than_a_reset_mends(
    target: Target,
    bugs: list[BaseException],
    features: int,
    sizes: list[int],
    places: list[tuple[int, int, int] | None],
    actions: list[tuple[Any, ...]],
) -> None:
    driver = Hostile(target)
    driver.start(features, sizes, places)
    for action in actions:
        driver.act(action)
        if action[0] == "settle" or (action[0] in DEADLY and target.registers.status() & OK != OK):
            target.settle()
            driver.start((1 << 64) - 1, [64], [None])
    target.settle()
    target.works()
    assert not bugs, "".join(map(repr, bugs))


def test_every_offset_of_the_registers_can_be_written(target: Target, bugs: list[BaseException]) -> None:
    for offset in (*range(0x140), *range(0x1000, 0x1010), *range(0x2000, 0x2040), *range(0x3000, 0x3020)):
        for size in (1, 2, 4, 8):
            for value in (0, 1, (1 << 64) - 1):
                target.write_register(offset, size, value)
    target.settle()
    target.works()
    assert not bugs


def test_a_queue_may_be_gone_while_it_is_served(target: Target, bugs: list[BaseException]) -> None:
    """Resets and notifications from two threads."""
    driver = Hostile(target)
    stop = threading.Event()

    def notify() -> None:
        while not stop.is_set():
            for index in range(len(target.transport.queues)):
                target.transport.notify(index)

    thread = threading.Thread(target=notify)
    thread.start()
    try:
        for _ in range(20):
            driver.start((1 << 64) - 1, [64], [None])
            for index in range(len(target.transport.queues)):
                driver.chain(index, [(64, bytes(64))], [512])
    finally:
        stop.set()
        thread.join()
    target.settle()
    assert target.registers.status() & ~NEEDS_RESET == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    target.works()
    assert not bugs
