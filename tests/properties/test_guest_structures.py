# SPDX-License-Identifier: Apache-2.0
"""Structures that a guest shares with KVM: anywhere, with anything in them, while another vCPU writes to them.

Clocks, steal time, EOIs, page faults and Hyper-V's pages lie at ends of pages, across pages and slots, in read-only
memory, in MMIO and where there is nothing. Registers are refused as they are documented (KVM's msr.rst), KVM writes
nowhere but into the structures, and machine, process and neighbours stay well.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.test_guest_fuzz import IRQ_HANDLER, give_hyperv, install
from tests.support.conformance import MEMORY_SIZE, PAGE, Guest, describe
from tests.support.fences import Fenced, Neighbour
from tests.support.machines import KVMS
from tests.support.threads import running

from softkvm import abi

ACCESSES = 120
TOTAL_EXITS = 2000
RESULTS = 0x6_0000
SCRIBBLER = 0x7_0000
#: Where structures are: 16 pages, in the middle of which one slot ends and the next begins.
PAGES, SLOT_END, PAGES_END = 0xC_0000, 0xC_8000, 0xD_0000
#: Nobody's, but behind read-only memory: structures reach from one page into the next, and from the last to nowhere.
ROM_BACKING, UNTOUCHED_END = PAGES_END + PAGE, MEMORY_SIZE - PAGE
ROM, ROM_SIZE = 0x20_0000, 4 * PAGE
VECTOR = 0x60
DONE = 0x81

STRUCTURES = (
    abi.MSR_KVM_WALL_CLOCK,
    abi.MSR_KVM_SYSTEM_TIME,
    abi.MSR_KVM_WALL_CLOCK_NEW,
    abi.MSR_KVM_SYSTEM_TIME_NEW,
    abi.MSR_KVM_STEAL_TIME,
    abi.MSR_KVM_PV_EOI_EN,
    abi.MSR_KVM_ASYNC_PF_EN,
)
HYPERV = (
    abi.HV_X64_MSR_HYPERCALL,
    abi.HV_X64_MSR_REFERENCE_TSC,
    abi.HV_X64_MSR_VP_ASSIST_PAGE,
    abi.HV_X64_MSR_SIMP,
    abi.HV_X64_MSR_SIEFP,
    abi.HV_X64_MSR_SCONTROL,
    abi.HV_X64_MSR_SINT0,
    abi.HV_X64_MSR_STIMER0_CONFIG,
    abi.HV_X64_MSR_STIMER0_COUNT,
    abi.HV_X64_MSR_EOM,
)


#: Those of them that hold no address.
_NUMBERS = (
    abi.HV_X64_MSR_SCONTROL,
    abi.HV_X64_MSR_SINT0,
    abi.HV_X64_MSR_STIMER0_CONFIG,
    abi.HV_X64_MSR_STIMER0_COUNT,
    abi.HV_X64_MSR_EOM,
)


def _mov(opcode: str, value: int, size: int) -> bytes:
    return bytes.fromhex(opcode) + value.to_bytes(size, "little")


def address(rng: random.Random) -> int:
    """Where a structure may be asked for."""
    end = rng.choice([PAGES + PAGE, SLOT_END, SLOT_END, PAGES_END, MEMORY_SIZE, ROM + ROM_SIZE, 1 << 52, 1 << 64])
    return rng.choice(
        [
            PAGES + rng.randrange(16 * PAGE // 64) * 64,
            PAGES + rng.randrange(16 * PAGE // 64) * 64,
            end - rng.choice([1, 2, 4, 8, 12, 16, 28, 31, 32, 60, 64, PAGE]),
            ROM + rng.randrange(64) * 64,
            rng.choice([0xFEE0_0000, 0xFEC0_0000, 0xE000_0000, 1 << 40]) + rng.randrange(64) * 64,
        ]
    )


def value_of(msr: int, rng: random.Random) -> int:
    """What a guest writes to a register."""
    if msr == abi.HV_X64_MSR_SINT0:
        return rng.choice([VECTOR, VECTOR | abi.HV_SYNIC_SINT_AUTO_EOI, abi.HV_SYNIC_SINT_MASKED, 3])
    if msr == abi.HV_X64_MSR_STIMER0_CONFIG:
        return rng.choice([0, 1 | 1 << 3, 1 << 1 | 1 | 1 << 3, 1 | 1 << 12 | VECTOR << 4])
    if msr == abi.HV_X64_MSR_STIMER0_COUNT:
        return rng.choice([1, 1000, 10_000])
    if msr in (abi.HV_X64_MSR_SCONTROL, abi.HV_X64_MSR_EOM):
        return 1
    return address(rng) | rng.choice([1, 1, 1, 0, 9, rng.randrange(64)])


def has_memory(gpa: int) -> bool:
    """Whether a guest-physical address is in a slot."""
    return gpa < MEMORY_SIZE or ROM <= gpa < ROM + ROM_SIZE


def refused(msr: int, value: int) -> bool:
    """Whether the document has a #GP for it."""
    if msr == abi.MSR_KVM_STEAL_TIME:
        return bool(value & 0x3E)
    if msr == abi.MSR_KVM_PV_EOI_EN:
        return bool(value & 2) or bool(value & 1 and not has_memory(value & ~3))
    if msr == abi.MSR_KVM_ASYNC_PF_EN:
        on = abi.KVM_ASYNC_PF_ENABLED | abi.KVM_ASYNC_PF_DELIVERY_AS_INT
        return bool(value & 0x30) or (value & on == on and not has_memory(value & ~0x3F))
    return False


