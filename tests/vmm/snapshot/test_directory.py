# SPDX-License-Identifier: Apache-2.0
"""Snapshots in directories: whole or not there, refused when they are damaged, restored without copying memory."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.machines import open_soft

from softkvm import api
from softkvm.cli.devices import specs_of
from softkvm.vmm.errors import SnapshotError
from softkvm.vmm.host_memory import merged
from softkvm.vmm.machine import Config, Machine
from softkvm.vmm.memory import GIB, MIB, PAGE_SIZE
from softkvm.vmm.snapshot import directory, manifest
from softkvm.vmm.snapshot.directory import Snapshot, save
from softkvm.vmm.snapshot.tracking import tracked, untrack

COUNTER = 0x9000
#: Real mode: counts the word at COUNTER up for ever.
COUNT = bytes.fromhex("31c0 8ed8") + b"\xff\x06" + struct.pack("<H", COUNTER) + bytes.fromhex("ebfa")


@pytest.fixture
def kvm() -> Iterator[api.Kvm]:
    with open_soft() as opened:
        yield opened


@pytest.fixture
def machine(kvm: api.Kvm) -> Iterator[Machine]:
    with Machine(kvm, Config(32 * MIB)) as made:
        made.load(COUNT, raw=True)
        yield made


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


def test_restored_machine_goes_on_and_the_snapshot_stays_as_it_is(
    machine: Machine, kvm: api.Kvm, tmp_path: Path
) -> None:
    machine.memory.write(20 * MIB, b"kept")
    machine.start()
    assert moves(machine)
    held: list[int] = []
    save(machine, tmp_path / "one", stopped=lambda: held.append(counter(machine)))
    assert moves(machine)  # the machine that was saved goes on
    before = (tmp_path / "one" / "memory").read_bytes()
    for _ in range(2):
        with Snapshot(tmp_path / "one") as snapshot:
            restored = snapshot.restore(kvm)
        with restored:
            assert counter(restored) == held[0]
            assert restored.memory.read(20 * MIB, 4) == b"kept"
            restored.memory.write(20 * MIB, b"else")
            restored.start()
            assert moves(restored)
    assert (tmp_path / "one" / "memory").read_bytes() == before


def test_the_files_are_the_users_and_memory_has_holes(machine: Machine, tmp_path: Path) -> None:
    saved = save(machine, tmp_path / "one")
    found = tmp_path / "one"
    assert sorted(path.name for path in found.iterdir()) == ["manifest.json", "memory", "state.json"]
    assert found.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in found.iterdir()} == {0o600}
    assert (found / "memory").stat().st_size == 32 * MIB
    assert saved.memory.stored < MIB
    assert (found / "memory").stat().st_blocks * 512 < 2 * MIB
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_memory_above_the_hole_and_large_memory_cost_nothing(kvm: api.Kvm, tmp_path: Path) -> None:
    """8 GiB of which the guest has touched a few pages."""
    with Machine(kvm, Config(8 * GIB)) as machine:
        machine.load(COUNT, raw=True)
        machine.memory.write(4 * GIB + 2 * GIB, b"far up")
        assert save(machine, tmp_path / "one").memory.stored < 2 * MIB
    with Snapshot(tmp_path / "one") as snapshot:
        snapshot.verify()
        with snapshot.restore(kvm) as restored:
            assert restored.memory.read(6 * GIB, 6) == b"far up"
            assert save(restored, tmp_path / "two").memory.stored < 2 * MIB
    with Snapshot(tmp_path / "two") as snapshot, snapshot.restore(kvm) as restored:
        assert restored.memory.read(6 * GIB, 6) == b"far up"


def test_given_back_memory_is_zeroes_in_the_next_snapshot(kvm: api.Kvm, tmp_path: Path) -> None:
    """A balloon's pages: the file that the machine began with still has what they had."""
    with Machine(kvm, Config(32 * MIB)) as machine:
        machine.memory.write(16 * MIB, b"old")
        save(machine, tmp_path / "one")
    with Snapshot(tmp_path / "one") as snapshot, snapshot.restore(kvm, watch=True) as restored:
        restored.memory.discard(16 * MIB, PAGE_SIZE)
        save(restored, tmp_path / "whole")
        save(restored, tmp_path / "part", base=tmp_path / "one")
    for name in ("whole", "part"):
        with Snapshot(tmp_path / name) as snapshot, snapshot.restore(kvm) as restored:
            assert restored.memory.read(16 * MIB, 3) == bytes(3)


