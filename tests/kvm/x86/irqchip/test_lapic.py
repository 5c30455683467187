# SPDX-License-Identifier: Apache-2.0
"""The local APIC's priorities, delivery, modes and state, against SDM vol. 3 chapter 11 and the KVM API."""

import errno
import struct

import pytest
from tests.support.interrupts import Board

from softkvm.abi import KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE

ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SPIV = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
MASKED = 1 << 16

FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = (mode << 8 for mode in (0, 1, 2, 4, 5, 6, 7))
LOGICAL, ASSERT, LEVEL = 1 << 11, 1 << 14, 1 << 15
SELF, ALL, ALL_BUT_SELF = 1 << 18, 2 << 18, 3 << 18


@pytest.fixture
def board() -> Board:
    return Board()


def read(board: Board, offset: int, cpu: int = 0) -> int:
    return board.lapics[cpu].mmio_read(offset, 4)


def write(board: Board, offset: int, value: int, cpu: int = 0) -> None:
    board.lapics[cpu].mmio_write(offset, 4, value)


def ipi(board: Board, icr: int, dest: int = 0, cpu: int = 0) -> None:
    write(board, ICR2, dest << 24, cpu)
    write(board, ICR, icr, cpu)


# Reset


def test_registers_after_power_up() -> None:
    board = Board(2, enabled=False)
    assert read(board, ID, cpu=1) == 1 << 24
    assert read(board, VERSION) & 0xFF == 0x14
    assert read(board, VERSION) >> 16 & 0xFF == 5  # six LVT entries
    assert read(board, SPIV) == 0xFF
    assert read(board, DFR) == 0xFFFFFFFF
    for offset in (TPR, PPR, LDR, ESR, ICR, ICR2, ISR, TMR, IRR):
        assert read(board, offset) == 0, hex(offset)
    for offset in (LVTT, LVTTHMR, LVTPC, LVT1, LVTERR):
        assert read(board, offset) == MASKED, hex(offset)
    assert board.lapics[0].apic_base == 0xFEE00900
    assert board.lapics[1].apic_base == 0xFEE00800


def test_lint0_of_the_boot_processor_is_a_virtual_wire() -> None:
    board = Board(2, enabled=False)
    assert read(board, LVT0, cpu=0) == EXTINT
    assert read(board, LVT0, cpu=1) == MASKED
    assert board.lapics[0].accept_pic_intr()
    assert not board.lapics[1].accept_pic_intr()


# Priorities


def test_interrupt_goes_from_request_to_service_to_end(board: Board) -> None:
    board.lapic.accept_irq(FIXED, 0x51)
    assert board.vcpus[0].calls[-1] == "event"
    assert read(board, IRR + 0x20) == 1 << 0x11
    assert board.lapic.has_interrupt() == 0x51
    assert board.lapic.get_interrupt() == 0x51
    assert read(board, IRR + 0x20) == 0
    assert read(board, ISR + 0x20) == 1 << 0x11
    assert read(board, PPR) == 0x50
    write(board, EOI, 0)
    assert read(board, ISR + 0x20) == 0
    assert read(board, PPR) == 0


def test_higher_class_interrupts_the_service_of_a_lower_and_the_same_class_does_not(board: Board) -> None:
    board.lapic.accept_irq(FIXED, 0x51)
    board.lapic.get_interrupt()
    board.lapic.accept_irq(FIXED, 0x5F)
    assert board.lapic.has_interrupt() == -1
    board.lapic.accept_irq(FIXED, 0x60)
    assert board.lapic.get_interrupt() == 0x60
    write(board, EOI, 0)
    assert board.lapic.has_interrupt() == -1  # 0x51 is still in service
    write(board, EOI, 0)
    assert board.lapic.get_interrupt() == 0x5F


