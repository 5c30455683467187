# SPDX-License-Identifier: Apache-2.0
"""Unused pages by hypercall (thread 20): a guest tells of a free huge page, and the host has its memory back.

The hypercall, its feature bit and its capability are softkvm's own: the thread's numbers became others' in Linux.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.guests import ROOT, missing
from tests.support.machines import open_soft
from tests.support.resident import resident
from tests.support.tiny import MIB, Tiny

from softkvm import abi
from softkvm.vmm.console import Console
from softkvm.vmm.machine import Config, Machine

HUGE = 2 * MIB
ENABLE = abi.KVM_UNUSED_PAGE_HINT_ENABLE
VMMCALL = b"\x0f\x01\xd9\xf4"  # vmmcall; hlt
U64 = (1 << 64) - 1
PAGE = HUGE  # the guest's page that the tests give back: the second huge page
AT = 8  # where it holds something

_libc = ctypes.CDLL(None, use_errno=True)


class Backed:
    """A guest whose second huge page (and a third) is memory of a given kind, filled with ones."""

    def __init__(self, kind: str = "anonymous", *, flags: int = 0, hints: int = ENABLE, vcpus: int = 1) -> None:
        self.tiny = Tiny(vcpus=vcpus).long_mode()
        self.size = 2 * HUGE
        length = self.size + HUGE
        self.fd = -1
        if kind == "anonymous":
            self.map = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self.fd = os.memfd_create("guest")
            os.ftruncate(self.fd, length)
            shared = mmap.MAP_SHARED if kind == "memfd" else mmap.MAP_PRIVATE
            self.map = mmap.mmap(self.fd, length, shared)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = base + -base % HUGE
        self.view = memoryview(self.map)[self.address - base : self.address - base + self.size]
        self.view[:] = b"\x01" * self.size
        self.tiny.slot(1, PAGE, self.size, self.address, flags)
        if hints:
            self.tiny.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, hints)

    def hint(self, gpa: int = PAGE, size: int = HUGE) -> int:
        """What the hypercall gives, as a signed number."""
        self.tiny.load(VMMCALL, rax=abi.KVM_HC_UNUSED_PAGE_HINT, rbx=gpa, rcx=size)
        result = self.tiny.run_to_halt().rax
        return result - (1 << 64) if result >> 63 else result

    def read(self, gpa: int) -> int:
        """A word as the guest sees it."""
        self.tiny.load(b"\x48\x8b\x03\xf4", rbx=gpa)  # mov rax, [rbx]; hlt
        return self.tiny.run_to_halt().rax

    def write(self, gpa: int, value: int) -> None:
        self.tiny.load(b"\x48\x89\x03\xf4", rbx=gpa, rax=value)
        self.tiny.run_to_halt()

    def resident(self) -> int:
        return resident(self.address, self.size)

    def close(self) -> None:
        self.tiny.close()
        if self.fd >= 0:
            os.close(self.fd)


@contextmanager
def backed(kind: str = "anonymous", *, flags: int = 0, hints: int = ENABLE) -> Iterator[Backed]:
    guest = Backed(kind, flags=flags, hints=hints)
    yield guest
    guest.close()


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_a_huge_page_goes_back_to_the_host_and_reads_zeroes(kind: str) -> None:
    with backed(kind) as guest:
        assert guest.read(PAGE + AT) == 0x0101_0101_0101_0101  # it is mapped, and in the TLB
        assert guest.resident() == 2 * HUGE
        blocks = os.fstat(guest.fd).st_blocks if guest.fd >= 0 else 0
        assert guest.hint() == 0
        assert guest.resident() == HUGE
        if guest.fd >= 0:
            assert blocks - os.fstat(guest.fd).st_blocks == HUGE // 512
        assert [guest.read(PAGE + at) for at in (0, AT, HUGE - 8)] == [0] * 3
        assert guest.read(PAGE + HUGE) == 0x0101_0101_0101_0101
        guest.write(PAGE + AT, 77)
        assert guest.read(PAGE + AT) == 77
        assert guest.view[AT] == 77


def test_without_userspaces_leave_there_is_no_such_hypercall() -> None:
    with backed(hints=0) as guest:
        assert guest.hint() == -abi.KVM_ENOSYS
        assert guest.resident() == 2 * HUGE


@pytest.mark.parametrize("reason", [abi.KVM_UNUSED_PAGE_HINT_DEVICE_ASSIGNED, abi.KVM_UNUSED_PAGE_HINT_PAGE_POISONING])
def test_an_assigned_device_or_page_poisoning_keeps_the_memory(reason: int) -> None:
    with backed(hints=ENABLE | reason) as guest:
        assert guest.hint() == -abi.KVM_EOPNOTSUPP
        assert guest.read(PAGE) == 0x0101_0101_0101_0101
        # The device is taken away.
        guest.tiny.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, ENABLE)
        assert guest.hint() == 0


def test_no_guest_is_offered_it_unasked() -> None:
    with backed() as guest:
        for entry in guest.tiny.kvm.get_supported_cpuid():
            if entry.function == abi.KVM_CPUID_FEATURES:
                assert not entry.eax >> abi.KVM_FEATURE_UNUSED_PAGE_HINT & 1


def test_the_feature_bit_is_needed_where_features_are_enforced() -> None:
    for offered in (False, True):
        guest = Backed()
        tiny = guest.tiny
        entries = tiny.vcpu.get_cpuid2()
        for entry in entries:
            if entry.function == abi.KVM_CPUID_FEATURES and offered:
                entry.eax |= 1 << abi.KVM_FEATURE_UNUSED_PAGE_HINT
        tiny.vcpu.set_cpuid2(entries)
        tiny.vcpu.enable_cap(abi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        assert guest.hint() == (0 if offered else -abi.KVM_ENOSYS)
        guest.close()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(PAGE + 4096, HUGE), (PAGE + 1, HUGE), (PAGE, 4096), (PAGE, 2 * HUGE), (PAGE, 0), (PAGE, HUGE + 1), (0, U64)],
)
def test_what_is_no_huge_page_is_einval(gpa: int, size: int) -> None:
    with backed() as guest:
        assert guest.hint(gpa, size) == -abi.KVM_EINVAL
        assert guest.resident() == 2 * HUGE


def test_a_page_that_is_not_all_of_one_writable_slots_is_efault() -> None:
    with backed() as guest:
        for gpa in (1 << 40, PAGE + 2 * HUGE, -HUGE & U64):
            assert guest.hint(gpa) == -abi.KVM_EFAULT
        # Half of it.
        guest.tiny.slot(1, 0, 0, 0)
        guest.tiny.slot(1, PAGE, HUGE // 2, guest.address)
        assert guest.hint() == -abi.KVM_EFAULT
    with backed(flags=abi.KVM_MEM_READONLY) as guest:
        assert guest.hint() == -abi.KVM_EFAULT
        assert guest.resident() == 2 * HUGE


def test_a_private_mapping_of_a_file_is_kept() -> None:
    """It would be the file's contents then, not zeroes."""
    with backed("private file") as guest:
        assert guest.hint() == -abi.KVM_EOPNOTSUPP
        assert guest.read(PAGE) == 0x0101_0101_0101_0101


