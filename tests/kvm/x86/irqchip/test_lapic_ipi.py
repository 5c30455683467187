# SPDX-License-Identifier: Apache-2.0
"""Destinations: physical, logical flat and cluster, shorthands, lowest priority (SDM vol. 3, 11.6)."""

import threading

import pytest
from tests.support.interrupts import Board
from tests.support.threads import beside

from softkvm.kvm.x86.irqchip.seams import IRQ_IGNORED, LapicIrq

ID, LDR, DFR, SPIV, ICR, ICR2 = 0x20, 0xD0, 0xE0, 0xF0, 0x300, 0x310
LOWEST, NMI = 1 << 8, 4 << 8
LOGICAL, ASSERT, BUSY, LEVEL = 1 << 11, 1 << 14, 1 << 12, 1 << 15
SELF, ALL, ALL_BUT_SELF = 1 << 18, 2 << 18, 3 << 18


def ipi(board: Board, icr: int, dest: int = 0, cpu: int = 0) -> None:
    board.lapics[cpu].mmio_write(ICR2, 4, dest << 24)
    board.lapics[cpu].mmio_write(ICR, 4, icr | ASSERT)


def receivers(board: Board, vector: int) -> list[int]:
    found = []
    for number, lapic in enumerate(board.lapics):
        if lapic.highest_irr() == vector:
            found.append(number)
            lapic.get_interrupt()
            lapic.eoi()
    return found


@pytest.fixture
def board() -> Board:
    return Board(4)


def test_physical_destination(board: Board) -> None:
    ipi(board, 0x40, dest=2)
    assert receivers(board, 0x40) == [2]
    ipi(board, 0x40, dest=9)
    assert receivers(board, 0x40) == []


def test_physical_broadcast_includes_the_sender(board: Board) -> None:
    ipi(board, 0x40, dest=0xFF, cpu=1)
    assert receivers(board, 0x40) == [0, 1, 2, 3]


def test_shorthands(board: Board) -> None:
    for shorthand, expected in ((SELF, [2]), (ALL, [0, 1, 2, 3]), (ALL_BUT_SELF, [0, 1, 3])):
        ipi(board, shorthand | 0x40, dest=0, cpu=2)
        assert receivers(board, 0x40) == expected


def test_changed_id_is_found_and_the_old_one_is_not(board: Board) -> None:
    ipi(board, 0x40, dest=3)
    assert receivers(board, 0x40) == [3]
    board.lapics[3].mmio_write(ID, 4, 7 << 24)
    ipi(board, 0x40, dest=3)
    assert receivers(board, 0x40) == []
    ipi(board, 0x40, dest=7)
    assert receivers(board, 0x40) == [3]


def test_logical_flat(board: Board) -> None:
    for number, lapic in enumerate(board.lapics):
        lapic.mmio_write(LDR, 4, 1 << number + 24)
    ipi(board, LOGICAL | 0x40, dest=0b1010)
    assert receivers(board, 0x40) == [1, 3]
    ipi(board, LOGICAL | 0x40, dest=0xFF)
    assert receivers(board, 0x40) == [0, 1, 2, 3]
    ipi(board, LOGICAL | 0x40, dest=0)
    assert receivers(board, 0x40) == []


def test_logical_cluster(board: Board) -> None:
    for number, lapic in enumerate(board.lapics):
        lapic.mmio_write(DFR, 4, 0)
        lapic.mmio_write(LDR, 4, (number // 2 << 4 | 1 << number % 2) << 24)
    ipi(board, LOGICAL | 0x40, dest=0x13)
    assert receivers(board, 0x40) == [2, 3]
    ipi(board, LOGICAL | 0x40, dest=0x02)
    assert receivers(board, 0x40) == [1]
    ipi(board, LOGICAL | 0x40, dest=0xFF)
    assert receivers(board, 0x40) == [0, 1, 2, 3]


def test_disabled_apic_is_not_there(board: Board) -> None:
    board.lapics[1].set_base(0xFEE00000)
    ipi(board, 0x40, dest=0xFF)
    assert receivers(board, 0x40) == [0, 2, 3]


def test_lowest_priority_chooses_one(board: Board) -> None:
    for number, lapic in enumerate(board.lapics):
        lapic.mmio_write(LDR, 4, 1 << number + 24)
    board.lapics[2].mmio_write(SPIV, 4, 0xFF)  # software-disabled: doesn't take part
    chosen = set()
    for vector in range(0x40, 0x50):
        ipi(board, LOWEST | LOGICAL | vector, dest=0b1110)
        found = receivers(board, vector)
        assert len(found) == 1
        chosen.update(found)
    assert chosen == {1, 3}


def test_lowest_priority_without_hashing_goes_round(board: Board) -> None:
    board.chips.apic_map.vector_hashing = False
    chosen = []
    for _ in range(8):
        ipi(board, LOWEST | 0x40, dest=0xFF)
        chosen += receivers(board, 0x40)
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_nmi_by_ipi(board: Board) -> None:
    ipi(board, NMI, dest=1)
    ipi(board, NMI | ALL_BUT_SELF)
    assert [vcpu.count("nmi") for vcpu in board.vcpus] == [0, 2, 1, 1]


def test_icr_is_never_busy(board: Board) -> None:
    board.lapic.mmio_write(ICR, 4, BUSY | ASSERT | SELF | 0x40)
    assert board.lapic.mmio_read(ICR, 4) == ASSERT | SELF | 0x40


def test_device_broadcast_reaches_x2apics(board: Board) -> None:
    board.x2apic()
    message = LapicIrq(vector=0x40, dest=0xFF)
    assert board.chips.apic_map.deliver(message) == 4
    board.chips.apic_map.x2apic_broadcast_quirk_disabled = True
    board.chips.apic_map.changed()
    assert board.chips.apic_map.deliver(message) == IRQ_IGNORED


def test_destinations_remembered_are_bounded(board: Board) -> None:
    board.x2apic()
    for dest in range(20_000):
        board.lapic.msr_write(0x830, dest << 32 | ASSERT | 0x40)
    assert len(board.chips.apic_map._cache) <= 4096
    assert board.pending() == [0x40] * 4


def test_interrupts_from_many_threads_are_not_lost() -> None:
    board = Board(2)
    lapic = board.lapics[1]
    seen: set[int] = set()
    vectors = range(0x20, 0xA0)
    done = threading.Event()

    def send(part: int) -> None:
        for vector in vectors[part::4]:
            lapic.accept_irq(0, vector)

    def take() -> None:
        while not (done.is_set() and lapic.highest_irr() < 0):
            vector = lapic.get_interrupt()
            if vector >= 0:
                seen.add(vector)
                lapic.eoi()

    taker = threading.Thread(target=take)
    senders = [threading.Thread(target=send, args=(part,)) for part in range(4)]
    with beside(taker):
        try:
            with beside(*senders):
                pass
        finally:
            done.set()
    assert seen == set(vectors)
