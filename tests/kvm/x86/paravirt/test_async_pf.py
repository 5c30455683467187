# SPDX-License-Identifier: Apache-2.0
"""Asynchronous page faults (msr.rst, KVM_FEATURE_ASYNC_PF*): guests and pages of which a userfaultfd tells us when."""

from __future__ import annotations

import ctypes
import errno
import random
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.provider import Provider
from tests.support.threads import beside, running, until
from tests.support.tiny import CODE, MIB, Memory, Tiny
from tests.support.tracing import texts, traced

from softkvm import abi
from softkvm.kvm.memory.async_pf import ASYNC_PF_PER_VCPU, AsyncPf, Work
from softkvm.kvm.memory.slow_memory import SlowMemory, is_resident
from softkvm.kvm.state import BLOCKING
from softkvm.kvm.x86.paravirt.apf import Apf

GPA, SIZE = 64 * MIB, 4 * MIB
#: The guest's structure, and what its handlers leave.
APF, READY = 0x9000, 0x9100
VECTOR = 0xF3
ON = abi.KVM_ASYNC_PF_ENABLED | abi.KVM_ASYNC_PF_DELIVERY_AS_INT
PF, NMI, INT = CODE + 0x100, CODE + 0x200, CODE + 0x300
LAPIC_SPIV = 0xF0
WAKE_ALL = 0xFFFF_FFFF

#: Says that the page is not present; clears the reason; runs until told that it is ready; goes back.
#: out 0x0e, al; mov dword [APF], 0; mov dword [READY], 0; sti; again: cmp dword [READY], 0; je again; add rsp, 8; iretq
_PF = bytes.fromhex("e60e c7042500900000 00000000 c7042500910000 00000000 fb 833c250091000000 74f6 4883c408 48cf")
#: push rax, rcx, rdx; mov eax, [APF + 4]; out 0xf3, eax; mov [READY], eax; mov dword [APF + 4], 0;
#: ACK: mov ecx, 0x4b564d07; mov eax, 1; xor edx, edx; wrmsr; EOI: mov dword [0xfee000b0], 0; pop rdx, rcx, rax; iretq
_INT = bytes.fromhex(
    "505152 8b042504900000 e7f3 89042500910000 c7042504900000 00000000"
    "b9074d564b b801000000 31d2 0f30 b9b000e0fe c701 00000000 5a5958 48cf"
)
#: out 0x02, al; iretq
_NMI = bytes.fromhex("e602 48cf")
#: sti; nop, as STI holds interrupts off for one more instruction; mov al, [rbx]; out 0x10, al; hlt
_MAIN = bytes.fromhex("fb 90 8a03 e610 f4")


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider(SIZE)
    yield provider
    provider.uffd.close()


@pytest.fixture
def tiny(provider: Provider) -> Iterator[Tiny]:
    """A guest in 64-bit mode with handlers for both events, whose second slot's pages are missing."""
    machine = Tiny(irqchip=True).long_mode(gigabytes=4)
    for vector, handler, code in ((14, PF, _PF), (2, NMI, _NMI), (VECTOR, INT, _INT)):
        machine.memory.write(handler, code)
        machine.gate64(vector, handler)
    lapic = machine.vcpu.get_lapic()
    regs = bytearray(bytes(lapic.regs))
    regs[LAPIC_SPIV : LAPIC_SPIV + 4] = struct.pack("<I", 0x1FF)
    ctypes.memmove(lapic.regs, bytes(regs), len(regs))
    machine.vcpu.set_lapic(lapic)
    machine.slot(1, GPA, SIZE, provider.memory.address)
    machine.load(_MAIN, rbx=GPA)
    yield machine
    machine.close()


def enable(tiny: Tiny, flags: int = abi.KVM_ASYNC_PF_SEND_ALWAYS) -> None:
    tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_INT: VECTOR, abi.MSR_KVM_ASYNC_PF_EN: APF | ON | flags})


def port(tiny: Tiny) -> tuple[int, int]:
    """Run to the next OUT; its port, and what was sent."""
    with running(tiny.vcpu) as run:
        assert run.wait() is None
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
    io = tiny.vcpu.kvm_run.io
    return io.port, int.from_bytes(bytes(tiny.vcpu.shared[io.data_offset : io.data_offset + io.size]), "little")


