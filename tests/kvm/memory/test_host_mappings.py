# SPDX-License-Identifier: Apache-2.0
"""What the process can reach, by /proc/self/maps."""

import ctypes
import errno
import mmap
import random
import sys
import threading

import pytest

from softkvm.kvm.memory import host_mappings
from softkvm.kvm.memory.host_mappings import _MOST_KNOWN, NO_ACCESS, READ, READ_WRITE, HostMappings, _query

PAGE = 4096


def test_access_follows_the_mappings_when_asked_for_more_than_is_known() -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mappings = HostMappings()
    assert mappings.access(address, 4 * PAGE) == READ_WRITE

    libc = ctypes.CDLL(None)

    def protect(page: int, protection: int) -> None:
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), protection) == 0

    protect(1, mmap.PROT_READ)
    protect(2, 0)
    assert mappings.access(address, PAGE) == READ_WRITE
    mappings.forget()
    assert mappings.access(address, 2 * PAGE) == READ
    assert mappings.access(address, 3 * PAGE) == NO_ACCESS
    assert mappings.access(address + 3 * PAGE, PAGE) == READ_WRITE
    protect(1, 3)
    assert mappings.access(address, 2 * PAGE, READ) == READ, "believed"
    assert mappings.access(address, 2 * PAGE) == READ_WRITE, "looked up again"
    protect(2, 3)


def test_ranges_may_span_neighbouring_mappings_and_end_anywhere() -> None:
    mappings = HostMappings()
    mappings._map = [0x1000, 0x3000, 0x6000], [0x3000, 0x5000, 0x7000], [2, 2, 2]
    assert mappings.access(0x2000, 0x2000) == READ_WRITE
    assert mappings.access(0x6000, 0x1000) == READ_WRITE
    assert mappings.access(0x4000, 0x3000) == NO_ACCESS  # a hole, and the real mappings are not there either


def test_vcpus_may_ask_while_a_memory_slot_changes() -> None:
    memory = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mappings = HostMappings()
    found: list[int | Exception] = []

    def ask() -> None:
        for _ in range(300):
            try:
                found.append(mappings.access(address, PAGE))
            except IndexError as error:
                found.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            mappings.forget()
    finally:
        sys.setswitchinterval(interval)
    assert found == [READ_WRITE] * 600


@pytest.fixture(params=[0, errno.ENOTTY, errno.EPERM, errno.ENOSYS], ids=["asked", "older", "refused", "unknown"])
def _host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that tell of the mapping at an address, and those of which all mappings have to be read."""
    if request.param:

        def refuse(maps: int, address: int) -> None:
            raise OSError(request.param, "as before Linux 6.11, or by a seccomp filter")

        monkeypatch.setattr(host_mappings, "_query", refuse)


@pytest.mark.usefixtures("_host")
def test_what_is_told_of_pages_that_change_is_what_their_mappings_say() -> None:
    rng = random.Random(5)
    pages = 64
    memory = mmap.mmap(-1, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    mappings = HostMappings()
    accesses = {NO_ACCESS: 0, READ: mmap.PROT_READ, READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE}
    now = [READ_WRITE] * pages
    for _ in range(300):
        first = rng.randrange(pages)
        end = rng.randrange(first, pages) + 1
        access = rng.choice(list(accesses))
        assert libc.mprotect(ctypes.c_void_p(address + first * PAGE), (end - first) * PAGE, accesses[access]) == 0
        now[first:end] = [access] * (end - first)
        first = rng.randrange(pages)
        end = rng.randrange(first, pages) + 1
        mappings.forget()  # as who changes what is there has KVM told
        wanted = rng.choice([READ, READ_WRITE])
        found = mappings.access(address + first * PAGE, (end - first) * PAGE, wanted)
        assert (found >= wanted) == (min(now[first:end]) >= wanted)
    libc.mprotect(ctypes.c_void_p(address), pages * PAGE, 3)


def test_a_page_that_can_be_reached_now_is_found_without_a_look_at_all_others() -> None:
    """What a demand pager does: thousands of mappings, and one more page at each fault."""
    memory = mmap.mmap(-1, 2048 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    for page in range(0, 2048, 2):
        libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0)
    mappings = HostMappings()
    try:
        with open("/proc/self/maps", "rb") as maps:
            _query(maps.fileno(), address)
    except OSError:
        pytest.skip("the host does not tell of the mapping at an address: before Linux 6.11")
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_mappings, "_read_mappings", lambda: read.append(1))
        for page in range(0, 2048, 2):
            assert mappings.access(address + page * PAGE, PAGE) == NO_ACCESS
            libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 3)
            assert mappings.access(address + page * PAGE, PAGE) == READ_WRITE
    assert not read
    assert len(mappings._map[0]) <= _MOST_KNOWN
    assert mappings._map[0] == sorted(mappings._map[0])
