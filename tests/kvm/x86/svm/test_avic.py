# SPDX-License-Identifier: Apache-2.0
"""AVIC in KVM: when it is in force, what inhibits it, and that no interrupt is lost on the way (APM vol. 2, 15.29)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from tests.support.conformance import watchdog
from tests.support.threads import running, until
from tests.support.tiny import CODE, DATA, Memory, Tiny
from tests.support.tracing import texts, traced

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.state import BLOCKING, IN_GUEST_MODE
from softkvm.kvm.x86.svm import vmcb as V
from softkvm.kvm.x86.svm.avic import Inhibit

HANDLER = CODE + 0x400
APIC = 0xFEE0_0000
ID, TPR, EOI, LDR, DFR, SPIV, ISR, TMR, IRR, ICR = 0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200, 0x300
TMICT = 0x380
BASE = bytes.fromhex("41b8 0000e0fe")  # mov r8d, 0xfee00000
END = bytes.fromhex("e610")  # out 0x10, al
SELF = 0x44000


def store(offset: int, value: int) -> bytes:
    """Code: ``mov dword [r8 + offset], value``."""
    return b"\x41\xc7\x80" + offset.to_bytes(4, "little") + value.to_bytes(4, "little")


def load(offset: int) -> bytes:
    """Code: ``mov eax, [r8 + offset]``."""
    return b"\x41\x8b\x80" + offset.to_bytes(4, "little")


class Machine(Tiny):
    """A 64-bit guest with APICs in KVM that are on. Its handlers add 1 to EBX, and end their interrupt."""

    def __init__(self, *, split: bool = False, avic: bool = True, x2apic: bool = False) -> None:
        super().__init__(irqchip=not split, split=24 if split else 0, params=Params(avic=avic))
        self.long_mode(gigabytes=4)
        self.end = store(EOI, 0)
        if x2apic:
            sregs = self.vcpu.get_sregs()
            sregs.apic_base |= 1 << 10
            self.vcpu.set_sregs(sregs)
            self.end = bytes.fromhex("b90b080000 31c0 31d2 0f30")  # mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
        for vcpu in self.vcpus:
            lapic = vcpu.get_lapic()
            lapic.regs[SPIV : SPIV + 2] = [0xFF, 1]
            vcpu.set_lapic(lapic)
        for vector in (0x51, 0x61, 0x30):
            self.handler(vector)

    def handler(self, vector: int, code: bytes = b"") -> None:
        """Handle a vector: ``inc ebx``, *code*, EOI, ``iretq``."""
        at = HANDLER + 0x40 * (vector >> 4)
        self.gate64(vector, at)
        self.memory.write(at, b"\xff\xc3" + code + self.end + b"\x48\xcf")

    def exits(self) -> dict[str, int]:
        return {V.EXIT_NAMES[code]: count for code, count in self.vcpu.exit_counts.items() if count}

    def bits(self, offset: int) -> int:
        regs = bytes(self.vcpu.get_lapic())
        return sum(int.from_bytes(regs[offset + 16 * n :][:4], "little") << 32 * n for n in range(8))

    def msi(self, vector: int, *, level: bool = False) -> int:
        return self.vm.signal_msi(abi.kvm_msi(address_lo=APIC, data=vector | level << 15))


@pytest.fixture(params=[False, True], ids=["kernel", "split"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(split=request.param)
    with watchdog(machine.vcpu, 30):
        yield machine
    machine.close()


def active(machine: Machine) -> bool:
    apic = machine.vcpu.apic
    assert apic is not None
    return apic.apicv_active and bool(machine.vcpu.d[V.INT_CTL] & V.AVIC_ENABLE)


def test_a_thousand_self_ipis_and_their_eois_cost_no_exit(machine: Machine) -> None:
    # mov ecx, 1000; again: ICR; sti; nop; cli; dec ecx; jnz again
    body = store(ICR, SELF | 0x51) + bytes.fromhex("fb 90 fa ffc9")
    machine.load(BASE + b"\xb9\xe8\x03\x00\x00" + body + b"\x75" + bytes((256 - len(body) - 2,)) + END, rbx=0)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == 1000
    assert sum(machine.exits().values()) < 20, machine.exits()


def test_tracepoints_tell_what_the_processor_left_to_kvm(machine: Machine) -> None:
    # the initial count; an IPI to nobody; then wait for a message
    machine.load(BASE + store(0x380, 0) + store(ICR + 0x10, 7 << 24) + store(ICR, 0x4051) + b"\xfb\xeb\xfe", rbx=0)
    with traced("kvm_avic_*", "kvm_apicv_*") as seen:
        with running(machine.vcpu):
            until(lambda: bool(texts(seen, "kvm_avic_incomplete_ipi")))
            until(lambda: machine.vcpu.mode == IN_GUEST_MODE)
            assert machine.msi(0x51) == 1
            until(lambda: bool(texts(seen, "kvm_apicv_accept_irq")))
            machine.vcpu.kick()
        debug = abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_BLOCKIRQ)
        machine.vcpu.set_guest_debug(debug)
    assert texts(seen, "kvm_avic_unaccelerated_access") == ["vcpu=0, offset=0x380(APIC_TMICT), trap, write, vec=0"]
    assert texts(seen, "kvm_avic_incomplete_ipi")[0].startswith("vcpu=0, icrh:icrl=0x07000000:00004051, id=")
    assert texts(seen, "kvm_apicv_accept_irq") == ["apicid 0 vec 81 (Fixed|edge)"]
    assert texts(seen, "kvm_avic_doorbell") in (["vcpuid=0, apicid=0"], [])
    assert texts(seen, "kvm_apicv_inhibit_changed")[-1] == "set reason=3, inhibits=0x8"


def test_a_halt_with_an_interrupt_pending_costs_no_exit(machine: Machine) -> None:
    body = store(ICR, SELF | 0x51) + bytes.fromhex("fb f4 fa ffc9")  # sti; hlt; cli
    machine.load(BASE + b"\xb9\x64\x00\x00\x00" + body + b"\x75" + bytes((256 - len(body) - 2,)) + END, rbx=0)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == 100
    assert sum(machine.exits().values()) < 20, machine.exits()


def test_a_message_wakes_a_halted_vcpu_and_interrupts_a_running_one_without_an_exit(machine: Machine) -> None:
    # sti; hlt; again: cmp ebx, 2; jne again; out
    machine.load(BASE + bytes.fromhex("fb f4 83fb02 75fb") + END, rbx=0)
    with running(machine.vcpu):
        until(lambda: machine.vcpu.mode == BLOCKING)
        assert machine.msi(0x51) == 1
        until(lambda: machine.vcpu.mode == IN_GUEST_MODE)
        before = machine.exits()
        assert machine.msi(0x51) == 1
        until(lambda: not machine.vcpu.running)
    assert machine.vcpu.get_regs().rbx == 2
    assert sum(machine.exits().values()) - sum(before.values()) <= 2, (before, machine.exits())


def test_the_highest_request_is_found_wherever_it_lies(machine: Machine) -> None:
    apic = machine.vcpu.apic
    assert apic is not None
    machine.load(BASE + END)
    assert machine.run() == abi.KVM_EXIT_IO
    assert active(machine)
    assert (apic.highest_irr(), apic.has_interrupt()) == (-1, -1)
    for vector in range(16, 256):
        assert machine.msi(vector) == 1
        assert (apic.highest_irr(), apic.has_interrupt()) == (vector, vector)
        assert apic.irr.bit_length() - 1 == vector


def test_registers_that_change_without_an_exit_are_in_kvm_get_lapic(machine: Machine) -> None:
    machine.load(BASE + store(TPR, 0x60) + store(ICR, SELF | 0x51) + END)
    assert machine.run() == abi.KVM_EXIT_IO
    assert active(machine)
    assert machine.bits(IRR) == 1 << 0x51
    state = machine.vcpu.get_lapic()
    assert (state.regs[TPR], machine.vcpu.kvm_run.cr8) == (0x60, 6)
    other = Machine(split=machine.vm.split_irqchip)
    other.vcpu.set_lapic(state)
    assert other.bits(IRR) == 1 << 0x51
    other.load(bytes.fromhex("31c0 440f22c0 fb 90 90") + END, rbx=0, r8=APIC)  # xor eax, eax; mov cr8, rax; sti
    assert other.run() == abi.KVM_EXIT_IO
    assert other.vcpu.get_regs().rbx == 1
    other.close()


@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
def test_a_level_triggered_interrupt_comes_again_until_its_line_falls(x2apic: bool) -> None:
    machine = Machine(x2apic=x2apic)
    with watchdog(machine.vcpu, 30):
        assert machine.vm.chips is not None
        ioapic = machine.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
        ioapic.chip.ioapic.redirtbl[20].bits = 0x61 | 1 << 15
        machine.vm.set_irqchip(ioapic)
        machine.handler(0x61, bytes.fromhex("e6e9"))  # out 0xe9, al
        machine.load(BASE + bytes.fromhex("fb 90 90 90") + END, rbx=0)
        machine.vm.irq_line(20, 1)
        for _ in range(3):
            assert machine.run() == abi.KVM_EXIT_IO
            assert machine.vcpu.kvm_run.io.port == 0xE9
            assert machine.bits(TMR) == 1 << 0x61
        machine.vm.irq_line(20, 0)
        assert machine.run() == abi.KVM_EXIT_IO
        assert (machine.vcpu.kvm_run.io.port, machine.vcpu.get_regs().rbx) == (0x10, 3)
        assert machine.exits()["avic_unaccelerated_access"] == 3
    machine.close()


def test_userspaces_ioapic_learns_of_the_eoi_of_its_level_triggered_message() -> None:
    machine = Machine(split=True)
    route = abi.kvm_irq_routing_entry(gsi=3, type=abi.KVM_IRQ_ROUTING_MSI)
    route.u.msi.address_lo, route.u.msi.data = APIC, 0x61 | 1 << 15
    machine.vm.set_gsi_routing([route])
    machine.load(BASE + bytes.fromhex("fb 90 90") + END, rbx=0)
    machine.vm.irq_line(3, 1)
    with watchdog(machine.vcpu, 30):
        assert machine.run() == abi.KVM_EXIT_IOAPIC_EOI
        assert machine.vcpu.kvm_run.eoi.vector == 0x61
        assert machine.run() == abi.KVM_EXIT_IO
    machine.close()


def test_an_interrupt_of_the_pic_that_has_to_wait_inhibits_it_until_it_is_taken() -> None:
    machine = Machine()
    pic = machine.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    pic.chip.pic.irq_base, pic.chip.pic.imr, pic.chip.pic.init4 = 0x30, 0xFE, 1
    machine.vm.set_irqchip(pic)
    lapic = machine.vcpu.get_lapic()
    lapic.regs[0x350:0x354] = [0, 7, 0, 0]  # LINT0: ExtINT
    machine.vcpu.set_lapic(lapic)
    assert machine.vm.avic is not None
    machine.load(BASE + bytes.fromhex("e611 fb 90 90") + END, rbx=0)  # out 0x11, al; sti
    with watchdog(machine.vcpu, 30):
        assert machine.run() == abi.KVM_EXIT_IO
        assert active(machine)
        machine.vm.irq_line(0, 1)
        machine.memory.write(CODE + 8, END)  # once more before STI
        machine.memory.write(CODE + 10, bytes.fromhex("fb 90 90") + END)
        assert machine.run() == abi.KVM_EXIT_IO
        assert machine.vm.avic.inhibits == Inhibit.IRQWIN and not active(machine)
        assert machine.msi(0x51) == 1  # an interrupt that comes meanwhile is not lost
        assert machine.run() == abi.KVM_EXIT_IO
        assert machine.vcpu.get_regs().rbx == 2
        assert machine.vm.avic.activated and active(machine)
    machine.close()


def change_id(machine: Machine) -> None:
    machine.load(BASE + store(ID, 5 << 24) + END)
    assert machine.run() == abi.KVM_EXIT_IO


def move_base(machine: Machine) -> None:
    sregs = machine.vcpu.get_sregs()
    sregs.apic_base = sregs.apic_base & 0xFFF | 0xFEC1_0000
    machine.vcpu.set_sregs(sregs)


def block_interrupts(machine: Machine) -> None:
    control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_BLOCKIRQ
    machine.vcpu.set_guest_debug(abi.kvm_guest_debug(control=control))


def unblock_interrupts(machine: Machine) -> None:
    machine.vcpu.set_guest_debug(abi.kvm_guest_debug())


def report_tpr(machine: Machine) -> None:
    machine.vcpu.tpr_access_reporting(1)


def activate_synic(machine: Machine) -> None:
    machine.vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC)


@pytest.mark.parametrize(
    ("inhibit", "reason"),
    [
        (change_id, Inhibit.APIC_ID_MODIFIED),
        (move_base, Inhibit.APIC_BASE_MODIFIED),
        (report_tpr, Inhibit.TPR_ACCESS),
        (activate_synic, Inhibit.HYPERV),
    ],
)
def test_what_is_against_it_is_noted_and_interrupts_come_as_without(machine: Machine, inhibit, reason) -> None:  # type: ignore[no-untyped-def]
    assert machine.vm.avic is not None
    machine.load(BASE + END)
    assert machine.run() == abi.KVM_EXIT_IO
    assert active(machine)
    inhibit(machine)
    assert machine.vm.avic.inhibits & reason
    # The EOI has to reach the registers wherever they are.
    at = APIC if reason != Inhibit.APIC_BASE_MODIFIED else 0xFEC1_0000
    machine.load(bytes.fromhex("fb 90 90") + END, rbx=0, r8=at)
    data = abi.kvm_msi(address_lo=APIC | (5 << 12 if reason == Inhibit.APIC_ID_MODIFIED else 0), data=0x51)
    assert machine.vm.signal_msi(data) == 1
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == 1
    assert not active(machine)
    assert machine.bits(ISR) == machine.bits(IRR) == 0


def test_a_debugger_that_blocks_interrupts_inhibits_it_as_long(machine: Machine) -> None:
    machine.load(BASE + bytes.fromhex("fb 90 90") + END + bytes.fromhex("90 90") + END, rbx=0)
    assert machine.msi(0x51) == 1
    block_interrupts(machine)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == 0
    unblock_interrupts(machine)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == 1
    assert active(machine)


#: To itself, to nobody, a local vector, the EOI of no interrupt, and something that is no register's.
STEPPED = (
    store(ICR, SELF | 0x51),
    store(ICR + 0x10, 7 << 24) + store(ICR, 0x4051),
    store(0x320, 0x1_0042),
    store(EOI, 0),
    store(LDR, 1 << 26),
    store(TPR, 0x70),
    bytes.fromhex("90"),
)


def stepped(*, x2apic: bool, ends_behind: int | None) -> list[tuple[int, bytes]]:
    """Return RIP and the APIC's registers at each KVM_EXIT_DEBUG of a step over :data:`STEPPED`.

    Without AVIC; or it is taken away behind each second instruction, and given back behind the others.
    """
    avic = ends_behind is not None
    machine = Machine(avic=avic, x2apic=x2apic)
    code = b"".join(STEPPED)
    if x2apic:  # a self-IPI, one to nobody, and a local vector
        wrmsr = b"\xb9%s\xb8%s\xba%s\x0f\x30"
        code = b"".join(
            wrmsr % tuple(number.to_bytes(4, "little") for number in numbers)
            for numbers in ((0x830, SELF | 0x51, 0), (0x830, 0x51, 7), (0x832, 0x1_0042, 0), (0x83F, 0x61, 0))
        )
    machine.load(BASE + code + bytes.fromhex("e610"), rbx=0)
    if avic:
        assert machine.vm.avic is not None and machine.vm.avic.activated
    control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP
    machine.vcpu.set_guest_debug(abi.kvm_guest_debug(control=control))
    seen = []
    with watchdog(machine.vcpu, 30):
        while machine.run() == abi.KVM_EXIT_DEBUG:
            debug = machine.vcpu.kvm_run.debug.arch
            assert debug.exception == abi.DB_VECTOR and debug.dr6 & 1 << 14
            seen.append((debug.pc - CODE, bytes(machine.vcpu.get_lapic())))
            # What the instruction has done is done: it can be taken away now.
            if avic:
                assert machine.vm.avic is not None
                machine.vm.avic.set_inhibit(Inhibit.NESTED, len(seen) % 2 == ends_behind)
    assert machine.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO
    machine.close()
    return seen


@pytest.mark.parametrize("ends_behind", [0, 1])
@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
def test_a_step_over_a_write_to_the_apic_shows_what_it_did_and_loses_nothing_when_avic_ends(
    x2apic: bool, ends_behind: int
) -> None:
    with_avic, without = (stepped(x2apic=x2apic, ends_behind=ends) for ends in (ends_behind, None))
    assert [rip for rip, _ in with_avic] == [rip for rip, _ in without]
    assert len(with_avic) >= 8
    for (rip, registers), (_, wanted) in zip(with_avic, without, strict=True):
        differ = {at & 0xFF0 for at in range(0x20, 0x400) if registers[at] != wanted[at]}
        # KVM keeps neither the arbitration priority nor what has been written to SELF_IPI, which nobody can read.
        assert not differ - {0x90, 0x3F0}, (rip, differ)


def test_a_guest_that_steps_itself_has_one_exception_for_each_write(machine: Machine) -> None:
    machine.handler(0, b"")
    machine.gate64(abi.DB_VECTOR, HANDLER + 0x300)
    machine.memory.write(HANDLER + 0x300, bytes.fromhex("ffc3 48cf"))  # inc ebx; iretq
    # pushfq; or [rsp], TF; popfq; the writes; nop; pushfq; and [rsp], ~TF; popfq
    on, off = bytes.fromhex("9c 48810c2400010000 9d"), bytes.fromhex("9c 48812424fffeffff 9d")
    writes = store(ICR, SELF | 0x51), store(0x320, 0x1_0042), store(ICR + 0x10, 7 << 24), store(ICR, 0x4051)
    machine.load(BASE + on + b"".join(writes) + off + END, rbx=0)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rbx == len(writes) + 3  # PUSHFQ, AND and POPFQ
    assert machine.bits(IRR) == 1 << 0x51
    assert bytes(machine.vcpu.get_lapic().regs)[0x320] & 0xFF == 0x42


def test_without_the_parameter_nothing_of_it_is_there() -> None:
    machine = Machine(avic=False)
    assert machine.vm.avic is None and type(machine.vcpu).__name__ == "VcpuIoctls"
    machine.close()


def test_memory_of_userspaces_over_the_registers_leaves_nothing_of_the_access_page_behind(machine: Machine) -> None:
    """The page is nobody's memory: once the slot over it is gone, and AVIC inhibited, accesses are the APIC's again."""
    avic = machine.vm.avic
    assert avic is not None

    def version() -> int:
        machine.load(BASE + load(0x30) + END)
        machine.run()
        return machine.vcpu.get_regs().rax

    expected = version()
    assert machine.vm.apic_access_gfn >= 0
    memory = Memory(0x1000)
    memory.write(0, b"\xee" * 0x1000)
    machine.slot(5, APIC, 0x1000, memory.address)
    avic.set_inhibit(Inhibit.NESTED, True)
    assert version() == 0xEEEE_EEEE
    machine.slot(5, APIC, 0, memory.address)
    assert version() == expected
    assert machine.vm.apic_access_gfn < 0
    avic.set_inhibit(Inhibit.NESTED, False)
    assert version() == expected
    assert machine.vm.apic_access_gfn >= 0


def test_windows_and_ids_that_change_side_by_side_leave_what_the_last_one_says(machine: Machine) -> None:
    """What one vCPU has found must not be put in place behind what another has found since."""
    avic, chips = machine.vm.avic, machine.vm.chips
    assert avic is not None and chips is not None
    regs = chips.apic_map.lapics[0].regs
    set_inhibit = avic.set_inhibit

    def renumber() -> None:
        regs[ID >> 2] = 5 << 24
        avic.recalculate()

    cases: list[tuple[Inhibit, Callable[[], None], Callable[[], None]]] = [
        (Inhibit.IRQWIN, lambda: avic.set_irq_window(False), lambda: avic.set_irq_window(True)),
        (Inhibit.APIC_ID_MODIFIED, avic.recalculate, renumber),
    ]
    for reason, first, second in cases:
        if reason == Inhibit.IRQWIN:
            avic.set_irq_window(True)
        else:
            renumber()
            regs[ID >> 2] = 0
        assert reason in avic.inhibits
        other = threading.Thread(target=second)

        def overtaken(what: Inhibit, on: bool, other: threading.Thread = other) -> None:
            if not on and not other.ident:
                other.start()
                other.join(0.2)  # it can't have ended by then, as it has to wait for this one
            set_inhibit(what, on)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(avic, "set_inhibit", overtaken)
            first()
            other.join()
        assert reason in avic.inhibits


def test_a_vector_is_level_triggered_as_long_as_its_last_interrupt_was(machine: Machine) -> None:
    for level in (True, False):
        machine.load(BASE + b"\xfb\xf3\x90\xfa" + END, rbx=0)  # sti; pause; cli
        assert machine.msi(0x51, level=level) == 1
        assert machine.run() in (abi.KVM_EXIT_IO, abi.KVM_EXIT_IOAPIC_EOI)
        while machine.vcpu.kvm_run.exit_reason != abi.KVM_EXIT_IO:
            machine.run()
        assert active(machine)
        assert machine.vcpu.get_regs().rbx == 1
        assert machine.bits(TMR) == level << 0x51


def test_an_interrupt_below_the_priority_wakes_no_halted_vcpu_when_avic_begins(machine: Machine) -> None:
    avic, vcpu = machine.vm.avic, machine.vcpu
    assert avic is not None
    avic.set_inhibit(Inhibit.NESTED, True)
    machine.handler(0x71)
    machine.load(BASE + store(TPR, 0x60) + b"\xfb\xf4\xfa" + END, rbx=0)  # sti; hlt; cli
    with running(vcpu):
        until(lambda: vcpu.mode == BLOCKING)
        machine.msi(0x61)
        avic.set_inhibit(Inhibit.NESTED, False)
        until(lambda: active(machine))
        until(lambda: vcpu.mode == BLOCKING)
        machine.msi(0x71)
        until(lambda: not vcpu.running)
    assert vcpu.get_regs().rbx == 1
    assert machine.bits(IRR) == 1 << 0x61


def test_the_timers_count_of_before_is_read_when_avic_begins(machine: Machine) -> None:
    avic = machine.vm.avic
    assert avic is not None
    avic.set_inhibit(Inhibit.NESTED, True)
    machine.load(BASE + store(TMICT, 0x7654_3210) + END)
    machine.run()
    avic.set_inhibit(Inhibit.NESTED, False)
    machine.load(BASE + load(TMICT) + END)
    machine.run()
    assert active(machine)
    assert machine.vcpu.get_regs().rax == 0x7654_3210


@pytest.mark.parametrize("inhibited", [False, True])
def test_an_end_of_interrupt_in_memory_is_offered_only_without_avic(machine: Machine, inhibited: bool) -> None:
    """With AVIC there is no exit at the next interrupt, which would withdraw the offer."""
    avic = machine.vm.avic
    assert avic is not None
    avic.set_inhibit(Inhibit.NESTED, inhibited)
    machine.vcpu.set_msrs({abi.MSR_KVM_PV_EOI_EN: DATA | 1})
    machine.handler(0x51, END)
    machine.load(BASE + b"\xfb\x90\xfa" + END, rbx=0)  # sti; nop; cli
    machine.msi(0x51)
    assert machine.run() == abi.KVM_EXIT_IO  # in the handler
    assert machine.bits(ISR) == 1 << 0x51
    machine.vcpu.set_vcpu_events(machine.vcpu.get_vcpu_events())  # events are looked at
    at = HANDLER + 0x40 * 5
    machine.memory.write(at + 4, bytes.fromhex("8a0425") + DATA.to_bytes(4, "little") + END + b"\xeb\xfe")  # mov al
    machine.vm.machine.notify_write(machine.memory.address + at, 64)
    assert machine.run() == abi.KVM_EXIT_IO
    assert machine.vcpu.get_regs().rax & 1 == inhibited


def test_an_apic_that_software_has_disabled_takes_no_message_until_it_is_enabled_again(machine: Machine) -> None:
    # disable; out; enable; out: the register's write takes effect before the next exit
    machine.load(BASE + store(SPIV, 0xFF) + END + store(SPIV, 0x1FF) + END, rbx=0)
    assert machine.run() == abi.KVM_EXIT_IO
    machine.msi(0x51)
    assert machine.bits(IRR) == 0
    assert not active(machine)
    assert machine.run() == abi.KVM_EXIT_IO
    assert active(machine)
    machine.msi(0x51)
    assert machine.bits(IRR) == 1 << 0x51