def program(rng: random.Random, *, hyperv: bool) -> tuple[bytes, list[tuple[int, int]]]:
    """Code that writes registers and notes which writes were taken, with interrupts and exits in between."""
    code, writes = b"", []
    if hyperv:
        # mov eax, 1; mov edx, ...; mov ecx, HV_X64_MSR_GUEST_OS_ID; wrmsr
        code += _mov("b8", 1, 4) + _mov("ba", 0x8100_0000, 4) + _mov("b9", abi.HV_X64_MSR_GUEST_OS_ID, 4) + b"\x0f\x30"
    for n in range(ACCESSES):
        msr = rng.choice(STRUCTURES + HYPERV if hyperv else STRUCTURES)
        value = value_of(msr, rng)
        writes.append((msr, value))
        access = _mov("b8", value & 0xFFFF_FFFF, 4) + _mov("ba", value >> 32, 4) + _mov("b9", msr, 4) + b"\x0f\x30"
        access += _mov("c60425", RESULTS + n, 4) + b"\x01"  # mov byte [RESULTS + n], 1
        code += _mov("4c8d3d", len(access), 4) + access  # lea r15, [rip + len]: the handler of #GP goes on there
        if rng.random() < 0.5:  # mov ebx, 0xfee00300; mov dword [rbx], self | VECTOR
            code += _mov("bb", 0xFEE0_0300, 4) + _mov("c703", 0x4_0000 | VECTOR, 4)
        code += b"\xe6\x80" + b"\xf3\x90" * rng.randrange(20)  # out 0x80, al; pause
    return code + _mov("e6", DONE, 1) + b"\xf4", writes


#: mov [rdi], rax; a step of xorshift; the next quadword of PAGES
_SCRIBBLE = bytes.fromhex(
    "488907 4889c1 48c1e10d 4831c8 4889c1 48c1e907 4831c8 4889c1 48c1e111 4831c84883c708 81e7ffff0000 81cf00000c00 ebcd"
)


@contextmanager
def scribbling(guest: Guest, seed: int) -> Iterator[None]:
    """Let the second vCPU write numbers to PAGES, over and over."""
    cpu = guest.vcpus[1]
    sregs = guest.cpu.get_sregs()
    sregs.apic_base = cpu.get_sregs().apic_base
    cpu.set_sregs(sregs)
    guest.write(SCRIBBLER, _SCRIBBLE)
    cpu.set_regs(abi.kvm_regs(rip=SCRIBBLER, rflags=2, rax=seed | 1, rdi=PAGES))
    cpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                cpu.run()
            except InterruptedError:
                continue

    with running(cpu, run) as thread:
        try:
            yield
        finally:
            stop.set()
    assert thread.error is None


def prepare(guest: Fenced, rng: random.Random, *, hyperv: bool) -> None:
    """Memory with a pattern in it, in slots that part where structures are, and read-only memory."""
    guest.fence()
    guest.write(PAGES, rng.randbytes(PAGES_END - PAGES))
    guest.write(ROM_BACKING, rng.randbytes(UNTOUCHED_END - ROM_BACKING))
    guest.region(0, 0, 0)
    guest.region(0, 0, SLOT_END)
    guest.region(1, SLOT_END, MEMORY_SIZE - SLOT_END, offset=SLOT_END)
    guest.region(2, ROM, ROM_SIZE, offset=ROM_BACKING, flags=abi.KVM_MEM_READONLY)
    for vcpu in guest.vcpus if hyperv else ():
        give_hyperv(vcpu)


