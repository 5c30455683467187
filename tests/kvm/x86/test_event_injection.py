# SPDX-License-Identifier: Apache-2.0
"""Which event the guest gets and when: priorities, halts, interrupted deliveries (APM vol. 2, 8.2 and 15.20)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.tiny import CODE, IDT, MIB, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.x86.svm import vmcb as V

HANDLER = CODE + 0x100
_CR8_WRITE = V.EXIT_WRITE_CR0 + 8


# --- task priority ---------------------------------------------------------------------------------


@pytest.fixture
def chips() -> Iterator[Tiny]:
    """A 64-bit guest with a local APIC that is on; vector n's handler says n at port 0xe9."""
    # (Virtualized by the processor, an APIC needs no exit for its priority.)
    machine = Tiny(irqchip=True, params=Params(avic=False)).long_mode()
    lapic = machine.vcpu.get_lapic()
    lapic.regs[0xF0:0xF2] = [0xFF, 1]  # SPIV: enabled
    machine.vcpu.set_lapic(lapic)
    for vector in (0x4F, 0x50, 0x5F, 0x60):
        machine.gate64(vector, HANDLER + 16 * (vector - 0x40))
        machine.memory.write(HANDLER + 16 * (vector - 0x40), bytes((0xB0, vector, 0xE6, 0xE9)))  # mov al; out 0xe9, al
    yield machine
    machine.close()


def _lower_to(priority: int) -> bytes:
    """Code that begins with priority 5, says so at port 0x10, lowers CR8, and says that at port 0x11."""
    # mov eax, 5; mov cr8, rax; sti; out 0x10, al; mov eax, priority; mov cr8, rax; nop; out 0x11, al
    return (
        bytes.fromhex("b805000000 440f22c0 fb e610 b8")
        + struct.pack("<I", priority)
        + bytes.fromhex("440f22c0 90 e611")
    )


def _outputs(tiny: Tiny, count: int) -> list[tuple[int, int]]:
    """Return the ports and the values of the next *count* OUTs."""
    seen = []
    for _ in range(count):
        assert tiny.run() == abi.KVM_EXIT_IO
        seen.append((tiny.vcpu.kvm_run.io.port, tiny.vcpu.get_regs().rax & 0xFF))
    return seen


@pytest.mark.parametrize("vector", [0x50, 0x5F])
@pytest.mark.parametrize("priority", [4, 0])
def test_an_interrupt_of_the_prioritys_own_class_comes_when_it_is_lowered(
    chips: Tiny, vector: int, priority: int
) -> None:
    # APM vol. 2, 16.6.4: an interrupt is taken if its class, vector[7:4], is above the priority
    chips.load(_lower_to(priority))
    assert _outputs(chips, 1) == [(0x10, 5)]
    chips.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=vector))
    assert _outputs(chips, 1) == [(0xE9, vector)]


def test_an_interrupt_of_a_lower_class_waits_until_the_priority_is_below_it(chips: Tiny) -> None:
    chips.load(_lower_to(4))
    assert _outputs(chips, 1) == [(0x10, 5)]
    chips.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x4F))
    assert _outputs(chips, 1) == [(0x11, 4)]


@pytest.mark.parametrize(("vector", "exits"), [(0x4F, 1), (0x50, 1), (0x5F, 1), (0x60, 0), (None, 0)])
def test_writes_of_cr8_are_intercepted_while_an_interrupt_waits_for_them(
    chips: Tiny, vector: int | None, exits: int
) -> None:
    # mov eax, 5; mov cr8, rax; out 0x10, al; mov eax, 3; mov cr8, rax; out 0x11, al: with interrupts off
    chips.load(bytes.fromhex("b805000000 440f22c0 e610 b803000000 440f22c0 e611"))
    assert _outputs(chips, 1) == [(0x10, 5)]
    before = chips.vcpu.exit_counts.get(_CR8_WRITE, 0)
    if vector is not None:
        chips.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=vector))
    assert _outputs(chips, 1) == [(0x11, 3)]
    assert chips.vcpu.exit_counts.get(_CR8_WRITE, 0) - before == exits


# --- waiting for a start-up IPI --------------------------------------------------------------------


def _mp_state(tiny: Tiny, state: int) -> None:
    tiny.vcpu.set_mp_state(abi.kvm_mp_state(mp_state=state))


@pytest.mark.parametrize("state", [abi.KVM_MP_STATE_INIT_RECEIVED, abi.KVM_MP_STATE_UNINITIALIZED])
def test_an_nmi_does_not_start_a_processor_that_waits_for_its_start_up_ipi(state: int) -> None:
    # SDM vol. 3, 9.4.2: "wait-for-SIPI state"; only a SIPI ends it
    tiny = Tiny(irqchip=True).real_mode()
    tiny.memory.write(8, HANDLER.to_bytes(4, "little"))
    tiny.memory.write(HANDLER, b"\xe6\xe9\xf4")  # out 0xe9, al; hlt
    tiny.load(b"\xe6\x10\xf4")
    _mp_state(tiny, state)
    tiny.vcpu.nmi()
    assert not tiny.vcpu.arch_check_block()
    tiny.vcpu.call_soon(tiny.vcpu.kick)
    with pytest.raises(InterruptedError):
        tiny.vcpu.run()
    assert tiny.vcpu.get_mp_state().mp_state == state
    _mp_state(tiny, abi.KVM_MP_STATE_RUNNABLE)  # what a SIPI does: the NMI comes then
    assert _outputs(tiny, 1)[0][0] == 0xE9
    tiny.close()


