# SPDX-License-Identifier: Apache-2.0
"""A guest that sleeps in memory with a userfaultfd: whoever must not wait for that page doesn't.

The kernel's vCPU waits for it in get_user_pages(), which signals end, and nothing that a request needs is held.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from tests.support.provider import PAGE, Provider
from tests.support.threads import PATIENCE_S, Running, running, until
from tests.support.tiny import CODE, MIB, Memory, Tiny

from softkvm import abi
from softkvm.bench.userfaultfd import MINOR, Userfaultfd
from softkvm.kvm.state import IN_GUEST_MODE

GPA, SIZE = 64 * MIB, 4 * MIB
#: mov al, [ebx]; hlt
_LOAD = b"\x8a\x03\xf4"
#: lock add [ebx], eax; hlt: of two lines, if EBX says so
_LOCKED = b"\xf0\x01\x03\xf4"


class Asleep:
    """A guest whose slot 1 has no page, and will not have one."""

    def __init__(self, provider: Provider, *, vcpus: int = 1) -> None:
        self.provider = provider
        self.tiny = Tiny(vcpus=vcpus).protected_mode()
        self.tiny.slot(1, GPA, SIZE, provider.memory.address)
        self.tiny.load(_LOAD, rbx=GPA)

    def sleeps(self, page: int = 0) -> None:
        """Wait until the guest sleeps in an access."""
        assert self.provider.uffd.wait() & -PAGE == self.provider.memory.address + page * PAGE

    def promptly(self, action: Callable[[], object]) -> None:
        """Do what has to come to its end while the guest sleeps."""
        doing = Running(action)
        doing.thread.start()
        doing.thread.join(PATIENCE_S)
        if doing.thread.is_alive():
            self.provider.uffd.close()  # everybody goes on
            doing.thread.join()
            pytest.fail("it waits for the page that nobody provides")
        assert doing.error is None


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider(SIZE)
    yield provider
    provider.uffd.close()


@pytest.fixture
def guest(provider: Provider) -> Iterator[Asleep]:
    made = Asleep(provider)
    yield made
    made.tiny.close()


def _delete(guest: Asleep) -> None:
    guest.tiny.slot(1, GPA, 0, 0)


def _log(guest: Asleep) -> None:
    guest.tiny.slot(1, GPA, SIZE, guest.provider.memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert not any(guest.tiny.vm.get_dirty_log(1))
    guest.tiny.slot(1, GPA, SIZE, guest.provider.memory.address, 0)


def _unmapped(guest: Asleep) -> None:
    guest.tiny.vm.host_unmapped(guest.provider.memory.address, SIZE)


@pytest.mark.parametrize("action", [_delete, _log, _unmapped], ids=lambda action: action.__name__)
def test_slots_and_logs_change_while_a_guest_sleeps_and_it_sleeps_on(
    guest: Asleep, action: Callable[[Asleep], None]
) -> None:
    with running(guest.tiny.vcpu) as run:
        guest.sleeps()
        guest.promptly(lambda: action(guest))
        if action is _delete:
            assert run.wait() is None
            assert guest.tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_MMIO
            return
        guest.sleeps()
        guest.provider.provide(0, 0x5A)
        assert run.wait() is None
    assert guest.tiny.vcpu.get_regs().rax & 0xFF == 0x5A


def test_the_machines_end_does_not_wait_for_a_guest_that_sleeps(guest: Asleep) -> None:
    with running(guest.tiny.vcpu) as run:
        guest.sleeps()
        guest.promptly(guest.tiny.vm.close)
        error = run.wait()
    assert error is not None and error.errno == errno.EIO


def test_memory_that_gets_its_userfaultfd_while_the_guest_runs_keeps_nobody_either() -> None:
    provider = Provider(SIZE, register=False)
    guest = Asleep(provider)
    guest.tiny.run_to_halt()
    provider.register()
    guest.tiny.load(_LOAD, rbx=GPA + MIB)
    with running(guest.tiny.vcpu) as run:
        guest.sleeps(MIB // PAGE)
        guest.promptly(guest.tiny.vm.close)
        assert run.wait() is not None
    provider.uffd.close()


def test_a_kick_ends_the_run_before_the_instruction_each_time(guest: Asleep) -> None:
    for _ in range(3):
        with running(guest.tiny.vcpu) as run:
            guest.sleeps()
            guest.tiny.vcpu.kick()
            error = run.wait()
        assert error is not None and error.errno == errno.EINTR
        assert guest.tiny.vcpu.get_regs().rip == CODE
    guest.provider.provide(0, 0x21)
    assert guest.tiny.run_to_halt().rax & 0xFF == 0x21


def test_a_signal_to_the_thread_ends_the_run(guest: Asleep) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    try:
        with running(guest.tiny.vcpu) as run:
            guest.sleeps()
            assert run.thread.ident is not None
            signal.pthread_kill(run.thread.ident, signal.SIGUSR1)
            error = run.wait()
        assert error is not None and error.errno == errno.EINTR
        until(lambda: seen)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_memory_that_is_in_its_file_but_not_mapped_is_slept_in_the_same_way() -> None:
    """Minor faults: what a demand pager of a memfd has."""
    fd = os.memfd_create("pages")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"\x33" * SIZE, 0)
    mapping = mmap.mmap(fd, SIZE)
    os.close(fd)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    try:
        uffd = Userfaultfd(MINOR)
        uffd.register(address, SIZE)
    except OSError as error:
        pytest.skip(f"the host has no userfaultfd for that: {error.strerror}")
    with uffd:
        tiny = Tiny().protected_mode()
        tiny.slot(1, GPA, SIZE, address)
        tiny.load(_LOAD, rbx=GPA)
        with running(tiny.vcpu) as run:
            assert uffd.wait() & -PAGE == address
            tiny.vcpu.kick()
            ended = run.wait()
        assert ended is not None and ended.errno == errno.EINTR
        uffd.go_on(address, PAGE)
        assert tiny.run_to_halt().rax & 0xFF == 0x33
        tiny.close()


def test_another_processor_has_the_bus_while_one_sleeps(provider: Provider) -> None:
    guest = Asleep(provider, vcpus=2)
    tiny = guest.tiny
    other = tiny.vcpus[1]
    other.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
    other.set_sregs(tiny.vcpu.get_sregs())
    tiny.memory.write(CODE + 0x100, _LOCKED)
    regs = tiny.vcpu.get_regs()
    regs.rip, regs.rbx, regs.rax = CODE + 0x100, 0x9000 + 62, 0x0102_0304
    other.set_regs(regs)
    with running(tiny.vcpu):
        guest.sleeps()
        guest.promptly(other.run)
    assert tiny.memory.read(0x9000 + 62, 4) == bytes([4, 3, 2, 1])
    tiny.close()


def test_each_access_is_made_once_however_often_the_guest_is_roused(provider: Provider) -> None:
    """Every page comes while kicks do; each instruction adds to two pages, over their border."""
    tiny = Tiny().protected_mode()
    pages = 48
    tiny.slot(1, GPA, SIZE, provider.memory.address)
    # add dword [ebx], 0x01010101; add ebx, ecx; dec edx; jnz back; hlt
    tiny.load(bytes.fromhex("8103 01010101 01cb 4a 75f5 f4"), rbx=GPA + PAGE - 2, rcx=PAGE, rdx=pages)
    done = threading.Event()

    def kicks() -> None:
        while not done.wait(0.0005):
            tiny.vcpu.kick()

    def run() -> None:
        while True:
            try:
                tiny.vcpu.run()
            except InterruptedError:
                continue
            return

    missing = set(range(pages + 1))

    def provide() -> bool:
        """Provide what is touched; true when all is there."""
        address = provider.uffd.next_fault()
        page = -1 if address is None else (address - provider.memory.address) // PAGE
        if page in missing:  # not a second time for an access that was begun once more
            missing.remove(page)
            provider.provide(page, 0)
        return not missing

    kicking = threading.Thread(target=kicks)
    kicking.start()
    try:
        with running(tiny.vcpu, run) as state:
            until(provide)
            assert state.wait() is None
    finally:
        provider.uffd.close()
        done.set()
        kicking.join()
    for page in range(1, pages):
        there = provider.memory.read(page * PAGE, PAGE)
        assert there[:2] == there[-2:] == b"\x01\x01" and not any(there[2:-2]), page
    tiny.close()


def test_memory_with_a_userfaultfd_is_found_with_its_slot_and_at_the_first_run() -> None:
    early, late = Provider(SIZE), Provider(SIZE, register=False)
    tiny = Tiny().protected_mode()
    tiny.slot(1, GPA, SIZE, early.memory.address)
    tiny.slot(2, GPA + SIZE, SIZE, late.memory.address)

    def awaited(memory: Memory) -> bool:
        found = tiny.vm.host_mappings.awaited
        return found is not None and found.has(memory.address, SIZE)

    assert awaited(early.memory) and not awaited(late.memory)
    late.register()
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    assert awaited(late.memory)
    assert tiny.vm.host_mappings.slow is None, "nothing is mapped page by page for that"
    assert tiny.vcpu.mode != IN_GUEST_MODE
    tiny.close()
    early.uffd.close()
    late.uffd.close()
