# SPDX-License-Identifier: Apache-2.0
"""A guest that looks at memory that is not there: what the host keeps of it is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import MIB, Tiny

from softkvm import abi

#: mov eax, [ebx]; add ebx, ecx; jmp
SCAN = b"\x8b\x03\x01\xcb\xeb\xfa"


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    tiny = Tiny().protected_mode()
    yield tiny
    tiny.close()


def _scan(tiny: Tiny, start: int, step: int, count: int) -> None:
    tiny.load(SCAN, rbx=start, rcx=step)
    for n in range(count):
        assert tiny.run() == abi.KVM_EXIT_MMIO
        assert tiny.vcpu.kvm_run.mmio.phys_addr == start + n * step
    tiny.vcpu.kvm_run.immediate_exit = 1  # complete the last one
    with pytest.raises(InterruptedError):
        tiny.run()
    tiny.vcpu.kvm_run.immediate_exit = 0


def test_a_scan_of_empty_address_space_takes_no_tables(tiny: Tiny) -> None:
    tiny.load(b"\xf4")
    tiny.run_to_halt()
    before = tiny.vm.mmu.tables
    _scan(tiny, 4 * MIB, 2 * MIB, 2000)
    _scan(tiny, 2 * MIB, 4096, 2000)
    assert tiny.vm.mmu.tables <= before + 1


def test_memory_is_found_after_a_scan_has_found_none(tiny: Tiny) -> None:
    _scan(tiny, 16 * MIB, 2 * MIB, 100)
    tiny.slot(1, 64 * MIB, MIB, tiny.memory.address)
    tiny.memory.write(DATA := 0x9000, b"\x2a\0\0\0")
    tiny.load(b"\x8b\x03\xf4", rbx=64 * MIB + DATA)
    assert tiny.run_to_halt().rax == 42
    _scan(tiny, 65 * MIB, 4096, 100)
    _scan(tiny, 16 * MIB, 2 * MIB, 24)