def test_an_nmi_ends_a_halt() -> None:
    tiny = Tiny(irqchip=True).real_mode()
    tiny.memory.write(8, HANDLER.to_bytes(4, "little"))
    tiny.memory.write(HANDLER, b"\xe6\xe9")
    tiny.load(b"\xf4")
    _mp_state(tiny, abi.KVM_MP_STATE_HALTED)
    tiny.vcpu.call_soon(tiny.vcpu.nmi)
    with watchdog(tiny.vcpu, 20):
        assert _outputs(tiny, 1)[0][0] == 0xE9
    tiny.close()


# --- soft exceptions and interrupts whose delivery was interrupted -------------------------------------


def _soft_machine(code: str, *, nrips: bool, vector: int) -> Tiny:
    """A 32-bit guest whose stack's page is mapped only when the event's frame is pushed."""
    tiny = Tiny(8 << 20, params=Params(nrips=nrips, max_huge_page_level=1)).protected_mode()
    gate = HANDLER & 0xFFFF | 8 << 16 | 0xEE << 40
    tiny.memory.write(IDT + 8 * vector, struct.pack("<Q", gate))
    tiny.memory.write(HANDLER, b"\xf4")
    tiny.load(bytes.fromhex(code), rsp=0x60_0000)
    return tiny


@pytest.mark.parametrize("nrips", [True, False])
@pytest.mark.parametrize(
    ("code", "vector", "length"),
    [("cc", abi.BP_VECTOR, 1), ("cd03", abi.BP_VECTOR, 2), ("b07f 0401 ce", abi.OF_VECTOR, 5), ("cd40", 0x40, 2)],
    ids=["int3", "int 3", "into", "int 0x40"],
)
def test_a_soft_event_whose_delivery_faulted_comes_from_its_instruction_again(
    nrips: bool, code: str, vector: int, length: int
) -> None:
    tiny = _soft_machine(code, nrips=nrips, vector=vector)
    taken = tiny.vcpu.stat_pf_taken
    assert tiny.run_to_halt().rip == HANDLER + 1
    assert tiny.vcpu.stat_pf_taken > taken, "the stack was there already"
    eip, cs, _ = struct.unpack("<3I", tiny.memory.read(0x60_0000 - 12, 12))
    assert (eip, cs) == (CODE + length, 8)
    tiny.close()


@pytest.mark.parametrize("code", ["cc", "cd40"])
def test_a_soft_event_is_none_of_kvms(code: str) -> None:
    """Nothing is queued that KVM did not inject: KVM_GET_VCPU_EVENTS at an exit in the midst of the delivery."""
    vector = 0x40 if code == "cd40" else abi.BP_VECTOR
    tiny = _soft_machine(code, nrips=True, vector=vector)
    tiny.registers(rsp=0x2000_0000)  # no memory: an internal error
    assert tiny.run() == abi.KVM_EXIT_INTERNAL_ERROR
    events = tiny.vcpu.get_vcpu_events()
    assert not tiny.vcpu.exception.injected and not tiny.vcpu.exception.pending
    assert (events.interrupt.injected, tiny.vcpu.get_regs().rip) == (0, CODE)
    tiny.close()


@pytest.mark.parametrize("nrips", [True, False])
def test_a_breakpoint_that_kvm_injects_is_injected_again(nrips: bool) -> None:
    """KVM_GUESTDBG_INJECT_BP: no instruction raises it, so it is KVM's to repeat."""
    tiny = _soft_machine("90f4", nrips=nrips, vector=abi.BP_VECTOR)
    tiny.vcpu.set_guest_debug(abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_INJECT_BP))
    assert tiny.run_to_halt().rip == HANDLER + 1
    tiny.close()


def test_an_interrupt_whose_delivery_faulted_is_given_again() -> None:
    tiny = _soft_machine("90f4", nrips=True, vector=0x40)
    tiny.registers(rflags=0x202)
    tiny.vcpu.interrupt(0x40)
    assert tiny.run_to_halt().rip == HANDLER + 1
    assert struct.unpack("<I", tiny.memory.read(0x60_0000 - 12, 4)) == (CODE,)
    tiny.close()


def test_an_nmi_waits_for_the_end_of_an_iret_whose_stack_faults_first() -> None:
    """APM vol. 2, 8.2.3: NMIs are masked until the IRET is done, however many exits its accesses make before."""
    stack, handler = 0x30_0000, 0x2000
    tiny = Tiny(size=4 * MIB).long_mode()
    tiny.gate64(2, handler)
    tiny.memory.write(handler, b"\xe6\x10\x48\xcf")  # out 0x10, al; iretq
    tiny.load(b"\xeb\xfe", rsp=stack)  # 1: jmp 1b
    tiny.vcpu.nmi()
    assert tiny.run() == abi.KVM_EXIT_IO
    tiny.vcpu.nmi()
    tiny.vm.zap_gfn_range((stack >> 12) - 1, 1)
    assert tiny.run() == abi.KVM_EXIT_IO
    frame = tiny.vcpu.get_regs().rsp
    assert int.from_bytes(tiny.memory.read(frame, 8), "little") == CODE
    tiny.close()
