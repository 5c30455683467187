# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from pathlib import Path

import pytest
from tests.support.resident import resident

from softkvm import abi
from softkvm.vmm import host_memory
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.host_memory import Backing
from softkvm.vmm.memory import GIB, HOLE_END, HOLE_START, HUGE_PAGE_SIZE, MIB, GuestMemory


class SlotRecorder:
    """Stands for a VM that memory is attached to."""

    def __init__(self) -> None:
        self.regions: list[abi.kvm_userspace_memory_region] = []
        self.unmapped: list[list[tuple[int, int]]] = []

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: mmap.mmap) -> None:
        self.regions.append(region)

    def host_unmapped_ranges(self, ranges: list[tuple[int, int]]) -> None:
        self.unmapped.append(ranges)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (32 * MIB, [(0, 32 * MIB)]),
        (HOLE_START, [(0, HOLE_START)]),
        (HOLE_START + 4096, [(0, HOLE_START), (HOLE_END, HOLE_END + 4096)]),
        (6 * GIB, [(0, HOLE_START), (HOLE_END, HOLE_END + 3 * GIB)]),
    ],
)
def test_ram_leaves_a_hole_below_4_gib(size: int, expected: list[tuple[int, int]]) -> None:
    memory = GuestMemory(size)
    assert [(ram.start, ram.end) for ram in memory.ranges] == expected
    assert all((ram.hva - ram.start) % HUGE_PAGE_SIZE == 0 for ram in memory.ranges)
    memory.close()


def test_slots_tell_kvm_where_the_ram_is() -> None:
    memory = GuestMemory(HOLE_START + 2 * MIB)
    vm = SlotRecorder()
    memory.attach(vm, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)  # type: ignore[arg-type]
    assert [(r.slot, r.flags, r.guest_phys_addr, r.memory_size) for r in vm.regions] == [
        (0, 1, 0, HOLE_START),
        (1, 1, HOLE_END, 2 * MIB),
    ]
    assert vm.regions[1].userspace_addr - vm.regions[0].userspace_addr == HOLE_START
    memory.close()


def test_access_on_both_sides_of_the_hole() -> None:
    memory = GuestMemory(HOLE_START + 2 * MIB)
    for address in (0, HOLE_START - 4, HOLE_END, HOLE_END + 2 * MIB - 4):
        memory.write(address, b"abcd")
        assert memory.read(address, 4) == b"abcd"
    memory.close()


@pytest.mark.parametrize(
    ("address", "size"), [(HOLE_START - 2, 4), (HOLE_START, 1), (HOLE_END - 1, 2), (1 << 60, 1), (-1, 1), (0, -1)]
)
def test_access_outside_ram_is_an_error(address: int, size: int) -> None:
    memory = GuestMemory(HOLE_START + 2 * MIB)
    with pytest.raises(IndexError):
        memory.read(address, size)
    memory.close()


@pytest.mark.parametrize("size", [0, 4095, 1 << 50, -4096, MIB + 1])
def test_impossible_sizes_are_named(size: int) -> None:
    with pytest.raises(ConfigError, match=f"memory size {size} bytes: expected"):
        GuestMemory(size)


def test_shared_memory_can_be_mapped_through_its_descriptor() -> None:
    memory = GuestMemory(2 * MIB, shared=True)
    memory.write(0x1000, b"seen")
    with mmap.mmap(memory.fd, os.fstat(memory.fd).st_size) as other:
        assert other[memory.skip + 0x1000 : memory.skip + 0x1004] == b"seen"
    memory.close()
    memory_fd = memory.fd
    assert memory_fd == -1


PAGE = 4096


def filled(kind: Backing, directory: Path) -> GuestMemory:
    """Four MiB of ones, of which a private file has twos."""
    memory = GuestMemory(4 * MIB, shared=kind is Backing.SHARED)
    if kind is Backing.PRIVATE_FILE:
        file = directory / "memory"
        file.write_bytes(b"\x02" * (4 * MIB))
        with file.open("rb") as opened:
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            place = ctypes.c_void_p(memory.ranges[0].hva), ctypes.c_size_t(4 * MIB)
            assert libc.mmap(*place, 3, 0x12, opened.fileno(), ctypes.c_long(0)) == memory.ranges[0].hva
        memory.backing = kind
    memory.view[:] = b"\x01" * (4 * MIB)
    return memory


