# SPDX-License-Identifier: Apache-2.0
"""The i8259s against the 8259A datasheet."""

import ctypes

import pytest

from softkvm import abi
from softkvm.kvm.x86.irqchip.i8259 import PIC_PORTS, Pic
from softkvm.kvm.x86.irqchip.seams import IRQ_COALESCED, IRQ_IGNORED

MASTER, MASTER_DATA, SLAVE, SLAVE_DATA, ELCR1, ELCR2 = PIC_PORTS
EOI = 0x20
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C


class PicBench:
    """Both chips after the usual PC initialization: vectors 0x20 and 0x28, all pins unmasked."""

    def __init__(self, icw4: int = 0x01) -> None:
        self.raised = 0
        self.acked: list[int] = []
        self.masks: list[tuple[int, bool]] = []
        self.pic = Pic(self._raise, self.acked.append, lambda pin, masked: self.masks.append((pin, masked)))
        for command, data, vector, cascade in ((MASTER, MASTER_DATA, 0x20, 4), (SLAVE, SLAVE_DATA, 0x28, 2)):
            self.out(command, 0x11)
            for icw in (vector, cascade, icw4):
                self.out(data, icw)

    def _raise(self) -> None:
        self.raised += 1

    def out(self, port: int, value: int) -> None:
        assert self.pic.io_write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.pic.io_read(port, 1)

    def pulse(self, pin: int) -> int:
        result = self.pic.set_pin(pin, 1)
        self.pic.set_pin(pin, 0)
        return result

    def register(self, port: int, which: int) -> int:
        self.out(port, which)
        return self.inb(port)


@pytest.fixture
def bench() -> PicBench:
    return PicBench()


@pytest.mark.parametrize("pin", [pin for pin in range(16) if pin != 2])
def test_interrupt_has_the_vector_of_its_pin(bench: PicBench, pin: int) -> None:
    assert bench.pulse(pin) == 1
    assert bench.pic.output
    assert bench.raised == 1
    assert bench.pic.read_irq() == 0x20 + pin
    assert not bench.pic.output


def test_slave_interrupt_is_in_service_in_both_chips(bench: PicBench) -> None:
    bench.pulse(12)
    bench.pic.read_irq()
    assert bench.register(MASTER, READ_ISR) == 1 << 2
    assert bench.register(SLAVE, READ_ISR) == 1 << 4
    bench.out(SLAVE, EOI)
    bench.out(MASTER, EOI)
    assert bench.register(MASTER, READ_ISR) == bench.register(SLAVE, READ_ISR) == 0
    assert sorted(bench.acked) == [2, 12]


def test_lower_priority_waits_for_eoi_and_higher_does_not(bench: PicBench) -> None:
    bench.pulse(4)
    assert bench.pic.read_irq() == 0x24
    bench.pulse(5)
    assert not bench.pic.output
    bench.pulse(1)
    assert bench.pic.output
    assert bench.pic.read_irq() == 0x21
    bench.out(MASTER, EOI)  # of 1
    assert not bench.pic.output
    bench.out(MASTER, EOI)  # of 4
    assert bench.pic.read_irq() == 0x25


def test_slave_ranks_at_pin_two_of_the_master(bench: PicBench) -> None:
    for pin in (3, 8, 1):
        bench.pulse(pin)
    order = []
    for _ in range(3):
        order.append(bench.pic.read_irq())
        bench.out(SLAVE, EOI)
        bench.out(MASTER, EOI)
    assert order == [0x21, 0x28, 0x23]


def test_spurious_interrupt_is_seven_of_its_chip_without_service(bench: PicBench) -> None:
    assert bench.pic.read_irq() == 0x27
    assert bench.register(MASTER, READ_ISR) == 0
    bench.out(ELCR2, 0x02)
    bench.pic.set_pin(9, 1)
    bench.pic.set_pin(9, 0)  # the level went away; the master still holds the slave's request
    assert bench.pic.read_irq() == 0x2F
    assert bench.register(SLAVE, READ_ISR) == 0
    assert bench.register(MASTER, READ_ISR) == 1 << 2  # which needs its EOI


