# SPDX-License-Identifier: Apache-2.0
"""A VM whose vCPUs go over their memory when they are told to: what the measurements of memory have in common."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from typing import Final

from softkvm import abi, api

PAGE: Final = 4096
PAGE_2M: Final = 2 << 20
#: Where the vCPUs' memory begins, and where code and page tables are.
TEST_GPA: Final = 1 << 32
CODE: Final = 0x1000
TABLES: Final = 0x2000
#: The guest says here that it has gone over its pages.
PORT: Final = 0x10

BACKINGS: Final = ("anonymous", "thp", "shmem", "hugetlb")

_U32: Final = (1 << 32) - 1
_MADV_HUGEPAGE: Final = 14
_MAP_HUGETLB: Final = 0x40000

#: RDI: the first page, RSI: how many, R9D: pages whose number is at most this are written, EAX: the generator.
_GUEST: Final = bytes.fromhex(
    "4889f1"  # again: mov rcx, rsi
    "4889fb"  #        mov rbx, rdi
    "69c00d661900"  # page: imul eax, eax, 1664525
    "055ff36e3c"  #   add eax, 1013904223
    "4439c8"  #       cmp eax, r9d
    "7705"  #         ja read
    "488903"  #       mov [rbx], rax
    "eb03"  #         jmp next
    "488b13"  # read: mov rdx, [rbx]
    "4881c300100000"  # next: add rbx, 4096
    "48ffc9"  #       dec rcx
    "75dc"  #         jnz page
    "e610"  #         out 0x10, al
    "ebd2"  #         jmp again
)


class BenchError(Exception):
    """What was asked for cannot be measured here; the message says why."""


def check_memory(vcpus: int, bytes_per_vcpu: int, overlap: bool) -> None:
    """Raise BenchError for memory that cannot be gone over here."""
    if vcpus < 1:
        raise BenchError(f"vcpus={vcpus}: expected at least 1")
    if bytes_per_vcpu <= 0 or bytes_per_vcpu % PAGE_2M:
        raise BenchError(f"{bytes_per_vcpu >> 10} KiB of memory for each vCPU: expected 2 MiB or a multiple of that")
    size = bytes_per_vcpu * (1 if overlap else vcpus)
    available = os.sysconf("SC_AVPHYS_PAGES") * PAGE
    if size > available:
        raise BenchError(f"{size >> 20} MiB of memory: this host has {available >> 20} MiB free")


def map_memory(size: int, backing: str) -> tuple[mmap.mmap, int]:
    """Return memory, and an address in it, aligned to 2 MiB, that ``size`` bytes follow."""
    room = size + PAGE_2M
    if backing == "hugetlb":
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
        except OSError as error:
            raise BenchError(f"backing=hugetlb: {error.strerror} (/proc/sys/vm/nr_hugepages)") from None
    elif backing == "shmem":
        fd = os.memfd_create("dirty-log")
        try:
            os.ftruncate(fd, room)
            memory = mmap.mmap(fd, room)
        finally:
            os.close(fd)
    else:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if backing == "thp":
        try:
            memory.madvise(_MADV_HUGEPAGE)
        except OSError as error:
            raise BenchError(f"backing=thp: {error.strerror}") from None
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-address // PAGE_2M) * PAGE_2M


@dataclass(frozen=True, slots=True)
class Walk:
    """What the vCPUs do: each goes over its part of memory, or with *overlap* all over the same."""

    vcpus: int
    bytes_per_vcpu: int
    overlap: bool
    #: Percent of the pages that a pass writes.
    write_percent: int

    @property
    def pages(self) -> int:
        """Pages of the memory."""
        return self.bytes_per_vcpu // PAGE * (1 if self.overlap else self.vcpus)


class Walkers:
    """A VM whose vCPUs go over their memory when they are told to, each on a thread of its own."""

    def __init__(self, kvm: api.Kvm, walk: Walk, memory: mmap.mmap, address: int) -> None:
        self.walk = walk
        self.vm = kvm.create_vm()
        self._size = walk.pages * PAGE
        self._low = mmap.mmap(-1, self._tables_size() + TABLES)
        self._memory, self._address = memory, address
        self._prepare()
        self._build_tables()
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                memory_size=len(self._low), userspace_addr=ctypes.addressof(ctypes.c_char.from_buffer(self._low))
            )
        )
        self._set_memory(0)
        self._vcpus = [self._vcpu(kvm, number) for number in range(walk.vcpus)]
        self._go = threading.Barrier(walk.vcpus + 1)
        self._done = threading.Barrier(walk.vcpus + 1)
        self._ended = False
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._main, args=(vcpu,), daemon=True) for vcpu in self._vcpus]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # the host's limit
            self.close()
            raise BenchError(f"{walk.vcpus} vCPUs: {error}") from None

    # --- the guest ---------------------------------------------------------------------------------

    def _tables_size(self) -> int:
        gigabytes = (TEST_GPA + self._size >> 30) + 1
        return PAGE * (2 + gigabytes)

    def _build_tables(self) -> None:
        """Map addresses one to one, by pages of 2 MiB."""
        gigabytes = self._tables_size() // PAGE - 2
        entries: dict[int, int] = {TABLES: TABLES + PAGE | 3}
        for n in range(gigabytes):
            table = TABLES + PAGE * (2 + n)
            entries[TABLES + PAGE + 8 * n] = table | 3
            for m in range(512):
                entries[table + 8 * m] = (n << 30) + m * PAGE_2M | 0x83
        for at, entry in entries.items():
            self._low[at : at + 8] = struct.pack("<Q", entry)
        self._low[CODE : CODE + len(_GUEST)] = _GUEST

    def _vcpu(self, kvm: api.Kvm, number: int) -> api.Vcpu:
        vcpu = self.vm.create_vcpu(number)
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        sregs = vcpu.get_sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment: abi.kvm_segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector, segment.g = 0, _U32, 8 if name == "cs" else 16, 1
            segment.type, segment.present, segment.s, segment.dpl = 11 if name == "cs" else 3, 1, 1, 0
            segment.l, segment.db, segment.unusable = int(name == "cs"), int(name != "cs"), 0
        sregs.cr3, sregs.cr4 = TABLES, sregs.cr4 | abi.X86_CR4_PAE
        sregs.cr0 |= abi.X86_CR0_PE | abi.X86_CR0_PG
        sregs.efer |= abi.EFER_LME | abi.EFER_LMA
        vcpu.set_sregs(sregs)
        part = 0 if self.walk.overlap else number
        vcpu.set_regs(
            abi.kvm_regs(
                rip=CODE,
                rflags=2,
                rax=number + 1,
                rdi=TEST_GPA + part * self.walk.bytes_per_vcpu,
                rsi=self.walk.bytes_per_vcpu // PAGE,
                r9=self.walk.write_percent * _U32 // 100,
            )
        )
        return vcpu

    def _main(self, vcpu: api.Vcpu) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):  # that is the end
            while True:
                self._go.wait()
                try:
                    self._run(vcpu)
                except BaseException as failure:  # told to who waits
                    self._failure = failure
                self._done.wait()

    def _run(self, vcpu: api.Vcpu) -> None:
        while True:
            try:
                vcpu.run()
            except InterruptedError:
                if self._ended:
                    return
                continue
            except OSError as error:
                if error.errno == errno.EFAULT and self._resolve(vcpu):
                    continue
                raise
            if vcpu.kvm_run.exit_reason == abi.KVM_EXIT_IO and vcpu.kvm_run.io.port == PORT:
                return
            name = abi.EXIT_REASON_NAMES.get(vcpu.kvm_run.exit_reason, str(vcpu.kvm_run.exit_reason))
            raise BenchError(f"the guest ended with {name}")

    # --- what it does ------------------------------------------------------------------------------

    def go_over_memory(self) -> None:
        """Let every vCPU go over its pages once."""
        self._go.wait()
        self._done.wait()
        if self._failure is not None:
            raise self._failure

    def _set_memory(self, flags: int) -> None:
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=1,
                flags=flags,
                guest_phys_addr=TEST_GPA,
                memory_size=self._size,
                userspace_addr=self._address,
            ),
            self._memory,
        )

    def _prepare(self) -> None:
        """Set what a VM needs before its memory."""

    def _resolve(self, vcpu: api.Vcpu) -> bool:
        """Do something about memory that KVM_RUN has not found; whether the guest can go on."""
        return False

    def close(self) -> None:
        """End the threads and the VM, in the middle of a pass, too: what waits for one may be ended by a signal."""
        self._ended = True
        self._go.abort()
        self._done.abort()
        for vcpu, thread in zip(self._vcpus, self._threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.01)
        for vcpu in self._vcpus:
            vcpu.close()
        self.vm.close()
