# SPDX-License-Identifier: Apache-2.0
"""In-kernel PICs, IOAPIC, local APIC and PIT (KVM API 4.24 to 4.27, 4.52, 4.57, 4.58, 4.70 to 4.73)."""

import errno
import os
import time
from collections.abc import Callable

import pytest
from tests.support.conformance import CODE, Guest, refused

from softkvm import abi

APIC_ID, APIC_TPR, APIC_PPR, APIC_SPIV, APIC_LVT0 = 0x20, 0x80, 0xA0, 0xF0, 0x350
APIC_ISR, APIC_IRR = 0x100, 0x200


@pytest.fixture
def chips(make: Callable[..., Guest]) -> Guest:
    """One vCPU with in-kernel chips and a PIT."""
    return make(irqchip=True, pit=True)


def lapic_register(guest: Guest, offset: int) -> int:
    return int.from_bytes(bytes(guest.cpu.get_lapic().regs[offset : offset + 4]), "little")


def set_lapic_register(guest: Guest, offset: int, value: int) -> None:
    state = guest.cpu.get_lapic()
    state.regs[offset : offset + 4] = list(value.to_bytes(4, "little"))
    guest.cpu.set_lapic(state)


def redirect(guest: Guest, pin: int, *, vector: int, level: bool = False, mask: bool = False) -> None:
    """Write an IOAPIC entry that sends *pin* to APIC 0."""
    chip = guest.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[pin].bits = vector | level << 15 | mask << 16
    guest.vm.set_irqchip(chip)


def pic(guest: Guest, number: int = 0) -> abi.kvm_pic_state:
    return guest.vm.get_irqchip(number).chip.pic


def ioapic_entry(guest: Guest, pin: int) -> abi.kvm_ioapic_redirect_fields:
    return guest.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[pin].fields


# --- making them -----------------------------------------------------------------------------------


def test_a_second_irqchip_is_eexist(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, vcpus=0)
    refused(errno.EEXIST, guest.vm.create_irqchip)


def test_an_irqchip_after_a_vcpu_is_einval(guest: Guest) -> None:
    refused(errno.EINVAL, guest.vm.create_irqchip)


def test_a_pit_comes_once(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, pit=True, vcpus=0)
    refused(errno.EEXIST, guest.vm.create_pit2)
    refused(errno.EEXIST, guest.vm.create_pit)


def test_the_first_pit_request_has_a_speaker_port(make: Callable[..., Guest]) -> None:
    guest = make(irqchip=True, vcpus=0)
    guest.vm.create_pit()
    with guest.vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
        guest.real("e461 e6e9", vcpu=vcpu)  # in al, 0x61; out 0xe9, al
        assert guest.run(vcpu) == abi.KVM_EXIT_IO
        assert (vcpu.kvm_run.io.port, vcpu.kvm_run.io.direction) == (0xE9, abi.KVM_EXIT_IO_OUT)


def test_requests_without_chips_are_enxio(guest: Guest) -> None:
    vm = guest.vm
    refused(errno.ENXIO, lambda: vm.irq_line(4, 1))
    refused(errno.ENXIO, lambda: vm.irq_line_status(4, 1))
    refused(errno.ENXIO, lambda: vm.get_irqchip(0))
    refused(errno.ENXIO, lambda: vm.set_irqchip(abi.kvm_irqchip()))
    refused(errno.ENXIO, vm.get_pit2)
    refused(errno.ENXIO, lambda: vm.set_pit2(abi.kvm_pit_state2()))
    refused(errno.ENXIO, vm.get_pit)
    refused(errno.ENXIO, lambda: vm.set_pit(abi.kvm_pit_state()))
    refused(errno.ENXIO, lambda: vm.reinject_control(1))
    refused(errno.EINVAL, lambda: guest.cpu.get_lapic())
    refused(errno.EINVAL, lambda: guest.cpu.set_lapic(abi.kvm_lapic_state()))


def test_unknown_chips_are_einval(chips: Guest) -> None:
    refused(errno.EINVAL, lambda: chips.vm.get_irqchip(3))
    refused(errno.EINVAL, lambda: chips.vm.set_irqchip(abi.kvm_irqchip(chip_id=3)))