def test_memory_that_is_gone_is_efault() -> None:
    with backed() as guest:
        assert not _libc.mprotect(ctypes.c_void_p(guest.address), ctypes.c_size_t(HUGE), 0)
        assert guest.hint() == -abi.KVM_EFAULT
        assert not _libc.mprotect(ctypes.c_void_p(guest.address), ctypes.c_size_t(HUGE), 3)


def test_the_dirty_log_has_what_was_given_back() -> None:
    with backed(flags=abi.KVM_MEM_LOG_DIRTY_PAGES) as guest:
        guest.tiny.vm.get_dirty_log(1)
        assert guest.hint(PAGE + HUGE) == 0
        log = guest.tiny.vm.get_dirty_log(1)
        assert log == bytes(HUGE // 4096 // 8) + b"\xff" * (HUGE // 4096 // 8)


def test_the_capabilitys_bits_are_checked() -> None:
    with backed(hints=0) as guest:
        bits = guest.tiny.vm.check_extension(abi.KVM_CAP_UNUSED_PAGE_HINT)
        assert bits == 7
        with pytest.raises(OSError) as info:
            guest.tiny.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, 8)
        assert info.value.errno == errno.EINVAL


@given(gpa=st.integers(0, U64), size=st.integers(0, U64) | st.just(HUGE))
@settings(max_examples=40, deadline=None)
def test_any_arguments_have_a_documented_result_and_no_other_page_changes(gpa: int, size: int) -> None:
    whole = size == HUGE and gpa % HUGE == 0
    assume(not whole or gpa)  # the page that its code is in
    inside = whole and PAGE <= gpa < PAGE + 2 * HUGE
    with backed() as guest:
        result = guest.hint(gpa, size)
        assert result == (0 if inside else -abi.KVM_EFAULT if whole else -abi.KVM_EINVAL)
        if not inside:
            assert guest.resident() == 2 * HUGE