def test_a_snapshot_of_changes_has_what_guest_and_devices_wrote(machine: Machine, kvm: api.Kvm, tmp_path: Path) -> None:
    machine.memory.write(24 * MIB, b"base")
    machine.start()
    save(machine, tmp_path / "one", watch=True)
    machine.memory.write(25 * MIB, b"device")
    assert moves(machine)
    two = save(machine, tmp_path / "two", base=tmp_path / "one", watch=True)
    machine.memory.write(26 * MIB, b"later")
    held: list[int] = []
    three = save(
        machine, tmp_path / "three", base=tmp_path / "two", watch=True, stopped=lambda: held.append(counter(machine))
    )
    assert max(two.memory.stored, three.memory.stored) <= 64 * PAGE_SIZE
    with Snapshot(tmp_path / "three") as snapshot, snapshot.restore(kvm) as restored:
        assert counter(restored) == held[0]
        assert [restored.memory.read(at * MIB, 6) for at in (24, 25, 26)] == [b"base\0\0", b"device", b"later\0"]
        restored.start()
        assert moves(restored)
    with Snapshot(tmp_path / "two") as snapshot, snapshot.restore(kvm) as restored:
        assert restored.memory.read(26 * MIB, 5) == bytes(5)
    os.rename(tmp_path, tmp_path.with_name("moved"))  # together they may move
    with Snapshot(tmp_path.with_name("moved") / "three") as snapshot:
        snapshot.verify()
    os.rename(tmp_path.with_name("moved"), tmp_path)


def test_changes_that_were_not_watched_cannot_be_saved_alone(machine: Machine, tmp_path: Path) -> None:
    save(machine, tmp_path / "one")
    with pytest.raises(SnapshotError, match="watched since nothing"):
        save(machine, tmp_path / "two", base=tmp_path / "one")
    save(machine, tmp_path / "three", watch=True)
    with pytest.raises(SnapshotError, match="watched since snapshot"):
        save(machine, tmp_path / "four", base=tmp_path / "one")
    untrack(machine)
    assert tracked(machine) is None
    assert not machine.memory.logging
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


def test_another_base_than_it_was_is_refused(machine: Machine, tmp_path: Path) -> None:
    save(machine, tmp_path / "one", watch=True)
    save(machine, tmp_path / "two", base=tmp_path / "one")
    os.rename(tmp_path / "one", tmp_path / "old")
    with pytest.raises(SnapshotError, match="it is no snapshot"):
        Snapshot(tmp_path / "two")
    save(machine, tmp_path / "one")
    with pytest.raises(SnapshotError, match="another snapshot than the base was"):
        Snapshot(tmp_path / "two")


def test_the_guest_is_told_of_its_twin(machine: Machine, kvm: api.Kvm, tmp_path: Path) -> None:
    """A new generation ID; not for a machine that goes on alone."""
    save(machine, tmp_path / "one")
    identifier = machine.board.vmgenid.identifier
    with Snapshot(tmp_path / "one") as snapshot:
        with snapshot.restore(kvm) as one, snapshot.restore(kvm) as other:
            assert len({identifier, one.board.vmgenid.identifier, other.board.vmgenid.identifier}) == 3
        with snapshot.restore(kvm, identity=None) as same:
            assert same.board.vmgenid.identifier == identifier