@pytest.mark.parametrize("vector", [16, 31, 32, 63, 64, 127, 128, 254, 255])
def test_every_word_of_the_registers_is_reached(board: Board, vector: int) -> None:
    board.lapic.accept_irq(FIXED, vector)
    assert read(board, IRR + (vector >> 5) * 16) == 1 << (vector & 31)
    assert board.lapic.get_interrupt() == vector


def test_task_priority_keeps_its_class_and_lower_ones_out(board: Board) -> None:
    write(board, TPR, 0x55)
    assert read(board, PPR) == 0x55
    board.lapic.accept_irq(FIXED, 0x5A)
    assert board.lapic.has_interrupt() == -1
    assert board.lapic.highest_irr() == 0x5A
    before = board.vcpus[0].count("event")
    write(board, TPR, 0x4F)
    assert board.lapic.has_interrupt() == 0x5A
    assert board.vcpus[0].count("event") > before
    board.lapic.get_interrupt()
    write(board, TPR, 0x53)
    assert read(board, PPR) == 0x53  # same class: the TPR with its sub-class
    write(board, TPR, 0x43)
    assert read(board, PPR) == 0x50


def test_cr8_is_the_class_of_the_tpr(board: Board) -> None:
    board.lapic.set_cr8(9)
    assert read(board, TPR) == 0x90
    write(board, TPR, 0x45)
    assert board.lapic.cr8 == 4
    board.lapic.set_cr8(4)  # unchanged in CR8's bits: the sub-class stays
    assert read(board, TPR) == 0x45


def test_arbitration_priority(board: Board) -> None:
    write(board, TPR, 0x35)
    assert read(board, APR) == 0x35
    board.lapic.accept_irq(FIXED, 0x47)
    assert read(board, APR) == 0x40


def test_eoi_without_service_is_ignored(board: Board) -> None:
    write(board, EOI, 0)
    assert read(board, PPR) == 0


def test_trigger_mode_register_follows_the_last_message(board: Board) -> None:
    board.lapic.accept_irq(FIXED, 0x40, True, True)
    assert read(board, TMR + 0x20) == 1
    board.lapic.accept_irq(FIXED, 0x40, True, False)
    assert read(board, TMR + 0x20) == 0


# Software disable


def test_software_disabled_apic_takes_nmi_and_init_but_no_vectors() -> None:
    board = Board(enabled=False)
    assert board.lapic.accept_irq(FIXED, 0x40) == 0
    assert board.lapic.accept_irq(NMI, 0) == 1
    assert board.lapic.accept_irq(SMI, 0) == 1
    assert board.lapic.accept_irq(INIT, 0) == 1
    assert board.lapic.has_interrupt() == -1
    assert board.vcpus[0].calls == ["nmi", "smi", "event"]


def test_software_disable_masks_the_local_vector_table(board: Board) -> None:
    write(board, LVT1, NMI)
    write(board, LVT0, EXTINT)
    write(board, SPIV, 0xFF)
    assert read(board, LVT1) == NMI | MASKED
    write(board, LVT1, NMI)  # can't be unmasked while disabled
    assert read(board, LVT1) == NMI | MASKED
    assert not board.lapic.accept_pic_intr()
    write(board, SPIV, 0x1FF)
    assert read(board, LVT1) == NMI | MASKED


# Errors


def test_esr_shows_errors_after_a_write(board: Board) -> None:
    ipi(board, FIXED | ASSERT | 0x0F)
    assert read(board, ESR) == 0
    write(board, ESR, 0)
    assert read(board, ESR) == 1 << 5  # send illegal vector
    write(board, ESR, 0)
    assert read(board, ESR) == 0
    assert board.lapic.accept_irq(FIXED, 3) == 0
    read(board, 0x10)
    write(board, ESR, 0)
    assert read(board, ESR) == 1 << 6 | 1 << 7  # received illegal vector, illegal register
    assert board.lapic.highest_irr() == -1


