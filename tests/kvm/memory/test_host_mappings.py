# SPDX-License-Identifier: Apache-2.0
"""What the process can reach, by /proc/self/maps."""

import ctypes
import mmap
import sys
import threading

from softkvm.kvm.memory.host_mappings import NO_ACCESS, READ, READ_WRITE, HostMappings

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
