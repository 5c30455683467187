# SPDX-License-Identifier: Apache-2.0
"""Memory that is remapped, moved, protected and given back under slots, while two vCPUs run: only KVM_RUN's EFAULT.

No address is free at any time: what a process maps where it has unmapped something may be an allocator's, and mapping
over that would be this test's own fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import random
import threading
import time

import pytest
from tests.support.threads import running, until
from tests.support.tiny import MIB, Tiny

from softkvm import abi

PAGE, SIZE, GPA = 4096, 8 * MIB, 64 * MIB
ROUNDS = 1500
_FIXED, _MREMAP_MAYMOVE_FIXED, _MADV_DONTNEED = 0x10, 3, 4
_NONE, _READ, _READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
for _call in (_libc.munmap, _libc.mprotect, _libc.madvise):
    _call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)[: 2 if _call is _libc.munmap else 3]

#: again: mov eax, [ebx+ecx]; inc dword [ebx+ecx]; add ecx, 4160; and ecx, 0x7ffffc; jmp again
_WALK = bytes.fromhex("8b040b ff040b 81c140100000 81e1fcff7f00 ebec")
#: again: cld; mov esi, ebx; lea edi, [ebx+0x400000]; mov ecx, 1024; rep movsd; add ebx, 4160; (within half); jmp again
_COPY = bytes.fromhex("fc 89de 8dbb00004000 b900040000 f3a5 81c340100000 81e3ffff3f04 81cb00000004 ebdf")


def _map(address: int | None, size: int, protection: int = _READ_WRITE) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_FIXED if address else 0)
    return int(_libc.mmap(address, size, protection, flags, -1, 0))


def _move_over(address: int, size: int) -> None:
    """Put another's pages there."""
    spare = _map(None, size)
    if _libc.mremap(spare, size, size, _MREMAP_MAYMOVE_FIXED, address) != address:
        _libc.munmap(spare, size)


#: What an owner does with memory.
_DEEDS = (
    _map,
    lambda address, size: _map(address, size, _NONE),
    lambda address, size: _libc.mprotect(address, size, _NONE),
    lambda address, size: _libc.mprotect(address, size, _READ),
    lambda address, size: _libc.mprotect(address, size, _READ_WRITE),
    lambda address, size: _libc.madvise(address, size, _MADV_DONTNEED),
    _move_over,
)


@pytest.mark.parametrize("told", [False, True])
def test_whatever_an_owner_does_with_memory_under_slots_guests_run_on_or_end_with_efault(told: bool) -> None:
    rng = random.Random(int(told))
    room = _map(None, SIZE + 2 * MIB, _NONE)
    base = (room + 2 * MIB - 1) & -2 * MIB
    _map(base, SIZE)
    tiny = Tiny(vcpus=2).protected_mode()
    tiny.slot(1, GPA, SIZE, base)
    for vcpu, code, at in zip(tiny.vcpus, (_WALK, _COPY), (0x2000, 0x2100), strict=True):
        tiny.memory.write(at, code)
        vcpu.set_mp_state(abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE))
        vcpu.set_sregs(tiny.vcpu.get_sregs())
        regs = vcpu.get_regs()
        regs.rip, regs.rbx, regs.rcx, regs.rsp, regs.rflags = at, GPA, 0, 0x8000, 2
        vcpu.set_regs(regs)
    stop = threading.Event()
    wrong: list[OSError] = []

    def run(number: int) -> None:
        while not stop.is_set():
            try:
                tiny.vcpus[number].run()
            except OSError as error:
                if error.errno == errno.EFAULT:
                    time.sleep(0.0005)
                elif error.errno != errno.EINTR:
                    wrong.append(error)
                    return

    def change(deed: int) -> None:
        address = base + rng.randrange(SIZE // PAGE) * PAGE
        size = min(rng.choice([1, 1, 7, 64, 512, 700]) * PAGE, base + SIZE - address)
        if deed < len(_DEEDS):
            with tiny.vm.mmu_lock if told else contextlib.nullcontext():
                if told:
                    tiny.vm.host_unmapped(address, size)
                _DEEDS[deed](address, size)
        elif deed == len(_DEEDS):
            tiny.slot(1, GPA, 0, 0)
            tiny.slot(1, GPA, SIZE, base)
        else:
            tiny.slot(1, GPA, SIZE, base, rng.choice([0, abi.KVM_MEM_LOG_DIRTY_PAGES]))
            with contextlib.suppress(FileNotFoundError):
                tiny.vm.get_dirty_log(1)

    with running(tiny.vcpu, lambda: run(0)), running(tiny.vcpus[1], lambda: run(1)):
        for _ in range(ROUNDS):
            change(rng.randrange(len(_DEEDS) + 2))
            for vcpu in tiny.vcpus:
                if rng.random() < 0.05:
                    vcpu.kick()
        _map(base, SIZE)  # all is there in the end
        until(lambda: wrong or all(vcpu.cpu.instructions > 100 for vcpu in tiny.vcpus))
        stop.set()
    assert not wrong
    tiny.vm.close()
    _libc.munmap(room, SIZE + 2 * MIB)
