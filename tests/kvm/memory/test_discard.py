# SPDX-License-Identifier: Apache-2.0
"""Memory that is given back to the host: what kind it may be, and what of the guest's follows it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest
from tests.support.tiny import MIB, Tiny

from softkvm import abi
from softkvm.kvm.memory.discard import discard
from softkvm.kvm.memory.host_mappings import Backing, HostMappings

HUGE = 2 * MIB
GPA = 4 * MIB
_libc = ctypes.CDLL(None, use_errno=True)


def mapping(length: int, flags: int, fd: int = -1) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(fd, length, flags)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def memfd(size: int) -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd


def test_what_memory_is_the_hosts_table_says() -> None:
    mappings = HostMappings()
    fd = memfd(HUGE)
    kinds = {
        Backing.ANONYMOUS: mapping(HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        Backing.SHARED: mapping(HUGE, mmap.MAP_SHARED, fd),
        Backing.OTHER: mapping(HUGE, mmap.MAP_PRIVATE, fd),
    }
    for kind, (_, address) in kinds.items():
        assert mappings.backing(address, HUGE) is kind
        assert mappings.backing(address + 4096, 4096) is kind
        assert mappings.backing(address, 1) is kind
    _, address = kinds[Backing.ANONYMOUS]
    for protection, expected in ((1, Backing.NONE), (0, Backing.NONE), (3, Backing.ANONYMOUS)):
        _libc.mprotect(ctypes.c_void_p(address + 4096), ctypes.c_size_t(4096), protection)
        assert mappings.backing(address, HUGE) is expected
        assert mappings.backing(address, 4096) is Backing.ANONYMOUS
    assert mappings.backing(0, 4096) is Backing.NONE
    assert mappings.backing((1 << 47) - 4096, 1 << 20) is Backing.NONE
    # Two kinds in one range.
    MAP_FIXED = 0x10
    _libc.mmap.restype = ctypes.c_void_p
    placed = _libc.mmap(
        ctypes.c_void_p(address + 8192), ctypes.c_size_t(4096), 3, mmap.MAP_SHARED | MAP_FIXED, fd, ctypes.c_long(0)
    )
    assert placed == address + 8192
    assert mappings.backing(address, HUGE) is Backing.OTHER
    os.close(fd)


@pytest.fixture
def tiny() -> Tiny:
    return Tiny().long_mode()


def refused(tiny: Tiny, size: int = HUGE) -> int:
    with pytest.raises(OSError) as info:
        discard(tiny.vm, GPA, size)
    return info.value.errno or 0


def test_the_guest_gets_zeroes_from_a_page_that_it_had_in_its_tlb(tiny: Tiny) -> None:
    memory, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"\x07" * len(memory)
    tiny.slot(1, GPA, 2 * HUGE, address)
    code = b"\x8b\x03\xf4"  # mov eax, [rbx]; hlt
    tiny.load(code, rbx=GPA)
    assert tiny.run_to_halt().rax == 0x0707_0707
    discard(tiny.vm, GPA, 4096)  # any number of pages
    tiny.load(code, rbx=GPA)
    assert tiny.run_to_halt().rax == 0
    tiny.load(code, rbx=GPA + 4096)
    assert tiny.run_to_halt().rax == 0x0707_0707
    tiny.close()


def test_code_that_is_given_back_is_no_code_any_more(tiny: Tiny) -> None:
    memory, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:3] = b"\xb0\x05\xf4"  # mov al, 5; hlt
    tiny.slot(1, GPA, 2 * HUGE, address)
    tiny.registers(rip=GPA, rax=0, rflags=2)
    assert tiny.run_to_halt().rax == 5
    discard(tiny.vm, GPA, HUGE)
    memory[2:3] = b"\xf4"  # add [rax], al; hlt
    tiny.registers(rip=GPA, rax=0x20000, rflags=2)
    assert tiny.run_to_halt().rax == 0x20000
    tiny.close()


def test_locked_memory_is_kept(tiny: Tiny) -> None:
    memory, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"\x07" * len(memory)
    if _libc.mlock(ctypes.c_void_p(address + HUGE - 4096), ctypes.c_size_t(4096)):
        pytest.skip(f"no memory can be locked: {os.strerror(ctypes.get_errno())}")
    tiny.slot(1, GPA, 2 * HUGE, address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert refused(tiny) == errno.EOPNOTSUPP
    assert memory[HUGE - 4096] == 7
    # What is before it may be gone.
    assert tiny.vm.get_dirty_log(1)[:64] == b"\xff" * 64
    tiny.close()


def test_a_ring_of_dirty_pages_has_no_room_for_it() -> None:
    tiny = Tiny(dirty_ring=4096 * 16).long_mode()
    _, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tiny.slot(1, GPA, 2 * HUGE, address, abi.KVM_MEM_LOG_DIRTY_PAGES)
    assert refused(tiny) == errno.EOPNOTSUPP
    tiny.slot(1, GPA, 2 * HUGE, address, 0)
    discard(tiny.vm, GPA, HUGE)
    tiny.close()


def test_private_frames_are_kept() -> None:
    tiny = Tiny.__new__(Tiny)
    from softkvm.kvm import Kvm

    with Kvm() as kvm:
        vm = kvm.create_vm(abi.KVM_X86_SW_PROTECTED_VM)
        tiny.vm = vm
        _, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tiny.slot(1, GPA, 2 * HUGE, address)
        for start, size in ((GPA, HUGE), (GPA + 4096, 4096)):
            attributes = abi.kvm_memory_attributes(
                address=start, size=size, attributes=abi.KVM_MEMORY_ATTRIBUTE_PRIVATE
            )
            vm.set_memory_attributes(attributes)
            assert refused(tiny) == errno.EOPNOTSUPP
            attributes.attributes = 0
            vm.set_memory_attributes(attributes)
        discard(vm, GPA, HUGE)
        vm.close()


def test_what_two_slots_share_is_neithers(tiny: Tiny) -> None:
    _, address = mapping(2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tiny.slot(1, GPA, HUGE // 2, address)
    tiny.slot(2, GPA + HUGE // 2, HUGE // 2, address + HUGE // 2)
    assert refused(tiny) == errno.EFAULT
    discard(tiny.vm, GPA, HUGE // 2)
    tiny.close()
