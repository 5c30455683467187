# SPDX-License-Identifier: Apache-2.0
"""What completes an instruction that userspace had data for, when userspace has changed the vCPU meanwhile.

As ``x86_emulate_instruction`` does with EMULTYPE_NO_DECODE: the decoded instruction, with the registers as they are now
and its own RIP. Port I/O of the accumulator is different: it is given up if RIP has changed (``complete_fast_pio_in``).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import CODE, MIB, Memory, Tiny

from softkvm import abi

DEVICE = 0x5000_0000
ELSEWHERE = CODE + 0x100


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny().long_mode(2)
    machine.memory.write(ELSEWHERE, b"\xf4")
    yield machine
    machine.close()


@pytest.mark.parametrize("slot", [False, True], ids=["device", "memory meanwhile"])
@pytest.mark.parametrize(
    "code",
    ["48 8b07", "48 ff07", "f048 ff07", "48 870f", "48 0fb10f", "a4", "48 a7"],
    ids=["mov", "inc", "lock inc", "xchg", "cmpxchg", "movsb", "cmpsq"],
)
def test_a_rip_that_is_set_before_an_mmio_read_is_completed_is_lost(tiny: Tiny, code: str, slot: bool) -> None:
    tiny.load(bytes.fromhex(code) + b"\xf4", rdi=DEVICE, rsi=DEVICE + 0x1000)
    length = len(bytes.fromhex(code))
    assert tiny.run() == abi.KVM_EXIT_MMIO
    tiny.registers(rip=ELSEWHERE)
    memory = Memory(MIB)
    if slot:
        tiny.slot(1, DEVICE, MIB, memory.address)
    while tiny.run() == abi.KVM_EXIT_MMIO:
        pass
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert tiny.vcpu.get_regs().rip == CODE + length + 1


def test_the_other_registers_that_are_set_meanwhile_are_taken(tiny: Tiny) -> None:
    tiny.load(b"\x48\x03\x07\xf4", rdi=DEVICE, rax=1)  # add rax, [rdi]; hlt
    assert tiny.run() == abi.KVM_EXIT_MMIO
    tiny.vcpu.kvm_run.mmio.data[:] = (5).to_bytes(8, "little")
    tiny.registers(rax=100)
    assert tiny.run() == abi.KVM_EXIT_HLT
    assert tiny.vcpu.get_regs().rax == 105


def test_an_in_whose_rip_has_changed_takes_nothing(tiny: Tiny) -> None:
    tiny.load(b"\xec\xf4", rdx=0x300, rax=1)
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.registers(rip=ELSEWHERE)
    assert tiny.run() == abi.KVM_EXIT_HLT
    assert (tiny.vcpu.get_regs().rip, tiny.vcpu.get_regs().rax) == (ELSEWHERE + 1, 1)
