# SPDX-License-Identifier: Apache-2.0
"""Rings of dirty pages (KVM API 8.29, KVM_CAP_DIRTY_LOG_RING)."""

import errno
import mmap
from collections.abc import Callable
from ctypes import sizeof

import pytest
from tests.support.conformance import MEMORY_SIZE, PAGE, Guest, refused

from softkvm import abi, api

RING = abi.KVM_CAP_DIRTY_LOG_RING
ENTRY = sizeof(abi.kvm_dirty_gfn)
SIZE = 1024 * ENTRY
#: Slots from 1 on: the same memory again and again, logged.
BASE = 0x100_0000
SLOTS = 5
PAGES = MEMORY_SIZE // PAGE
#: mov [ebx], eax; add ebx, 0x1000; loop; hlt
TOUCH = "8903 81c300100000 e2f6 f4"


def enable(vm: api.Vm, size: int) -> None:
    """Ask for rings of *size* bytes."""
    vm.enable_cap(RING, size)


class Ring:
    """A vCPU's ring, as userspace sees it."""

    def __init__(self, vcpu: api.Vcpu, size: int = SIZE) -> None:
        self.map = mmap.mmap(vcpu.shared_fd, size, offset=abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)
        self.entries = size // ENTRY
        self.next = 0

    def entry(self, index: int) -> abi.kvm_dirty_gfn:
        return abi.kvm_dirty_gfn.from_buffer(self.map, index % self.entries * ENTRY)

    def collect(self, most: int = 1 << 20) -> list[tuple[int, int]]:
        """Take what is dirty, and mark it for a reset.

        A page may be there several times: where a store is emulated each puts it there (see ``once``).
        """
        found: list[tuple[int, int]] = []
        while len(found) < most:
            entry = self.entry(self.next)
            if entry.flags != abi.KVM_DIRTY_GFN_F_DIRTY:
                break
            found.append((entry.slot, entry.offset))
            entry.flags |= abi.KVM_DIRTY_GFN_F_RESET
            self.next += 1
        return found