def test_the_guest_runs_on_and_is_told_when_the_page_is_there(tiny: Tiny, provider: Provider) -> None:
    enable(tiny)
    assert port(tiny) == (VECTOR, WAKE_ALL), "it may have come from another host"
    assert port(tiny)[0] == 0x0E
    flags, ready = struct.unpack("<II", tiny.memory.read(APF, 8))
    token = tiny.vcpu.get_sregs().cr2
    assert (flags, ready) == (1, 0)
    assert token not in (0, WAKE_ALL) and token & 0xFFF == tiny.vcpu.vcpu_id
    with running(tiny.vcpu) as run:
        # The page is still missing, and the guest runs: in its handler.
        before = tiny.vcpu.cpu.instructions
        until(lambda: tiny.vcpu.cpu.instructions > before + 10_000)
        provider.provide(0, 0x5A)
        assert run.wait() is None
    assert tiny.vcpu.kvm_run.io.port == VECTOR
    assert struct.unpack("<II", tiny.memory.read(APF, 8)) == (0, token)
    assert port(tiny) == (0x10, 0x5A)
    assert tiny.vcpu.apf.queued == 0
    assert tiny.vm.stats()["pages_2m"] == 1, "the first slot's: of the second, one page is there"


def test_tracepoints_tell_of_a_page_from_the_fault_to_its_coming(tiny: Tiny, provider: Provider) -> None:
    enable(tiny)
    with traced("kvm_*async*") as seen:
        assert port(tiny) == (VECTOR, WAKE_ALL)
        assert port(tiny)[0] == 0x0E
        with running(tiny.vcpu) as run:
            provider.provide(0, 0x5A)
            assert run.wait() is None
    token = tiny.vcpu.get_sregs().cr2
    page = f"gva = {GPA:#x}, gfn = {GPA >> 12:#x}"
    assert texts(seen, "kvm_try_async_get_page") == [page]
    assert texts(seen, "kvm_async_pf_not_present") == [f"token {token:#x} gva {GPA:#x}"]
    assert texts(seen, "kvm_async_pf_completed") == [f"gva {GPA:#x} address {provider.memory.address:#x}"]
    assert texts(seen, "kvm_async_pf_ready") == [f"token {WAKE_ALL:#x} gva 0", f"token {token:#x} gva {GPA:#x}"]


def test_a_guest_that_cannot_be_told_halts_in_the_instruction_and_takes_events(tiny: Tiny, provider: Provider) -> None:
    enable(tiny, flags=0)  # ring 0 is not interrupted without SEND_ALWAYS
    assert port(tiny) == (VECTOR, WAKE_ALL)
    with running(tiny.vcpu) as run:
        until(lambda: tiny.vcpu.apf.halted)
        tiny.vcpu.inject_nmi()
        assert run.wait() is None
    assert tiny.vcpu.kvm_run.io.port == 2
    with running(tiny.vcpu) as run:
        until(lambda: tiny.vcpu.apf.halted)
        provider.provide(0, 0x33)
        assert run.wait() is None
    assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rax & 0xFF) == (0x10, 0x33)
    assert struct.unpack("<II", tiny.memory.read(APF, 8)) == (0, 0), "it was told nothing, so it isn't told of the end"


def test_a_page_that_comes_before_the_guest_has_halted_for_it_ends_the_halt(tiny: Tiny, provider: Provider) -> None:
    tiny.vm.find_slow_memory()
    setup = tiny.vcpu.apf.setup

    def late(machine: Any, work: Work, ready: Callable[[], None]) -> bool:
        provider.provide(0, 0x66)
        assert setup(machine, work, ready)
        until(lambda: tiny.vcpu.apf.done)  # before the vCPU looks at its requests
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny.vcpu.apf), "setup", lambda _self, *arguments: late(*arguments))
        assert port(tiny) == (0x10, 0x66)


def test_with_interrupts_off_the_vcpu_waits_and_a_kick_ends_that(tiny: Tiny, provider: Provider) -> None:
    tiny.load(_MAIN[1:], rbx=GPA)
    tiny.vm.find_slow_memory()
    with running(tiny.vcpu) as run:
        until(lambda: tiny.vcpu.mode == BLOCKING)
        tiny.vcpu.kick()
        error = run.wait()
    assert error is not None and error.errno == errno.EINTR
    assert tiny.vcpu.get_regs().rip == CODE + 1, "before the instruction"
    with running(tiny.vcpu) as run:
        until(lambda: tiny.vcpu.mode == BLOCKING)
        provider.provide(0, 0x44)
        assert run.wait() is None
    assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rax & 0xFF) == (0x10, 0x44)


def test_pages_that_come_one_after_the_other_are_told_one_by_one(tiny: Tiny, provider: Provider) -> None:
    # The handler goes on behind the instruction instead, so that the next page is touched before the first is there.
    # out 0x0e, al; add qword [rsp + 8], 2; add rsp, 8; iretq
    tiny.memory.write(PF, bytes.fromhex("e60e 4883442408 02 4883c408 48cf"))
    pages = 5
    # sti; nop; for each page: mov al, [rbx]; add rbx, rcx; then: out 0x10, al; jmp to itself
    tiny.load(b"\xfb\x90" + b"\x8a\x03\x48\x01\xcb" * pages + b"\xe6\x10\xeb\xfe", rbx=GPA, rcx=4096)
    enable(tiny)
    assert port(tiny) == (VECTOR, WAKE_ALL)
    tokens = []
    for _ in range(pages):
        assert port(tiny)[0] == 0x0E
        tokens.append(tiny.vcpu.get_sregs().cr2)
    assert len(set(tokens)) == pages
    assert port(tiny)[0] == 0x10
    assert tiny.vcpu.apf.queued == pages
    for page in reversed(range(pages)):
        provider.provide(page, 1)
        assert port(tiny) == (VECTOR, tokens[page])
    assert tiny.vcpu.apf.queued == 0


