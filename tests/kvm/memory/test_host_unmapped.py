# SPDX-License-Identifier: Apache-2.0
"""Host memory that goes away under a slot: what an MMU notifier is for (Documentation/virt/kvm/locking.rst)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from tests.support.tiny import CODE, MIB, Tiny

from softkvm import abi
from softkvm.kvm.memory.guest_memory import cmpxchg_guest, read_guest, write_guest

PAGE = 4096
GPA = 16 * MIB
SIZE = 4 * MIB
MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def remap(address: int, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
    """Map zeroed memory in the place of what there is."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    got = _libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0))
    assert got == address


def unmap(address: int, size: int) -> None:
    assert _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


class Guest:
    """A guest in 32-bit mode whose slot 1 is memory that nobody but the test holds."""

    def __init__(self) -> None:
        self.tiny = Tiny().protected_mode()
        self.vm, self.vcpu = self.tiny.vm, self.tiny.vcpu
        room = _libc.mmap(None, ctypes.c_size_t(SIZE + 2 * MIB), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.room = room
        self.address = (room + 2 * MIB - 1) & -2 * MIB
        remap(self.address, SIZE)
        self.tiny.slot(1, GPA, SIZE, self.address)

    def hva(self, page: int) -> int:
        return int(self.address + page * PAGE)

    def store(self, page: int, value: int = 1) -> None:
        """Let the guest store a byte."""
        self.tiny.load(b"\x88\x03\xf4", rbx=GPA + page * PAGE, rax=value)  # mov [ebx], al; hlt
        self.tiny.run_to_halt()

    def fetch(self, page: int) -> int:
        """Let the guest load a byte."""
        self.tiny.load(b"\x8a\x03\xf4", rbx=GPA + page * PAGE)  # mov al, [ebx]; hlt
        return self.tiny.run_to_halt().rax & 0xFF

    def close(self) -> None:
        self.tiny.close()
        unmap(self.room, SIZE + 2 * MIB)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def test_memory_that_is_gone_is_efault_and_memory_that_has_come_back_is_used(guest: Guest) -> None:
    for page in (4, 5, 6):
        guest.store(page, page)
    assert guest.vm.stats()["pages_2m"] >= 1
    unmap(guest.hva(5), PAGE)
    guest.vm.host_unmapped(guest.hva(5), PAGE)
    with pytest.raises(OSError) as caught:
        guest.fetch(5)
    assert caught.value.errno == errno.EFAULT
    assert (guest.fetch(4), guest.fetch(6)) == (4, 6)
    assert read_guest(guest.vm, GPA + 5 * PAGE, 1) is None
    assert not write_guest(guest.vm, GPA + 5 * PAGE, b"1")
    remap(guest.hva(5), PAGE)
    assert guest.fetch(5) == 0
    guest.store(5, 0x55)
    assert ctypes.c_uint8.from_address(guest.hva(5)).value == 0x55


def test_memory_that_becomes_read_only_is_not_written(guest: Guest) -> None:
    guest.store(3, 3)
    remap(guest.hva(3), PAGE, mmap.PROT_READ)
    guest.vm.host_unmapped(guest.hva(3), PAGE)
    assert guest.fetch(3) == 0
    with pytest.raises(OSError) as caught:
        guest.store(3)
    assert caught.value.errno == errno.EFAULT


def test_exactly_the_pages_that_the_range_meets_are_forgotten_in_every_slot(guest: Guest) -> None:
    guest.tiny.slot(2, 2 * GPA, 8 * PAGE, guest.hva(0), abi.KVM_MEM_LOG_DIRTY_PAGES)  # the same memory again
    for page in range(8):
        assert write_guest(guest.vm, GPA + page * PAGE, b"\1")
        guest.fetch(page)
        guest.tiny.load(b"\x8a\x03\xf4", rbx=2 * GPA + page * PAGE)
        guest.tiny.run_to_halt()
    before = guest.vm.stats()["pages_4k"]
    guest.vm.host_unmapped(guest.hva(2) + PAGE - 1, 2)  # two pages
    assert before - guest.vm.stats()["pages_4k"] == 2  # slot 1's are in a large leaf
    guest.vm.host_unmapped(guest.address - MIB, MIB)
    guest.vm.host_unmapped(guest.hva(0), 0)
    assert before - guest.vm.stats()["pages_4k"] == 2


def test_many_ranges_take_one_flush(guest: Guest) -> None:
    for page in range(8):
        guest.store(page, page + 1)
    before = guest.vm.stats()
    # Two of a slot's, one that nobody has, an empty one.
    gone = [(guest.hva(1), PAGE), (guest.hva(5), 2 * PAGE), (guest.address - MIB, PAGE), (guest.hva(3), 0)]
    for page in (1, 5, 6):
        remap(guest.hva(page), PAGE)
    guest.vm.host_unmapped_ranges(gone)
    after = guest.vm.stats()
    assert after["remote_tlb_flush"] - before["remote_tlb_flush"] == 1
    assert [guest.fetch(page) for page in range(8)] == [1, 0, 3, 4, 5, 0, 0, 8]
    guest.vm.host_unmapped_ranges([])
    assert guest.vm.stats()["remote_tlb_flush"] == after["remote_tlb_flush"]


def test_what_was_written_stays_in_the_dirty_log(guest: Guest) -> None:
    guest.tiny.slot(1, GPA, SIZE, guest.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.store(9)
    remap(guest.hva(9), PAGE)
    guest.vm.host_unmapped(guest.hva(8), 3 * PAGE)
    assert int.from_bytes(guest.vm.get_dirty_log(1), "little") == 1 << 9


def test_memory_may_go_away_while_a_guest_uses_it(guest: Guest) -> None:
    errors: list[int | None] = []
    entered = threading.Event()

    def run() -> None:
        # again: inc byte [ebx]; jmp again
        guest.tiny.load(b"\xfe\x03\xeb\xfc", rbx=GPA + 7 * PAGE)
        guest.vcpu.call_soon(entered.set)
        try:
            guest.vcpu.run()
        except OSError as error:
            errors.append(error.errno)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert entered.wait(20)
        end = time.monotonic() + 20
        while not ctypes.c_uint8.from_address(guest.hva(7)).value:
            assert time.monotonic() < end
        with guest.vm.mmu_lock:
            guest.vm.host_unmapped(guest.hva(7), PAGE)
            unmap(guest.hva(7), PAGE)
        thread.join(20)
        assert not thread.is_alive()
    finally:
        guest.vcpu.kick()
        thread.join()
    assert errors == [errno.EFAULT]


def test_memory_that_goes_away_untold_is_efault_and_no_signal(guest: Guest) -> None:
    for page in range(4):
        guest.store(page, page)
    unmap(guest.hva(1), PAGE)
    remap(guest.hva(2), PAGE, mmap.PROT_READ)
    for attempt in (lambda: guest.fetch(1), lambda: guest.store(1), lambda: guest.store(2)):
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EFAULT
            # The access is still to be done, and is done when there is memory.
            assert guest.vcpu.get_regs().rip == CODE
    assert (guest.fetch(0), guest.fetch(2), guest.fetch(3)) == (0, 0, 3)
    remap(guest.hva(1), PAGE)
    assert guest.fetch(1) == 0
    guest.store(1, 0x77)
    assert ctypes.c_uint8.from_address(guest.hva(1)).value == 0x77


def test_a_file_that_is_cut_short_is_efault_in_the_guest_and_in_kvm(guest: Guest) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        memory = mmap.mmap(file.fileno(), SIZE)
        guest.tiny.slot(2, 2 * GPA, SIZE, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        memory[PAGE] = 7
        guest.tiny.load(b"\x8a\x03\x8a\x43\x01\xf4", rbx=2 * GPA + PAGE)  # mov al, [ebx]; mov al, [ebx + 1]; hlt
        assert guest.tiny.run_to_halt().rax & 0xFF == 0
        file.truncate(PAGE)
        guest.tiny.load(b"\x8a\x03\xf4", rbx=2 * GPA + PAGE)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                guest.vcpu.run()
            assert caught.value.errno == errno.EFAULT
        assert read_guest(guest.vm, 2 * GPA + PAGE, 4) is None
        assert not write_guest(guest.vm, 2 * GPA + PAGE, b"1")
        assert cmpxchg_guest(guest.vm, 2 * GPA + PAGE, b"\0", b"\1") is None
        file.truncate(SIZE)
        assert guest.tiny.run_to_halt().rax & 0xFF == 0
        assert read_guest(guest.vm, 2 * GPA + PAGE, 4) == bytes(4)
        guest.tiny.slot(2, 2 * GPA, 0, 0)


def test_code_page_tables_and_stacks_may_go_away_too(guest: Guest) -> None:
    guest.tiny.slot(2, 2 * GPA, SIZE, guest.address)
    remap(guest.hva(0), SIZE)
    ctypes.memmove(guest.hva(0), b"\x50\xeb\xfd", 3)  # push eax; jmp back
    for page, place in ((0, 0), (1, 0)):
        guest.tiny.load(b"\xf4", rip=2 * GPA, rsp=2 * GPA + 2 * PAGE)
        guest.vcpu.call_soon(partial(unmap, guest.hva(page), PAGE))
        with pytest.raises(OSError) as caught:
            guest.vcpu.run()
        assert (caught.value.errno, guest.vcpu.get_regs().rip - 2 * GPA) == (errno.EFAULT, place)
        remap(guest.hva(page), PAGE)
        ctypes.memmove(guest.hva(0), b"\x50\xeb\xfd", 3)


def anywhere(near: int, size: int) -> int:
    """Map memory where the host likes, best of all near there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    at = _libc.mmap(ctypes.c_void_p(near), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert at
    return int(at)


def test_a_hole_under_a_slot_is_nobodys_who_does_not_name_it(guest: Guest) -> None:
    guest.tiny.slot(1, GPA, 0, 0)
    unmap(guest.hva(8), 8 * PAGE)
    guest.tiny.slot(1, GPA, SIZE, guest.address)
    taken = [anywhere(guest.hva(8 + n), PAGE) for n in range(8)]
    assert all(at + PAGE <= guest.address or at >= guest.address + SIZE for at in taken)
    for page in (8, 15):
        with pytest.raises(OSError) as caught:
            guest.store(page)
        assert caught.value.errno == errno.EFAULT
        assert read_guest(guest.vm, GPA + page * PAGE, 1) is None
    guest.store(7, 7)
    remap(guest.hva(8), PAGE)
    guest.store(8, 8)
    assert ctypes.c_uint8.from_address(guest.hva(8)).value == 8
    # Without the slot the host may give it to anybody, but for what is the client's.
    guest.tiny.slot(1, GPA, 0, 0)
    free = anywhere(guest.hva(9), 7 * PAGE)
    assert free == guest.hva(9)
    assert ctypes.c_uint8.from_address(guest.hva(8)).value == 8
    for at in taken:
        unmap(at, PAGE)


def test_a_hole_that_a_guest_has_come_upon_is_nobodys_either(guest: Guest) -> None:
    guest.store(3)
    for page in (3, 1000):  # touched before, and not
        unmap(guest.hva(page), 4 * PAGE)
        guest.vm.host_mappings.forget()
        with pytest.raises(OSError) as caught:
            guest.fetch(page)
        assert caught.value.errno == errno.EFAULT
        at = anywhere(guest.hva(page + 1), PAGE)
        assert at != guest.hva(page + 1)
        unmap(at, PAGE)


def test_a_vm_that_is_closed_leaves_no_hole_behind() -> None:
    guest = Guest()
    guest.tiny.slot(1, GPA, 0, 0)
    unmap(guest.hva(8), 8 * PAGE)
    guest.tiny.slot(1, GPA, SIZE, guest.address)
    guest.tiny.slot(2, 2 * GPA, SIZE, guest.address)  # the same memory again
    guest.tiny.slot(1, GPA, 0, 0)
    at = anywhere(guest.hva(8), 8 * PAGE)
    assert at != guest.hva(8)
    unmap(at, 8 * PAGE)
    guest.tiny.close()
    assert anywhere(guest.hva(8), 8 * PAGE) == guest.hva(8)
    guest.close()


COUNT_UP, COUNT_DOWN = b"\x40\xf4", b"\x48\xf4"  # inc eax; hlt, and dec eax; hlt


@pytest.mark.parametrize("log", [0, abi.KVM_MEM_LOG_DIRTY_PAGES])
def test_code_that_was_decoded_goes_with_its_memory(guest: Guest, log: int) -> None:
    guest.tiny.slot(1, GPA, SIZE, guest.address, log)
    for code, result in ((COUNT_UP, 11), (COUNT_DOWN, 9), (COUNT_UP, 11)):
        with guest.vm.mmu_lock:
            guest.vm.host_unmapped(guest.hva(3), PAGE)
            unmap(guest.hva(3), PAGE)
            remap(guest.hva(3), PAGE)
            ctypes.memmove(guest.hva(3), code, len(code))
        for _ in range(3):
            guest.tiny.load(b"\xf4", rip=GPA + 3 * PAGE, rax=10)
            assert guest.tiny.run_to_halt().rax == result


def test_code_that_runs_meanwhile_goes_with_its_memory(guest: Guest) -> None:
    """A vCPU that never leaves goes on in what has come in the place of its code."""
    ctypes.memmove(guest.hva(3), b"\xeb\xfe", 2)  # jmp to itself
    guest.tiny.load(b"\xf4", rip=GPA + 3 * PAGE, rax=10)
    entered = threading.Event()
    guest.vcpu.call_soon(entered.set)
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    try:
        assert entered.wait(20)
        end = time.monotonic() + 20
        while not guest.vcpu.cpu.instructions:
            assert time.monotonic() < end
        with guest.vm.mmu_lock:
            guest.vm.host_unmapped(guest.hva(3), PAGE)
            remap(guest.hva(3), PAGE)
            ctypes.memmove(guest.hva(3), COUNT_UP, 2)
        thread.join(20)
        assert not thread.is_alive()
        assert guest.vcpu.get_regs().rax == 11
    finally:
        guest.vcpu.kick()
        thread.join()


def test_ranges_that_no_slot_has_are_known_without_a_lock(guest: Guest) -> None:
    address, argument = guest.vm.machine.has_region_function
    has_region = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(address)
    for start, size, expected in (
        (guest.address - PAGE, PAGE, 0),
        (guest.address - PAGE, PAGE + 1, 1),
        (guest.address + SIZE - 1, 1, 1),
        (guest.address + SIZE, PAGE, 0),
        (guest.address + PAGE, 0, 0),
        (0, (1 << 64) - 1, 1),
    ):
        assert has_region(argument, start, size) == expected
        assert guest.vm.machine.has_region(start, size) == bool(expected)
    guest.tiny.slot(1, GPA, 0, 0)
    assert has_region(argument, guest.address, SIZE) == 0
    guest.tiny.close()
    assert has_region(argument, 0, (1 << 64) - 1) == 0


def test_of_many_slots_only_those_concerned_are_looked_at(guest: Guest) -> None:
    guest.tiny.slot(1, GPA, 0, 0)
    count = SIZE // (2 * PAGE)
    for n in range(count):
        guest.tiny.slot(1 + n, GPA + n * 2 * PAGE, PAGE, guest.hva(2 * n))
    assert guest.vm.regions.users(guest.hva(20), guest.hva(20) + 3 * PAGE) == {11, 12}
    assert guest.vm.regions.users(guest.hva(21), guest.hva(22)) == set()
    guest.store(20, 5)
    remap(guest.hva(20), PAGE)
    guest.vm.host_unmapped(guest.hva(20), PAGE)
    assert guest.fetch(20) == 0
    for n in range(count):
        guest.tiny.slot(1 + n, 0, 0, 0)
