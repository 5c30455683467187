# SPDX-License-Identifier: Apache-2.0
"""Paravirtual EOI as Documentation/virt/kvm/x86/msr.rst has it."""

import pytest
from tests.support.interrupts import Board

from softkvm.kvm.x86.paravirt.pv_eoi import PvEoi

GPA = 0x1000


class PvEoiBench(Board):
    """A guest with 8 KiB of memory and an interrupt in service."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(0x2000)
        self.pv_eoi = PvEoi(self.lapic, self._read, self._write)
        assert self.pv_eoi.set_msr(GPA | 1)
        self.lapic.accept_irq(0, 0x41)
        assert self.lapic.get_interrupt() == 0x41

    def _read(self, gpa: int, size: int) -> bytes | None:
        return bytes(self.memory[gpa : gpa + size]) if gpa + size <= len(self.memory) else None

    def _write(self, gpa: int, data: bytes) -> bool:
        if gpa + len(data) > len(self.memory):
            return False
        self.memory[gpa : gpa + len(data)] = data
        return True


@pytest.fixture
def bench() -> PvEoiBench:
    return PvEoiBench()


def test_cleared_bit_is_an_eoi(bench: PvEoiBench) -> None:
    bench.pv_eoi.sync_to_guest()
    assert bench.memory[GPA] == 1
    bench.memory[GPA] = 0
    bench.pv_eoi.sync_from_guest()
    assert bench.lapic.isr == 0
    assert bench.lapic.ppr == 0


def test_uncleared_bit_is_withdrawn(bench: PvEoiBench) -> None:
    bench.pv_eoi.sync_to_guest()
    bench.pv_eoi.sync_from_guest()
    assert bench.memory[GPA] == 0
    assert bench.lapic.isr
    bench.pv_eoi.sync_from_guest()
    assert bench.lapic.isr


def test_not_offered_with_another_interrupt_requested(bench: PvEoiBench) -> None:
    bench.lapic.accept_irq(0, 0x31)
    bench.pv_eoi.sync_to_guest()
    assert bench.memory[GPA] == 0


def test_not_offered_for_a_vector_of_the_ioapic(bench: PvEoiBench) -> None:
    ioapic = bench.chips.ioapic
    assert ioapic is not None
    ioapic.io_write(0, 4, 0x10)
    ioapic.io_write(0x10, 4, 0x41)
    bench.pv_eoi.sync_to_guest()
    assert bench.memory[GPA] == 0


def test_not_offered_without_service_or_when_disabled(bench: PvEoiBench) -> None:
    assert bench.pv_eoi.set_msr(GPA)
    bench.pv_eoi.sync_to_guest()
    assert bench.memory[GPA] == 0
    assert bench.pv_eoi.set_msr(GPA | 1)
    bench.lapic.eoi()
    bench.pv_eoi.sync_to_guest()
    assert bench.memory[GPA] == 0


def test_address_must_be_aligned_and_have_memory(bench: PvEoiBench) -> None:
    assert not bench.pv_eoi.set_msr(GPA | 2 | 1)
    assert not bench.pv_eoi.set_msr(0xFFFF_FFFF_FFFF_FFF0 | 1)
    assert bench.pv_eoi.msr == GPA | 1
    assert bench.pv_eoi.set_msr(0xFFFF_FFFF_FFFF_FFF0)  # not enabled
