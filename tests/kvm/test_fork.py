# SPDX-License-Identifier: Apache-2.0
"""Forked children: they close what they inherited, use what they make, and the parent notices nothing.

As with the kernel's VMs: a request on one of another process (another ``mm``) is EIO (``kvm_vm_ioctl``).
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
from tests.support.descriptors import open_descriptors
from tests.support.forks import in_child
from tests.support.tiny import CODE, MIB, Tiny

from softkvm import _softcpu, abi

SPIN = b"\xeb\xfe"
HANDLER = 0x2000
VECTOR = 0x40


@contextmanager
def running(tiny: Tiny) -> Iterator[None]:
    """Run a vCPU on a thread of its own."""

    def run() -> None:
        with pytest.raises(InterruptedError):
            tiny.vcpu.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not tiny.vcpu.exit_counts and tiny.vcpu.mode == 0:
            time.sleep(0.001)
        yield
    finally:
        tiny.vcpu.kick()
        thread.join()


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True).real_mode()
    yield machine
    machine.close()


def timer_guest(tiny: Tiny) -> None:
    """Start code that programs the local APIC's timer, and spins until its interrupt's OUT."""
    stores = ((0xFEE0_00F0, 0x1FF), (0xFEE0_0320, VECTOR), (0xFEE0_03E0, 0xB), (0xFEE0_0380, 1_000_000))
    code = b"".join(b"\xc7\x05" + at.to_bytes(4, "little") + value.to_bytes(4, "little") for at, value in stores)
    tiny.protected_mode()
    tiny.memory.write(0x4000 + 8 * VECTOR, (HANDLER | 8 << 16 | 0x8E00 << 32).to_bytes(8, "little"))
    tiny.memory.write(HANDLER, b"\xe6\x10")
    tiny.load(code + b"\xfb\xeb\xfe")


def uses_a_vm_of_its_own() -> None:
    """A new VM's vCPU gets its timer's interrupts, an irqfd's, and ends."""
    tiny = Tiny(irqchip=True)
    timer_guest(tiny)
    assert tiny.run() == abi.KVM_EXIT_IO
    eventfd = os.eventfd(0)
    tiny.vm.irqfd(eventfd, 3)
    os.eventfd_write(eventfd, 1)
    end = time.monotonic() + 20
    while not tiny.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    tiny.vm.create_pit2()
    tiny.close()


@pytest.mark.parametrize("code", [SPIN, b"\xf4\xeb\xfd"])
def test_a_child_closes_the_vm_of_a_vcpu_that_runs_or_halts(tiny: Tiny, code: bytes) -> None:
    tiny.load(code)
    with running(tiny):
        in_child(tiny.close)
        in_child(tiny.vcpu.close, tiny.vm.close, tiny.vm.close)
        in_child(lambda: _forget(tiny))
        assert tiny.vcpu.running
    assert tiny.vcpu.get_regs().rip >= CODE


def _forget(tiny: Tiny) -> None:
    tiny.__dict__.clear()
    gc.collect()


def test_every_request_to_an_inherited_vm_is_eio(tiny: Tiny) -> None:
    def requests() -> None:
        for thing, file in ((tiny.vm, abi.File.VM), (tiny.vcpu, abi.File.VCPU)):
            names = [abi.method_name(request) for request in abi.requests_of(file)]
            for method in [getattr(thing, name) for name in names if hasattr(thing, name)]:
                refused(errno.EIO, method)
        tiny.vcpu.kick()
        assert tiny.vcpu.kvm_run.immediate_exit == 0
        refused(errno.EIO, _softcpu.Cpu.vmrun, tiny.vcpu.cpu, tiny.vcpu.vmcb.address)
        refused(errno.EIO, tiny.vm.machine.alloc_page)
        refused(errno.EIO, tiny.vm.machine.pte_load, tiny.vm.mmu.root_address)
        refused(errno.EIO, tiny.vm.machine.read, tiny.memory.address, 8)
        refused(errno.EIO, _softcpu.Cpu, tiny.vm.machine, 1)
        tiny.vcpu.close()
        tiny.vm.close()
        for request in (tiny.vm.create_vcpu, tiny.vcpu.run):
            refused(errno.EBADF, request)

    in_child(requests)


def refused(code: int, call: Callable[..., object], *args: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code


def test_a_child_uses_what_it_makes_whatever_its_parent_does(tiny: Tiny) -> None:
    timer_guest(tiny)  # the timer's thread is the parent's
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.load(SPIN)
    with running(tiny):
        in_child(uses_a_vm_of_its_own)
        in_child(lambda: in_child(uses_a_vm_of_its_own))
    uses_a_vm_of_its_own()


def test_locks_that_the_parents_threads_hold_keep_no_child(tiny: Tiny) -> None:
    tiny.vm.create_pit2()
    eventfd = os.eventfd(0)
    tiny.vm.irqfd(eventfd, 5)
    tiny.vm.ioeventfd(eventfd, 0x1000_0000, 4)
    chips = tiny.vm.chips
    assert chips is not None and tiny.vcpu.apic is not None and chips.ioapic is not None and chips.pic is not None
    locks: list[AbstractContextManager[object]] = [
        tiny.vm.lock, tiny.vm.slots_lock, tiny.vm.mmu_lock, tiny.vm.eventfds._lock, tiny.vm.pio_bus._lock,
        tiny.vcpu.request_lock, tiny.vcpu.apic.lock, chips.apic_map._lock, chips.ioapic._lock, chips.pic._lock,
    ]  # fmt: skip
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(20)
        in_child(tiny.vcpu.close, tiny.vm.close, uses_a_vm_of_its_own)
    finally:
        over.set()
        thread.join()
    os.close(eventfd)


def test_a_childs_close_leaves_the_parents_irqfds_alone(tiny: Tiny) -> None:
    eventfd = os.eventfd(0)
    tiny.vm.irqfd(eventfd, 3)
    in_child(tiny.close)
    os.eventfd_write(eventfd, 1)
    end = time.monotonic() + 20
    while not tiny.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.close(eventfd)


def test_a_child_gives_back_the_descriptors_that_it_inherited(tiny: Tiny) -> None:
    eventfd = os.eventfd(0)
    tiny.vm.irqfd(eventfd, 3)

    def close() -> None:
        inherited = open_descriptors()  # without those of VMs that only threads of the parent's still had
        tiny.vm.close()
        # the irqfd's, the epoll file's and the one that wakes its thread, and the ring of coalesced writes
        assert len(inherited - open_descriptors()) == 4

    in_child(close)
    os.close(eventfd)


def test_a_fork_at_any_moment_of_the_parents_work_gives_a_child_that_works() -> None:
    over = threading.Event()

    def work() -> None:
        other = Tiny().real_mode()
        while not over.is_set():
            pages = [other.vm.machine.alloc_page(64) for _ in range(4)]
            other.slot(1, 4 * MIB, MIB, other.memory.address)
            other.slot(1, 4 * MIB, 0, other.memory.address)
            for page in pages:
                page.free()
        other.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            in_child(lambda: Tiny(irqchip=True).close())
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_child_that_is_forked_in_the_middle_of_kvm_run_leaves_it_with_eio(tiny: Tiny) -> None:
    children: list[int] = []
    tiny.load(b"\xe6\x10")
    tiny.vcpu.call_soon(lambda: children.append(os.fork()))
    try:
        reason = tiny.run()
    except OSError as error:
        os._exit(0 if children == [0] and error.errno == errno.EIO else 1)
    if children == [0]:
        os._exit(2)
    assert reason == abi.KVM_EXIT_IO
    assert os.waitpid(children[0], 0)[1] == 0
