# SPDX-License-Identifier: Apache-2.0
"""Guests whose memory gets large leaves where it had small ones: with the next fault, and nothing is lost."""

from __future__ import annotations

import ctypes
import mmap

import pytest
from tests.support.threads import running, until
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm.memory.collapse import Collapser

PAGE = 4096
GPA = 64 * MIB
SIZE = 2 * MIB
_libc = ctypes.CDLL(None)


def _leaves(tiny: Tiny) -> tuple[int, int]:
    """Leaves of slot 1: small and large ones. Slot 0 has one large."""
    stats = tiny.vm.stats()
    return stats["pages_4k"], stats["pages_2m"] - 1


def _store(tiny: Tiny, page: int, value: int) -> None:
    tiny.load(b"\x88\x03\xf4", rbx=GPA + page * PAGE, rax=value)  # mov [ebx], al; hlt
    tiny.run_to_halt()


@pytest.fixture
def _no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up small leaves beside the vCPUs."""
    monkeypatch.setattr(Collapser, "note", lambda self, slot: None)


@pytest.mark.usefixtures("_no_collapse")
def test_after_the_dirty_log_a_fault_in_a_small_table_makes_it_one_leaf() -> None:
    tiny, memory = Tiny().protected_mode(), Memory(SIZE)
    tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    for page in (1, 2, 100):
        _store(tiny, page, page)
    small = _leaves(tiny)
    assert small[0] >= 3 and small[1] == 0
    tables = tiny.vm.stats()["mmu_shadow_pages"]
    tiny.slot(1, GPA, SIZE, memory.address)
    _store(tiny, 1, 7)
    assert _leaves(tiny) == small, "its leaf is there"
    _store(tiny, 300, 9)
    assert _leaves(tiny) == (0, 1)
    assert tiny.vm.stats()["mmu_shadow_pages"] == tables - 1
    assert [memory.read(page * PAGE, 1)[0] for page in (1, 2, 100, 300)] == [7, 2, 100, 9]
    tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    _store(tiny, 5, 5)
    assert tiny.vm.get_dirty_log(1)[:8] == (1 << 5).to_bytes(8, "little"), "what was written before is no news"
    tiny.close()


def test_memory_that_can_be_reached_by_and_by_is_one_leaf_in_the_end() -> None:
    tiny, memory = Tiny().protected_mode(), Memory(SIZE)
    half = ctypes.c_void_p(memory.address + SIZE // 2), ctypes.c_size_t(SIZE // 2)
    assert _libc.mprotect(*half, 0) == 0
    tiny.slot(1, GPA, SIZE, memory.address)
    _store(tiny, 3, 3)
    small, large = _leaves(tiny)
    assert small >= 1 and large == 0
    assert _libc.mprotect(*half, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    _store(tiny, 400, 4)
    assert _leaves(tiny) == (0, 1)
    assert (memory.read(3 * PAGE, 1), memory.read(400 * PAGE, 1)) == (b"\3", b"\4")
    tiny.close()


@pytest.mark.usefixtures("_no_collapse")
def test_another_processor_goes_on_in_the_table_that_is_given_up() -> None:
    """It adds to a page by the small leaf all the time; none of its additions is lost."""
    tiny, memory = Tiny(vcpus=2).protected_mode(), Memory(SIZE)
    other = tiny.vcpus[1]
    other.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
    other.set_sregs(tiny.vcpu.get_sregs())
    tiny.memory.write(0x2000, bytes.fromhex("ff03 41 ebfb"))  # inc dword [ebx]; inc ecx; jmp back
    regs = tiny.vcpu.get_regs()
    regs.rip, regs.rbx, regs.rcx = 0x2000, GPA + 8 * PAGE, 0
    other.set_regs(regs)
    tiny.slot(1, GPA, SIZE, memory.address)

    def adds_to(before: bytes) -> None:
        until(lambda: memory.read(8 * PAGE, 4) != before)

    with running(other) as run:
        for _ in range(20):
            tiny.slot(1, GPA, SIZE, memory.address, abi.KVM_MEM_LOG_DIRTY_PAGES)
            before = memory.read(8 * PAGE, 4)
            adds_to(before)
            tiny.slot(1, GPA, SIZE, memory.address)
            before = memory.read(8 * PAGE, 4)
            tiny.vm.zap_gfn_range((GPA >> 12) + 300, 1)
            _store(tiny, 300, 1)
            assert _leaves(tiny) == (0, 1)
            adds_to(before)
        other.kick()
        run.wait()
    done = other.get_regs()
    added = int.from_bytes(memory.read(8 * PAGE, 4), "little")
    assert added - (done.rcx & 0xFFFF_FFFF) & 0xFFFF_FFFF == (done.rip == 0x2002)
    tiny.close()
