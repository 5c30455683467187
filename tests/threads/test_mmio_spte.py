# SPDX-License-Identifier: Apache-2.0
"""Thread 4, MMIO SPTEs: what a guest finds where there is no memory, while slots come, go, and their generation wraps.

What an entry is made of: tests/kvm/x86/mmu/test_spte.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm import Params
from softkvm.kvm.x86.mmu.spte import MMIO_SPTE_GEN_MASK, SHADOW_MMIO_ACCESS_MASK, is_mmio_spte, mmio_spte_access

#: Where the guest looks, by page: no slot has these, or has them for a while.
HOLE, FAR_HOLE = 64 * MIB, 1 << 30


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny().protected_mode()
    yield machine
    machine.close()


def read(tiny: Tiny, gpa: int) -> int | None:
    """Have the guest read a byte: what it has found in memory, None if that was an exit for MMIO."""
    # mov al, [ebx]; hlt
    tiny.load(b"\x8a\x03\xf4", rbx=gpa, rax=0)
    if tiny.run() == abi.KVM_EXIT_MMIO:
        mmio = tiny.vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (gpa, 1, 0)
        mmio.data[0] = 0x5A
        assert tiny.run_to_halt().rax & 0xFF == 0x5A
        return None
    assert tiny.vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    return tiny.vcpu.get_regs().rax & 0xFF


def cached(tiny: Tiny, gpa: int) -> bool:
    return tiny.vm.mmu.lookup_mmio(gpa >> 12, tiny.vm.memslots.generation)


def test_the_generation_wraps_and_the_guest_finds_what_is_there(tiny: Tiny) -> None:
    memory = Memory(MIB)
    memory.write(0, b"\x77")
    assert read(tiny, HOLE) is None
    assert cached(tiny, HOLE)
    old = tiny.vm.memslots.generation
    # The generation before the last: two changes from here on the bits in entries begin again.
    tiny.vm.memslots.generation = MMIO_SPTE_GEN_MASK - 1
    assert not cached(tiny, HOLE), "an entry of another generation says nothing"
    assert read(tiny, FAR_HOLE) is None
    tiny.slot(1, 2 * HOLE, MIB, memory.address)
    assert tiny.vm.memslots.generation == MMIO_SPTE_GEN_MASK
    assert read(tiny, 2 * HOLE) == 0x77
    # Now it wraps. No entry is left that a generation to come could take for its own.
    tiny.slot(1, 2 * HOLE, 0, memory.address)
    assert not tiny.vm.memslots.generation & MMIO_SPTE_GEN_MASK
    for generation in (*range(old + 1), MMIO_SPTE_GEN_MASK - 1, MMIO_SPTE_GEN_MASK):
        for gpa in (HOLE, FAR_HOLE, 2 * HOLE):
            assert not tiny.vm.mmu.lookup_mmio(gpa >> 12, generation)
    for gpa in (HOLE, FAR_HOLE, 2 * HOLE):
        assert read(tiny, gpa) is None
        assert cached(tiny, gpa)
    # The hole becomes memory in the generation that its first entry was made under.
    while tiny.vm.memslots.generation & MMIO_SPTE_GEN_MASK != old - 1:
        tiny.slot(2, 3 * HOLE, MIB if tiny.vm.memslots.by_id(2) is None else 0, memory.address)
    tiny.slot(1, HOLE, MIB, memory.address)
    assert tiny.vm.memslots.generation & MMIO_SPTE_GEN_MASK == old
    assert read(tiny, HOLE) == 0x77
    assert read(tiny, FAR_HOLE) is None


def test_an_entry_says_what_the_access_may_be(tiny: Tiny) -> None:
    read(tiny, HOLE)
    spte, _ = tiny.vm.mmu.get_spte(HOLE >> 12)
    assert is_mmio_spte(spte)
    assert mmio_spte_access(spte) == SHADOW_MMIO_ACCESS_MASK, "the nested tables restrict nothing"


def test_mmio_is_not_cached_when_the_module_parameter_says_so() -> None:
    tiny = Tiny(params=Params(enable_mmio_caching=False)).protected_mode()
    assert read(tiny, HOLE) is None
    assert not cached(tiny, HOLE)
    tiny.close()