def extent(msr: int, value: int) -> range:
    """The bytes that KVM may write to once a register has been taken."""
    enabled = bool(value & 1)
    if msr in (abi.MSR_KVM_WALL_CLOCK, abi.MSR_KVM_WALL_CLOCK_NEW):
        return range(value, value + 12)
    start, size = {
        abi.MSR_KVM_SYSTEM_TIME: (value & ~1, 32 if (value & 0xFFE) + 32 <= PAGE else 0),
        abi.MSR_KVM_SYSTEM_TIME_NEW: (value & ~1, 32 if (value & 0xFFE) + 32 <= PAGE else 0),
        abi.MSR_KVM_STEAL_TIME: (value & ~63, 64),
        abi.MSR_KVM_PV_EOI_EN: (value & ~3, 4),
        abi.MSR_KVM_ASYNC_PF_EN: (value & ~63, 64),
        abi.HV_X64_MSR_VP_ASSIST_PAGE: (value & ~0xFFF, 4),
    }.get(msr, (value & ~0xFFF, PAGE))
    return range(start, start + size * enabled)


def drive(guest: Guest) -> None:
    """Run to the program's end: every write has been tried."""
    for _ in range(TOTAL_EXITS):
        reason = guest.run(timeout_s=60.0)
        assert reason in (abi.KVM_EXIT_IO, abi.KVM_EXIT_HYPERV), describe(guest.kvm_run)
        if reason == abi.KVM_EXIT_IO and guest.kvm_run.io.port == DONE:
            return
    raise AssertionError(f"not at its end after {TOTAL_EXITS} exits")


def check(seed: int, *, hyperv: bool, beside: bool) -> None:
    """Have a guest try its structures; *beside* another vCPU that writes to them, or alone."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        neighbour = stack.enter_context(Neighbour())
        kvm = stack.enter_context(KVMS["soft"]())
        guest = stack.enter_context(Fenced(kvm, irqchip=True, vcpus=2))
        prepare(guest, rng, hyperv=hyperv)
        code, writes = program(rng, hyperv=hyperv)
        install(guest, code)
        # An interrupt ends by its bit in memory, or by its register: lock btr dword [PAGES], 0; jc 1f; …; 1: iretq
        guest.write(
            IRQ_HANDLER,
            bytes.fromhex("f00fba342500000c0000 720e 53 bbb000e0fe c70300000000 5b 48cf"),
        )
        lapic = guest.cpu.get_lapic()
        memoryview(lapic.regs).cast("B")[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        guest.cpu.set_lapic(lapic)
        before = bytes(guest.memory[ROM_BACKING:UNTOUCHED_END])
        pages = bytes(guest.memory[PAGES:ROM_BACKING])
        with scribbling(guest, seed) if beside else nullcontext():
            drive(guest)
        taken = bytes(guest.memory[RESULTS : RESULTS + ACCESSES])
        for (msr, value), ok in zip(writes, taken, strict=True):
            if msr in STRUCTURES:
                assert bool(ok) != refused(msr, value), f"MSR {msr:#x} = {value:#x}"
        assert bytes(guest.memory[ROM_BACKING:UNTOUCHED_END]) == before, "KVM wrote where there is no structure"
        assert guest.intact()
        if not beside:
            written = {n for n, byte in enumerate(guest.memory[PAGES:ROM_BACKING], PAGES) if byte != pages[n - PAGES]}
            allowed = {at for access in writes for at in extent(*access) if access[0] not in _NUMBERS}
            assert written & allowed, "some are structures"
            assert not written - allowed - set(range(PAGES, PAGES + 4)), "there the guest itself notes its EOIs"
    assert neighbour.sums
    assert set(neighbour.sums) == {neighbour.total}


@pytest.mark.parametrize("hyperv", [False, True], ids=["kvm", "hyperv"])
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32))
def test_structures_anywhere_with_anything_in_them_harm_nobody(seed: int, hyperv: bool) -> None:
    check(seed, hyperv=hyperv, beside=True)


@pytest.mark.parametrize("hyperv", [False, True], ids=["kvm", "hyperv"])
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32))
def test_kvm_writes_into_structures_and_nowhere_else(seed: int, hyperv: bool) -> None:
    check(seed, hyperv=hyperv, beside=False)
