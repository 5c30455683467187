# SPDX-License-Identifier: Apache-2.0
"""Rings of dirty pages: what KVM writes by itself."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from ctypes import sizeof

import pytest
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm.memory.guest_memory import cmpxchg_guest, write_guest

PAGE = 4096
GPA = 16 * MIB
RING = 4096
ENTRY = sizeof(abi.kvm_dirty_gfn)
ENTRIES = RING // ENTRY


class Logged:
    """Two vCPUs with small rings, and a slot that is logged."""

    def __init__(self) -> None:
        self.tiny = Tiny(vcpus=2, dirty_ring=RING)
        self.vm = self.tiny.vm
        self.source = Memory(2 * MIB)
        self.tiny.slot(1, GPA, 2 * MIB, self.source.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
        offset = abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE
        self.rings = [mmap.mmap(vcpu.shared_fd, RING, offset=offset) for vcpu in self.tiny.vcpus]
        self.next = [0, 0]

    def collect(self, number: int) -> list[int]:
        """Collect a ring: pages of the slot."""
        pages: list[int] = []
        while True:
            entry = abi.kvm_dirty_gfn.from_buffer(self.rings[number], self.next[number] % ENTRIES * ENTRY)
            if entry.flags != abi.KVM_DIRTY_GFN_F_DIRTY:
                return pages
            assert entry.slot == 1
            pages.append(int(entry.offset))
            entry.flags = abi.KVM_DIRTY_GFN_F_RESET
            self.next[number] += 1


@pytest.fixture
def logged() -> Iterator[Logged]:
    made = Logged()
    yield made
    made.tiny.close()


def test_what_kvm_writes_for_a_vcpu_is_in_its_ring(logged: Logged) -> None:
    vm, second = logged.vm, logged.tiny.vcpus[1]
    assert second.cpu.request(write_guest, vm, GPA + 2 * PAGE - 1, b"12")
    assert second.cpu.request(cmpxchg_guest, vm, GPA + 5 * PAGE, bytes(4), b"1234") == bytes(4)
    assert write_guest(vm, 0x1000, b"not logged")
    assert (logged.collect(0), logged.collect(1)) == ([], [1, 2, 5])
    assert write_guest(vm, GPA + 7 * PAGE, b"for nobody")
    assert (logged.collect(0), logged.collect(1)) == ([7], [])


def test_what_has_no_room_waits_for_a_reset(logged: Logged) -> None:
    for page in range(ENTRIES + 3):
        assert write_guest(logged.vm, GPA + page * PAGE, b"1")
    vcpu = logged.tiny.vcpus[0]
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == abi.KVM_EXIT_DIRTY_RING_FULL
    assert logged.collect(0) == list(range(ENTRIES))
    assert logged.vm.reset_dirty_rings() == ENTRIES
    assert logged.collect(0) == [ENTRIES, ENTRIES + 1, ENTRIES + 2]


def test_a_ring_is_mapped_shared_and_is_no_code(logged: Logged) -> None:
    """As kvm_vcpu_mmap() has it, for mappings that begin or end in the ring."""
    offset, both = abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE, mmap.PROT_READ | mmap.PROT_WRITE
    vcpu = logged.tiny.vcpu
    for protection, shared in ((both, False), (both | mmap.PROT_EXEC, True)):
        for start, size in ((offset, RING), (offset - PAGE, 2 * PAGE)):
            with pytest.raises(OSError) as caught:
                vcpu.shared_fd_mapped(0, size, start, protection, shared=shared)
            assert caught.value.errno == errno.EINVAL
        vcpu.shared_fd_mapped(0, PAGE, offset - PAGE, protection, shared=shared)
        vcpu.shared_fd_mapped(0, PAGE, offset + RING, protection, shared=shared)
    vcpu.shared_fd_mapped(0, RING, offset, both)


def test_the_file_is_as_long_as_the_ring_needs(logged: Logged) -> None:
    tiny = Tiny()
    for vcpu, pages in ((tiny.vcpu, 3), (logged.tiny.vcpu, abi.KVM_DIRTY_LOG_PAGE_OFFSET + 1)):
        with mmap.mmap(vcpu.shared_fd, 0) as whole:
            assert len(whole) == pages * PAGE
        assert len(vcpu.shared) == 3 * PAGE
