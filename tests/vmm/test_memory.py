# SPDX-License-Identifier: Apache-2.0
import mmap
import os

import pytest

from softkvm import abi
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import GIB, HOLE_END, HOLE_START, HUGE_PAGE_SIZE, MIB, GuestMemory


class SlotRecorder:
    """Stands for a VM that memory is attached to."""

    def __init__(self) -> None:
        self.regions: list[abi.kvm_userspace_memory_region] = []

    def set_user_memory_region(self, region: abi.kvm_userspace_memory_region, memory: mmap.mmap) -> None:
        self.regions.append(region)


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
