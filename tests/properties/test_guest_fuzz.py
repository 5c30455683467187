# SPDX-License-Identifier: Apache-2.0
"""A guest that touches everything it can reach harms neither the process nor a machine beside it."""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.conformance import CODE, MEMORY_SIZE, STACK, Guest, set_pio_data, watchdog
from tests.support.machines import KVMS

from softkvm import abi

ACCESSES = 400
IDT, HANDLER, IRQ_HANDLER = 0xA000, 0xB000, 0xB100
TOTAL_S = 5.0
CANARY = 16 * 4096

PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x40, 0x43, 0x61, 0x70, 0x71, 0x4D0, 0x5658, 0xCF8, 0xCFC, 0x80, 0x7E, 0xFFFF)
PAGES = (0xFEE0_0000, 0xFEC0_0000, 0x20_0000, MEMORY_SIZE - 4096, MEMORY_SIZE, 0xFFFF_F000, 0xE000_0000)
MSRS = (
    *range(0x10, 0x13),
    0x1B,
    0x3B,
    0x8B,
    0xCE,
    *range(0x174, 0x17B),
    0x1A0,
    0x1D9,
    *range(0x200, 0x210),
    0x277,
    0x2FF,
    *range(0x400, 0x410),
    0x6E0,
    *range(0x800, 0x840),
    *range(0x4B56_4D00, 0x4B56_4D09),
    *range(0xC000_0080, 0xC000_0085),
    *range(0xC000_0100, 0xC000_0104),
    0xC001_0015,
    0xC001_0117,
    0x4000_0000,
    0x4000_0070,
)
#: Instructions with an operand at [rbx]: moves, read-modify-writes, strings, SSE, wide compare-exchange.
MMIO_CODE = (
    *("8a03", "668b03", "8b03", "488b03", "8803", "668903", "8903", "488903", "f00fc103", "8703", "830305"),
    *("480fb103", "0fb603", "0fc703", "0fae3b", "a4", "f3aa", "ff33", "0f2803", "0f2903", "0fc70b"),
)


def _mov(opcode: str, value: int, size: int = 4) -> bytes:
    return bytes.fromhex(opcode) + (value % (1 << 8 * size)).to_bytes(size, "little")


def _number(rng: random.Random) -> int:
    return rng.choice([0, 1, rng.getrandbits(8), rng.getrandbits(32), (1 << 64) - 1, 1 << rng.randrange(64)])


def _access(rng: random.Random) -> bytes:
    """One access: a port, MMIO, an MSR or a hypercall, with a register state that matters."""
    values = _mov("48b8", _number(rng), 8) + _mov("48ba", _number(rng), 8)  # mov rax, imm64; mov rdx, imm64
    kind = rng.randrange(5)
    if kind == 0:
        port = rng.choice(PORTS) if rng.random() < 0.7 else rng.getrandbits(16)
        # mov edx, port; in or out with al, ax, eax
        return values + _mov("ba", port) + bytes.fromhex(rng.choice(["ec", "ed", "66ed", "ee", "ef", "66ef"]))
    if kind == 1:
        # mov ebx, address; an instruction with [rbx]
        address = rng.choice(PAGES) + rng.choice([rng.randrange(4096), rng.randrange(256) * 16])
        code = rng.choice(MMIO_CODE)
        return values + _mov("bb", address) + _mov("b9", rng.randrange(4)) + bytes.fromhex(code)
    if kind == 2:
        return values + _mov("b9", rng.choice(MSRS)) + bytes.fromhex("0f32")  # rdmsr
    if kind == 3:
        return values + _mov("b9", rng.choice(MSRS)) + bytes.fromhex("0f30")  # wrmsr
    number = rng.randrange(14)
    rest = _mov("48bb", _number(rng), 8) + _mov("48b9", _number(rng), 8) + _mov("48be", _number(rng), 8)
    return rest + _mov("b8", number) + bytes.fromhex(rng.choice(["0f01c1", "0f01d9"]))  # vmcall, vmmcall


def program(seed: int) -> bytes:
    """Straight code; each access leaves the address of the next in R15, where exceptions go on."""
    rng = random.Random(seed)
    code = b""
    for _ in range(ACCESSES):
        access = _access(rng)
        code += _mov("4c8d3d", len(access)) + access  # lea r15, [rip + len]
    return code + b"\xfa\xf4"  # cli; hlt


