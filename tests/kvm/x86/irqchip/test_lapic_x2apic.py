# SPDX-License-Identifier: Apache-2.0
"""x2APIC mode: which MSRs there are, who may do what with them, and the 64-bit ICR (SDM vol. 3, 11.12)."""

import pytest
from tests.support.interrupts import Board

ASSERT = 1 << 14


@pytest.fixture
def board() -> Board:
    board = Board(2)
    board.x2apic()
    return board


def test_no_register_exists_outside_of_x2apic_mode() -> None:
    lapic = Board().lapic
    assert lapic.msr_read(0x802) is None
    assert not lapic.msr_write(0x808, 0)


# SDM table 11-6
READ_ONLY = {0x802, 0x803, 0x80A, 0x80D, 0x839, *range(0x810, 0x828)}
READ_WRITE = {0x808, 0x80F, 0x828, 0x830, *range(0x832, 0x839), 0x83E}
WRITE_ONLY = {0x80B, 0x83F}


def test_which_registers_exist(board: Board) -> None:
    lapic = board.lapic
    readable = {index for index in range(0x800, 0x900) if lapic.msr_read(index) is not None}
    assert readable == READ_ONLY | READ_WRITE
    writable = {index for index in range(0x800, 0x900) if lapic.msr_write(index, 0 if index != 0x830 else 0x4020)}
    assert writable == READ_WRITE | WRITE_ONLY


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x808, 0x100),
        (0x80B, 1),
        (0x80F, 0x400),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x837, 1 << 15),
        (0x83E, 1 << 2),
        (0x83F, 0x100),
    ],
)
def test_reserved_bits_fault_and_change_nothing(board: Board, index: int, value: int) -> None:
    before = board.lapic.get_state()
    assert not board.lapic.msr_write(index, value)
    assert board.lapic.get_state() == before


@pytest.mark.parametrize("index", sorted((READ_WRITE | WRITE_ONLY) - {0x830}))
def test_high_half_is_reserved_but_in_the_icr(board: Board, index: int) -> None:
    assert not board.lapic.msr_write(index, 1 << 32)


def test_id_and_logical_id_follow_from_the_vcpu(board: Board) -> None:
    board = Board(20)
    board.x2apic()
    assert board.lapics[19].msr_read(0x802) == 19
    assert board.lapics[19].msr_read(0x80D) == 1 << 16 | 1 << 3


def test_icr_is_one_64_bit_register(board: Board) -> None:
    assert board.lapic.msr_write(0x830, 1 << 32 | ASSERT | 0x41)
    assert board.lapic.msr_read(0x830) == 1 << 32 | ASSERT | 0x41
    assert board.pending() == [-1, 0x41]


def test_icr_broadcast_is_all_32_bits(board: Board) -> None:
    assert board.lapic.msr_write(0x830, 0xFF << 32 | ASSERT | 0x41)
    assert board.pending() == [-1, -1]
    assert board.lapic.msr_write(0x830, 0xFFFFFFFF << 32 | ASSERT | 0x42)
    assert board.pending() == [0x42, 0x42]


def test_logical_destination_is_cluster_and_member() -> None:
    board = Board(18)
    board.x2apic()
    logical = 1 << 11
    assert board.lapic.msr_write(0x830, 0x0001_0003 << 32 | logical | ASSERT | 0x41)
    assert [number for number, vector in enumerate(board.pending()) if vector == 0x41] == [16, 17]


def test_self_ipi(board: Board) -> None:
    assert board.lapic.msr_write(0x83F, 0x55)
    assert board.pending() == [0x55, -1]
    assert board.lapic.msr_write(0x83F, 0x05)
    assert board.lapic.msr_write(0x828, 0)
    assert board.lapic.msr_read(0x828) == 1 << 5 | 1 << 6


def test_eoi(board: Board) -> None:
    board.lapic.msr_write(0x83F, 0x55)
    board.lapic.get_interrupt()
    assert board.lapic.msr_read(0x812) == 1 << 21
    assert board.lapic.msr_write(0x80B, 0)
    assert board.lapic.msr_read(0x812) == 0


def test_read_only_bits_of_an_lvt_entry_may_be_written(board: Board) -> None:
    assert board.lapic.msr_write(0x835, 1 << 12 | 1 << 14 | 0x10700)
    assert board.lapic.msr_read(0x835) == 0x10700


def test_tsc_deadline_mode_needs_its_cpuid_bit(board: Board) -> None:
    assert board.lapic.msr_write(0x832, 2 << 17 | 0x40)
    board.lapic.cpuid_changed(x2apic=True, tsc_deadline=False, maxphyaddr=48)
    assert not board.lapic.msr_write(0x832, 2 << 17 | 0x40)