def test_edge_is_needed_for_another_request(bench: PicBench) -> None:
    bench.pic.set_pin(3, 1)
    bench.pic.read_irq()
    bench.out(MASTER, EOI)
    bench.pic.set_pin(3, 1)
    assert not bench.pic.output
    bench.pic.set_pin(3, 0)
    bench.pic.set_pin(3, 1)
    assert bench.pic.output


def test_level_triggered_line_asks_again_after_eoi(bench: PicBench) -> None:
    bench.out(ELCR1, 0x20)
    bench.pic.set_pin(5, 1)
    assert bench.pic.read_irq() == 0x25
    bench.out(MASTER, EOI)
    assert bench.pic.output
    bench.pic.set_pin(5, 0)
    assert not bench.pic.output
    assert bench.register(MASTER, READ_IRR) == 0


def test_line_is_the_or_of_its_sources(bench: PicBench) -> None:
    bench.out(ELCR1, 0x20)
    bench.pic.set_pin(5, 1, source_id=0)
    bench.pic.set_pin(5, 1, source_id=1)
    bench.pic.set_pin(5, 0, source_id=0)
    assert bench.pic.output
    bench.pic.set_pin(5, 0, source_id=1)
    assert not bench.pic.output


def test_status_of_a_line(bench: PicBench) -> None:
    assert bench.pulse(6) == 1
    assert bench.pulse(6) == IRQ_COALESCED
    bench.out(MASTER_DATA, 0x40)
    assert bench.pulse(6) == IRQ_IGNORED


def test_masked_request_is_kept_until_unmasked(bench: PicBench) -> None:
    bench.out(MASTER_DATA, 0xFF)
    bench.pulse(1)
    assert not bench.pic.output
    assert bench.register(MASTER, READ_IRR) == 0x02
    assert bench.inb(MASTER_DATA) == 0xFF
    bench.out(MASTER_DATA, 0xFD)
    assert bench.pic.output
    assert bench.masks[-1] == (1, False)


def test_elcr_keeps_timer_keyboard_cascade_rtc_and_fpu_edge_triggered(bench: PicBench) -> None:
    bench.out(ELCR1, 0xFF)
    bench.out(ELCR2, 0xFF)
    assert (bench.inb(ELCR1), bench.inb(ELCR2)) == (0xF8, 0xDE)


def test_specific_eoi_ends_only_its_level(bench: PicBench) -> None:
    bench.pulse(6)
    bench.pic.read_irq()
    bench.pulse(3)
    bench.pic.read_irq()
    bench.out(MASTER, 0x60 | 6)
    assert bench.register(MASTER, READ_ISR) == 1 << 3


def test_rotate_on_specific_eoi_makes_the_pin_lowest(bench: PicBench) -> None:
    bench.pulse(3)
    bench.pic.read_irq()
    bench.out(MASTER, 0xE0 | 3)
    bench.pulse(3)
    bench.pulse(4)
    assert bench.pic.read_irq() == 0x24


def test_rotate_on_non_specific_eoi(bench: PicBench) -> None:
    bench.pulse(0)
    bench.pic.read_irq()
    bench.out(MASTER, 0xA0)
    bench.pulse(0)
    bench.pulse(1)
    assert bench.pic.read_irq() == 0x21


def test_set_priority_command(bench: PicBench) -> None:
    bench.out(MASTER, 0xC0 | 4)  # 4 is lowest, 5 highest
    for pin in (0, 4, 5):
        bench.pulse(pin)
    assert bench.pic.read_irq() == 0x25


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    bench = PicBench(icw4=0x03)
    bench.pulse(5)
    assert bench.pic.read_irq() == 0x25
    assert bench.register(MASTER, READ_ISR) == 0
    assert bench.acked == [5]


def test_rotate_in_automatic_eoi_mode() -> None:
    bench = PicBench(icw4=0x03)
    bench.out(MASTER, 0x80)
    bench.pulse(0)
    bench.pic.read_irq()
    bench.pulse(0)
    bench.pulse(1)
    assert bench.pic.read_irq() == 0x21
    bench.out(MASTER, 0x00)


