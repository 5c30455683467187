# SPDX-License-Identifier: Apache-2.0
"""No write is ever missing from the dirty log, while the guest runs on.

What a live migration depends on, and what ``dirty_log_test`` of Linux's KVM selftests is for. The guest's processors
store all the time; the host takes the log, round after round, and copies the pages that are in it. A page that differs
from its copy without being in the log was written after the log was taken, so the next log must have it.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import sizeof
from dataclasses import dataclass, field

import pytest
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi

PAGE = 4096
GPA = 16 * MIB
SIZE = 2 * MIB
PAGES = SIZE // PAGE
VCPUS = 2
SLOT = 1
CODE = 0x1000
#: Where processor n counts its rounds of stores.
COUNTS = 0x6000
TABLES = 0x40000

#: A ring's bytes: so few that it is full now and then.
RING = 4096
ENTRY = sizeof(abi.kvm_dirty_gfn)

#: At least so many rounds, and more until the time is over.
ROUNDS = 8
SECONDS = 1.0
#: So many stores between two logs, if the host finds time for them.
STORES = 300
PATIENCE_S = 0.5

#: Registers: EBX a random number, EDX the slot, ESI the processor's own offset in a page, EBP where it counts.
GUEST = bytes.fromhex(
    "69db6d4ec641"  # again: imul ebx, ebx, 1103515245
    "81c339300000"  # add ebx, 12345
    "89d8"  # mov eax, ebx
    "c1e807"  # shr eax, 7
    "2500f01f00"  # and eax, 0x1ff000
    "3d00001f00"  # cmp eax, 0x1f0000
    "73e3"  # jae again: room for the page tables
    "01d0"  # add eax, edx
    "01f0"  # add eax, esi
    "8918"  # mov [eax], ebx
    "f083400401"  # lock add dword [eax + 4], 1
    "8998f0efffff"  # mov [eax - 0x1010], ebx
    "8998f60f0000"  # mov [eax + 0xff6], ebx: across pages by one of the processors
    "83450001"  # add dword [ebp], 1
    "ebc6"  # jmp again
)


@dataclass
class Log:
    """The host's copy of the slot, and what it knows."""

    tiny: Tiny
    memory: Memory
    clear: bool
    copy: bytearray = field(default_factory=lambda: bytearray(SIZE))
    #: Pages that were written after the last log was taken.
    must: set[int] = field(default_factory=set)
    logged: int = 0

    def flags(self, flags: int) -> None:
        """KVM_SET_USER_MEMORY_REGION with other flags."""
        self.tiny.slot(SLOT, GPA, SIZE, self.memory.address, flags)

    def start(self) -> None:
        """Begin to log: what is written from here on is in the log."""
        self.flags(abi.KVM_MEM_LOG_DIRTY_PAGES)
        self.copy[:] = self.memory.view
        self.must.clear()

    def dirty(self) -> set[int]:
        """Take the log."""
        bitmap = self.tiny.vm.get_dirty_log(SLOT)
        if self.clear:
            self.tiny.vm.clear_dirty_log(SLOT, 0, PAGES, bitmap)
        bits = int.from_bytes(bitmap, "little")
        return {page for page in range(PAGES) if bits >> page & 1}

    def take(self) -> None:
        """Take the log, copy its pages, and look at the others."""
        dirty = self.dirty()
        assert self.must <= dirty, f"written, and not in the log: pages {sorted(self.must - dirty)}"
        self.logged += len(dirty)
        for page in dirty:
            self.copy[page * PAGE : (page + 1) * PAGE] = self.memory.view[page * PAGE : (page + 1) * PAGE]
        self.must = {page for page in range(PAGES) if page not in dirty and self.differs(page)}

    def differs(self, page: int) -> bool:
        """Tell whether a page is not what it was when it was copied."""
        part = slice(page * PAGE, (page + 1) * PAGE)
        return self.memory.view[part] != self.copy[part]