def test_error_interrupt(board: Board) -> None:
    write(board, LVTERR, 0xFE)
    ipi(board, FIXED | ASSERT | 1)
    assert board.lapic.get_interrupt() == 0xFE
    ipi(board, FIXED | ASSERT | 1)  # the same error, not yet read
    assert board.lapic.has_interrupt() == -1


def test_error_vector_that_is_itself_illegal_ends(board: Board) -> None:
    write(board, LVTERR, 0x05)
    ipi(board, FIXED | ASSERT | 1)
    write(board, ESR, 0)
    assert read(board, ESR) == 1 << 5 | 1 << 6


# MMIO


def test_page_is_read_in_parts_of_a_register_but_not_across(board: Board) -> None:
    write(board, LDR, 0xAB000000)
    assert board.lapic.mmio_read(LDR + 3, 1) == 0xAB
    assert board.lapic.mmio_read(LDR + 2, 2) == 0xAB00
    assert board.lapic.mmio_read(LDR + 2, 4) == 0
    assert board.lapic.mmio_read(LDR, 8) == 0


@pytest.mark.parametrize(("offset", "size"), [(TPR, 1), (TPR, 2), (TPR, 8), (TPR + 4, 4), (TPR + 1, 1)])
def test_writes_other_than_aligned_32_bits_are_ignored(board: Board, offset: int, size: int) -> None:
    board.lapic.mmio_write(offset, size, 0x77)
    assert read(board, TPR) == 0


def test_read_only_registers_ignore_writes_without_error(board: Board) -> None:
    before = read(board, VERSION)
    for offset in (VERSION, APR, PPR, ISR, TMR, IRR, 0x390):
        write(board, offset, 0xFFFFFFFF)
        assert read(board, offset) in (0, before)
    write(board, ESR, 0)
    assert read(board, ESR) == 0


def test_reserved_bits_do_not_stick(board: Board) -> None:
    for offset, mask in {
        TPR: 0xFF,
        LDR: 0xFF000000,
        SPIV: 0x3FF,
        LVTT: 0x700FF,
        LVTTHMR: 0x107FF,
        LVTPC: 0x107FF,
        LVT0: 0x1A7FF,
        LVT1: 0x1A7FF,
        LVTERR: 0x100FF,
        0x3E0: 0b1011,
    }.items():
        write(board, offset, 0xFFFFFFFF)
        assert read(board, offset) == mask, hex(offset)
    write(board, DFR, 0)
    assert read(board, DFR) == 0x0FFFFFFF


def test_every_offset_and_value_is_survived(board: Board) -> None:
    for value in (0, 1, 0x1FF, 0x80000000, 0xFFFFFFFF):
        for offset in range(0, 0x1000, 4):
            board.lapic.mmio_write(offset, 4, value)
            assert 0 <= board.lapic.mmio_read(offset, 4) <= 0xFFFFFFFF


# Local interrupts


def test_local_nmi_smi_and_fixed(board: Board) -> None:
    for entry in (NMI, SMI, FIXED | 0x44):
        write(board, LVT1, entry)
        assert board.lapic.local_deliver(LVT1)
    assert board.vcpus[0].calls[-3:] == ["nmi", "smi", "event"]
    assert board.lapic.get_interrupt() == 0x44
    write(board, LVT1, NMI | MASKED)
    assert not board.lapic.local_deliver(LVT1)


def test_performance_counter_entry_masks_itself(board: Board) -> None:
    write(board, LVTPC, NMI)
    assert board.lapic.local_deliver(LVTPC)
    assert read(board, LVTPC) == NMI | MASKED


# INIT and start-up


def test_init_then_start_up_starts_the_processor() -> None:
    board = Board(2)
    ap, lapic = board.vcpus[1], board.lapics[1]
    ipi(board, INIT | ASSERT, dest=1)
    lapic.accept_events()
    assert ap.mp_state == KVM_MP_STATE_INIT_RECEIVED
    assert "reset True" in ap.calls
    ipi(board, SIPI | ASSERT | 0x9A, dest=1)
    lapic.accept_events()
    assert ap.mp_state == KVM_MP_STATE_RUNNABLE
    assert ap.calls[-1] == "sipi 0x9a"
    ipi(board, SIPI | ASSERT | 0x9B, dest=1)  # the second one finds it running
    lapic.accept_events()
    assert "sipi 0x9b" not in ap.calls


