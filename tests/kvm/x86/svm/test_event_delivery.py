# SPDX-License-Identifier: Apache-2.0
"""Accesses without memory while an event is being delivered (APM vol. 2, 15.7.2; KVM_INTERNAL_ERROR_DELIVERY_EV).

What faulted is the delivery's access, so the instruction at RIP must not be emulated in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import CODE, IDT, STACK, Tiny

from softkvm import abi

HOLE = 0x2000_0000
HANDLER = CODE + 0x100
_NPF = 0x400
# EXITINTINFO: valid, type, vector
_UD = 0x8000_0306
_PF = 0x8000_0B0E
_NMI = 0x8000_0202
_INT_30 = 0x8000_0430
_EXTERNAL = 0x8000_0040


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    machine.memory.write(HANDLER, b"\xf4")
    yield machine
    machine.close()


def _set_idt(tiny: Tiny, base: int) -> None:
    sregs = tiny.vcpu.get_sregs()
    sregs.idt.base = base
    tiny.vcpu.set_sregs(sregs)


def _delivery_error(tiny: Tiny) -> list[int]:
    """Run to the internal error; returns EXITINTINFO, exit code, EXITINFO1, guest-physical address."""
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR
    internal = tiny.vcpu.kvm_run.internal
    assert (internal.suberror, internal.ndata) == (abi.KVM_INTERNAL_ERROR_DELIVERY_EV, 5)
    assert tiny.vcpu.get_regs().rip == CODE
    return list(internal.data[:4])


@pytest.mark.parametrize(
    ("code", "event", "registers"),
    [
        ("0f0b", _UD, {}),  # ud2
        ("8b03", _PF, {"rbx": 1 << 40}),  # mov eax, [rbx]: no page there; a load that could be emulated
        ("cd30", _INT_30, {}),  # int 0x30
    ],
)
def test_an_idt_in_a_hole_is_an_internal_error(tiny: Tiny, code: str, event: int, registers: dict[str, int]) -> None:
    tiny.long_mode()
    _set_idt(tiny, HOLE)
    tiny.load(bytes.fromhex(code + "f4"), **registers)
    assert _delivery_error(tiny)[:2] == [event, _NPF]
    assert tiny.vcpu.kvm_run.internal.data[3] == HOLE + 16 * (event & 0xFF)


@pytest.mark.parametrize("nmi", [True, False])
def test_a_stack_in_a_hole_is_an_internal_error_for_interrupts(tiny: Tiny, nmi: bool) -> None:
    tiny.long_mode()
    for vector in (2, 0x40):
        tiny.gate64(vector, HANDLER)
    tiny.load(b"\xf4", rsp=HOLE + 0x800, rflags=0x202)
    if nmi:
        tiny.vcpu.nmi()
    else:
        tiny.vcpu.interrupt(0x40)
    event, code, error, gpa = _delivery_error(tiny)
    assert (event, code, gpa & ~0xFFF) == (_NMI if nmi else _EXTERNAL, _NPF, HOLE)
    assert error & 2, "a write"


def test_a_stack_in_read_only_memory_is_one_too(tiny: Tiny) -> None:
    tiny.long_mode()
    tiny.gate64(abi.UD_VECTOR, HANDLER)
    tiny.slot(1, HOLE, 0x1000, tiny.memory.address, abi.KVM_MEM_READONLY)
    tiny.load(b"\x0f\x0b", rsp=HOLE + 0x800)
    assert _delivery_error(tiny)[0] == _UD


def test_the_event_is_delivered_when_there_is_memory(tiny: Tiny) -> None:
    tiny.long_mode()
    _set_idt(tiny, HOLE)
    tiny.gate64(0x40, HANDLER)
    tiny.load(b"\xf4", rflags=0x202)
    tiny.vcpu.interrupt(0x40)
    _delivery_error(tiny)
    events = tiny.vcpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x40)
    tiny.slot(1, HOLE, 0x1000, tiny.memory.address + IDT)
    assert tiny.run_to_halt().rip == HANDLER + 1
    assert int.from_bytes(tiny.memory.read(STACK - 40, 8), "little") == CODE


def test_an_instruction_behind_the_event_is_emulated_again(tiny: Tiny) -> None:
    """The access of an instruction is MMIO as ever, when nothing is being delivered."""
    tiny.long_mode()
    tiny.gate64(abi.UD_VECTOR, HANDLER)
    tiny.memory.write(HANDLER, b"\x8b\x03\xf4")  # mov eax, [rbx]; hlt
    tiny.load(b"\x0f\x0b", rbx=HOLE)
    assert tiny.run() == abi.KVM_EXIT_MMIO
    assert tiny.vcpu.kvm_run.mmio.phys_addr == HOLE
