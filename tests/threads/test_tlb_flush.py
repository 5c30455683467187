# SPDX-License-Identifier: Apache-2.0
"""Threads 11, 14 and 30, remote TLB flushes: by ranges, of one tracked root, skipped when done, full after a failure.

The silicon's part: cpu/tests/system/flush.rs.
"""

from __future__ import annotations

import mmap
import random
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence

import pytest
from tests.support.threads import running, until
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm.tlb import MAX_RANGES, TlbRange, TlbsDirty
from softkvm.kvm.x86.mmu.root_tdp import INVALID_PAGE
from softkvm.kvm.x86.state import VmState

GPA, SIZE = 64 * MIB, 8 * MIB
PAGES = SIZE >> 12
FIRST = GPA >> 12

Flushed = list[tuple[int, Sequence[TlbRange] | None]]


@pytest.fixture
def memory() -> Memory:
    return Memory(SIZE)


@pytest.fixture
def tiny(memory: Memory) -> Iterator[Tiny]:
    machine = Tiny().protected_mode()
    machine.slot(1, GPA, SIZE, memory.address)
    yield machine
    machine.close()


def log(tiny: Tiny, memory: Memory, *, on: bool = True) -> None:
    tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES if on else 0)


def go_over(tiny: Tiny, *, pages: int = PAGES, write: bool = True) -> None:
    """Have the guest write, or read, a byte of each of the first pages."""
    # mov [ebx], al (or mov al, [ebx]); add ebx, edx; loop; hlt
    access = b"\x88\x03" if write else b"\x8a\x03"
    tiny.load(access + b"\x01\xd3\xe2\xfa\xf4", rax=1, rbx=GPA, rcx=pages, rdx=4096)
    tiny.run_to_halt()


def fills(tiny: Tiny) -> int:
    return tiny.vcpu.cpu.stats()["tlb_fills"]


def watch(tiny: Tiny) -> Flushed:
    """Return a list of what the operation is asked for from now on."""
    seen: Flushed = []
    operation = tiny.vm.flush_guest_mapping

    def flush(vm: VmState, root: int, ranges: Sequence[TlbRange] | None) -> bool:
        seen.append((root, ranges))
        return operation(vm, root, ranges)

    tiny.vm.flush_guest_mapping = flush
    return seen


def flushes(tiny: Tiny) -> dict[str, int]:
    return {name: value for name, value in tiny.vm.stats().items() if name.startswith("remote_tlb_flush")}


# --- what is flushed -----------------------------------------------------------------------------------------


def test_clearing_a_part_of_the_log_keeps_the_translations_of_the_rest(tiny: Tiny, memory: Memory) -> None:
    tiny.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    log(tiny, memory)
    go_over(tiny)
    tiny.vm.get_dirty_log(1)
    go_over(tiny)
    seen = watch(tiny)
    tiny.vm.clear_dirty_log(1, 64, 64, b"\xff" * 8)
    assert seen == [(tiny.vm.mmu.root_address, [TlbRange(FIRST + 64, 64)])]
    before = fills(tiny)
    go_over(tiny)
    assert fills(tiny) - before == 64, "a TLB entry for each page of the range"
    dirty = int.from_bytes(tiny.vm.get_dirty_log(1), "little")
    assert dirty == (1 << PAGES) - 1, "the others were not cleared, and the range has been written again"