def test_interrupts_from_userspace_are_refused_with_chips(chips: Guest) -> None:
    refused(errno.ENXIO, lambda: chips.cpu.interrupt(0x40))


# --- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC])
def test_chip_state_round_trips(chips: Guest, number: int) -> None:
    state = chips.vm.get_irqchip(number)
    if number == abi.KVM_IRQCHIP_IOAPIC:
        assert state.chip.ioapic.base_address == 0xFEC0_0000
        assert all(entry.fields.mask for entry in state.chip.ioapic.redirtbl)
        state.chip.ioapic.redirtbl[7].bits = 0x0100_0000_0000_0937
        state.chip.ioapic.ioregsel = 5
        state.chip.ioapic.id = 0
    else:
        state.chip.pic.irq_base, state.chip.pic.imr, state.chip.pic.priority_add = 0x30 + 8 * number, 0xFB, 3
        state.chip.pic.init_state = 0
    chips.vm.set_irqchip(state)
    assert bytes(chips.vm.get_irqchip(number)) == bytes(state)


def test_requested_vectors_come_back_as_set(chips: Guest) -> None:
    """Bits 0 to 15, which no interrupt has, too: the kernel's selftests use them to tell their guest something."""
    state = chips.cpu.get_lapic()
    for word in range(8):
        state.regs[APIC_IRR + 16 * word : APIC_IRR + 16 * word + 4] = [0xFF, 0x81, 0x42 + word, 0x18]
    chips.cpu.set_lapic(state)
    got = bytes(chips.cpu.get_lapic())
    for word in range(8):
        assert got[APIC_IRR + 16 * word :][:4] == bytes([0xFF, 0x81, 0x42 + word, 0x18])


def test_lapic_after_reset(chips: Guest) -> None:
    assert lapic_register(chips, APIC_ID) == 0
    assert lapic_register(chips, 0x30) & 0xFF in range(0x10, 0x20)
    assert lapic_register(chips, APIC_SPIV) == 0xFF
    assert lapic_register(chips, APIC_LVT0) == 0x700, "the quirk: LINT0 takes the PIC after reset"
    assert lapic_register(chips, 0x320) == 0x1_0000
    assert chips.cpu.get_sregs().apic_base == 0xFEE0_0900


def test_lapic_state_round_trips(chips: Guest) -> None:
    state = chips.cpu.get_lapic()
    state.regs[APIC_SPIV : APIC_SPIV + 2] = [0xFF, 1]
    state.regs[0x320:0x324] = [0xEC, 0, 1, 0]
    state.regs[APIC_TPR] = 0x40
    state.regs[0x3E0] = 0xB
    chips.cpu.set_lapic(state)
    got = bytes(chips.cpu.get_lapic())
    for offset in (APIC_SPIV, 0x320, APIC_TPR, 0x3E0):
        assert got[offset : offset + 4] == bytes(state.regs[offset : offset + 4]), hex(offset)
    assert chips.cpu.get_sregs().cr8 == 4


def test_the_pits_channels_round_trip_without_its_flags(chips: Guest) -> None:
    flagged = chips.vm.get_pit2()
    flagged.flags = abi.KVM_PIT_FLAGS_HPET_LEGACY
    chips.vm.set_pit2(flagged)
    state = chips.vm.get_pit()
    channel = state.channels[2]
    channel.count, channel.mode, channel.rw_mode, channel.gate = 0x4321, 3, 3, 1
    chips.vm.set_pit(state)
    for channel in (chips.vm.get_pit().channels[2], chips.vm.get_pit2().channels[2]):
        assert (channel.count, channel.mode, channel.rw_mode) == (0x4321, 3, 3)
    assert chips.vm.get_pit2().flags & abi.KVM_PIT_FLAGS_HPET_LEGACY