class RingLog(Log):
    """The same by the processors' rings."""

    rings: list[mmap.mmap]
    next: list[int]

    def open(self) -> None:
        """Map the rings."""
        offset = abi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE
        self.rings = [mmap.mmap(vcpu.shared_fd, RING, offset=offset) for vcpu in self.tiny.vcpus]
        self.next = [0] * len(self.rings)

    def dirty(self) -> set[int]:
        pages = set()
        for number, ring in enumerate(self.rings):
            while True:
                entry = abi.kvm_dirty_gfn.from_buffer(ring, self.next[number] * ENTRY % RING)
                if entry.flags != abi.KVM_DIRTY_GFN_F_DIRTY:
                    break
                assert entry.slot == SLOT
                pages.add(entry.offset)
                entry.flags = abi.KVM_DIRTY_GFN_F_RESET
                self.next[number] += 1
        self.tiny.vm.reset_dirty_rings()
        return pages


@contextmanager
def storing(tiny: Tiny) -> Iterator[None]:
    """Let all processors run."""

    def run(number: int) -> None:
        with pytest.raises(InterruptedError):
            while True:  # a ring that is full ends a run
                tiny.vcpus[number].run()
                assert tiny.vcpus[number].kvm_run.exit_reason == abi.KVM_EXIT_DIRTY_RING_FULL
                time.sleep(0.0005)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(VCPUS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for vcpu in tiny.vcpus:
            vcpu.kick()
        for thread in threads:
            thread.join()


def stores(tiny: Tiny) -> int:
    """How many rounds of stores there have been on all processors."""
    return sum(struct.unpack_from(f"<{VCPUS}I", tiny.memory.view, COUNTS))


def guest(paging: bool, dirty_ring: int = 0) -> tuple[Tiny, Memory]:
    """A guest that is about to store, in 32-bit mode; with *paging* page tables of 4 KiB pages in the slot, too."""
    tiny = Tiny(vcpus=VCPUS, dirty_ring=dirty_ring)
    memory = Memory(SIZE)
    tiny.slot(SLOT, GPA, SIZE, memory.address)
    tiny.memory.write(CODE, GUEST)
    tiny.protected_mode()
    sregs = tiny.vcpu.get_sregs()
    if paging:
        # 32-bit paging: a table for the first 4 MiB and, at the slot's end, one for 16 to 20 MiB: the processors set
        # accessed and dirty bits in it.
        directory, low, high = TABLES, TABLES + PAGE, GPA + SIZE - PAGE
        tiny.memory.write(directory, struct.pack("<5I", low | 3, 0, 0, 0, high | 3))
        tiny.memory.write(low, struct.pack("<1024I", *(n << 12 | 3 for n in range(1024))))
        memory.write(SIZE - PAGE, struct.pack("<1024I", *(GPA + (n << 12) | 3 for n in range(1024))))
        sregs.cr3, sregs.cr0 = directory, sregs.cr0 | abi.X86_CR0_PG
    for number, vcpu in enumerate(tiny.vcpus):
        vcpu.set_sregs(sregs)
        vcpu.set_regs(
            abi.kvm_regs(
                rip=CODE, rflags=2, rbx=number + 1, rdx=GPA + 8 * PAGE, rsi=64 * number + 8, rbp=COUNTS + 4 * number
            )
        )
    return tiny, memory


@pytest.mark.parametrize("paging", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_no_write_is_missing_from_the_log(paging: bool, clear: bool) -> None:
    tiny, memory = guest(paging)
    if clear:
        tiny.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    check(Log(tiny, memory, clear))


@pytest.mark.parametrize("paging", [False, True])
def test_no_write_is_missing_from_the_rings(paging: bool) -> None:
    log = RingLog(*guest(paging, RING), clear=False)
    log.open()
    check(log)


def check(log: Log) -> None:
    """Let the guest store, and take the log again and again."""
    tiny, memory = log.tiny, log.memory
    try:
        with storing(tiny):
            log.start()
            end = time.monotonic() + SECONDS
            rounds = 0
            while rounds < ROUNDS or time.monotonic() < end:
                rounds += 1
                if rounds % 16 == 0:  # large leaves come back, and are split again
                    log.flags(0)
                    log.start()
                done, patience = stores(tiny), time.monotonic() + PATIENCE_S
                while stores(tiny) < done + STORES and time.monotonic() < patience:
                    time.sleep(0.0005)
                log.take()
        log.take()  # the processors stand
        assert memory.view == log.copy
        assert log.logged > PAGES // 2
    finally:
        tiny.close()
