# SPDX-License-Identifier: Apache-2.0
"""A machine moves while its guest runs: it goes on over there, or here if anything goes wrong, and never twice."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.guests import linux_guest
from tests.support.machines import open_soft

from softkvm import api
from softkvm.vmm.block.files import create_qcow2, open_image
from softkvm.vmm.block.image import ImageFileError
from softkvm.vmm.console import Console
from softkvm.vmm.devices.virtio_blk import DiskSpec
from softkvm.vmm.errors import MigrationError
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import MIB, PAGE_SIZE
from softkvm.vmm.migration import stream
from softkvm.vmm.migration.source import Migration, Progress, Report
from softkvm.vmm.migration.stream import Channel, Kind
from softkvm.vmm.migration.target import Incoming, listen_for
from softkvm.vmm.outcome import End

COUNTER = 0x9000
#: Real mode: counts the word at COUNTER up for ever.
COUNT = bytes.fromhex("31c0 8ed8") + b"\xff\x06" + struct.pack("<H", COUNTER) + bytes.fromhex("ebfa")


@pytest.fixture
def kvm() -> Iterator[api.Kvm]:
    with open_soft() as opened:
        yield opened


def counter(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(COUNTER, 2), "little")


def moves(machine: Machine) -> bool:
    """Whether the guest counts."""
    before = counter(machine)
    deadline = time.monotonic() + 20
    while counter(machine) == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def counting(kvm: api.Kvm, **config: object) -> Machine:
    machine = Machine(kvm, Config(32 * MIB, **config))  # type: ignore[arg-type]
    machine.load(COUNT, raw=True)
    machine.memory.write(16 * MIB, random.Random(1).randbytes(3 * PAGE_SIZE))
    return machine


class Arrival(threading.Thread):
    """A target on a thread of its own: *machine*, or the *error* that there was."""

    def __init__(self, kvm: api.Kvm, connection: socket.socket, console: Callable[[bytes], None] | None = None) -> None:
        super().__init__()
        self.machine: Machine | None = None
        self.error: MigrationError | None = None
        self._kvm, self._connection, self._console = kvm, connection, console
        self.start()

    def run(self) -> None:
        with Channel(self._connection) as channel:
            try:
                self.machine = listen_for(channel, self._kvm, self._console)
            except MigrationError as error:
                self.error = error

    def arrived(self) -> Machine:
        self.join(60)
        assert self.machine is not None, self.error
        return self.machine


def move(machine: Machine, kvm: api.Kvm, console: Callable[[bytes], None] | None = None) -> tuple[Machine, Report]:
    """Move *machine* to a new one in this process, which is not started."""
    here, there = socket.socketpair()
    arrival = Arrival(kvm, there, console)
    with Channel(here) as channel:
        report = Migration(machine, channel).run()
    return arrival.arrived(), report


def test_the_guest_goes_on_and_the_source_has_ended(kvm: api.Kvm) -> None:
    with counting(kvm) as machine:
        machine.memory.write(20 * MIB, b"gone")
        machine.start()
        assert moves(machine)
        other, report = move(machine, kvm)
        with other:
            assert machine.wait(20).end is End.MIGRATED
            last = counter(machine)
            assert counter(other) == last  # not a step more was made here
            assert other.memory.read(16 * MIB, 3 * PAGE_SIZE) == machine.memory.read(16 * MIB, 3 * PAGE_SIZE)
            assert bytes(other.memory.view) == bytes(machine.memory.view)
            assert other.board.vmgenid.identifier == machine.board.vmgenid.identifier  # there is one machine
            other.start()
            assert moves(other)
            assert counter(machine) == last
        assert report.rounds >= 1
        assert 0 < report.downtime_s < report.seconds
        assert report.sent < 4 * MIB


def test_pages_that_have_become_zeroes_are_zeroes_there(kvm: api.Kvm) -> None:
    with counting(kvm) as machine:
        machine.memory.write(24 * MIB, b"was" * 4000)
        machine.start()
        here, there = socket.socketpair()
        arrival = Arrival(kvm, there)
        cleared = False

        def clear(progress: Progress) -> None:
            nonlocal cleared
            if not cleared:
                machine.memory.clear(24 * MIB, 3 * PAGE_SIZE)
                cleared = True

        with Channel(here) as channel:
            Migration(machine, channel, progress=clear).run()
        with arrival.arrived() as other:
            assert cleared
            assert other.memory.read(24 * MIB, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)


def test_a_paused_machine_arrives_paused(kvm: api.Kvm) -> None:
    with counting(kvm) as machine:
        machine.start()
        assert moves(machine)
        machine.pause()
        other, _ = move(machine, kvm)
        with other:
            other.start()
            assert other.paused
            before = counter(other)
            time.sleep(0.1)
            assert counter(other) == before
            other.resume()
            assert moves(other)


@pytest.mark.guest
def test_linux_moves_while_it_works(kvm: api.Kvm) -> None:
    guest = linux_guest()
    console = Console()
    work = "for i in 1 2 3 4 5 6; do head -c 2000000 /dev/urandom > /tmp/$i; md5sum /tmp/$i; done > /tmp/sums"
    machine = Machine(kvm, Config(128 * MIB, 2), console.output)
    try:
        console.attach(machine)
        machine.load(guest.kernel, guest.initrd, f"{guest.command_line} quiet")
        machine.start()
        console.expect("# ", 120)
        console.send(f"({work}; echo all done) &\n")
        console.expect("# ", 30)
        for _ in range(2):
            other, report = move(machine, kvm, console.output)
            assert machine.wait(20).end is End.MIGRATED
            machine.close()
            machine = other
            console.attach(machine)
            machine.start()
            assert report.rounds >= 1
        console.expect("all done", 60)
        console.send("md5sum -c /tmp/sums; echo checked $?\n")
        console.expect(r"checked 0\r", 30)
        console.send("dmesg | grep -cE 'BUG|Call Trace|stall|lockup'; echo looked\n")
        console.expect(r"^0\r\nlooked", 30)
    finally:
        machine.close()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_disk_is_the_sides_that_has_the_machine(kvm: api.Kvm, tmp_path: Path, format: str) -> None:
    """Its image is locked by one side, then by the other; if the other refuses, by the first again."""
    path = tmp_path / "disk"
    if format == "raw":
        path.write_bytes(bytes(1 << 20))
    else:
        create_qcow2(str(path), 1 << 20)
    spec = DiskSpec(str(path), format=format)

    def arriving(connection: socket.socket, new: Callable[[Config], Machine], found: list[Machine | None]) -> None:
        with (
            contextlib.suppress(MigrationError),
            Channel(connection) as channel,
            Incoming(channel, lambda config, extra: new(config)) as incoming,
        ):
            found.append(incoming.receive())

    def refused(config: Config) -> Machine:
        open_image(str(path)).close()  # it is to be had
        raise MigrationError("not here")

    def moved(machine: Machine, new: Callable[[Config], Machine]) -> list[Machine | None]:
        here, there = socket.socketpair()
        found: list[Machine | None] = []
        thread = threading.Thread(target=arriving, args=(there, new, found))
        thread.start()
        try:
            with Channel(here) as channel:
                Migration(machine, channel).run()
        finally:
            thread.join(60)
        return found

    with counting(kvm, device_specs=(spec,)) as machine:
        machine.start()
        with pytest.raises(MigrationError, match="not here"):
            moved(machine, refused)
        with pytest.raises(ImageFileError, match="another process"):
            open_image(str(path))
        assert moves(machine)
        (other,) = moved(machine, lambda config: Machine(kvm, replace(config, device_specs=(spec,))))
        assert other is not None
        with other:
            with pytest.raises(ImageFileError, match="another process"):
                open_image(str(path))
            other.start()
            assert moves(other)
    open_image(str(path)).close()


# -- a guest that writes all the time


def test_a_guest_that_is_quicker_than_the_connection_is_slowed_down_and_let_go_again(kvm: api.Kvm) -> None:
    with counting(kvm) as machine:
        machine.start()
        here, there = socket.socketpair()
        arrival = Arrival(kvm, there)
        percents: list[int] = []

        def tell(progress: Progress) -> None:
            percents.append(progress.percent)
            machine.memory.write(8 * MIB, bytes(range(256)) * 4096)  # as much each round, whatever the guest gets to
            if progress.percent <= 40:
                migration.cancel()

        with Channel(here) as channel:
            migration = Migration(machine, channel, progress=tell, downtime_s=-1)
            with pytest.raises(MigrationError, match="cancelled"):
                migration.run()
        arrival.join(60)
        assert percents == sorted(percents, reverse=True)
        assert percents[-1] <= 40
        assert machine.vcpus[0].bandwidth is None
        assert arrival.machine is None


def test_a_quota_of_the_users_is_there_afterwards(kvm: api.Kvm) -> None:
    with counting(kvm, cpu_quota=50) as machine:
        machine.start()
        quota = machine.vcpus[0].bandwidth
        here, there = socket.socketpair()
        with Channel(here) as channel:
            migration = Migration(machine, channel)
            migration._throttle.tighten()
            there.close()
            with pytest.raises(MigrationError):
                migration.run()
            migration._throttle.end()
        assert machine.vcpus[0].bandwidth is quota
        assert moves(machine)


# -- whatever goes wrong


def large_leaves(machine: Machine) -> int:
    stats = machine.vm.stats() if hasattr(machine.vm, "stats") else {}
    return int(stats.get("pages_2m", 0))


def test_cancelling_leaves_the_source_with_its_large_pages(kvm: api.Kvm) -> None:
    """Row 6: what logging has split is given up and mapped large again."""
    with counting(kvm) as machine:
        machine.start()
        assert moves(machine)
        assert large_leaves(machine) > 0
        here, there = socket.socketpair()
        arrival = Arrival(kvm, there)
        seen: list[int] = []

        def tell(progress: Progress) -> None:
            assert moves(machine)
            seen.append(large_leaves(machine))
            if len(seen) == 3:
                migration.cancel()

        with Channel(here) as channel:
            migration = Migration(machine, channel, progress=tell, downtime_s=-1)
            with pytest.raises(MigrationError, match="cancelled"):
                migration.run()
        arrival.join(60)
        assert arrival.machine is None
        assert min(seen) == 0  # the page that is written is mapped small meanwhile
        assert not machine.ended.is_set()
        assert not machine.memory.logging
        deadline = time.monotonic() + 20
        while large_leaves(machine) == 0 and time.monotonic() < deadline:
            assert moves(machine)
        assert large_leaves(machine) > 0


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.PAGES, Kind.STATE, Kind.COMMIT])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_connection_that_ends_at_any_point_leaves_one_machine(kvm: api.Kvm, kind: Kind, side: str) -> None:
    """The proxy passes frames on, up to the first of a kind, and lets both sides have lost each other then."""
    with counting(kvm) as machine, Proxy(kind, after=side == "target") as proxy:
        machine.start()
        assert moves(machine)
        arrival = Arrival(kvm, proxy.there)
        handed_over = True
        with Channel(proxy.here) as channel:
            try:
                Migration(machine, channel).run()
            except MigrationError:
                handed_over = False
        arrival.join(60)
        if arrival.machine is not None:
            # The target had COMMIT, and its word was lost by the proxy, as no socket loses it: the one case.
            assert (kind, side) == (Kind.COMMIT, "target")
            arrival.machine.close()
        else:
            assert not handed_over
            assert not machine.ended.is_set()
            assert moves(machine)


class Proxy:
    """Two connections with a thread between them that breaks both at the first frame of *kind*, or right *after* it."""

    def __init__(self, kind: Kind, *, after: bool) -> None:
        self._kind, self._after = kind, after
        self.here, self._a = socket.socketpair()
        self._b, self.there = socket.socketpair()
        self._threads = [
            threading.Thread(target=self._forward, args=(self._a, self._b)),
            threading.Thread(target=self._back),
        ]

    def __enter__(self) -> Proxy:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._break()
        for thread in self._threads:
            thread.join()
        for end in (self._a, self._b):
            end.close()

    def _break(self) -> None:
        for end in (self._a, self._b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while header := source.recv(20, socket.MSG_WAITALL):
                _, kind, length, _ = struct.unpack("<IIQI", header)
                contents = source.recv(length, socket.MSG_WAITALL) if length else b""
                if kind == self._kind and not self._after:
                    break
                target.sendall(header + contents)
                if kind == self._kind:
                    break
        self._break()

    def _back(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._b.recv(65536):
                self._a.sendall(data)
        self._break()


def test_a_target_with_another_processor_refuses_and_says_why(kvm: api.Kvm) -> None:
    with counting(kvm) as machine:
        machine.start()
        here, there = socket.socketpair()

        def other(config: Config, extra: dict[str, object]) -> Machine:
            raise MigrationError("there is no room for it")

        errors: list[MigrationError] = []

        def receive() -> None:
            with Channel(there) as channel, Incoming(channel, other) as incoming:
                try:
                    incoming.receive()
                except MigrationError as error:
                    errors.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        refused = pytest.raises(MigrationError, match="the other side refuses: there is no room for it")
        with Channel(here) as channel, refused:
            Migration(machine, channel).run()
        thread.join()
        assert str(errors[0]) == "there is no room for it"
        assert moves(machine)


# -- what a source may send

frames = st.builds(
    lambda kind, contents, magic, wrong: (
        struct.pack("<IIQI", magic, kind, len(contents), zlib.crc32(contents) ^ wrong) + contents
    ),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=64),
        st.builds(lambda at, size: struct.pack("<QQ", at, size), st.integers(0, 1 << 63), st.integers(0, 1 << 63)),
        st.builds(lambda at: struct.pack("<Q", at) + bytes(PAGE_SIZE), st.integers(0, 1 << 63)),
    ),
    st.sampled_from([stream.MAGIC, stream.MAGIC, stream.MAGIC, 0x12345678]),
    st.sampled_from([0, 0, 0, 1]),
)


@given(st.lists(frames, max_size=4), st.booleans(), st.integers(0, 100))
@settings(max_examples=60)
def test_whatever_comes_is_refused_or_waited_for(parts: list[bytes], hello: bool, cut: int) -> None:
    """No machine comes of it, and the reason is one line."""
    data = b"".join(parts)
    if hello:
        body = stream.encode_json(
            {
                "version": stream.VERSION,
                "softkvm": "0.1.0",
                "machine": {
                    "memory_size": 32 * MIB,
                    "vcpus": 1,
                    "pit": True,
                    "hpet": True,
                    "end_when_halted": True,
                    "hyperv": False,
                },
                "files": True,
                "paused": False,
                "extra": {},
            }
        )
        data = struct.pack("<IIQI", stream.MAGIC, Kind.HELLO, len(body), zlib.crc32(body)) + body + data
    here, there = socket.socketpair()
    with open_soft() as kvm, Channel(there) as channel:
        here.sendall(data[: len(data) - cut] if cut < len(data) else data)
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(MigrationError) as refused:
            listen_for(channel, kvm)
        assert "\n" not in str(refused.value)
    here.close()


@given(st.lists(frames, max_size=3), st.booleans(), st.integers(0, 60))
@settings(max_examples=25)
def test_whatever_a_target_answers_the_machine_stays(parts: list[bytes], accepts: bool, cut: int) -> None:
    """Unless it answers as a target does, to the word that the machine is its own."""
    accepted = struct.pack("<IIQI", stream.MAGIC, Kind.ACCEPTED, 0, 0) if accepts else b""
    data = accepted + b"".join(parts)
    here, there = socket.socketpair()
    with open_soft() as kvm, counting(kvm) as machine, Channel(here) as channel:
        machine.start()
        there.sendall(data[: len(data) - cut] if cut < len(data) else data)
        there.shutdown(socket.SHUT_WR)
        swallowing = threading.Thread(target=swallow, args=(there,))
        swallowing.start()
        with pytest.raises(MigrationError) as refused:
            Migration(machine, channel).run()
        assert "\n" not in str(refused.value)
        assert not machine.ended.is_set()
        assert not machine.memory.logging
        assert moves(machine)
        channel.shut_down()
        swallowing.join()
    there.close()


def swallow(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 20):
            continue


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        ({"version": 9}, "migration of version 9, expected 1"),
        ({"softkvm": "7"}, "the source is softkvm 7"),
        ({"machine": {}}, "configuration is none"),
        ({"machine": None}, "machine: NoneType, expected dict"),
        ({"files": 5}, "files: int, expected bool"),
    ],
)
def test_hellos_of_another_kind_are_refused(kvm: api.Kvm, hello: dict[str, object], why: str) -> None:
    import softkvm

    machine = {"memory_size": 32 * MIB, "vcpus": 1, "pit": True, "hpet": True, "end_when_halted": True, "hyperv": False}
    said = {
        "version": 1,
        "softkvm": softkvm.__version__,
        "machine": machine,
        "files": True,
        "paused": False,
        "extra": {},
        **hello,
    }
    here, there = socket.socketpair()
    with Channel(here) as source, Channel(there) as channel:
        source.send(Kind.HELLO, stream.encode_json(said))
        with pytest.raises(MigrationError, match=why):
            listen_for(channel, kvm)
        with pytest.raises(MigrationError, match="the other side refuses"):
            source.receive(Kind.ACCEPTED)


@pytest.mark.parametrize(
    "where", ["", "unix:", "tcp:", "tcp:10.0.0.1:5", "tcp:127.0.0.1:70000", "unix:" + "x" * 200, "fd:3"]
)
def test_places_that_are_none_are_refused_in_one_line(where: str) -> None:
    with pytest.raises(MigrationError):
        stream.connect(where)
    with pytest.raises(MigrationError):
        stream.Listener(where)