def test_a_page_that_is_taken_away_is_waited_for_again(tiny: Tiny, provider: Provider) -> None:
    tiny.vm.find_slow_memory()
    provider.provide(0, 1)
    assert port(tiny) == (0x10, 1)
    libc = ctypes.CDLL(None)
    tiny.vm.host_unmapped(provider.memory.address, 4096)
    assert libc.madvise(ctypes.c_size_t(provider.memory.address), ctypes.c_size_t(4096), 9) == 0  # MADV_REMOVE
    tiny.load(_MAIN, rbx=GPA)
    with running(tiny.vcpu) as run:
        until(lambda: tiny.vcpu.apf.halted)
        provider.provide(0, 2)
        assert run.wait() is None
    assert tiny.vcpu.get_regs().rax & 0xFF == 2


def test_kvm_itself_waits_without_the_interpreters_lock(tiny: Tiny, provider: Provider) -> None:
    """The structure of the clock is in a page that is provided by a thread of the interpreter."""
    with running(tiny.vcpu, lambda: tiny.vcpu.set_msrs({abi.MSR_KVM_WALL_CLOCK_NEW: GPA})) as run:
        assert provider.uffd.wait() & -4096 == provider.memory.address
        provider.provide(0, 0)
        assert run.wait() is None
    assert provider.memory.read(0, 4) == struct.pack("<I", 2), "the clock's version"


def test_the_host_finds_memory_with_a_userfaultfd(tiny: Tiny, provider: Provider) -> None:
    assert tiny.vm.host_mappings.slow is None
    tiny.vm.find_slow_memory()
    assert tiny.vm.host_mappings.slow is not None
    assert tiny.vm.host_mappings.slow.has(provider.memory.address, SIZE)
    tiny.vm.set_slow_memory(provider.memory.address, SIZE, slow=False)
    assert tiny.vm.host_mappings.slow is None


# --- msr.rst -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (abi.MSR_KVM_ASYNC_PF_EN, APF | ON | 0x10),
        (abi.MSR_KVM_ASYNC_PF_EN, APF | ON | 0x20),
        (abi.MSR_KVM_ASYNC_PF_EN, (1 << 40) | ON),
        (abi.MSR_KVM_ASYNC_PF_INT, 0x100),
    ],
)
def test_reserved_bits_and_a_structure_without_memory_are_refused(tiny: Tiny, msr: int, value: int) -> None:
    assert tiny.vcpu.set_msrs({msr: value}) == 0


def test_without_an_in_kernel_apic_it_cannot_be_enabled() -> None:
    tiny = Tiny().long_mode()
    assert tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: APF | ON}) == 0
    assert tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: 0}) == 1
    tiny.close()


def test_disabling_forgets_what_was_waited_for(tiny: Tiny, provider: Provider) -> None:
    enable(tiny)
    assert port(tiny) == (VECTOR, WAKE_ALL)
    assert port(tiny)[0] == 0x0E
    tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: 0})
    assert tiny.vcpu.apf.queued == 0
    provider.provide(0, 0x21)
    tiny.memory.write(READY, b"\x01")
    tiny.load(_MAIN, rbx=GPA)
    assert port(tiny) == (0x10, 0x21)


# --- the pieces ----------------------------------------------------------------------------------------------


def test_a_vcpu_waits_for_so_many_pages_and_no_more() -> None:
    class Machine:
        def populate(self, hva: int) -> None:
            until(lambda: released)

    pages, released, ready = AsyncPf(), [], []
    machine = Machine()
    for n in range(ASYNC_PF_PER_VCPU):
        assert pages.setup(machine, Work(n, 0, n), lambda: ready.append(1))  # type: ignore[arg-type]
    assert not pages.setup(machine, Work(99, 0, 99), lambda: None)  # type: ignore[arg-type]
    assert pages.awaits(3) and not pages.awaits(99)
    released.append(1)
    until(lambda: len(ready) == ASYNC_PF_PER_VCPU)
    assert {pages.finish().gfn for _ in range(ASYNC_PF_PER_VCPU)} == set(range(ASYNC_PF_PER_VCPU))
    assert pages.queued == 0