def test_clones_have_context_ids_of_their_own(kvm: api.Kvm, tmp_path: Path) -> None:
    specs = specs_of([["--vsock", "cid=40"]])
    with Machine(kvm, Config(32 * MIB, device_specs=specs)) as machine:
        machine.load(COUNT, raw=True)
        save(machine, tmp_path / "one")
    found = []
    with Snapshot(tmp_path / "one") as snapshot:
        for number in range(3):
            with snapshot.restore(kvm, identity=number, device_specs=specs_of([["--vsock", ""]])) as clone:
                found.append(clone.devices[0].hub.guest_cid)
    assert found == [40, 41, 42]


def test_the_longest_chain_has_no_more_mappings_than_a_process_may_have() -> None:
    assert (directory.MOST_BASES + 1) * directory.MOST_RANGES < 65530 - 2000


# -- nothing half done


def test_a_name_that_is_taken_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    with pytest.raises(SnapshotError, match="it exists"):
        save(machine, tmp_path / "one")
    assert (tmp_path / "one").read_text() == "mine"


def test_a_directory_that_is_not_there_is_named(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="No such file or directory"):
        save(machine, tmp_path / "none" / "one")


def test_a_failure_leaves_nothing_and_the_machine_runs(machine: Machine, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, os.strerror(28))

    machine.start()
    with pytest.raises(SnapshotError, match="No space left on device"):
        save(machine, tmp_path / "one", stopped=fail)
    assert list(tmp_path.iterdir()) == []
    assert moves(machine)


def test_what_a_killed_process_left_behind_is_taken_away(machine: Machine, tmp_path: Path) -> None:
    dead = tmp_path / ".one.4194305.0123abcd.tmp"  # no process has so high a number
    dead.mkdir()
    others = tmp_path / ".two.4194305.0123abcd.tmp"
    others.mkdir()
    save(machine, tmp_path / "one")
    assert not dead.exists()
    assert others.exists()


# -- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshots")
    with open_soft() as kvm, Machine(kvm, Config(32 * MIB)) as machine:
        machine.load(COUNT, raw=True)
        save(machine, path / "one", watch=True)
        machine.memory.write(8 * MIB, b"x")
        save(machine, path / "two", base=path / "one")
    return path


Damage = Callable[[bytes], bytes]
damages: st.SearchStrategy[Damage] = st.one_of(
    st.builds(
        lambda at, bit: (
            lambda data: data[: at % len(data)] + bytes([data[at % len(data)] ^ 1 << bit]) + data[at % len(data) + 1 :]
        ),
        st.integers(0, 1 << 40),
        st.integers(0, 7),
    ),
    st.builds(lambda at: lambda data: data[: at % len(data)], st.integers(0, 1 << 40)),
    st.builds(lambda more: lambda data: data + more, st.binary(min_size=1, max_size=10)),
    st.builds(lambda new: lambda data: new, st.binary(max_size=100)),
)


@given(name=st.sampled_from(["manifest.json", "state.json"]), damage=damages, which=st.sampled_from(["one", "two"]))
@settings(max_examples=80)
def test_damaged_files_are_refused_in_one_line(whole: Path, name: str, damage: Damage, which: str) -> None:
    file = whole / which / name
    data = file.read_bytes()
    broken = damage(data)
    try:
        file.write_bytes(broken)
        # blanks at the end of JSON mean nothing
        if broken != data and not (name == "manifest.json" and broken.strip() == data.strip()):
            with pytest.raises(SnapshotError) as refused:
                Snapshot(whole / "two")
            assert "\n" not in str(refused.value)
            assert str(whole) in str(refused.value)
    finally:
        file.write_bytes(data)
    Snapshot(whole / "two").close()