def test_pit_state_round_trips(chips: Guest) -> None:
    state = chips.vm.get_pit2()
    channel = state.channels[2]
    channel.count, channel.mode, channel.rw_mode, channel.gate = 0x1234, 3, 3, 1
    state.flags = abi.KVM_PIT_FLAGS_HPET_LEGACY
    chips.vm.set_pit2(state)
    got = chips.vm.get_pit2()
    assert (got.channels[2].count, got.channels[2].mode, got.channels[2].rw_mode) == (0x1234, 3, 3)
    assert got.flags & abi.KVM_PIT_FLAGS_HPET_LEGACY


def test_reinjection_can_be_turned_off(chips: Guest) -> None:
    chips.vm.reinject_control(0)
    chips.vm.reinject_control(1)


# --- i8259 through irq_line ------------------------------------------------------------------------


def unmask_pic(guest: Guest, *, elcr: int = 0) -> None:
    state = guest.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    state.chip.pic.irq_base, state.chip.pic.imr, state.chip.pic.init_state = 0x20, 0, 0
    state.chip.pic.elcr = elcr
    guest.vm.set_irqchip(state)


def test_an_edge_is_latched(chips: Guest) -> None:
    unmask_pic(chips)
    chips.vm.irq_line(4, 1)
    assert pic(chips).irr == 0x10 and pic(chips).last_irr == 0x10
    chips.vm.irq_line(4, 0)
    assert pic(chips).irr == 0x10 and pic(chips).last_irr == 0


def test_a_level_is_not_latched(chips: Guest) -> None:
    unmask_pic(chips, elcr=0x20)
    chips.vm.irq_line(5, 1)
    assert pic(chips).irr == 0x20
    chips.vm.irq_line(5, 0)
    assert pic(chips).irr == 0


def test_irq_line_status_tells_delivery(chips: Guest) -> None:
    unmask_pic(chips)
    assert chips.vm.irq_line_status(4, 1) > 0
    chips.vm.irq_line(4, 0)
    assert chips.vm.irq_line_status(4, 1) == 0, "coalesced: the edge before is still pending"
    chips.vm.irq_line(4, 0)


def test_an_unmasked_pic_line_reaches_the_guest(chips: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    unmask_pic(chips)
    chips.ivt(0x24, CODE + 0x100)
    chips.write(CODE + 0x100, bytes.fromhex("b042 e6e9 b020 e620 cf"))  # mov al, 0x42; out 0xe9, al; EOI; iret
    chips.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)  # 1: hlt; jmp 1b
    for _ in range(2):
        chips.vm.irq_line(4, 1)
        chips.vm.irq_line(4, 0)
        run = chips.expect(abi.KVM_EXIT_IO)
        assert run.io.port == 0xE9
        assert pic(chips).isr == 0x10 and pic(chips).irr == 0


def test_a_level_pic_line_comes_again_after_its_eoi(chips: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    unmask_pic(chips, elcr=0x20)
    chips.ivt(0x25, CODE + 0x100)
    chips.write(CODE + 0x100, bytes.fromhex("e6e9 b020 e620 cf"))  # out 0xe9, al; EOI; iret
    chips.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    chips.vm.irq_line(5, 1)
    chips.expect(abi.KVM_EXIT_IO)
    chips.expect(abi.KVM_EXIT_IO)  # the line is still up
    chips.vm.irq_line(5, 0)
    chips.cpu.kick()
    with pytest.raises(InterruptedError):
        chips.cpu.run()
    assert pic(chips).irr == 0


def test_a_masked_pic_line_waits(chips: Guest) -> None:
    unmask_pic(chips)
    state = chips.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER)
    state.chip.pic.imr = 0x10
    chips.vm.set_irqchip(state)
    chips.vm.irq_line(4, 1)
    assert pic(chips).irr == 0x10
    chips.real("90 e6e9", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)  # nop; out 0xe9, al
    assert chips.expect(abi.KVM_EXIT_IO).io.port == 0xE9
    assert pic(chips).isr == 0


# --- IOAPIC ----------------------------------------------------------------------------------------


def pending(guest: Guest, register: int, vector: int) -> bool:
    return bool(lapic_register(guest, register + (vector >> 5) * 16) >> (vector & 31) & 1)


@pytest.fixture
def apic(chips: Guest) -> Guest:
    """Chips with the local APIC enabled by software, LINT0 masked."""
    set_lapic_register(chips, APIC_SPIV, 0x1FF)
    set_lapic_register(chips, APIC_LVT0, 0x1_0000)
    return chips