def test_special_mask_mode_lets_lower_priorities_in(bench: PicBench) -> None:
    bench.pulse(2 + 1)
    bench.pic.read_irq()
    bench.out(MASTER_DATA, 1 << 3)
    bench.out(MASTER, 0x68)
    bench.pulse(6)
    assert bench.pic.read_irq() == 0x26
    bench.out(MASTER, 0x48)


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself() -> None:
    bench = PicBench(icw4=0x11)
    bench.pulse(12)
    assert bench.pic.read_irq() == 0x2C
    bench.pulse(8)
    assert bench.pic.read_irq() == 0x28
    plain = PicBench()
    plain.pulse(12)
    plain.pic.read_irq()
    plain.pulse(8)
    assert not plain.pic.output


def test_poll_acknowledges(bench: PicBench) -> None:
    bench.out(MASTER, POLL)
    assert bench.inb(MASTER) & 0x80 == 0
    bench.pulse(4)
    bench.out(MASTER, POLL)
    assert bench.inb(MASTER) == 0x84
    assert not bench.pic.output
    assert bench.register(MASTER, READ_ISR) == 1 << 4


def test_initialization_clears_mask_and_service_and_selects_irr(bench: PicBench) -> None:
    bench.out(MASTER_DATA, 0xFF)
    bench.pulse(1)
    bench.out(MASTER, READ_ISR)
    bench.out(MASTER, 0x11)
    for icw in (0x50, 4, 1):
        bench.out(MASTER_DATA, icw)
    assert bench.inb(MASTER_DATA) == 0
    assert bench.inb(MASTER) == 0  # IRR: an edge from before is gone
    bench.pulse(1)
    assert bench.pic.read_irq() == 0x51


def test_initialization_without_icw4_takes_three_words(bench: PicBench) -> None:
    bench.out(MASTER, 0x10)
    bench.out(MASTER_DATA, 0x40)
    bench.out(MASTER_DATA, 0x04)
    bench.out(MASTER_DATA, 0xA5)
    assert bench.inb(MASTER_DATA) == 0xA5


def test_accesses_of_other_sizes_are_ignored(bench: PicBench) -> None:
    assert bench.pic.io_write(MASTER_DATA, 2, 0xFFFF)
    assert bench.inb(MASTER_DATA) == 0
    assert bench.pic.io_read(MASTER_DATA, 4) == 0


def test_state_round_trip_keeps_pending_interrupts(bench: PicBench) -> None:
    bench.out(ELCR2, 0x04)
    bench.out(MASTER_DATA, 0x41)
    bench.pulse(4)
    bench.pic.read_irq()
    bench.pulse(11)
    other = Pic(lambda: None)
    states = [bench.pic.get_state(chip) for chip in (0, 1)]
    for chip, state in enumerate(states):
        other.set_state(chip, state)
    assert [bytes(other.get_state(chip)) for chip in (0, 1)] == [bytes(state) for state in states]
    assert other.output
    assert other.read_irq() == 0x2B
    assert states[0].imr == 0x41
    assert states[0].irq_base == 0x20
    assert states[1].elcr == 0x04
    assert ctypes.sizeof(states[0]) == 16


@pytest.mark.parametrize("mask", [0, 0xF8, 0xFF])
def test_a_state_brings_the_mask_of_the_elcr_with_it(bench: PicBench, mask: int) -> None:
    """KVM API 4.26: what KVM_SET_IRQCHIP has got, KVM_GET_IRQCHIP gives back, whole."""
    state = bench.pic.get_state(0)
    state.elcr_mask, state.elcr = mask, 0x28
    bench.pic.set_state(0, state)
    assert bytes(bench.pic.get_state(0)) == bytes(state)
    bench.out(ELCR1, 0xFF)
    assert bench.inb(ELCR1) == mask


def test_any_state_is_survived() -> None:
    pic = Pic(lambda: None)
    for chip in (0, 1):
        pic.set_state(chip, abi.kvm_pic_state.from_buffer_copy(b"\xff" * 16))
    for port in PIC_PORTS:
        pic.io_write(port, 1, 0xFF)
        pic.io_read(port, 1)
    pic.read_irq()