def test_damaged_memory_is_found_by_its_size_and_by_its_checksum(whole: Path) -> None:
    file = whole / "one" / "memory"
    with file.open("r+b") as memory:
        memory.truncate(32 * MIB - PAGE_SIZE)
        with pytest.raises(SnapshotError, match=r"memory is damaged: .* bytes, expected 33554432"):
            Snapshot(whole / "two")
        memory.truncate(32 * MIB)
        memory.seek(20 * MIB)
        memory.write(b"!")
        memory.flush()
        with Snapshot(whole / "two") as snapshot, pytest.raises(SnapshotError, match="checksum"):
            snapshot.verify()
        memory.seek(20 * MIB)
        memory.write(b"\0")
        memory.flush()
        with Snapshot(whole / "two") as snapshot:
            snapshot.verify()


def forged(whole: Path, **changes: object) -> bytes:
    """A manifest with a right checksum and other contents."""
    body = json.loads((whole / "one" / "manifest.json").read_bytes())
    del body["sha256"]
    body.update(changes)
    return json.dumps({**body, "sha256": manifest._digest(body)}).encode()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "something"}, "none of a snapshot's"),
        ({"version": 2}, "snapshot of format 2, expected 1"),
        ({"softkvm": "9.9"}, r"snapshot of softkvm 9\.9, this is"),
        ({"machine": {}}, "machine: expected memory_size"),
        ({"memory": {"size": -1, "stored": 0, "sha256": "0" * 64}}, "expected a number"),
        ({"memory": {"size": PAGE_SIZE, "stored": 0, "sha256": "0" * 64}}, "memory of two sizes"),
        ({"base": {"path": "one"}}, "damaged"),
        ({"files": [1]}, "damaged"),
        ({"id": "../.."}, "id"),
        ({"more": 1}, "it has more, too"),
        ({"extra": 5}, "damaged"),
    ],
)
def test_manifests_that_say_what_cannot_be_are_refused(whole: Path, changes: dict[str, object], why: str) -> None:
    with pytest.raises(SnapshotError, match=why):
        manifest.decode(forged(whole, **changes))


def test_a_machine_that_cannot_be_is_refused(whole: Path, kvm: api.Kvm, tmp_path: Path) -> None:
    """A manifest that somebody has made, of a machine with no vCPU."""
    body = json.loads((whole / "one" / "manifest.json").read_bytes())
    for name in ("memory", "state.json"):
        os.link(whole / "one" / name, tmp_path / name)
    (tmp_path / "manifest.json").write_bytes(forged(whole, machine={**body["machine"], "vcpus": 0}))
    with Snapshot(tmp_path) as snapshot, pytest.raises(SnapshotError, match="0 vCPUs"):
        snapshot.restore(kvm)
    (tmp_path / "manifest.json").write_bytes(forged(whole, machine={**body["machine"], "vcpus": 2}))
    with Snapshot(tmp_path) as snapshot, pytest.raises(SnapshotError, match="state of 1 vCPUs, expected 2"):
        snapshot.restore(kvm)


def test_files_that_have_changed_since_are_refused(
    machine: Machine, kvm: api.Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"blocks")
    monkeypatch.setattr(machine.board, "files", lambda: [str(disk)])
    save(machine, tmp_path / "one")
    with Snapshot(tmp_path / "one") as snapshot:
        snapshot.restore(kvm).close()
        disk.write_bytes(b"other blocks")
        with pytest.raises(SnapshotError, match="disk: it has changed since"):
            snapshot.restore(kvm)
        disk.unlink()
        with pytest.raises(SnapshotError, match="disk: No such file"):
            snapshot.restore(kvm)


ranges = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 5)), max_size=60)


@given(ranges, st.integers(1, 20))
def test_fewer_ranges_hold_the_same_and_more(pairs: list[tuple[int, int]], most: int) -> None:
    apart = merged([(start * PAGE_SIZE, count * PAGE_SIZE) for start, count in pairs])
    fewer = directory.few(apart, most)
    assert len(fewer) <= most
    assert fewer == merged(fewer)
    for start, size in apart:
        assert any(first <= start and start + size <= first + length for first, length in fewer)
    if len(apart) <= most:
        assert fewer == apart