def once(pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return pages in the order that they came first."""
    return list(dict.fromkeys(pages))


class Logged:
    """A guest with rings, and what it takes to see them."""

    def __init__(self, guest: Guest, vcpus: int = 1) -> None:
        self.guest = guest
        enable(guest.vm, SIZE)
        for number in range(vcpus):
            vcpu = guest.vm.create_vcpu(number)
            vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
            guest.vcpus.append(vcpu)
        guest.vcpu = guest.vcpus[0]
        for slot in range(SLOTS):
            guest.region(1 + slot, BASE + slot * MEMORY_SIZE, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
        self.rings = [Ring(vcpu) for vcpu in guest.vcpus]
        guest.protected(TOUCH)
        self.sregs, self.regs = guest.cpu.get_sregs(), guest.cpu.get_regs()

    def touch(self, page: int, count: int = 1, vcpu: int = 0) -> None:
        """Let a vCPU write to pages of the logged slots, which follow one another, at its next runs."""
        cpu = self.guest.vcpus[vcpu]
        cpu.set_sregs(self.sregs)
        self.regs.rbx, self.regs.rcx = BASE + page * PAGE + 0xF00, count
        cpu.set_regs(self.regs)

    def halt(self, vcpu: int = 0) -> None:
        """Run to HLT."""
        self.guest.expect(abi.KVM_EXIT_HLT, self.guest.vcpus[vcpu])


@pytest.fixture
def logged(make: Callable[..., Guest]) -> Logged:
    """One vCPU with a ring."""
    return Logged(make(vcpus=0))


def test_the_capability_is_the_largest_size(kvm: api.Kvm) -> None:
    assert kvm.check_extension(RING) == 65536 * ENTRY
    assert kvm.check_extension(abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL) == 65536 * ENTRY


def test_sizes_are_powers_of_two_within_limits(make: Callable[..., Guest]) -> None:
    vm = make(vcpus=0).vm
    for size in (0, 1, 2048, 3 * PAGE, SIZE + 1):
        refused(errno.EINVAL, lambda size=size: enable(vm, size))  # type: ignore[misc]
    refused(errno.E2BIG, lambda: enable(vm, 2 * 65536 * ENTRY))
    enable(vm, 65536 * ENTRY)
    refused(errno.EINVAL, lambda: enable(vm, 65536 * ENTRY))
    refused(errno.EINVAL, lambda: vm.enable_cap(abi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, SIZE))


def test_they_come_before_the_first_vcpu_or_not_at_all(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: enable(guest.vm, SIZE))
    refused(errno.EINVAL, guest.vm.reset_dirty_rings)


def test_there_are_no_bitmaps_then(logged: Logged) -> None:
    refused(errno.ENXIO, lambda: logged.guest.vm.get_dirty_log(1))
    refused(errno.ENXIO, lambda: logged.guest.vm.clear_dirty_log(1, 0, 64, bytes(8)))


def test_the_first_write_to_a_page_is_in_the_ring(logged: Logged) -> None:
    (ring,) = logged.rings
    logged.touch(3, 2)
    logged.halt()
    assert once(ring.collect()) == [(1, 3), (1, 4)]
    logged.touch(PAGES + 7)
    logged.halt()
    assert once(ring.collect()) == [(2, 7)]


def test_a_second_write_is_not(logged: Logged, device_differs: Callable[[str], None]) -> None:
    device_differs("a store that KVM emulates (here: all) puts its page into the ring of dirty pages each time")
    (ring,) = logged.rings
    for _ in range(2):
        logged.touch(3, 2)
        logged.halt()
    assert ring.collect() == [(1, 3), (1, 4)]


def test_a_reset_counts_what_was_collected_and_protects_it_again(logged: Logged) -> None:
    (ring,), vm = logged.rings, logged.guest.vm
    assert vm.reset_dirty_rings() == 0
    logged.touch(0, 4)
    logged.halt()
    assert vm.reset_dirty_rings() == 0
    assert ring.collect(3) == [(1, 0), (1, 1), (1, 2)]
    assert vm.reset_dirty_rings() == 3
    assert [ring.entry(index).flags for index in range(4)] == [0, 0, 0, abi.KVM_DIRTY_GFN_F_DIRTY]
    logged.touch(0, 4)
    logged.halt()
    again = ring.collect()
    assert again[0] == (1, 3)
    assert once(again[1:])[:3] == [(1, 0), (1, 1), (1, 2)]
    assert vm.reset_dirty_rings() == len(again)


def test_a_reset_ends_at_the_first_entry_that_is_not_collected(logged: Logged) -> None:
    (ring,), vm = logged.rings, logged.guest.vm
    logged.touch(0, 3)
    logged.halt()
    ring.entry(1).flags |= abi.KVM_DIRTY_GFN_F_RESET
    ring.entry(2).flags |= abi.KVM_DIRTY_GFN_F_RESET
    assert vm.reset_dirty_rings() == 0
    ring.entry(0).flags |= abi.KVM_DIRTY_GFN_F_RESET
    assert vm.reset_dirty_rings() == 3


def test_entries_that_userspace_has_spoilt_are_passed_over(logged: Logged) -> None:
    (ring,), vm = logged.rings, logged.guest.vm
    logged.touch(0, 4)
    logged.halt()
    for index, (slot, offset) in enumerate([(1, 1 << 40), (999, 0), (1 << 16 | 1, 0), (0xFFFF, (1 << 64) - 1)]):
        ring.entry(index).slot, ring.entry(index).offset = slot, offset
        ring.entry(index).flags |= abi.KVM_DIRTY_GFN_F_RESET
    assert vm.reset_dirty_rings() == 4


def test_a_ring_that_is_nearly_full_ends_every_run_until_it_is_reset(
    logged: Logged, device_differs: Callable[[str], None]
) -> None:
    device_differs("while KVM emulates one store after the other it looks at no ring, which runs over")
    (ring,), guest = logged.rings, logged.guest
    wanted = [(1 + page // PAGES, page % PAGES) for page in range(SLOTS * PAGES)]
    logged.touch(0, SLOTS * PAGES)
    for _ in range(3):
        guest.expect(abi.KVM_EXIT_DIRTY_RING_FULL)
    seen = ring.collect()
    assert ring.entries // 4 <= len(seen) <= ring.entries
    guest.expect(abi.KVM_EXIT_DIRTY_RING_FULL)  # collected is not reset
    assert guest.vm.reset_dirty_rings() == len(seen)
    while guest.run() == abi.KVM_EXIT_DIRTY_RING_FULL:
        more = ring.collect()
        assert guest.vm.reset_dirty_rings() == len(more) > 0
        seen += more
    assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    seen += ring.collect()
    assert once(seen) == wanted  # the store that the run ended before may have been announced


def test_pages_that_were_written_before_are_watched_from_then_on(logged: Logged) -> None:
    (ring,), guest = logged.rings, logged.guest
    for flags in (0, abi.KVM_MEM_LOG_DIRTY_PAGES):
        guest.region(2, BASE + MEMORY_SIZE, MEMORY_SIZE, flags=flags)
        for _ in range(2):
            logged.touch(PAGES + 5, 2)
            logged.halt()
    assert once(ring.collect()) == [(2, 5), (2, 6)]


def test_what_is_not_logged_is_not_there(logged: Logged) -> None:
    (ring,), guest = logged.rings, logged.guest
    guest.region(1, BASE, MEMORY_SIZE, flags=0)
    logged.touch(PAGES - 2, 4)
    logged.halt()
    assert once(ring.collect()) == [(2, 0), (2, 1)]


def test_every_vcpu_has_its_own(make: Callable[..., Guest]) -> None:
    logged = Logged(make(vcpus=0), vcpus=2)
    first, second = logged.rings
    logged.touch(0, 2)
    logged.halt()
    logged.touch(2, 2, vcpu=1)
    logged.halt(1)
    assert (once(first.collect()), once(second.collect())) == ([(1, 0), (1, 1)], [(1, 2), (1, 3)])
    assert logged.guest.vm.reset_dirty_rings() >= 4
    logged.touch(0, 3, vcpu=1)
    logged.halt(1)
    assert (first.collect(), once(second.collect())) == ([], [(1, 0), (1, 1), (1, 2)])
