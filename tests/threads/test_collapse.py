# SPDX-License-Identifier: Apache-2.0
"""The end of dirty logging is only noted: a worker brings large leaves back, in steps, and gives way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.threads import running, until
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm.memory import collapse
from softkvm.kvm.state import IN_GUEST_MODE

GPA, SIZE = 64 * MIB, 32 * MIB
TABLES = SIZE >> 21
PAGES = SIZE >> 12


@pytest.fixture
def memory() -> Memory:
    return Memory(SIZE)


@pytest.fixture
def tiny(memory: Memory) -> Iterator[Tiny]:
    machine = Tiny().protected_mode()
    machine.slot(1, GPA, SIZE, memory.address)
    yield machine
    machine.close()


def log(tiny: Tiny, memory: Memory, *, on: bool) -> None:
    tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES if on else 0)


def write_all(tiny: Tiny) -> None:
    """Have the guest write a byte of every page."""
    # mov [ebx], al; add ebx, edx; loop; hlt
    tiny.load(b"\x88\x03\x01\xd3\xe2\xfa\xf4", rax=1, rbx=GPA, rcx=PAGES, rdx=4096)
    tiny.run_to_halt()


def small(tiny: Tiny) -> int:
    return int(tiny.vm.stats()["pages_4k"])


def test_small_leaves_of_a_slot_that_is_logged_no_more_go(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory, on=True)
    write_all(tiny)
    assert small(tiny) == PAGES
    log(tiny, memory, on=False)
    until(tiny.vm.collapser.idle)
    assert small(tiny) == 0
    write_all(tiny)
    assert tiny.vm.stats()["pages_2m"] >= TABLES


def test_the_request_itself_gives_nothing_up(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory, on=True)
    write_all(tiny)
    with tiny.vm.mmu_lock:
        log(tiny, memory, on=False)
        assert small(tiny) == PAGES
    until(tiny.vm.collapser.idle)
    assert small(tiny) == 0


def test_a_slot_that_is_logged_again_keeps_what_it_has(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory, on=True)
    write_all(tiny)
    with tiny.vm.mmu_lock:
        log(tiny, memory, on=False)
        log(tiny, memory, on=True)
    until(tiny.vm.collapser.idle)
    assert small(tiny) == PAGES
    assert tiny.vm.get_dirty_log(1) == bytes(PAGES // 8)
    write_all(tiny)
    assert tiny.vm.get_dirty_log(1) == b"\xff" * (PAGES // 8)


def test_who_waits_for_the_lock_gets_it_between_steps(
    tiny: Tiny, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse, "STEP_TABLES", 1)
    log(tiny, memory, on=True)
    write_all(tiny)
    seen = set()
    log(tiny, memory, on=False)
    while not tiny.vm.collapser.idle():
        with tiny.vm.mmu_lock:
            seen.add(small(tiny))
    assert seen - {PAGES, 0}, "the lock was free in the middle"


def test_the_worker_ends_with_its_vm(tiny: Tiny, memory: Memory) -> None:
    log(tiny, memory, on=True)
    write_all(tiny)
    with tiny.vm.mmu_lock:
        log(tiny, memory, on=False)
        tiny.close()
    until(tiny.vm.collapser.idle)


def test_a_guest_that_runs_meanwhile_loses_no_page_of_a_later_log(tiny: Tiny, memory: Memory) -> None:
    # again: mov ebx, GPA; mov ecx, PAGES; page: inc dword [ebx]; add ebx, 4096; loop page; jmp again
    code = b"\xbb" + GPA.to_bytes(4, "little") + b"\xb9" + PAGES.to_bytes(4, "little")
    code += bytes.fromhex("ff03 81c300100000 e2f6") + b"\xeb" + (-(len(code) + 10 + 2) & 0xFF).to_bytes(1, "little")
    tiny.load(code)

    def counters() -> list[int]:
        return [int.from_bytes(memory.read(n * 4096, 4), "little") for n in range(PAGES)]

    for _ in range(4):
        with running(tiny.vcpu):
            until(lambda: tiny.vcpu.mode == IN_GUEST_MODE)
            log(tiny, memory, on=False)  # which the worker follows while the guest runs
            log(tiny, memory, on=True)
            then, dirty = counters(), 0
            while dirty.bit_count() < PAGES // 2:
                dirty |= int.from_bytes(tiny.vm.get_dirty_log(1), "little")
            log(tiny, memory, on=False)
            log(tiny, memory, on=True)
            then, dirty = counters(), 0
            while counters() == then:
                pass
        dirty |= int.from_bytes(tiny.vm.get_dirty_log(1), "little")
        written = {n for n, (old, new) in enumerate(zip(then, counters(), strict=True)) if old != new}
        assert written
        assert written <= {n for n in range(PAGES) if dirty >> n & 1}
