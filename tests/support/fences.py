# SPDX-License-Identifier: Apache-2.0
"""Guests that do whatever they can beside one that notices, and memory between pages that nobody may write."""

from __future__ import annotations

import ctypes
import mmap
import threading

from tests.support.conformance import MEMORY_SIZE, Guest
from tests.support.machines import KVMS

from softkvm import abi

CANARY = 16 * 4096


class Neighbour:
    """A machine that sums its memory again and again, and notices if anything touches it."""

    def __init__(self) -> None:
        self.kvm = KVMS["soft"]()
        self.guest = Guest(self.kvm)
        self.guest.write(0x5_0000, bytes(range(256)) * 1024)
        # 0: mov esi, 0x50000; mov ecx, 0x10000; xor eax, eax; 1: add eax, [rsi]; add esi, 4; loop 1b; hlt; jmp 0b
        self.guest.long("be00000500 b900000100 31c0 0306 83c604 e2f9 f4 ebea")
        words = (ctypes.c_uint32 * 0x1_0000).from_buffer_copy(self.guest.memory[0x5_0000 : 0x5_0000 + 0x4_0000])
        self.total = sum(words) & 0xFFFF_FFFF
        self.sums: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.guest.expect(abi.KVM_EXIT_HLT)
            self.sums.append(self.guest.cpu.get_regs().rax)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.guest.close()
        self.kvm.close()


class Fenced(Guest):
    """A guest whose memory lies between pages that nobody may write."""

    def fence(self) -> None:
        self.whole = mmap.mmap(-1, MEMORY_SIZE + 2 * CANARY)
        self.whole[:CANARY] = b"\xc5" * CANARY
        self.whole[-CANARY:] = b"\xc5" * CANARY
        self.region(0, 0, 0)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.whole)) + CANARY
        self.memory = memoryview(self.whole)[CANARY:-CANARY]  # type: ignore[assignment]
        self.region(0, 0, MEMORY_SIZE)

    def intact(self) -> bool:
        fence = b"\xc5" * CANARY
        return self.whole[:CANARY] == fence and self.whole[-CANARY:] == fence
