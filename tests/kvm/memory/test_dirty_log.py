# SPDX-License-Identifier: Apache-2.0
"""The dirty log (KVM API 4.8, 4.117): what the guest and KVM wrote, once each, whatever the leaf size."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.threads import until
from tests.support.tiny import MIB, Memory, Tiny

from softkvm import abi
from softkvm.kvm import Vm
from softkvm.kvm.memory import dirty_log, guest_memory
from softkvm.kvm.memory.guest_memory import cmpxchg_guest, write_guest

GPA = 16 * MIB
SIZE = 4 * MIB


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    machine = Tiny()
    machine.protected_mode()
    machine.extra = Memory(SIZE)  # type: ignore[attr-defined]
    machine.slot(1, GPA, SIZE, machine.extra.address)  # type: ignore[attr-defined]
    # store AL to EBX, EBX + EDX, ... ECX times: mov [ebx], al; add ebx, edx; loop; hlt
    machine.memory.write(0x1000, b"\x88\x03\x01\xd3\xe2\xfa\xf4")
    yield machine
    machine.close()


def _log(tiny: Tiny, flags: int) -> None:
    tiny.slot(1, GPA, SIZE, tiny.extra.address, flags)  # type: ignore[attr-defined]


def _store(tiny: Tiny, first: int, step: int, count: int) -> None:
    tiny.registers(rip=0x1000, rax=1, rbx=first, rcx=count, rdx=step, rflags=2)
    tiny.run_to_halt()


def _dirty(tiny: Tiny) -> set[int]:
    bits = int.from_bytes(tiny.vm.get_dirty_log(1), "little")
    return {n for n in range(bits.bit_length()) if bits >> n & 1}


def test_a_slot_that_is_not_logged_has_no_log(tiny: Tiny) -> None:
    with pytest.raises(OSError) as info:
        tiny.vm.get_dirty_log(1)
    assert info.value.errno == errno.ENOENT
    with pytest.raises(OSError) as info:
        tiny.vm.get_dirty_log(40000)
    assert info.value.errno == errno.EINVAL


def test_the_log_has_a_bit_per_page_in_whole_words(tiny: Tiny) -> None:
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert tiny.vm.get_dirty_log(1) == bytes(SIZE // 4096 // 8)


def test_exactly_the_pages_written_since_the_last_log_are_in_it(tiny: Tiny) -> None:
    _store(tiny, GPA, 4096, 3)  # before logging: large leaves, dirty
    assert tiny.vm.stats()["pages_2m"] >= 1
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert tiny.vm.stats()["pages_2m"] == 2  # the guest's own memory, and what is protected now
    assert _dirty(tiny) == set()
    _store(tiny, GPA + 5 * 4096, 7 * 4096, 4)
    assert tiny.vm.stats()["pages_2m"] == 1
    _store(tiny, GPA + 600 * 4096, 4096, 1)
    assert _dirty(tiny) == {5, 12, 19, 26, 600}
    assert _dirty(tiny) == set()
    _store(tiny, GPA + 12 * 4096, 4096, 1)
    assert _dirty(tiny) == {12}


def test_a_log_that_is_collected_in_several_pieces_is_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_log, "_BATCH_PAGES", 256)
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    written = (0, 255, 256, 511, 600, SIZE // 4096 - 1)
    for page in written:
        _store(tiny, GPA + page * 4096, 4096, 1)
    assert _dirty(tiny) == set(written)
    assert _dirty(tiny) == set()


def test_what_kvm_itself_writes_is_logged_too(tiny: Tiny) -> None:
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert write_guest(tiny.vm, GPA + 3 * 4096 - 2, b"1234")
    assert _dirty(tiny) == {2, 3}


def test_pages_first_touched_by_a_write_under_logging_are_dirty(tiny: Tiny) -> None:
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    _store(tiny, GPA + 100 * 4096, 4096, 50)
    assert _dirty(tiny) == set(range(100, 150))


def test_large_leaves_come_back_when_logging_ends(tiny: Tiny) -> None:
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    _store(tiny, GPA, 4096, 20)
    _log(tiny, 0)
    until(tiny.vm.collapser.idle)
    _store(tiny, GPA, 4096, 20)
    assert tiny.vm.stats()["pages_2m"] == 2
    with pytest.raises(OSError):
        tiny.vm.get_dirty_log(1)


def test_manual_protect_keeps_bits_until_they_are_cleared(tiny: Tiny) -> None:
    tiny.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    _store(tiny, GPA, 4096, 2)
    _store(tiny, GPA + 64 * 4096, 4096, 2)
    assert _dirty(tiny) == {0, 1, 64, 65}
    assert _dirty(tiny) == {0, 1, 64, 65}
    tiny.vm.clear_dirty_log(1, 64, 64, (0b01).to_bytes(8, "little"))
    assert _dirty(tiny) == {0, 1, 65}
    with pytest.raises(OSError) as info:
        tiny.vm.clear_dirty_log(1, 63, 64, bytes(8))
    assert info.value.errno == errno.EINVAL


def test_initially_set_reports_every_page_once(tiny: Tiny) -> None:
    tiny.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3)
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert len(_dirty(tiny)) == SIZE // 4096


@pytest.mark.parametrize("write", [write_guest, lambda vm, gpa, data: cmpxchg_guest(vm, gpa, bytes(len(data)), data)])
def test_a_write_of_kvms_is_logged_although_logging_began_while_it_was_on_its_way(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, write: Callable[[Vm, int, bytes], object]
) -> None:
    reachable = guest_memory._reachable

    def late(*args: Any, **options: Any) -> bool:
        _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)  # the slot has been looked up, and is now another
        assert _dirty(tiny) == set()
        return reachable(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(guest_memory, "_reachable", late)
        assert write(tiny.vm, GPA + 7 * 4096, b"abcd")
    assert _dirty(tiny) == {7}


def test_pages_marked_through_a_replaced_slot_are_marked_under_the_lock_of_its_successor(tiny: Tiny) -> None:
    _log(tiny, abi.KVM_MEM_LOG_DIRTY_PAGES)
    old = tiny.vm.memslots.by_id(1)
    tiny.slot(1, GPA + SIZE, SIZE, tiny.extra.address, abi.KVM_MEM_LOG_DIRTY_PAGES)  # type: ignore[attr-defined]
    new = tiny.vm.memslots.by_id(1)
    assert old is not None and new is not None and old is not new
    assert new.dirty_bitmap is old.dirty_bitmap and new._dirty_lock is old._dirty_lock