def test_reading_the_log_keeps_the_translations_of_pages_that_were_not_written(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory)
    go_over(tiny, write=False)
    go_over(tiny, pages=3)
    go_over(tiny, write=False)
    seen = watch(tiny)
    assert tiny.vm.get_dirty_log(1) == b"\x07" + bytes(PAGES // 8 - 1)
    assert [ranges for _, ranges in seen] == [[TlbRange(FIRST, 3)]]
    before = fills(tiny)
    go_over(tiny, write=False)
    assert fills(tiny) - before == 3


def test_a_page_that_is_zapped_is_forgotten_alone(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory)
    go_over(tiny)
    seen = watch(tiny)
    tiny.vm.zap_gfn_range(FIRST + 7, 1)
    assert [ranges for _, ranges in seen] == [[TlbRange(FIRST + 7, 1)]]
    before = fills(tiny)
    go_over(tiny)
    assert fills(tiny) - before == 2, "once for the fault, and once for what it has led to"


def test_a_large_leaf_is_forgotten_as_a_whole(tiny: Tiny) -> None:
    go_over(tiny)
    seen = watch(tiny)
    tiny.vm.zap_gfn_range(FIRST + 513, 1)
    assert [ranges for _, ranges in seen] == [[TlbRange(FIRST + 512, 512)]]


def test_many_ranges_are_flushed_as_everything(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory)
    go_over(tiny)
    seen = watch(tiny)
    with tiny.vm.mmu_lock:
        for n in range(MAX_RANGES + 1):
            tiny.vm.mmu.zap_range(FIRST + 2 * n, FIRST + 2 * n + 1)
        tiny.vm.finish_zap()
    assert [ranges for _, ranges in seen] == [None]


def test_ranges_that_meet_are_one() -> None:
    dirty = TlbsDirty()
    for start, end in [(7, 9), (1, 3), (3, 4), (0, 2), (20, 21)]:
        dirty.add(start, end)
    assert dirty
    assert dirty.take() == [TlbRange(0, 4), TlbRange(7, 2), TlbRange(20, 1)]
    assert not dirty
    assert dirty.take() == []


# --- whether it is flushed -----------------------------------------------------------------------------------


def test_a_machine_that_has_not_run_has_no_root_and_nothing_is_flushed(tiny: Tiny) -> None:
    seen = watch(tiny)
    assert (tiny.vm.root_tdp, tiny.vcpu.root_tdp) == (INVALID_PAGE, INVALID_PAGE)
    tiny.vm.flush_remote_tlbs()
    assert seen == []
    go_over(tiny, pages=1)
    assert tiny.vcpu.root_tdp == tiny.vm.mmu.root_address
    tiny.vm.flush_remote_tlbs()
    assert seen == [(tiny.vm.mmu.root_address, None)]


def test_the_root_is_the_one_that_all_have_and_invalid_after_a_mismatch() -> None:
    tiny = Tiny(vcpus=3).protected_mode()
    vm, seen = tiny.vm, watch(tiny)
    root = vm.mmu.root_address
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    assert vm.root_tdp == INVALID_PAGE, "until it is asked for"
    vm.flush_remote_tlbs()
    assert (vm.root_tdp, seen) == (root, [(root, None)])
    # As nesting will: one of them uses other tables.
    vm.vcpus[1].root_tdp = other = vm.mmu.root_address + 0x1000
    vm.root_tdp = INVALID_PAGE
    seen.clear()
    vm.flush_remote_tlbs()
    assert seen == [(root, None), (other, None)], "each of them once, the third has none"
    assert vm.root_tdp == INVALID_PAGE
    vm.vcpus[1].root_tdp = root
    vm.flush_remote_tlbs()
    assert vm.root_tdp == root
    vm.close()


def test_the_first_failure_ends_it_and_everything_is_flushed_once_by_request() -> None:
    tiny = Tiny(vcpus=3).protected_mode()
    vm = tiny.vm
    asked: list[int] = []

    def fails(vm: VmState, root: int, ranges: Sequence[TlbRange] | None) -> bool:
        asked.append(root)
        return False

    tiny.load(b"\xf4")
    tiny.run_to_halt()
    for n, vcpu in enumerate(vm.vcpus):
        vcpu.root_tdp = n << 12
    vm.flush_guest_mapping = fails
    before = flushes(tiny)
    vm.flush_remote_tlbs_range(1, 2)
    assert asked == [0], "no other root is tried"
    after = flushes(tiny)
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "remote_tlb_flush_requests": 1,
        "remote_tlb_flush_failed": 1,
        "remote_tlb_flush_full": 1,
    }
    served = tiny.vcpu.stat_tlb_flush
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    assert tiny.vcpu.stat_tlb_flush == served + 1
    vm.close()


def test_what_somebody_has_flushed_is_not_flushed_again(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory)
    go_over(tiny)
    with tiny.vm.mmu_lock:
        assert tiny.vm.mmu.write_protect(FIRST, FIRST + 9)
        assert tiny.vm.mmu.write_protect(FIRST + 9, FIRST + 20)
    before = flushes(tiny)
    tiny.vm.flush_dirty_tlbs()
    tiny.vm.flush_dirty_tlbs()
    after = flushes(tiny)
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "remote_tlb_flush": 1,
        "remote_tlb_flush_requests": 2,
        "remote_tlb_flush_ranged": 1,
        "remote_tlb_flush_skipped": 1,
    }


def test_a_vcpu_does_not_leave_its_guest_for_a_flush(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory)
    # again: inc dword [ebx]; cmp dword [ecx], 0; je again; hlt
    tiny.load(b"\xff\x03\x83\x39\x00\x74\xf9\xf4", rbx=GPA, rcx=0x9000)
    with running(tiny.vcpu) as run:
        while not struct.unpack("<I", memory.read(0, 4))[0]:
            pass
        exits = dict(tiny.vcpu.exit_counts)
        for n in range(100):
            tiny.vm.flush_remote_tlbs_range(FIRST + n, 1)
            tiny.vm.flush_remote_tlbs()
        assert tiny.vcpu.exit_counts == exits
        tiny.memory.write(0x9000, b"\x01")
        run.wait()
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HLT


# --- never a write by a translation that is gone -------------------------------------------------------------

#: Each vCPU writes its counter into page after page, chosen by a generator; counters only grow.
#: again: imul esi, esi, 1664525; add esi, 1013904223; mov edi, esi; shr edi, 20; and edi, PAGES - 1; shl edi, 12;
#: inc eax; mov [ebx+edi], eax; jmp again. Each vCPU has its own word of every page.
_WRITER = bytes.fromhex("69f60d661900 81c65ff36e3c 89f7 c1ef14 81e7ff070000 c1e70c 40 89043b ebe0")