def test_an_ioapic_edge_is_sent_once(apic: Guest) -> None:
    redirect(apic, 10, vector=0x51)
    assert apic.vm.irq_line_status(10, 1) > 0
    assert pending(apic, APIC_IRR, 0x51)
    set_lapic_register(apic, APIC_IRR + (0x51 >> 5) * 16, 0)
    apic.vm.irq_line(10, 1)
    assert not pending(apic, APIC_IRR, 0x51), "no second edge"
    apic.vm.irq_line(10, 0)
    apic.vm.irq_line(10, 1)
    assert pending(apic, APIC_IRR, 0x51)


def test_an_ioapic_level_waits_for_its_eoi(apic: Guest) -> None:
    redirect(apic, 20, vector=0x61, level=True)
    apic.vm.irq_line(20, 1)
    assert pending(apic, APIC_IRR, 0x61)
    assert ioapic_entry(apic, 20).remote_irr == 1
    assert apic.vm.irq_line_status(20, 1) == -1, "not delivered while remote IRR is set"
    apic.vm.irq_line(20, 0)
    assert ioapic_entry(apic, 20).remote_irr == 1


def test_an_ioapic_level_comes_again_while_the_line_is_up(apic: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    redirect(apic, 11, vector=0x61, level=True)
    apic.ivt(0x61, CODE + 0x100)
    # out 0xe9, al; mov dword [0xfee000b0], 0 through 32-bit addressing; iret
    apic.write(CODE + 0x100, bytes.fromhex("e6e9 6667c7 05b000e0fe 00000000 cf"))
    apic.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    sregs = apic.cpu.get_sregs()
    sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1  # "unreal" mode
    apic.cpu.set_sregs(sregs)
    apic.vm.irq_line(11, 1)
    apic.expect(abi.KVM_EXIT_IO)
    apic.expect(abi.KVM_EXIT_IO)
    apic.vm.irq_line(11, 0)
    apic.cpu.kick()
    with pytest.raises(InterruptedError):
        apic.cpu.run()


@pytest.mark.parametrize("level", [False, True], ids=["edge", "level"])
def test_an_interrupt_is_in_service_until_its_eoi(apic: Guest, needs: Callable[[str], None], level: bool) -> None:
    needs("interrupts in real mode")
    needs("interrupts in service until their EOI")
    redirect(apic, 11, vector=0x61, level=level)
    apic.ivt(0x61, CODE + 0x100)
    apic.ivt(0x55, CODE + 0x200)
    # sti; nop; nop; out 0xe9, al; mov dword [0xfee000b0], 0 through 32-bit addressing; nop; hlt
    apic.write(CODE + 0x100, bytes.fromhex("fb 90 90 e6e9 6667c7 05b000e0fe 00000000 90 f4"))
    apic.write(CODE + 0x200, bytes.fromhex("e6ea"))  # out 0xea, al
    apic.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    sregs = apic.cpu.get_sregs()
    sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1  # "unreal" mode
    apic.cpu.set_sregs(sregs)
    apic.vm.irq_line(11, 1)
    apic.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x55))
    assert apic.expect(abi.KVM_EXIT_IO).io.port == 0xE9, "the lower priority waits although IF is set"
    assert pending(apic, APIC_ISR, 0x61) and not pending(apic, APIC_IRR, 0x61)
    assert pending(apic, APIC_IRR, 0x55) and lapic_register(apic, APIC_PPR) == 0x60
    assert ioapic_entry(apic, 11).remote_irr == level
    apic.vm.irq_line(11, 0)
    assert apic.expect(abi.KVM_EXIT_IO).io.port == 0xEA, "after the EOI"
    assert not pending(apic, APIC_ISR, 0x61) and pending(apic, APIC_ISR, 0x55)
    assert ioapic_entry(apic, 11).remote_irr == 0


