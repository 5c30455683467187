# SPDX-License-Identifier: Apache-2.0
"""A guest that touches everything it can reach harms neither the process nor a machine beside it."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.conformance import CODE, MEMORY_SIZE, STACK, Guest, set_pio_data, watchdog
from tests.support.fences import Fenced, Neighbour
from tests.support.machines import KVMS

from softkvm import abi, api
from softkvm.kvm.x86.hyperv.msrs import HV_MSRS
from softkvm.kvm.x86.msrs import FEATURE_MSRS
from softkvm.kvm.x86.msrs import MSRS as KVM_MSRS

ACCESSES = 400
IDT, HANDLER, IRQ_HANDLER = 0xA000, 0xB000, 0xB100
TOTAL_S = 5.0

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
#: All that KVM knows by name: those that userspace saves, Hyper-V's, paravirtual ones.
KNOWN_MSRS = sorted({*KVM_MSRS, *HV_MSRS, *FEATURE_MSRS})
HYPERCALLS = (*range(14), abi.KVM_HC_UNUSED_PAGE_HINT, 0xFFFF_FFFF)
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
        return values + _mov("b9", rng.choice(rng.choice([MSRS, KNOWN_MSRS]))) + bytes.fromhex("0f32")  # rdmsr
    if kind == 3:
        return values + _mov("b9", rng.choice(rng.choice([MSRS, KNOWN_MSRS]))) + bytes.fromhex("0f30")  # wrmsr
    number = rng.choice(HYPERCALLS)
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


def give_hyperv(vcpu: api.Vcpu, *, synic: bool = True) -> None:
    """Let a vCPU have Hyper-V's interfaces, and KVM's registers beside."""
    if synic:
        vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC2, 0)
    own = [entry for entry in vcpu.get_cpuid2() if not 0x4000_0000 <= entry.function < 0x4000_0100]
    vcpu.set_cpuid2(own + vcpu.get_supported_hv_cpuid())


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
        elif run.exit_reason == abi.KVM_EXIT_HYPERV:
            run.hyperv.u.hcall.result = rng.getrandbits(64)  # of a SynIC's registers, they are for reading
        else:
            assert run.exit_reason in abi.EXIT_REASON_NAMES
            break
    return exits


@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32), chips=st.booleans(), hyperv=st.booleans())
def test_a_fuzzing_guest_harms_nobody(seed: int, chips: bool, hyperv: bool) -> None:
    with Neighbour() as neighbour, KVMS["soft"]() as kvm, Fenced(kvm, irqchip=chips, pit=chips) as guest:
        guest.fence()
        guest.vm.enable_cap(abi.KVM_CAP_UNUSED_PAGE_HINT, abi.KVM_UNUSED_PAGE_HINT_ENABLE)
        if hyperv:
            give_hyperv(guest.cpu, synic=chips)
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