@pytest.mark.parametrize("seed", range(3))
def test_no_write_is_missing_in_the_log_while_ranges_are_protected_and_zapped(seed: int, memory: Memory) -> None:
    """Whatever has changed in a page between two looks at it is in the log that is read behind the first."""
    vcpus, rng = 2, random.Random(seed)
    tiny = Tiny(vcpus=vcpus)
    for n, vcpu in enumerate(tiny.vcpus):
        tiny.vcpu = vcpu
        tiny.protected_mode()
        tiny.load(_WRITER, rax=0, rbx=GPA + 4 * n, rsi=seed + 77 * n)
    tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    stop = threading.Event()

    def run(n: int) -> None:
        while not stop.is_set():
            try:
                tiny.vcpus[n].run()
            except InterruptedError:
                pass

    def words() -> list[bytes]:
        return [memory.read(page << 12, 4 * vcpus) for page in range(PAGES)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(vcpus)]
    for thread in threads:
        thread.start()
    try:
        tiny.vm.get_dirty_log(1)
        for _ in range(25):
            # What is written from here on is in the next log, or was there before this look.
            before = words()
            for _ in range(rng.randrange(8)):
                start = rng.randrange(PAGES)
                count = rng.choice([1, 3, 64, 600])
                if rng.random() < 0.7:
                    tiny.vm.zap_gfn_range(FIRST + start, min(count, PAGES - start))
                else:
                    tiny.vm.flush_remote_tlbs_range(FIRST + start, count)
            after = words()
            dirty = int.from_bytes(tiny.vm.get_dirty_log(1), "little")
            missing = [page for page in range(PAGES) if before[page] != after[page] and not dirty >> page & 1]
            assert not missing
    finally:
        stop.set()
        for vcpu in tiny.vcpus:
            vcpu.kick()
        for thread in threads:
            thread.join()
        tiny.close()
    assert flushes(tiny)["remote_tlb_flush_ranged"] > 0


class Ring:
    """A vCPU's ring of dirty pages, as userspace sees it."""

    def __init__(self, tiny: Tiny, vcpu: int) -> None:
        offset = abi.KVM_DIRTY_LOG_PAGE_OFFSET * 4096
        self._entries = mmap.mmap(tiny.vcpus[vcpu].shared_fd, RING_BYTES, offset=offset)
        self._words = memoryview(self._entries).cast("I")
        self._next = 0

    def collect(self) -> set[int]:
        """Take what is there: pages of slot 1."""
        found: set[int] = set()
        while True:
            at = self._next % (RING_BYTES // 16) * 4
            if self._words[at] != abi.KVM_DIRTY_GFN_F_DIRTY:
                return found
            if self._words[at + 1] == 1:
                found.add(self._words[at + 2])
            self._words[at] = abi.KVM_DIRTY_GFN_F_RESET
            self._next += 1


RING_BYTES = 8 << 10


@pytest.mark.parametrize("ring", [False, True], ids=["bitmap", "ring"])
def test_a_migration_copies_what_the_guest_has_written_to_the_last_byte(ring: bool, memory: Memory) -> None:
    """Pages are copied while the guest writes, as the log names them; in the end both memories are the same."""
    vcpus, rounds = 2, 30
    tiny = Tiny(vcpus=vcpus, dirty_ring=RING_BYTES if ring else 0)
    for n, vcpu in enumerate(tiny.vcpus):
        tiny.vcpu = vcpu
        tiny.protected_mode()
        tiny.load(_WRITER, rax=0, rbx=GPA + 4 * n, rsi=77 * n)
    log(tiny, memory)
    rings = [Ring(tiny, n) for n in range(vcpus)] if ring else []
    copy = bytearray(memory.read(0, SIZE))
    stop, full = threading.Event(), [0]

    def run(n: int) -> None:
        while not stop.is_set():
            try:
                tiny.vcpus[n].run()
            except InterruptedError:
                continue
            assert tiny.vcpus[n].kvm_run.exit_reason == abi.KVM_EXIT_DIRTY_RING_FULL
            full[0] += 1

    def dirty_pages() -> Iterable[int]:
        if not ring:
            bits = int.from_bytes(tiny.vm.get_dirty_log(1), "little")
            return [page for page in range(PAGES) if bits >> page & 1]
        found = set[int]().union(*(each.collect() for each in rings))
        tiny.vm.reset_dirty_rings()
        return found

    def copy_dirty() -> int:
        pages = dirty_pages()
        for page in pages:
            copy[page << 12 : (page + 1) << 12] = memory.read(page << 12, 4096)
        return len(set(pages))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(vcpus)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: full[0] or not ring)  # vCPUs stop when nobody has their rings reset
        copied = sum(copy_dirty() for _ in range(rounds))

        def has_copied() -> bool:
            nonlocal copied
            copied += copy_dirty()
            return copied > 0

        until(has_copied)  # on a busy host the guest may have done nothing yet
    finally:
        stop.set()
        for thread in threads:
            while thread.is_alive():
                for vcpu in tiny.vcpus:
                    vcpu.kick()
                thread.join(0.01)
    while copy_dirty():
        pass
    assert copied > 0
    assert bytes(copy) == memory.read(0, SIZE)
    tiny.close()