@pytest.mark.parametrize("kind", list(Backing))
def test_what_is_given_back_reads_as_zeroes_and_the_host_has_it(kind: Backing, tmp_path: Path) -> None:
    memory, vm = filled(kind, tmp_path), SlotRecorder()
    memory.attach(vm)  # type: ignore[arg-type]
    hva = memory.ranges[0].hva
    assert resident(hva, 4 * MIB) == 4 * MIB
    gone = [(2 * MIB, MIB), (0x3000, PAGE), (0x4000, 2 * PAGE), (0x1000, PAGE)]
    assert memory.discard_ranges(gone) == MIB + 4 * PAGE
    assert resident(hva, 4 * MIB) == 3 * MIB - 4 * PAGE
    for page in range(4 * MIB // PAGE):
        expected = 0 if page in (1, 3, 4, 5) or 512 <= page < 768 else 1
        assert memory.read(page * PAGE, PAGE) == bytes([expected]) * PAGE, page
    # One call for all, neighbours as one range, at the host's addresses.
    assert vm.unmapped == [[(hva + 0x1000, PAGE), (hva + 0x3000, 3 * PAGE), (hva + 2 * MIB, MIB)]]
    memory.write(0x1000, b"again")
    assert memory.read(0x1000, 6) == b"again\0"
    assert memory.discard(0, 4 * MIB) == 4 * MIB
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)
    memory.close()


def test_memory_on_both_sides_of_the_hole_is_given_back() -> None:
    memory = GuestMemory(HOLE_START + 2 * MIB)
    for gpa in (HOLE_START - PAGE, HOLE_END):
        memory.write(gpa, b"there")
    assert memory.discard_ranges([(HOLE_START - PAGE, PAGE), (HOLE_END, PAGE)]) == 2 * PAGE
    assert memory.read(HOLE_START - PAGE, 5) == memory.read(HOLE_END, 5) == bytes(5)
    memory.close()


@pytest.mark.parametrize("wrong", [(0, PAGE + 1), (1, PAGE), (4 * MIB, PAGE), (-PAGE, PAGE), (HOLE_END, PAGE)])
def test_a_batch_with_something_wrong_gives_nothing_back(wrong: tuple[int, int], tmp_path: Path) -> None:
    memory = filled(Backing.ANONYMOUS, tmp_path)
    with pytest.raises((IndexError, ValueError)):
        memory.discard_ranges([(2 * MIB, PAGE), wrong])
    assert memory.read(0, 4 * MIB) == b"\x01" * (4 * MIB)
    memory.close()


def test_an_empty_batch_tells_kvm_nothing() -> None:
    memory, vm = GuestMemory(2 * MIB), SlotRecorder()
    memory.attach(vm)  # type: ignore[arg-type]
    assert memory.discard_ranges([]) == memory.discard(0, 0) == 0
    assert vm.unmapped == []
    memory.close()


def test_memory_that_is_kept_for_a_device_stays(tmp_path: Path) -> None:
    memory = filled(Backing.ANONYMOUS, tmp_path)
    memory.keep("a device is assigned")
    assert memory.discard(0, 4 * MIB) == 0
    assert memory.kept_for == "a device is assigned"
    assert memory.read(0, 4 * MIB) == b"\x01" * (4 * MIB)
    memory.close()


def test_pinned_memory_is_all_there_and_stays() -> None:
    memory = GuestMemory(2 * MIB)
    memory.pin()
    assert resident(memory.ranges[0].hva, 2 * MIB) == 2 * MIB
    assert memory.discard(0, 2 * MIB) == 0
    assert memory.kept_for == "its memory is pinned"
    memory.close()


def test_memory_that_the_host_does_not_lock_is_refused_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("softkvm.vmm.memory.lock", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8192 * 1024, 8192 * 1024))
    memory = GuestMemory(2 * MIB)
    with pytest.raises(ConfigError, match=r"^the host does not lock 2 MiB of memory: .*ulimit -l is 8192 KiB"):
        memory.pin()
    assert not memory.kept_for
    memory.close()


@pytest.mark.parametrize("code", ["EINVAL", "ENOMEM"])
def test_what_the_host_does_not_take_is_zeroes_all_the_same(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked memory; more mappings than a process may have."""

    def refuse(address: int, size: int) -> None:
        raise OSError(getattr(errno, code), "")

    monkeypatch.setattr(host_memory, "_replace", refuse)
    memory = filled(Backing.PRIVATE_FILE, tmp_path)
    assert memory.discard(PAGE, PAGE) == 0
    assert memory.read(0, 3 * PAGE) == b"\x01" * PAGE + bytes(PAGE) + b"\x01" * PAGE
    memory.close()


def test_walls_stand_around_the_ram() -> None:
    """What runs past it ends there, and the host tells two guests' memory apart."""
    memories = [GuestMemory(2 * MIB) for _ in range(3)]
    mapped = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    for memory in memories:
        start = memory.ranges[0].hva
        assert [f"{start:x}-{start + 2 * MIB:x}", "rw-p"] in mapped
        assert any(place.startswith(f"{start + 2 * MIB:x}-") and rights == "---p" for place, rights in mapped)
        memory.close()


def test_memory_is_zero_if_every_byte_is() -> None:
    memory = GuestMemory(2 * MIB)
    hva = memory.ranges[0].hva
    assert host_memory.is_zero(hva, 2 * MIB)
    assert host_memory.is_zero(hva, 1)
    for at in (0, 1, PAGE, 2 * MIB - 1):
        memory.view[at] = 1
        assert not host_memory.is_zero(hva, 2 * MIB)
        assert not host_memory.is_zero(hva + at, 1)
        memory.view[at] = 0
    memory.close()
