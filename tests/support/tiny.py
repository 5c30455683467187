# SPDX-License-Identifier: Apache-2.0
"""Tiny virtual machines for tests of KVM: some memory, one vCPU in a given mode, a few bytes of code."""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import cast

import softkvm
from softkvm import abi
from softkvm.kvm import Kvm, Params, Vcpu, Vm

CODE = 0x1000
STACK = 0x8000
DATA = 0x10000
PAGE_TABLES = 0x40000
GDT = 0x3000
IDT = 0x4000
MIB = 1 << 20

CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10


class Memory:
    """Host memory for a guest, 2 MiB aligned."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size + 2 * MIB)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = (base + 2 * MIB - 1) & -(2 * MIB)
        self.size = size
        self.view = memoryview(self._map)[self.address - base : self.address - base + size]

    def write(self, address: int, data: bytes) -> None:
        self.view[address : address + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.view[address : address + size])


class Tiny:
    """One VM with memory at 0 and one vCPU."""

    def __init__(
        self,
        size: int = 2 * MIB,
        *,
        irqchip: bool = False,
        split: int = 0,
        params: Params | None = None,
        vcpus: int = 1,
        dirty_ring: int = 0,
        caps: dict[int, int] | None = None,
    ) -> None:
        self.kvm = Kvm(params) if params is not None else cast(Kvm, softkvm.open())
        self.vm: Vm = self.kvm.create_vm()
        if irqchip:
            self.vm.create_irqchip()
        if split:
            self.vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, split)
        if dirty_ring:
            self.vm.enable_cap(abi.KVM_CAP_DIRTY_LOG_RING, dirty_ring)
        for cap, value in (caps or {}).items():
            self.vm.enable_cap(cap, value)
        self.memory = Memory(size)
        self.slot(0, 0, size, self.memory.address)
        self.vcpus: list[Vcpu] = []
        for n in range(vcpus):
            vcpu = self.vm.create_vcpu(n)
            vcpu.set_cpuid2(self.kvm.get_supported_cpuid())
            self.vcpus.append(vcpu)
        self.vcpu = self.vcpus[0]

    def slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
            )
        )

    def registers(self, **values: int) -> None:
        regs = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def load(self, code: bytes, **registers: int) -> None:
        """Put code at CODE and point RIP there."""
        self.memory.write(CODE, code)
        self.vm.machine.notify_write(self.memory.address + CODE, len(code))
        self.registers(**{"rip": CODE, "rsp": STACK, "rflags": 2, **registers})

    def real_mode(self) -> Tiny:
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        return self

    def protected_mode(self) -> Tiny:
        """Flat 32-bit segments, paging off."""
        sregs = self.vcpu.get_sregs()
        _flat(sregs, long_mode=False)
        sregs.cr0 = 0x11
        self.vcpu.set_sregs(sregs)
        self._tables(sregs, code=0x00CF_9B00_0000_FFFF)
        return self

    def long_mode(self, gigabytes: int = 1) -> Tiny:
        """64-bit mode with the first gigabytes mapped one to one by 2 MiB pages, user and writable."""
        write = self.memory.write
        pml4, pdpt, pd = PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000
        write(pml4, struct.pack("<Q", pdpt | 7))
        for g in range(gigabytes):
            write(pdpt + 8 * g, struct.pack("<Q", (pd + 0x1000 * g) | 7))
            for n in range(512):
                write(pd + 0x1000 * g + 8 * n, struct.pack("<Q", g << 30 | n << 21 | 0x87))
        sregs = self.vcpu.get_sregs()
        _flat(sregs, long_mode=True)
        sregs.cr3 = pml4
        sregs.cr4 = 0x620  # PAE, OSFXSR, OSXMMEXCPT
        sregs.cr0 = 0x8000_0033
        sregs.efer = 0xD01  # SCE, LME, LMA, NXE
        self.vcpu.set_sregs(sregs)
        self._tables(sregs, code=0x00AF_9B00_0000_FFFF)
        return self

    def _tables(self, sregs: abi.kvm_sregs, code: int) -> None:
        self.memory.write(GDT, struct.pack("<3Q", 0, code, 0x00CF_9300_0000_FFFF))
        sregs.gdt.base, sregs.gdt.limit = GDT, 0x17
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        self.vcpu.set_sregs(sregs)

    def gate64(self, vector: int, handler: int) -> None:
        """Set a 64-bit interrupt gate."""
        low = handler & 0xFFFF | CODE_SELECTOR << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
        self.memory.write(IDT + 16 * vector, struct.pack("<QQ", low, handler >> 32))

    def run(self) -> int:
        """KVM_RUN; returns the exit reason."""
        self.vcpu.run()
        return self.vcpu.kvm_run.exit_reason

    def run_to_halt(self) -> abi.kvm_regs:
        assert self.run() == abi.KVM_EXIT_HLT, self.vcpu.kvm_run.exit_reason
        return self.vcpu.get_regs()

    def close(self) -> None:
        self.vm.close()


def _flat(sregs: abi.kvm_sregs, *, long_mode: bool) -> None:
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment: abi.kvm_segment = getattr(sregs, name)
        segment.base, segment.limit, segment.g = 0, 0xFFFF_FFFF, 1
        segment.selector, segment.type, segment.db = DATA_SELECTOR, 3, 1
        segment.present, segment.s, segment.dpl, segment.unusable = 1, 1, 0, 0
    sregs.cs.selector, sregs.cs.type = CODE_SELECTOR, 11
    if long_mode:
        sregs.cs.l, sregs.cs.db = 1, 0