@pytest.mark.parametrize("polarity", [0, 1], ids=["active-high", "active-low"])
def test_the_polarity_of_an_ioapic_entry_is_ignored(apic: Guest, polarity: int) -> None:
    assert apic.vm.check_extension(abi.KVM_CAP_IOAPIC_POLARITY_IGNORED)
    chip = apic.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[12].bits = 0x71 | polarity << 13
    apic.vm.set_irqchip(chip)
    assert not pending(apic, APIC_IRR, 0x71)
    apic.vm.irq_line(12, 1)
    assert pending(apic, APIC_IRR, 0x71), "1 is active"


def test_a_masked_ioapic_pin_is_ignored(apic: Guest) -> None:
    redirect(apic, 12, vector=0x71, mask=True)
    apic.vm.irq_line(12, 1)
    assert not pending(apic, APIC_IRR, 0x71)
    apic.vm.irq_line(12, 0)


def test_an_msi_reaches_the_local_apic(apic: Guest) -> None:
    assert apic.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x81)) == 1
    assert pending(apic, APIC_IRR, 0x81)
    refused(errno.EINVAL, lambda: apic.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x81, flags=2)))


def test_a_message_may_name_its_device(apic: Guest) -> None:
    message = abi.kvm_msi(address_lo=0xFEE0_0000, data=0x82, flags=abi.KVM_MSI_VALID_DEVID, devid=0x18)
    assert apic.vm.signal_msi(message) == 1
    assert pending(apic, APIC_IRR, 0x82)
    entry = abi.kvm_irq_routing_entry(gsi=40, type=abi.KVM_IRQ_ROUTING_MSI, flags=abi.KVM_MSI_VALID_DEVID)
    entry.u.msi.address_lo, entry.u.msi.data = 0xFEE0_0000, 0x92
    apic.vm.set_gsi_routing([entry])
    apic.vm.irq_line(40, 1)
    assert pending(apic, APIC_IRR, 0x92)
    entry.type = abi.KVM_IRQ_ROUTING_IRQCHIP
    refused(errno.EINVAL, lambda: apic.vm.set_gsi_routing([entry]))


def test_ioapic_lines_without_a_pin_are_nothing(apic: Guest) -> None:
    state = apic.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    state.chip.ioapic.irr = 0xFF00_0000
    apic.vm.set_irqchip(state)
    assert apic.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 0


def test_more_than_4096_routes_are_einval(chips: Guest) -> None:
    entry = abi.kvm_irq_routing_entry(gsi=5, type=abi.KVM_IRQ_ROUTING_MSI)
    refused(errno.EINVAL, lambda: chips.vm.set_gsi_routing([entry] * 4097))


def test_routing_sends_a_gsi_as_a_message(apic: Guest) -> None:
    entry = abi.kvm_irq_routing_entry(gsi=40, type=abi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.data = 0xFEE0_0000, 0x91
    apic.vm.set_gsi_routing([entry])
    apic.vm.irq_line(40, 1)
    assert pending(apic, APIC_IRR, 0x91)


@pytest.mark.parametrize(
    ("gsi", "type", "chip", "pin"), [(4096, 1, 2, 0), (5, 99, 0, 0), (5, 1, 3, 0), (5, 1, 2, 24), (5, 1, 0, 8)]
)
def test_impossible_routes_are_einval(apic: Guest, gsi: int, type: int, chip: int, pin: int) -> None:
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=type)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
    refused(errno.EINVAL, lambda: apic.vm.set_gsi_routing([entry]))
    redirect(apic, 10, vector=0x51)
    apic.vm.irq_line(10, 1)
    assert pending(apic, APIC_IRR, 0x51), "the table from before is in force"


def test_an_irqfd_raises_its_line(apic: Guest) -> None:
    redirect(apic, 10, vector=0x52)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        apic.vm.irqfd(fd, 10)
        refused(errno.EBUSY, lambda: apic.vm.irqfd(fd, 10))
        os.eventfd_write(fd, 1)
        deadline = time.monotonic() + 5
        while not pending(apic, APIC_IRR, 0x52) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert pending(apic, APIC_IRR, 0x52)
        apic.vm.irqfd(fd, 10, abi.KVM_IRQFD_FLAG_DEASSIGN)
        refused(errno.EINVAL, lambda: apic.vm.irqfd(fd, 10, 1 << 7))
    finally:
        os.close(fd)


