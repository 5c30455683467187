# SPDX-License-Identifier: Apache-2.0
"""AVIC with both kinds of irqchip, as guests see it: interrupts come while it is turned on and off under them.

The thread: "svm: Enabling AVIC with in kernel irqchip" (run-time activation and deactivation, handlers for APIC ID, DFR
and LDR, the access page, ExtINT, and the i8254 without an irq ack notifier).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from tests.support.threads import beside, running, until
from tests.support.tiny import CODE, DATA, STACK, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.avic import APIC_ACCESS_GFN, Inhibit

IPIS = 2000
VECTOR = 0x51
APIC = 0xFEE0_0000
SPIV, EOI, LDR, DFR, ICR, ICR2 = 0xF0, 0xB0, 0xD0, 0xE0, 0x300, 0x310
HANDLER, OTHER = CODE + 0x400, CODE + 0x800
END = b"\xe6\x10"  # out 0x10, al
LOGICAL, OTHERS = 1 << 11, 3 << 18
FIXED = 0x4000 | VECTOR


def store(offset: int, value: int) -> bytes:
    """``mov dword [r8 + offset], value``, with R8 at the registers."""
    return b"\x41\xc7\x80" + offset.to_bytes(4, "little") + value.to_bytes(4, "little")


def wrmsr(offset: int, value: int) -> bytes:
    """``mov ecx, MSR; mov eax, low; mov edx, high; wrmsr``."""
    parts = (b"\xb9", 0x800 + (offset >> 4)), (b"\xb8", value & 0xFFFF_FFFF), (b"\xba", value >> 32)
    return b"".join(opcode + number.to_bytes(4, "little") for opcode, number in parts) + b"\x0f\x30"


class Pair(Tiny):
    """Two 64-bit processors. The first sends an interrupt, waits until it has been counted, and sends the next."""

    def __init__(self, *, split: bool, x2apic: bool, avic: bool = True, vcpus: int = 2) -> None:
        super().__init__(irqchip=not split, split=24 if split else 0, params=Params(avic=avic), vcpus=vcpus)
        self.long_mode(gigabytes=4)
        first = self.vcpu.get_sregs()
        for vcpu in self.vcpus:
            sregs = vcpu.get_sregs()
            base = sregs.apic_base | (1 << 10 if x2apic else 0)
            sregs = type(first).from_buffer_copy(first)
            sregs.apic_base = base
            vcpu.set_sregs(sregs)
            vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
            lapic = vcpu.get_lapic()
            lapic.regs[SPIV : SPIV + 2] = [0xFF, 1]
            if not x2apic:
                lapic.regs[DFR : DFR + 4] = [0xFF] * 4
                lapic.regs[LDR + 3] = 1 << vcpu.vcpu_id
            vcpu.set_lapic(lapic)
        self.x2apic = x2apic
        # inc dword [r9]; EOI; iretq
        self.gate64(VECTOR, HANDLER)
        self.memory.write(HANDLER, b"\x41\xff\x01" + (wrmsr(EOI, 0) if x2apic else store(EOI, 0)) + b"\x48\xcf")

    def send(self, icr: int, dest: int) -> bytes:
        if self.x2apic:
            return wrmsr(ICR, dest << 32 | icr)
        return store(ICR2, dest << 24) + store(ICR, icr)

    def load_sender(self, icr: int, dest: int) -> None:
        # again: send; inc esi; wait: pause; cmp [r9], esi; jne wait; dec edi; jnz again; out
        body = self.send(icr, dest) + bytes.fromhex("ffc6 f390 413931 75f9 ffcf 0f85")
        body += (-(len(body) + 4) & 0xFFFF_FFFF).to_bytes(4, "little") + END
        self.load(body, rsi=0, rdi=IPIS, r8=APIC, r9=DATA)

    def load_receiver(self, *, halts: bool) -> None:
        # sti; again: hlt (or pause); jmp again
        self.memory.write(OTHER, b"\xfb" + (b"\xf4\xeb\xfd" if halts else b"\xf3\x90\xeb\xfc"))
        regs = self.vcpus[1].get_regs()
        regs.rip, regs.rsp, regs.rflags, regs.r8, regs.r9 = OTHER, STACK - 0x1000, 2, APIC, DATA
        self.vcpus[1].set_regs(regs)

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory.read(DATA, 4), "little")

    def exits(self, number: int) -> int:
        return sum(count for code, count in self.vcpus[number].exit_counts.items() if code != V.EXIT_PAUSE)


@pytest.fixture(params=["kernel", "split"])
def split(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "split")


@pytest.fixture(params=["xapic", "x2apic"])
def pair(request: pytest.FixtureRequest, split: bool) -> Iterator[Pair]:
    pair = Pair(split=split, x2apic=request.param == "x2apic")
    yield pair
    pair.close()


def ping(pair: Pair) -> None:
    """Have the first processor send all its interrupts, beside the second one."""
    with running(pair.vcpus[1]):
        until(lambda: pair.vcpus[1].running)
        with running(pair.vcpu) as sender:
            until(lambda: not pair.vcpu.running)
            assert sender.wait() is None
        assert pair.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
        assert pair.count == IPIS
        pair.vcpus[1].kick()


@pytest.mark.parametrize("icr", [FIXED, FIXED | LOGICAL, FIXED | OTHERS], ids=["physical", "logical", "shorthand"])
def test_interrupts_to_a_running_processor_cost_neither_an_exit(pair: Pair, icr: int) -> None:
    dest = 0 if icr & OTHERS else 2 if icr & LOGICAL and not pair.x2apic else 1 if not icr & LOGICAL else 2
    pair.load_sender(icr, dest)
    pair.load_receiver(halts=False)
    ping(pair)
    assert pair.exits(0) < IPIS // 10, pair.vcpu.exit_counts
    assert pair.exits(1) < IPIS // 10, pair.vcpus[1].exit_counts


def test_halted_processors_are_woken_by_the_sender_without_its_exit(pair: Pair) -> None:
    pair.load_sender(FIXED, 1)
    pair.load_receiver(halts=True)
    ping(pair)
    assert pair.exits(0) < IPIS // 10, pair.vcpu.exit_counts


@pytest.mark.parametrize("halts", [False, True], ids=["running", "halting"])
def test_no_interrupt_is_lost_or_comes_twice_while_it_is_turned_on_and_off(pair: Pair, halts: bool) -> None:
    pair.load_sender(FIXED, 1)
    pair.load_receiver(halts=halts)
    avic = pair.vm.avic
    assert avic is not None
    over = threading.Event()
    turns = 0

    def turn() -> None:
        nonlocal turns
        while not over.wait(0.0005):
            turns += 1
            avic.set_inhibit(Inhibit.NESTED, bool(turns & 1))

    with beside(threading.Thread(target=turn)):
        try:
            until(lambda: turns > 1)
            ping(pair)
        finally:
            over.set()
    assert turns > 1


class Circle(Pair):
    """Four processors. The first sends an interrupt to all others, waits until each has counted it, and sends again."""

    def __init__(self, *, split: bool, x2apic: bool) -> None:
        super().__init__(split=split, x2apic=x2apic, vcpus=4)
        body = self.send(FIXED | OTHERS, 0) + bytes.fromhex("ffc6")
        for n in range(1, 4):
            body += bytes.fromhex("f390 413971") + bytes([16 * n]) + bytes.fromhex("72f8")  # pause; cmp; jb
        body += bytes.fromhex("ffcf 0f85")
        body += (-(len(body) + 4) & 0xFFFF_FFFF).to_bytes(4, "little") + END
        self.load(body, rsi=0, rdi=IPIS, r8=APIC, r9=DATA)
        self.load_receiver(halts=True)
        for n, vcpu in enumerate(self.vcpus[1:], 1):
            regs = self.vcpus[1].get_regs()
            regs.rsp, regs.r9 = STACK - 0x800 * n, DATA + 16 * n
            vcpu.set_regs(regs)


@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
def test_an_interrupt_to_several_comes_once_to_each_while_it_is_turned_on_and_off(split: bool, x2apic: bool) -> None:
    """Who has sent it to some must not come upon one that it cannot be sent to: all would have it sent again."""
    circle = Circle(split=split, x2apic=x2apic)
    avic = circle.vm.avic
    assert avic is not None
    over = threading.Event()
    turns = 0

    def turn() -> None:
        nonlocal turns
        while not over.wait(0.0003):
            turns += 1
            avic.set_inhibit(Inhibit.NESTED, bool(turns & 1))

    with contextlib.ExitStack() as stack:
        for vcpu in circle.vcpus[1:]:
            stack.enter_context(running(vcpu))
        stack.callback(over.set)
        stack.enter_context(beside(threading.Thread(target=turn)))
        until(lambda: turns > 1 and all(vcpu.running for vcpu in circle.vcpus[1:]))
        with running(circle.vcpu) as sender:
            until(lambda: not circle.vcpu.running)
            assert sender.wait() is None
        over.set()
        counts = [int.from_bytes(circle.memory.read(DATA + 16 * n, 4), "little") for n in range(1, 4)]
        for vcpu in circle.vcpus[1:]:
            vcpu.kick()
    assert counts == [IPIS] * 3
    circle.close()


def test_an_entry_that_is_not_valid_any_more_still_has_its_page(split: bool) -> None:
    """As long as a sender may be on its way that has found it valid."""
    pair = Pair(split=split, x2apic=False)
    avic = pair.vm.avic
    assert avic is not None
    pair.load(END)
    pair.run()
    entry = avic.physical_table[0]
    assert entry >> 63
    avic.set_inhibit(Inhibit.NESTED, True)
    pair.load(END)
    pair.run()
    assert avic.physical_table[0] == entry & ~(1 << 63)
    pair.close()


def test_the_access_page_is_there_while_all_have_avic(split: bool) -> None:
    pair = Pair(split=split, x2apic=False)
    vm, avic = pair.vm, pair.vm.avic
    assert avic is not None
    pair.load(store(LDR, 1 << 24) + END, r8=APIC)
    assert pair.run() == abi.KVM_EXIT_IO
    assert vm.apic_access_gfn < 0, "the second one runs without as yet"
    pair.load_receiver(halts=True)
    with running(pair.vcpus[1]):
        until(lambda: vm.apic_access_gfn == APIC_ACCESS_GFN)
        avic.set_inhibit(Inhibit.NESTED, True)
        assert vm.apic_access_gfn < 0
        avic.set_inhibit(Inhibit.NESTED, False)
        pair.load(store(LDR, 1 << 24) + END, r8=APIC)
        assert pair.run() == abi.KVM_EXIT_IO
        until(lambda: vm.apic_access_gfn == APIC_ACCESS_GFN)
        pair.vcpus[1].kick()
    pair.close()


def test_changed_ids_end_it_and_the_interrupts_go_to_them(split: bool) -> None:
    pair = Pair(split=split, x2apic=False)
    # The second one calls itself 7 and halts; the first sends to 7.
    pair.load_sender(FIXED, 7)
    pair.load_receiver(halts=True)
    code = store(0x20, 7 << 24)
    pair.memory.write(OTHER, code + b"\xfb\xf4\xeb\xfd")
    assert pair.vm.avic is not None
    with running(pair.vcpus[1]):
        until(lambda: pair.vm.avic.inhibits == Inhibit.APIC_ID_MODIFIED)  # type: ignore[union-attr]
        pair.registers(rdi=50)
        with running(pair.vcpu):
            until(lambda: not pair.vcpu.running)
        assert pair.count == 50
        pair.vcpus[1].kick()
    pair.close()


def alias(pair: Pair, how: str) -> int:
    """Give the second processor a logical ID that is not one-to-one; return a destination that is for it."""
    first, second = pair.vcpus
    lapic = second.get_lapic()
    if how == "same":  # the first one's interrupts are off
        state = first.get_lapic()
        state.regs[LDR + 3] = 2
        first.set_lapic(state)
    elif how == "two bits":
        lapic.regs[LDR + 3] = 6
    elif how == "two models":
        lapic.regs[LDR + 3], lapic.regs[DFR + 3] = 0x12, 0x0F
    else:
        sregs = second.get_sregs()
        sregs.apic_base |= 1 << 10
        second.set_sregs(sregs)
        pair.memory.write(HANDLER, b"\x41\xff\x01" + wrmsr(EOI, 0) + b"\x48\xcf")
        return 2
    second.set_lapic(lapic)
    return lapic.regs[LDR + 3] & 0xFF


@pytest.mark.parametrize("how", ["same", "two bits", "two models", "two modes"])
def test_logical_ids_that_are_not_one_to_one_end_it(split: bool, how: str) -> None:
    pair = Pair(split=split, x2apic=False)
    avic = pair.vm.avic
    assert avic is not None and avic.activated
    before = [vcpu.get_lapic() for vcpu in pair.vcpus]
    dest = alias(pair, how)
    assert avic.inhibits == Inhibit.LOGICAL_ID_ALIASED
    assert not any(avic.logical_table[:16])
    pair.load_sender(FIXED | LOGICAL, dest)
    pair.load_receiver(halts=False)
    ping(pair)
    if how != "two modes":
        for vcpu, lapic in zip(pair.vcpus, before, strict=True):
            vcpu.set_lapic(lapic)
        assert avic.activated
    pair.close()


def test_the_pits_ticks_that_a_guest_is_late_for_come_later_although_no_eoi_is_seen() -> None:
    tiny = Pair(split=False, x2apic=False)
    vm = tiny.vm
    vm.create_pit2()
    chips = vm.chips
    assert chips is not None and chips.pit is not None
    ioapic = vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    ioapic.chip.ioapic.redirtbl[0].bits = VECTOR
    vm.set_irqchip(ioapic)
    pic = vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    pic.chip.pic.imr = 0xFF
    vm.set_irqchip(pic)
    state = vm.get_pit2()
    state.channels[0].mode, state.channels[0].rw_mode, state.channels[0].count = 2, 3, 1193  # 1 kHz
    # Interrupts off; the vCPU takes none while ticks pile up.
    tiny.load(b"\xfb\x90\xeb\xfd" + END, r8=APIC, r9=DATA)  # sti; nop; jmp
    vm.set_pit2(state)
    until(lambda: chips.pit is not None and chips.pit._pending >= 20)
    with running(tiny.vcpu):
        until(lambda: tiny.count >= 40)
        assert tiny.vcpu.apic is not None and tiny.vcpu.apic.apicv_active
        until(lambda: chips.pit is not None and chips.pit._pending < 20)
        tiny.vcpu.kick()
    assert V.EXIT_AVIC_UNACCELERATED_ACCESS not in tiny.vcpu.exit_counts
    tiny.close()


def test_a_vm_without_it_has_no_trace_of_it(split: bool) -> None:
    pair = Pair(split=split, x2apic=False, avic=False)
    pair.load_sender(FIXED, 1)
    pair.load_receiver(halts=False)
    ping(pair)
    assert pair.exits(0) > IPIS
    assert not pair.vcpu.d[V.INT_CTL] & V.AVIC_ENABLE
    pair.close()
