# SPDX-License-Identifier: Apache-2.0
"""Exceptions of signals' handlers in the middle of requests: what a request changes is changed as a whole, or not."""

from __future__ import annotations

import ctypes
import mmap
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import pytest
from tests.support.timeouts import OWN_ALARM
from tests.support.tiny import CODE, MIB, Memory, Tiny

from softkvm import abi

pytestmark = OWN_ALARM

T = TypeVar("T")
GPA = 16 * MIB
SLOT = 1
ROUNDS = 1600


class Storm(Exception):
    """What the handler raises."""


class Interrupting:
    """Makes calls that a timer's handler may interrupt with an exception, at any moment of them."""

    def __init__(self) -> None:
        self.armed = False
        self.interrupted = 0
        self._random = random.Random(1)
        self._spans: dict[str, float] = {}

    def handle(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            self.interrupted += 1
            raise Storm

    def call(self, name: str, function: Callable[[], T]) -> T | None:
        """Call *function*; None if that is interrupted. Whether the timer comes in time is left to chance."""
        span = self._spans.get(name, 100e-6)
        start = time.perf_counter()
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, span))
            # No call between the return and the mark: there the interpreter runs no handler.
            result = function()
            self.armed = False
            return result
        except Storm:
            return None
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            # What one call takes, and how long it is until the next handler's time.
            self._spans[name] = 0.9 * span + 0.1 * min(1.2 * (time.perf_counter() - start), 1e-3)

    def done(self, name: str, function: Callable[[], None]) -> bool:
        """Call *function*; False if that is interrupted."""

        def whether() -> bool:
            function()
            return True

        return self.call(name, whether) or False


@pytest.fixture
def storm() -> Iterator[Interrupting]:
    interrupting = Interrupting()
    before = signal.signal(signal.SIGALRM, interrupting.handle)
    yield interrupting
    interrupting.armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert interrupting.interrupted > ROUNDS // 100, "hardly any came in time"


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny(irqchip=True).protected_mode()
    yield machine
    machine.close()


def pages(log: bytes) -> set[int]:
    bits = int.from_bytes(log, "little")
    return {n for n in range(bits.bit_length()) if bits >> n & 1}


@pytest.mark.parametrize("manual", [False, True], ids=["get", "get and clear"])
def test_no_dirty_page_is_lost(tiny: Tiny, storm: Interrupting, manual: bool) -> None:
    extra = Memory(MIB)
    count = MIB // 4096
    if manual:
        tiny.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    tiny.slot(SLOT, GPA, MIB, extra.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    tiny.load(b"\xfe\x03\xe6\x10")  # inc byte [ebx]; out 0x10, al
    owed: set[int] = set()
    vm = tiny.vm
    for n in range(ROUNDS):
        page = n * 7 % count
        tiny.registers(rip=CODE, rbx=GPA + page * 4096)
        assert tiny.run() == abi.KVM_EXIT_IO
        owed.add(page)
        log = storm.call("get", lambda: vm.get_dirty_log(SLOT))
        if log is not None and manual:
            owed |= pages(log)  # they have to come again unless they are cleared
            if storm.done("clear", partial(vm.clear_dirty_log, SLOT, 0, count, log)):
                owed -= pages(log)
        elif log is not None:
            owed -= pages(log)
        tiny.vcpu.get_regs()
    if manual:
        # A clear that was interrupted has been done, or has not.
        assert pages(vm.get_dirty_log(SLOT)) <= owed
    else:
        assert owed <= pages(vm.get_dirty_log(SLOT))
        assert not pages(vm.get_dirty_log(SLOT))


def test_a_slot_is_changed_or_not(tiny: Tiny, storm: Interrupting) -> None:
    extra = mmap.mmap(-1, 2 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(extra))
    vm = tiny.vm
    tiny.load(b"\xfe\x03\xe6\x10")
    shapes = [  # size, address, flags
        (2 * MIB, GPA, 0),
        (2 * MIB, GPA, abi.KVM_MEM_LOG_DIRTY_PAGES),
        (2 * MIB, GPA + 4 * MIB, abi.KVM_MEM_LOG_DIRTY_PAGES),
        (0, 0, 0),
    ]

    def shape() -> tuple[int, int, int]:
        slot = vm.memslots.by_id(SLOT)
        return (slot.npages << 12, slot.base_gfn << 12, slot.flags) if slot is not None else (0, 0, 0)

    before = shape()
    for n in range(ROUNDS):
        size, gpa, flags = wanted = shapes[n % len(shapes)]
        region = abi.kvm_userspace_memory_region(
            slot=SLOT, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=address
        )
        done = storm.done("slot", partial(vm.set_user_memory_region, region, extra))
        if shape() != wanted:
            assert not done and shape() == before
            vm.set_user_memory_region(region, extra)
        if size:
            had = extra[0]
            tiny.registers(rip=CODE, rbx=gpa)
            assert tiny.run() == abi.KVM_EXIT_IO
            assert extra[0] == (had + 1) & 0xFF
        before = wanted
    assert not before[0]
    extra.close()  # nobody holds it any more


def test_registers_are_set_or_not(tiny: Tiny, storm: Interrupting) -> None:
    vcpu = tiny.vcpu
    names = [name for name, *_ in abi.kvm_regs._fields_ if name not in ("rip", "rflags")]
    before = 0
    for n in range(1, ROUNDS):
        regs = abi.kvm_regs(rip=n, rflags=2, **dict.fromkeys(names, n))
        storm.done("registers", partial(vcpu.set_regs, regs))
        now = vcpu.get_regs()
        assert now.rip in (n, before) or n == 1
        if now.rip == n:
            assert {getattr(now, name) for name in names} == {n}
        before = now.rip


def test_the_chips_locks_are_free_whenever_a_handler_runs(tiny: Tiny, storm: Interrupting) -> None:
    vm = tiny.vm
    vm.create_pit2()
    raised = 0

    def handle(*_: object) -> None:
        nonlocal raised
        raised ^= 1
        vm.irq_line(5, raised)  # what it has interrupted may be in the same chip
        vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
        vm.get_pit2()
        tiny.vcpu.call_soon(lambda: None)
        tiny.vcpu.nmi()
        storm.handle()

    signal.signal(signal.SIGALRM, handle)
    chip = vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    pit = vm.get_pit2()

    def work() -> None:
        vm.irq_line(5, 1)
        vm.irq_line_status(6, 1)
        vm.set_irqchip(chip)
        vm.set_pit2(pit)
        vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x41))
        tiny.vcpu.call_soon(lambda: None)
        tiny.vcpu.nmi()
        vm.irq_line(5, 0)

    for _ in range(ROUNDS):
        storm.done("chips", work)