def test_an_ioeventfd_takes_matching_writes(guest: Guest) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.ioeventfd(fd, 0x500, 1, datamatch=7, flags=abi.KVM_IOEVENTFD_FLAG_PIO)
        refused(
            errno.EEXIST,
            lambda: guest.vm.ioeventfd(fd, 0x500, 1, datamatch=7, flags=abi.KVM_IOEVENTFD_FLAG_PIO),
        )
        refused(errno.EINVAL, lambda: guest.vm.ioeventfd(fd, 0x500, 3, flags=abi.KVM_IOEVENTFD_FLAG_PIO))
        guest.real("ba0005 b007 ee ee b008 ee f4")  # mov dx, 0x500; mov al, 7; out; out; mov al, 8; out; hlt
        assert guest.expect(abi.KVM_EXIT_IO).io.port == 0x500
        assert os.eventfd_read(fd) == 2
        guest.expect(abi.KVM_EXIT_HLT)
    finally:
        os.close(fd)


def test_the_pit_counts_and_interrupts(chips: Guest, needs: Callable[[str], None]) -> None:
    needs("interrupts in real mode")
    unmask_pic(chips)
    chips.ivt(0x20, CODE + 0x100)
    chips.write(CODE + 0x100, bytes.fromhex("e6e9 b020 e620 cf"))  # out 0xe9, al; EOI; iret
    # channel 0, mode 2, count 0x1000 (3.4 ms): mov al,0x34; out 0x43; mov al,0; out 0x40; mov al,0x10; out 0x40; 1: hlt
    chips.real("b034 e643 b000 e640 b010 e640 f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
    for _ in range(3):
        assert chips.expect(abi.KVM_EXIT_IO).io.port == 0xE9


# --- split irqchip ---------------------------------------------------------------------------------


def test_a_split_irqchip_has_local_apics_only(make: Callable[..., Guest]) -> None:
    guest = make(vcpus=0)
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 4097))
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    refused(errno.EEXIST, lambda: guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24))
    refused(errno.ENXIO, lambda: guest.vm.get_irqchip(0))
    with guest.vm.create_vcpu(0) as vcpu:
        assert bytes(vcpu.get_lapic().regs[APIC_SPIV : APIC_SPIV + 1]) == b"\xff"


def test_with_a_split_irqchip_the_pics_windows_are_userspaces(
    make: Callable[..., Guest], needs: Callable[[str], None]
) -> None:
    needs("interrupt windows in real mode")
    guest = make(vcpus=0)
    guest.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    with guest.vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(guest.kvm.get_supported_cpuid())
        guest.ivt(0x40, CODE + 0x100)
        guest.write(CODE + 0x100, bytes.fromhex("e6ea cf"))  # out 0xea, al; iret
        guest.real("e6e9 fb 90 90 ebfe", vcpu=vcpu)  # out 0xe9, al; sti; nop; nop; jmp $
        vcpu.kvm_run.request_interrupt_window = 1
        run = guest.expect(abi.KVM_EXIT_IO, vcpu)
        assert (run.ready_for_interrupt_injection, run.if_flag) == (0, 0)
        run = guest.expect(abi.KVM_EXIT_IRQ_WINDOW_OPEN, vcpu)
        assert (run.ready_for_interrupt_injection, run.if_flag) == (1, 1)
        run.request_interrupt_window = 0
        vcpu.interrupt(0x40)
        assert guest.expect(abi.KVM_EXIT_IO, vcpu).io.port == 0xEA


def test_all_bits_of_a_local_apics_bitmaps_are_restored(make: Callable[..., Guest]) -> None:
    chips = make(irqchip=True)
    state = chips.cpu.get_lapic()
    for register in (0x100, 0x180, 0x200):  # ISR, TMR, IRR: vectors 0 to 31
        state.regs[register : register + 4] = [0xFF] * 4
    chips.cpu.set_lapic(state)
    restored = chips.cpu.get_lapic()
    for register in (0x100, 0x180, 0x200):
        assert bytes(restored.regs[register : register + 4]) == b"\xff" * 4, hex(register)
