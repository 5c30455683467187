# SPDX-License-Identifier: Apache-2.0
"""What is remembered by a key that the guest chooses has a limit, and is right beyond it."""

from __future__ import annotations

import logging

import pytest
from tests.support.interrupts import FakeClock
from tests.support.tiny import Tiny

from softkvm.kvm.irq.io_bus import _MEMO_ENTRIES, IoBus
from softkvm.kvm.x86 import msrs
from softkvm.kvm.x86.emulate.operands import _CACHE_ENTRIES, DecodeCache
from softkvm.kvm.x86.irqchip.apic_map import _CACHE_LIMIT, ApicMap


class Device:
    def io_read(self, address: int, size: int) -> int:
        return address

    def io_write(self, address: int, size: int, value: int) -> bool:
        return True


def test_a_bus_looks_up_any_address() -> None:
    bus = IoBus()
    bus.add(0x100, 1 << 20, Device())
    for address in range(_MEMO_ENTRIES + 500):
        expected = address if address >= 0x100 else None
        assert bus.read(address, 1) == expected
    assert len(bus.table.memo) == _MEMO_ENTRIES


def test_instructions_of_any_bytes_are_decoded() -> None:
    cache = DecodeCache()
    for immediate in range(_CACHE_ENTRIES + 500):
        assert cache.get(b"\xb8" + immediate.to_bytes(4, "little"), 32).length == 5  # mov eax, imm32
    assert len(cache._known) == 500


def test_interrupts_for_any_destination_are_sent() -> None:
    apics = ApicMap()
    for dest in range(_CACHE_LIMIT + 500):
        assert apics.destinations(dest, False, True) == ()
    assert len(apics._cache) <= _CACHE_LIMIT


def test_model_specific_registers_that_do_not_exist_are_not_kept() -> None:
    tiny = Tiny()
    vcpu = tiny.vcpu
    for index in (*range(0x4000), *range(0xC000_0000, 0xC000_4000), *range(0x4000_0000, 0x4000_0400)):
        msrs.set_msr(vcpu, index, 0, host=False)
    assert len(vcpu.msr_values) <= len(msrs.MSRS)
    tiny.close()


def test_a_guest_writes_at_most_ten_lines_in_five_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr("softkvm.kvm.state.time.monotonic", lambda: clock() / 1e9)
    tiny = Tiny()
    with caplog.at_level(logging.INFO, "softkvm"):
        for _ in range(1000):
            msrs.get_msr(tiny.vcpu, 0xDEAD, host=False)
        assert len(caplog.records) == 10
        clock.advance(5_100_000_000)
        msrs.get_msr(tiny.vcpu, 0xDEAD, host=False)
        assert len(caplog.records) == 11
    tiny.close()
