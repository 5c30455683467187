# SPDX-License-Identifier: Apache-2.0
"""The dirty log (KVM API 4.8 KVM_GET_DIRTY_LOG, 4.117 KVM_CLEAR_DIRTY_LOG, 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""

import errno

import pytest
from tests.support.conformance import MEMORY_SIZE, PAGE, Guest, refused

from softkvm import abi

PAGES = MEMORY_SIZE // PAGE
LOG = abi.KVM_MEM_LOG_DIRTY_PAGES
#: A slot behind the guest's memory whose size is no multiple of 64 pages.
ODD_SLOT, ODD_GPA, ODD_PAGES = 1, 0x20_0000, 130
WORD = 64


def bits(log: bytes) -> set[int]:
    value = int.from_bytes(log, "little")
    return {n for n in range(len(log) * 8) if value >> n & 1}


def test_the_log_of_a_slot_that_has_none_is_enoent(guest: Guest) -> None:
    refused(errno.ENOENT, lambda: guest.vm.get_dirty_log(0))
    refused(errno.ENOENT, lambda: guest.vm.get_dirty_log(5))


def test_the_log_of_an_impossible_slot_is_einval(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: guest.vm.get_dirty_log(0x7FFF))
    refused(errno.EINVAL, lambda: guest.vm.get_dirty_log(7 << 16))


def test_the_log_names_each_written_page_once(guest: Guest) -> None:
    guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    # mov byte [0x3000], 1; mov byte [0x5fff], 1; hlt; mov byte [0x4000], 1; mov al, [0x6000]; hlt
    guest.real("c606003001 c606ff5f01 f4 c606004001 a00060 f4")
    assert guest.vm.get_dirty_log(0) == bytes(MEMORY_SIZE // PAGE // 8)
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {3, 5}
    assert bits(guest.vm.get_dirty_log(0)) == set()
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {4}


def test_a_page_dirtied_again_is_logged_again(guest: Guest) -> None:
    guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.real("fe060030 f4 ebf9")  # 1: inc byte [0x3000]; hlt; jmp 1b
    for _ in range(3):
        guest.expect(abi.KVM_EXIT_HLT)
        assert bits(guest.vm.get_dirty_log(0)) == {3}
    assert guest.memory[0x3000] == 3


def test_the_log_is_in_whole_words(guest: Guest) -> None:
    guest.region(1, 0x20_0000, 3 * PAGE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert guest.vm.get_dirty_log(1) == bytes(8)
    guest.region(2, 0x30_0000, 65 * PAGE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert guest.vm.get_dirty_log(2) == bytes(16)


def test_turning_the_log_off_ends_it(guest: Guest) -> None:
    guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.real("fe060030 f4 ebf9")  # 1: inc byte [0x3000]; hlt; jmp 1b
    guest.expect(abi.KVM_EXIT_HLT)
    guest.region(0, 0, MEMORY_SIZE)
    refused(errno.ENOENT, lambda: guest.vm.get_dirty_log(0))
    guest.expect(abi.KVM_EXIT_HLT)
    guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert bits(guest.vm.get_dirty_log(0)) == set()
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {3}


def test_a_string_input_dirties_its_page(guest: Guest) -> None:
    guest.region(0, 0, MEMORY_SIZE, flags=abi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.real("bf0070 ba3412 6c f4")  # mov di, 0x7000; mov dx, 0x1234; insb; hlt
    guest.vm.get_dirty_log(0)
    guest.expect(abi.KVM_EXIT_IO)
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {7}


# --- cleared by hand -------------------------------------------------------------------------------


def manual(guest: Guest, options: int = abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) -> None:
    """Let bits stay until KVM_CLEAR_DIRTY_LOG, and log all of the guest's memory."""
    if guest.vm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & options != options:
        pytest.skip("this KVM does not have these options of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    guest.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, options)
    guest.region(0, 0, MEMORY_SIZE, flags=LOG)


def mask(*pages: int, of: int = PAGES) -> bytes:
    """Return a bitmap of *of* pages with the bits of *pages*."""
    return sum(1 << page for page in pages).to_bytes((of + 63) // 64 * 8, "little")


def clear(guest: Guest, bitmap: bytes, *, slot: int = 0, first_page: int = 0, num_pages: int = PAGES) -> None:
    """KVM_CLEAR_DIRTY_LOG."""
    guest.vm.clear_dirty_log(slot, first_page, num_pages, bitmap)


@pytest.mark.parametrize("options", [2, 4, 5, 1 << 40])
def test_unknown_options_are_einval(guest: Guest, options: int) -> None:
    refused(errno.EINVAL, lambda: guest.vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, options))


def test_bits_stay_until_they_are_cleared(guest: Guest) -> None:
    manual(guest)
    guest.real("fe060030 fe060050 f4")  # inc byte [0x3000]; inc byte [0x5000]; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {3, 5}
    assert bits(guest.vm.get_dirty_log(0)) == {3, 5}
    clear(guest, mask(3))
    assert bits(guest.vm.get_dirty_log(0)) == {5}
    clear(guest, mask(5, 9))  # a page that was clean stays so
    assert bits(guest.vm.get_dirty_log(0)) == set()


def test_a_page_written_after_its_clearing_is_logged_again(guest: Guest) -> None:
    manual(guest)
    guest.real("fe060030 f4 ebf9")  # 1: inc byte [0x3000]; hlt; jmp 1b
    for _ in range(3):
        guest.expect(abi.KVM_EXIT_HLT)
        assert bits(guest.vm.get_dirty_log(0)) == {3}
        clear(guest, mask(3))
        assert bits(guest.vm.get_dirty_log(0)) == set()


def test_only_the_named_range_is_cleared(guest: Guest) -> None:
    manual(guest)
    # mov ax, 0x4000; mov ds, ax; inc byte [0]; inc byte [0x1000]; mov ax, 0x8000; mov ds, ax; inc byte [0]; hlt
    guest.real("b80040 8ed8 fe060000 fe060010 b80080 8ed8 fe060000 f4")
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {64, 65, 128}
    clear(guest, mask(0, of=WORD), first_page=64, num_pages=64)  # bit 0 is the first page of the range
    assert bits(guest.vm.get_dirty_log(0)) == {65, 128}
    clear(guest, mask(*range(128), of=128), first_page=0, num_pages=128)
    assert bits(guest.vm.get_dirty_log(0)) == {128}
    clear(guest, mask(*range(128), of=128), first_page=128, num_pages=128)  # up to the slot's end
    assert bits(guest.vm.get_dirty_log(0)) == set()


def test_the_log_may_be_cleared_without_the_capability(guest: Guest) -> None:
    guest.region(0, 0, MEMORY_SIZE, flags=LOG)
    guest.real("fe060030 fe060050 f4")  # inc byte [0x3000]; inc byte [0x5000]; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    clear(guest, mask(3))
    assert bits(guest.vm.get_dirty_log(0)) == {5}
    assert bits(guest.vm.get_dirty_log(0)) == set()


def test_all_pages_may_start_dirty(guest: Guest) -> None:
    manual(guest, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.KVM_DIRTY_LOG_INITIALLY_SET)
    assert bits(guest.vm.get_dirty_log(0)) == set(range(PAGES))
    clear(guest, mask(*range(PAGES)))
    assert bits(guest.vm.get_dirty_log(0)) == set()
    guest.real("fe060030 f4")  # inc byte [0x3000]; hlt
    guest.expect(abi.KVM_EXIT_HLT)
    assert bits(guest.vm.get_dirty_log(0)) == {3}


@pytest.mark.parametrize(
    ("first_page", "num_pages"),
    [
        (1, 64),
        (63, 64),
        (32, ODD_PAGES - 32),
        (0, 63),
        (0, 65),
        (64, 65),
        (0, ODD_PAGES + 1),
        (0, 192),
        (64, 128),
        (128, 64),
        (192, 0),
        (192, 64),
        (1 << 40, 64),
    ],
)
def test_ranges_that_are_not_whole_words_of_the_slot_are_einval(guest: Guest, first_page: int, num_pages: int) -> None:
    manual(guest)
    guest.region(ODD_SLOT, ODD_GPA, ODD_PAGES * PAGE, flags=LOG)
    bitmap = bytes(192 // 8)
    refused(errno.EINVAL, lambda: clear(guest, bitmap, slot=ODD_SLOT, first_page=first_page, num_pages=num_pages))


@pytest.mark.parametrize(("first_page", "num_pages"), [(0, ODD_PAGES), (0, 0), (0, 128), (64, 64), (64, 66), (128, 2)])
def test_ranges_of_whole_words_or_up_to_the_end_are_taken(guest: Guest, first_page: int, num_pages: int) -> None:
    manual(guest, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.KVM_DIRTY_LOG_INITIALLY_SET)
    guest.region(ODD_SLOT, ODD_GPA, ODD_PAGES * PAGE, flags=LOG)
    clear(guest, b"\xff" * 24, slot=ODD_SLOT, first_page=first_page, num_pages=num_pages)
    cleared = set(range(first_page, first_page + num_pages))
    logged = {page for page in bits(guest.vm.get_dirty_log(ODD_SLOT)) if page < ODD_PAGES}
    assert logged == set(range(ODD_PAGES)) - cleared


def test_clearing_a_slot_without_a_log_is_enoent(guest: Guest) -> None:
    refused(errno.ENOENT, lambda: clear(guest, mask()))
    refused(errno.ENOENT, lambda: clear(guest, mask(), slot=5))
    refused(errno.EINVAL, lambda: clear(guest, mask(), first_page=1))  # looked at before the slot is


def test_clearing_an_impossible_slot_is_einval(guest: Guest) -> None:
    refused(errno.EINVAL, lambda: clear(guest, mask(), slot=0x7FFF))
    refused(errno.EINVAL, lambda: clear(guest, mask(), slot=7 << 16))


def test_a_bitmap_shorter_than_the_range_is_efault(guest: Guest) -> None:
    manual(guest)
    refused(errno.EFAULT, lambda: clear(guest, bytes(PAGES // 8 - 1)))