def test_start_up_without_init_is_ignored_and_init_voids_an_earlier_one() -> None:
    board = Board(2)
    ipi(board, SIPI | ASSERT | 1, dest=1)
    ipi(board, INIT | ASSERT, dest=1)
    board.lapics[1].accept_events()
    assert board.vcpus[1].mp_state == KVM_MP_STATE_INIT_RECEIVED


def test_init_de_assert_does_nothing() -> None:
    board = Board(2)
    ipi(board, INIT | LEVEL, dest=1)
    assert board.lapics[1].pending_events == 0


def test_boot_processor_runs_again_after_init(board: Board) -> None:
    ipi(board, INIT | ASSERT | SELF)
    board.lapic.accept_events()
    assert board.vcpus[0].mp_state == KVM_MP_STATE_RUNNABLE


def test_blocked_init_stays_pending_and_start_up_is_lost() -> None:
    board = Board(2)
    board.vcpus[1].blocked = True
    ipi(board, INIT | ASSERT, dest=1)
    ipi(board, SIPI | ASSERT | 1, dest=1)
    board.lapics[1].accept_events()
    board.vcpus[1].blocked = False
    board.lapics[1].accept_events()
    assert board.vcpus[1].mp_state == KVM_MP_STATE_INIT_RECEIVED


def test_init_keeps_id_and_x2apic_mode_and_clears_the_rest() -> None:
    board = Board(2)
    board.x2apic()
    lapic = board.lapics[1]
    lapic.accept_irq(FIXED, 0x40)
    lapic.set_tpr(0x20)
    lapic.reset(init_event=True)
    assert lapic.x2apic_mode
    assert lapic.msr_read(0x802) == 1
    assert lapic.msr_read(0x80D) == 2
    assert lapic.msr_read(0x808) == 0
    assert lapic.msr_read(0x80F) == 0xFF
    assert lapic.highest_irr() == -1


# IA32_APIC_BASE


def test_mode_transitions() -> None:
    xapic, x2apic, disabled, invalid = 0xFEE00900, 0xFEE00D00, 0xFEE00100, 0xFEE00500
    for start, target, allowed in (
        (xapic, x2apic, True),
        (xapic, disabled, True),
        (xapic, invalid, False),
        (x2apic, disabled, True),
        (x2apic, xapic, False),
        (x2apic, invalid, False),
        (disabled, xapic, True),
        (disabled, x2apic, False),
        (disabled, invalid, False),
    ):
        lapic = Board().lapic
        assert lapic.set_base(start, host_initiated=True)
        assert lapic.set_base(target) is allowed, (hex(start), hex(target))
        assert lapic.apic_base == (target if allowed else start)


def test_reserved_bits_of_the_base() -> None:
    lapic = Board().lapic
    for bit in (0, 7, 9, 48, 63):
        assert not lapic.set_base(lapic.apic_base | 1 << bit)
    lapic.cpuid_changed(x2apic=False, tsc_deadline=False, maxphyaddr=36)
    assert not lapic.set_base(lapic.apic_base | 1 << 10)
    assert not lapic.set_base(lapic.apic_base | 1 << 36)
    assert lapic.set_base(0x8_0000_0900)
    assert lapic.mmio_in_range(0x8_0000_0FF0)
    assert not lapic.mmio_in_range(0xFEE00000)