def test_a_racing_vcpu_never_sees_what_was_there() -> None:
    """One writes a number, says so and gives the page back; the other sees that number, a later one or zeroes."""
    guest = Backed(vcpus=2)
    tiny = guest.tiny
    rounds, said = 60, 0x1_0000
    # The writer, rbp = round: [page] = rbp; [said] = rbp; vmmcall; inc rbp; cmp; jb; hlt
    writer = bytes.fromhex("4889fb 48892b 48892e b8 0100 6b73 b90000 2000 0f01d9".replace(" ", ""))
    writer += bytes.fromhex("48ffc5 4883fd") + bytes([rounds]) + b"\x72" + (256 - len(writer) - 9).to_bytes(1, "little")
    writer += b"\xc6\x46\x10\x01\xf4"  # mov byte [rsi+16], 1; hlt
    # The reader: rax = [said]; rdx = [page]; rdx must be 0 or at least rax; until the end
    reader = bytes.fromhex(
        "488b06 488b17 4885d2 7405 4839c2 7207 807e1000 74ea f4 4889d7 48c7c5ffffffff f4".replace(" ", "")
    )
    tiny.memory.write(0x1000, writer)
    tiny.memory.write(0x1800, reader)
    first, second = tiny.vcpus
    second.set_sregs(first.get_sregs())
    for vcpu, rip in ((first, 0x1000), (second, 0x1800)):
        vcpu.set_regs(abi.kvm_regs(rip=rip, rsp=0x8000, rflags=2, rdi=PAGE, rsi=said, rbp=1))
    guest.view[:8] = bytes(8)

    def run(n: int) -> None:
        tiny.vcpus[n].run()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.get_regs().rbp == rounds
    assert second.get_regs().rbp == 1, "the reader saw something older"
    guest.close()


@pytest.mark.guest
def test_a_guests_allocator_gives_back_what_it_does_not_use() -> None:
    """Memory of the host follows the guest's: all, nothing but what the guest itself takes, all again."""
    image = ROOT / "guests" / "build" / "allocator.elf"
    if not image.exists():
        missing("guests/build/allocator.elf is not built: make guests")
    size = 128 * MIB

    def offer(entries: list[abi.kvm_cpuid_entry2]) -> list[abi.kvm_cpuid_entry2]:
        for entry in entries:
            if entry.function == abi.KVM_CPUID_FEATURES:
                entry.eax |= 1 << abi.KVM_FEATURE_UNUSED_PAGE_HINT
        return entries

    def enable(machine: Machine) -> None:
        machine.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, ENABLE)

    console = Console()
    with open_soft() as kvm, Machine(kvm, Config(size, cpuid=offer, devices=enable), console.output) as machine:
        ram = machine.board.memory.ranges[0]

        def held() -> int:
            return resident(ram.hva, size)

        def command(text: str, pattern: str) -> None:
            console.send(text)
            console.expect(pattern, timeout_s=120)

        console.attach(machine)
        machine.load(image.read_bytes(), None, "")
        machine.start()
        pages = int(console.expect(r"allocator of (\d+) huge pages, hints offered", timeout_s=60)[1])
        assert pages >= 50
        for _ in range(2):
            command("a", rf"allocated {512 * pages}\b")
            assert held() >= pages * HUGE
            command("f", rf"freed, hints {pages} refused 0\b")
            assert held() <= size - pages * HUGE
        command("h", rf"huge pages {pages} not zero 0\b")
        console.send("q")
        machine.wait(60)