def install(guest: Guest, code: bytes) -> None:
    """Load the fuzzing program with handlers for every vector."""
    guest.write(HANDLER, _mov("bc", STACK) + bytes.fromhex("41ffe7"))  # mov esp, STACK; jmp r15
    # An interrupt: end it (mov dword [0xfee000b0], 0 by way of a register) and return
    guest.write(IRQ_HANDLER, bytes.fromhex("53") + _mov("bb", 0xFEE0_00B0) + bytes.fromhex("c70300000000 5b 48cf"))
    for vector in range(256):
        target = HANDLER if vector < 32 else IRQ_HANDLER
        gate = target & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (target >> 16) << 48
        guest.write(IDT + vector * 16, gate.to_bytes(8, "little") + bytes(8))
    guest.write(0x9008, (0x00AF_9B00_0000_FFFF).to_bytes(8, "little"))
    guest.long(b"\xf4")
    guest.write(0x4_0000, code)
    sregs = guest.cpu.get_sregs()
    sregs.gdt = abi.kvm_dtable(base=0x9000, limit=0x1F)
    sregs.idt = abi.kvm_dtable(base=IDT, limit=0xFFF)
    guest.cpu.set_sregs(sregs)
    guest.cpu.set_regs(abi.kvm_regs(rip=0x4_0000, rflags=0x202, rsp=STACK))


def drive(guest: Guest, rng: random.Random) -> int:
    """Run until the program's end or something that ends a machine; returns the number of exits."""
    exits = 0
    run = guest.kvm_run
    ends = time.monotonic() + TOTAL_S
    while time.monotonic() < ends:
        exits += 1
        try:
            with watchdog(guest.cpu, 1.0):
                guest.cpu.run()
        except InterruptedError:
            break  # a masked HLT or a loop in overwritten code
        if run.exit_reason == abi.KVM_EXIT_IO:
            if run.io.direction == abi.KVM_EXIT_IO_IN:
                set_pio_data(guest.cpu, rng.randbytes(run.io.size * run.io.count))
        elif run.exit_reason == abi.KVM_EXIT_MMIO:
            run.mmio.data[:] = list(rng.randbytes(8))
        else:
            assert run.exit_reason in abi.EXIT_REASON_NAMES
            break
    return exits


class Neighbour:
    """A machine that sums its memory again and again, and notices if anything touches it."""

    def __init__(self) -> None:
        self.kvm = KVMS["soft"]()
        self.guest = Guest(self.kvm)
        self.guest.write(0x5_0000, bytes(range(256)) * 1024)
        # 0: mov esi, 0x50000; mov ecx, 0x10000; xor eax, eax; 1: add eax, [rsi]; add esi, 4; loop 1b; hlt; jmp 0b
        self.guest.long("be00000500 b900000100 31c0 0306 83c604 e2f9 f4 ebea")
        words = (ctypes.c_uint32 * 0x1_0000).from_buffer_copy(self.guest.memory[0x5_0000 : 0x5_0000 + 0x4_0000])
        self.total = sum(words) & 0xFFFF_FFFF
        self.sums: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.guest.expect(abi.KVM_EXIT_HLT)
            self.sums.append(self.guest.cpu.get_regs().rax)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.guest.close()
        self.kvm.close()


class Fenced(Guest):
    """A guest whose memory lies between pages that nobody may write."""

    def fence(self) -> None:
        self.whole = mmap.mmap(-1, MEMORY_SIZE + 2 * CANARY)
        self.whole[:CANARY] = b"\xc5" * CANARY
        self.whole[-CANARY:] = b"\xc5" * CANARY
        self.region(0, 0, 0)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.whole)) + CANARY
        self.memory = memoryview(self.whole)[CANARY:-CANARY]  # type: ignore[assignment]
        self.region(0, 0, MEMORY_SIZE)

    def intact(self) -> bool:
        fence = b"\xc5" * CANARY
        return self.whole[:CANARY] == fence and self.whole[-CANARY:] == fence


@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32), chips=st.booleans())
def test_a_fuzzing_guest_harms_nobody(seed: int, chips: bool) -> None:
    with Neighbour() as neighbour, KVMS["soft"]() as kvm, Fenced(kvm, irqchip=chips, pit=chips) as guest:
        guest.fence()
        install(guest, program(seed))
        exits = drive(guest, random.Random(seed))
        assert exits > 0
        assert guest.intact()
    assert neighbour.sums
    assert set(neighbour.sums) == {neighbour.total}


def test_the_fuzzing_program_gets_through() -> None:
    """Without writes to MSRs (one of them could end the guest) every access is reached."""
    with KVMS["soft"]() as kvm, Guest(kvm) as guest:
        rng = random.Random(7)
        code = b""
        for _ in range(200):
            access = _access(rng)
            if access.endswith(b"\x0f\x30"):
                continue
            code += _mov("4c8d3d", len(access)) + access
        install(guest, code + b"\xfa\xf4")
        assert drive(guest, rng) > 20
        assert guest.kvm_run.exit_reason == abi.KVM_EXIT_HLT
        assert guest.cpu.get_regs().rip == 0x4_0000 + len(code) + 2
    assert CODE < IDT