def test_no_token_is_0_however_many_there_were() -> None:
    apf = Apf()
    tokens = [apf.new_token(0) for _ in range((1 << 20) + 3)]
    assert 0 not in tokens and max(tokens) < 1 << 32
    assert WAKE_ALL not in tokens[:-4]


def test_ranges_of_slow_memory_join_and_part() -> None:
    slow = SlowMemory([(0x5000, 0x7000), (0x1000, 0x3000)]).with_range(0x2000, 0x5000)
    assert slow.ranges == [(0x1000, 0x7000)]
    slow = slow.without_range(0x2000, 0x4000)
    assert slow.ranges == [(0x1000, 0x2000), (0x4000, 0x7000)]
    assert slow.has(0x1FFF, 1) and not slow.has(0x2000, 0x2000) and slow.has(0x2000, 0x2001)
    assert slow.is_there(0x2000, 0x1000), "it isn't slow, whatever is there"
    memory = Memory(8192)
    assert not is_resident(memory.address, 8192)
    memory.write(0, b"x")
    assert is_resident(memory.address, 4096) and not is_resident(memory.address, 8192)
    assert not is_resident(1 << 46, 4096), "nothing is mapped there"


# --- what a guest may put there ------------------------------------------------------------------------------


def test_whatever_a_guest_writes_into_its_structure_and_registers_its_page_comes(
    tiny: Tiny, provider: Provider
) -> None:
    """Registers are refused as documented, and no contents of the structure keep the vCPU from its page."""
    rng = random.Random(0)
    tiny.memory.write(PF, bytes.fromhex("4883c408 48cf"))  # add rsp, 8; iretq: whatever it was told, it looks again
    tiny.memory.write(INT, bytes.fromhex("50 b8b000e0fe c70000000000 58 48cf"))  # only the EOI
    told = 0
    for page in range(60):
        where = rng.choice([APF, 2 * MIB - 64, 2 * MIB, 1 << 40, GPA + SIZE])
        data = where | rng.choice([ON, ON, rng.randrange(64)]) | rng.choice([0, abi.KVM_ASYNC_PF_SEND_ALWAYS])
        vector = rng.choice([VECTOR, VECTOR, 0, 15, 0x100, 0xFFFF_FFFF])
        assert tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_INT: vector}) == (vector < 0x100)
        missing = data & ON == ON and where >= 2 * MIB
        assert tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: data}) == (not data & 0x30 and not missing)
        for area in (APF, 2 * MIB - 64):
            tiny.memory.write(area, rng.choice([bytes(8), rng.randbytes(8)]))
        tiny.load(_MAIN, rbx=GPA + (page << 12))
        timer = threading.Timer(0.02, provider.provide, (page, page))
        with beside(timer), running(tiny.vcpu) as run:
            assert run.wait() is None
            timer.join()
        assert (tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rax & 0xFF) == (0x10, page)
        told += tiny.vcpu.stat_async_pf_not_present
        tiny.vcpu.set_msrs({abi.MSR_KVM_ASYNC_PF_EN: 0})
        assert tiny.vcpu.apf.queued == 0
    assert told > 0


def test_who_enables_the_apic_behind_it_is_told_then() -> None:
    """Linux's first processor does (``apic_set_spiv`` asks for it): what waits would keep it from ever sleeping."""
    tiny = Tiny(irqchip=True).long_mode(gigabytes=4)
    tiny.memory.write(INT, _INT)
    tiny.gate64(VECTOR, INT)
    enable(tiny)
    # sti; nop; out 0x10, al; mov ecx, 0xfee000f0; mov dword [rcx], 0x1ff; nop; out 0x11, al; hlt
    tiny.load(bytes.fromhex("fb 90 e610 b9f000e0fe c701 ff010000 90 e611 f4"))
    assert port(tiny)[0] == 0x10
    assert port(tiny) == (VECTOR, WAKE_ALL)
    assert port(tiny)[0] == 0x11
    assert not tiny.vcpu.apf.done
    tiny.close()


@pytest.mark.parametrize("interrupts", [False, True])
def test_who_never_enables_the_apic_sleeps_in_hlt_all_the_same(interrupts: bool) -> None:
    """As Linux without ACPI, which says "System halted" then: nobody can tell it of pages that have come."""
    tiny = Tiny(irqchip=True).long_mode(gigabytes=4)
    enable(tiny)
    tiny.load(bytes.fromhex("fbf4ebfd" if interrupts else "f4ebfd"))  # (sti;) hlt; jmp to the hlt
    with running(tiny.vcpu):
        until(lambda: tiny.vcpu.stat_halt_exits > 0)
        until(lambda: tiny.vcpu.mode == BLOCKING or tiny.vcpu.stat_halt_exits > 1000)
        assert tiny.vcpu.apf.done
        assert tiny.vcpu.stat_halt_exits == 1
    tiny.close()
