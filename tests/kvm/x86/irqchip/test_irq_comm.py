# SPDX-License-Identifier: Apache-2.0
"""GSI routing, MSIs and the chips together (KVM API 4.24, 4.25, 4.52, 4.70, 4.71)."""

import errno

import pytest
from tests.support.interrupts import Board

from softkvm import abi
from softkvm.kvm.irq.io_bus import IoBus
from softkvm.kvm.x86.irqchip.irq_comm import KVM_MAX_IRQ_ROUTES, irqchip_entry, msi_message
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED, IRQ_IGNORED

MASTER, SLAVE, IOAPIC = abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC
IOAPIC_BASE = 0xFEC00000
LVT0 = 0x350


def msi_entry(
    gsi: int, address_lo: int = 0xFEE00000, data: int = 0x41, address_hi: int = 0
) -> abi.kvm_irq_routing_entry:
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo = address_lo
    entry.u.msi.address_hi = address_hi
    entry.u.msi.data = data
    return entry


class Machine(Board):
    """The chips on their buses."""

    def __init__(self, cpus: int = 1, *, split: bool = False) -> None:
        super().__init__(cpus, split=split)
        self.pio, self.mmio = IoBus(), IoBus()
        self.chips.attach(self.pio, self.mmio)

    def init_pic(self) -> None:
        """Vectors 0x20 and 0x28, all unmasked."""
        for port, values in ((0x20, (0x11, 0x20, 4, 1)), (0xA0, (0x11, 0x28, 2, 1))):
            self.pio.write(port, 1, values[0])
            for value in values[1:]:
                self.pio.write(port + 1, 1, value)

    def redirect(self, pin: int, low: int) -> None:
        for register, value in ((0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)):
            assert self.mmio.write(IOAPIC_BASE, 4, register)
            assert self.mmio.write(IOAPIC_BASE + 0x10, 4, value)

    def take(self) -> int:
        if not self.chips.cpu_has_interrupt(self.lapic):
            return -1
        return self.chips.cpu_get_interrupt(self.lapic)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def set_routing_errno(machine: Machine, entries: list[abi.kvm_irq_routing_entry]) -> int | None:
    with pytest.raises(OSError) as error:
        machine.chips.routing.set_routing(entries)
    return error.value.errno


# Default routing


def test_default_routing_drives_both_chips(machine: Machine) -> None:
    machine.init_pic()
    machine.redirect(5, 0x45)
    assert machine.chips.set_gsi(5, 1) == 2
    assert machine.take() == 0x25  # ExtINT through LINT0 comes first
    assert machine.take() == 0x45
    assert machine.take() == -1


