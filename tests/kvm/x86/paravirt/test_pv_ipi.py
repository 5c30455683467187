# SPDX-License-Identifier: Apache-2.0
"""KVM_HC_SEND_IPI as the hypercall's document has it."""

from tests.support.interrupts import Board

from softkvm import abi
from softkvm.kvm.x86.paravirt.pv_ipi import pv_send_ipi

FIXED_EDGE = 0x41


def test_bits_count_from_the_lowest_id() -> None:
    board = Board(6)
    assert pv_send_ipi(board.chips.apic_map, 0b1011, 0, 2, FIXED_EDGE, op_64_bit=True) == 3
    assert [number for number, vector in enumerate(board.pending()) if vector == 0x41] == [2, 3, 5]


def test_second_word_follows_the_first_in_the_guests_width() -> None:
    for op_64_bit, first in ((True, 64), (False, 32)):
        board = Board(66)
        assert pv_send_ipi(board.chips.apic_map, 1 << 40, 0b11, 0, FIXED_EDGE, op_64_bit=op_64_bit) == 2 + op_64_bit
        expected = [40, first, first + 1] if op_64_bit else [first, first + 1]
        assert [number for number, vector in enumerate(board.pending()) if vector == 0x41] == expected


def test_nmi_and_absent_processors() -> None:
    board = Board(2)
    assert pv_send_ipi(board.chips.apic_map, 2**64 - 1, 2**64 - 1, 1, 0x400, op_64_bit=True) == 1
    assert board.vcpus[1].calls == ["nmi"]
    assert pv_send_ipi(board.chips.apic_map, 1, 0, 2**63, FIXED_EDGE, op_64_bit=True) == 0


def test_shorthand_or_logical_destination_is_an_error() -> None:
    board = Board(2)
    for icr in (1 << 11, 1 << 18, 3 << 18):
        assert pv_send_ipi(board.chips.apic_map, 1, 0, 0, icr, op_64_bit=True) == -abi.KVM_EINVAL