def test_disabled_apic_reads_all_ones_and_delivers_nothing(board: Board) -> None:
    version = read(board, VERSION)
    board.lapic.set_base(0xFEE00100)
    assert read(board, VERSION) == 0xFFFFFFFF
    assert board.lapic.mmio_read(VERSION, 1) == 0xFF
    assert board.lapic.accept_irq(FIXED, 0x40) == 0
    assert board.lapic.accept_pic_intr()  # the processor's INTR pin
    assert board.vcpus[0].calls[-2:] == ["base", "event"]
    board.lapic.set_cr8(3)
    assert board.lapic.cr8 == 3
    board.lapic.set_base(0xFEE00900)
    assert read(board, VERSION) == version


def test_page_is_a_hole_in_x2apic_mode_unless_the_quirk_is_off(board: Board) -> None:
    board.x2apic()
    assert board.lapic.mmio_in_range(0xFEE00030)
    assert read(board, VERSION) == 0xFFFFFFFF
    board.chips.apic_map.mmio_hole = False
    assert not board.lapic.mmio_in_range(0xFEE00030)


# Save and restore


def test_state_round_trip_keeps_interrupts_and_layout() -> None:
    board = Board()
    lapic = board.lapic
    lapic.accept_irq(FIXED, 0x61)
    lapic.get_interrupt()
    lapic.accept_irq(FIXED, 0x71, True, True)
    write(board, TPR, 0x12)
    write(board, LVT1, NMI)
    write(board, LDR, 0x02000000)
    state = lapic.get_state()
    assert len(state) == 0x400
    assert struct.unpack_from("<I", state, ISR + 0x30) == (1 << 1,)
    assert struct.unpack_from("<I", state, IRR + 0x30) == (1 << 0x11,)
    assert struct.unpack_from("<I", state, TMR + 0x30) == (1 << 0x11,)
    assert struct.unpack_from("<I", state, PPR) == (0x60,)
    other = Board()
    other.lapic.set_state(state)
    assert other.lapic.get_state() == state
    assert other.lapic.get_interrupt() == 0x71
    assert other.vcpus[0].calls[-1] == "event"


def test_x2apic_id_in_the_state_has_the_format_that_was_chosen() -> None:
    board = Board(2)
    board.x2apic()
    lapic = board.lapics[1]
    state = lapic.get_state()
    assert struct.unpack_from("<I", state, ID) == (1 << 24,)
    lapic.set_state(state)
    board.chips.apic_map.x2apic_format = True
    with pytest.raises(OSError, match="x2APIC ID") as error:
        lapic.set_state(state)
    assert error.value.errno == errno.EINVAL
    assert struct.unpack_from("<I", lapic.get_state(), ID) == (1,)


def test_any_state_is_survived(board: Board) -> None:
    board.lapic.set_state(b"\xff" * 0x400)
    for offset in range(0, 0x400, 16):
        assert 0 <= read(board, offset) <= 0xFFFFFFFF
    board.lapic.get_interrupt()
    board.lapic.eoi()
    board.clock.advance(10**9)
    board.lapic.inject_timer_irqs()
    with pytest.raises(OSError):
        board.lapic.set_state(b"short")


def test_split_irqchip_offers_directed_eoi() -> None:
    board = Board(split=True)
    assert read(board, VERSION) & 1 << 24
    write(board, SPIV, 0x11FF)
    assert board.lapic.eoi_broadcast_suppressed()
    assert not read(Board(), VERSION) & 1 << 24


def test_a_higher_task_priority_reaches_the_processor_before_its_next_instruction(board: Board) -> None:
    before = board.vcpus[0].count("event")
    write(board, TPR, 0xF0)
    assert board.vcpus[0].count("event") > before


def test_loaded_registers_keep_lint0_of_an_apic_that_is_off(board: Board) -> None:
    state = bytearray(board.lapic.get_state())
    state[0x350:0x354] = (0x700).to_bytes(4, "little")
    state[0xF1] &= ~1  # software disabled
    board.lapic.set_state(bytes(state))
    assert board.lapic.get_state()[0x350:0x354] == bytes(state[0x350:0x354])