@pytest.mark.parametrize("gsi", range(24))
def test_default_routing_is_the_kernels(machine: Machine, gsi: int) -> None:
    routing = machine.chips.routing
    assert routing.gsi_of(IOAPIC, gsi) == gsi
    if gsi < 16:
        assert routing.gsi_of(gsi // 8, gsi % 8) == gsi


def test_status_combines_the_chips(machine: Machine) -> None:
    assert machine.chips.set_gsi(20, 1) == IRQ_IGNORED  # masked after reset
    assert machine.chips.set_gsi(4000, 1) == IRQ_IGNORED
    assert machine.chips.set_gsi(2**32 - 1, 1) == IRQ_IGNORED
    machine.init_pic()
    assert machine.chips.set_gsi(5, 1) == 1
    machine.chips.set_gsi(5, 0)
    assert machine.chips.set_gsi(5, 1) == IRQ_COALESCED


# KVM_SET_GSI_ROUTING


def test_new_table_replaces_the_old_one(machine: Machine) -> None:
    machine.redirect(2, 0x42)
    changes: list[int] = []
    machine.chips.routing.on_change.append(lambda: changes.append(1))
    machine.chips.routing.set_routing([irqchip_entry(0, IOAPIC, 2)])
    assert machine.chips.set_gsi(0, 1) == 1
    assert machine.take() == 0x42
    assert machine.chips.set_gsi(2, 1) == IRQ_IGNORED
    assert changes == [1]
    machine.chips.routing.set_routing([])
    assert machine.chips.set_gsi(0, 1) == IRQ_IGNORED


@pytest.mark.parametrize(
    "entries",
    [
        [irqchip_entry(KVM_MAX_IRQ_ROUTES, IOAPIC, 0)],
        [irqchip_entry(0, IOAPIC, 24)],
        [irqchip_entry(0, MASTER, 8)],
        [irqchip_entry(0, SLAVE, 8)],
        [irqchip_entry(0, 3, 0)],
        [irqchip_entry(0, 2**32 - 1, 2**32 - 1)],
        [irqchip_entry(5, IOAPIC, 5), irqchip_entry(5, IOAPIC, 6)],
        [irqchip_entry(5, IOAPIC, 5), msi_entry(5)],
        [msi_entry(5), irqchip_entry(5, IOAPIC, 5)],
        [msi_entry(5), msi_entry(5)],
        [abi.kvm_irq_routing_entry(gsi=1, type=0)],
        [abi.kvm_irq_routing_entry(gsi=1, type=abi.KVM_IRQ_ROUTING_S390_ADAPTER)],
        [abi.kvm_irq_routing_entry(gsi=1, type=abi.KVM_IRQ_ROUTING_MSI, flags=2)],
        [abi.kvm_irq_routing_entry(gsi=1, type=abi.KVM_IRQ_ROUTING_IRQCHIP, flags=1)],
        [msi_entry(0)] * (KVM_MAX_IRQ_ROUTES + 1),
    ],
)
def test_invalid_table_is_refused_and_the_old_one_stays(
    machine: Machine, entries: list[abi.kvm_irq_routing_entry]
) -> None:
    machine.redirect(20, 0x52)
    assert set_routing_errno(machine, entries) == errno.EINVAL
    assert machine.chips.set_gsi(20, 1) == 1


def test_split_irqchip_routes_only_messages() -> None:
    machine = Machine(split=True)
    assert set_routing_errno(machine, [irqchip_entry(0, IOAPIC, 0)]) == errno.EINVAL
    assert set_routing_errno(machine, [irqchip_entry(0, MASTER, 0)]) == errno.EINVAL
    machine.chips.routing.set_routing([msi_entry(30)])
    assert machine.chips.set_gsi(30, 1) == 1
    assert machine.chips.set_gsi(30, 0) == IRQ_IGNORED
    assert machine.take() == 0x41
    assert machine.chips.routing.routed_msi(30) == (0xFEE00000, 0, 0x41)


def test_split_irqchip_tells_userspace_of_the_eois_it_waits_for() -> None:
    exits: list[tuple[int, int]] = []
    board = Board(2, split=True, eoi_exit=lambda vcpu_id, vector: exits.append((vcpu_id, vector)))
    level = msi_entry(20, address_lo=0xFEE01000, data=0x8041)
    beyond = msi_entry(30, address_lo=0xFEE01000, data=0x8042)
    edge = msi_entry(21, address_lo=0xFEE01000, data=0x43)
    board.chips.routing.set_routing([level, edge, beyond])
    for gsi in (20, 21, 30):
        board.chips.set_gsi(gsi, 1)
        board.lapics[1].get_interrupt()
        board.lapics[1].eoi()
    assert exits == [(1, 0x41)]
    board.lapics[1].mmio_write(0xF0, 4, 0x11FF)  # directed EOIs: no broadcast
    board.chips.set_gsi(20, 1)
    board.lapics[1].get_interrupt()
    board.lapics[1].eoi()
    assert len(exits) == 1


# MSIs


def test_message_fields() -> None:
    plain = msi_message((0xFEE05000, 0, 0x0041), False)
    assert (plain.dest, plain.vector, plain.delivery_mode, plain.logical) == (5, 0x41, 0, False)
    assert not plain.level_triggered
    assert not plain.redirection_hint
    full = msi_message((0xFEE0100C, 0x12300, 0xC1FF), True)
    assert full.dest == 0x12301
    assert (full.vector, full.delivery_mode, full.logical) == (0xFF, 0x100, True)
    assert full.level_triggered
    assert full.redirection_hint


def test_signal_msi(machine: Machine) -> None:
    msi = abi.kvm_msi(address_lo=0xFEE00000, data=0x61)
    assert machine.chips.routing.signal_msi(msi) == 1
    assert machine.take() == 0x61
    msi.address_lo = 0xFEE09000
    assert machine.chips.routing.signal_msi(msi) == IRQ_IGNORED
    machine.lapic.set_spiv(0xFF)
    msi.address_lo = 0xFEE00000
    assert machine.chips.routing.signal_msi(msi) == 0
    msi.flags = 2
    with pytest.raises(OSError) as error:
        machine.chips.routing.signal_msi(msi)
    assert error.value.errno == errno.EINVAL


def test_high_address_is_checked_in_x2apic_format(machine: Machine) -> None:
    machine.chips.apic_map.x2apic_format = True
    assert set_routing_errno(machine, [msi_entry(30, address_hi=1)]) == errno.EINVAL
    with pytest.raises(OSError):
        machine.chips.routing.signal_msi(abi.kvm_msi(address_lo=0xFEE00000, address_hi=0x80))


def test_redirection_hint_goes_to_one_of_the_destinations() -> None:
    machine = Machine(4)
    for number, lapic in enumerate(machine.lapics):
        lapic.mmio_write(0xD0, 4, 1 << number + 24)
    assert machine.chips.routing.set_msi(0xFEE0F000 | 1 << 3 | 1 << 2, 0, 0x41) == 1


# Ack and mask notifiers


def test_ack_notifier_is_called_at_eoi_of_either_chip(machine: Machine) -> None:
    machine.init_pic()
    machine.redirect(5, 0x8045)
    acked: list[int] = []

    def note() -> None:
        acked.append(1)

    machine.chips.routing.add_ack_notifier(5, note)
    machine.chips.set_gsi(5, 1)
    machine.take()
    machine.pio.write(0x20, 1, 0x20)
    assert acked == [1]
    machine.chips.set_gsi(5, 0)
    assert machine.take() == 0x45
    machine.lapic.eoi()
    assert acked == [1, 1]
    machine.chips.routing.remove_ack_notifier(5, note)
    machine.chips.set_gsi(5, 1)
    machine.take()
    machine.pio.write(0x20, 1, 0x20)
    assert len(acked) == 2


def test_resampled_line_is_lowered_by_its_ack_notifier_without_another_interrupt(machine: Machine) -> None:
    machine.redirect(20, 0x8052)
    machine.chips.routing.add_ack_notifier(20, lambda: (machine.chips.set_gsi(20, 0, 1), None)[1])
    machine.chips.set_gsi(20, 1, 1)
    assert machine.take() == 0x52
    machine.lapic.eoi()
    assert machine.take() == -1


def test_mask_notifier(machine: Machine) -> None:
    seen: list[bool] = []
    machine.chips.routing.add_mask_notifier(1, seen.append)
    machine.redirect(1, 0x31)
    machine.redirect(1, 0x10031)
    machine.pio.write(0x21, 1, 0x02)
    assert seen == [False, True, True]


# Virtual wire


def test_pic_reaches_only_the_processor_with_extint_on_lint0() -> None:
    machine = Machine(2)
    machine.init_pic()
    machine.chips.set_gsi(4, 1)
    assert machine.vcpus[0].calls[-1] == "event"
    assert machine.chips.cpu_has_interrupt(machine.lapics[0])
    assert not machine.chips.cpu_has_interrupt(machine.lapics[1])
    machine.lapics[0].mmio_write(LVT0, 4, 0x10700)
    assert not machine.chips.cpu_has_interrupt(machine.lapics[0])


# PIT


def program_pit(machine: Machine, count: int = 11932) -> None:
    machine.pio.write(0x43, 1, 0x34)
    machine.pio.write(0x40, 1, count & 0xFF)
    machine.pio.write(0x40, 1, count >> 8)


def test_pit_ticks_through_the_pic_one_at_each_eoi(machine: Machine) -> None:
    machine.chips.create_pit(0, machine.pio)
    machine.init_pic()
    program_pit(machine)
    machine.advance(30_500_000)
    for _ in range(3):
        assert machine.take() == 0x20
        assert machine.take() == -1
        machine.pio.write(0x20, 1, 0x20)
    assert machine.take() == -1


def test_pit_ticks_through_the_ioapic_one_at_each_eoi(machine: Machine) -> None:
    machine.chips.create_pit(0, machine.pio)
    machine.chips.routing.set_routing([irqchip_entry(0, IOAPIC, 2)])
    machine.redirect(2, 0x30)
    program_pit(machine)
    machine.advance(30_500_000)
    for _ in range(3):
        assert machine.take() == 0x30
        assert machine.take() == -1
        machine.lapic.eoi()
    assert machine.take() == -1


def test_pit_is_an_nmi_watchdog_through_lint0(machine: Machine) -> None:
    machine.chips.create_pit(0, machine.pio)
    machine.lapic.mmio_write(LVT0, 4, 0x400)
    program_pit(machine)
    machine.advance(10_500_000)
    assert machine.vcpus[0].count("nmi") == 1


def test_speaker_port_comes_with_its_flag(machine: Machine) -> None:
    machine.chips.create_pit(0, machine.pio)
    assert machine.pio.read(0x61, 1) is None
    other = Machine()
    other.chips.create_pit(abi.KVM_PIT_SPEAKER_DUMMY, other.pio)
    assert other.pio.read(0x61, 1) is not None


def test_create_pit_errors(machine: Machine) -> None:
    machine.chips.create_pit(2, machine.pio)  # flags that KVM doesn't know are nothing to it
    with pytest.raises(OSError) as failed:
        machine.chips.create_pit(0, machine.pio)
    assert failed.value.errno == errno.EEXIST
    split = Machine(split=True)
    with pytest.raises(OSError) as failed:
        split.chips.create_pit(0, split.pio)
    assert failed.value.errno == errno.ENOENT
