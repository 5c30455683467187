# SPDX-License-Identifier: Apache-2.0
"""A small machine on either KVM, for tests that use nothing but the KVM API."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.support.machines import KVMS

from softkvm import abi, api
from softkvm.closing import Closing

PAGE = 4096
MEMORY_SIZE = 1 << 20
CODE = 0x1000
STACK = 0x8000
GDT = 0x9000
IDT = 0xA000
TABLES = 0x10000
TIMEOUT_S = 5.0

CODE_SELECTOR, DATA_SELECTOR = 8, 16


class Hang(AssertionError):
    """A guest that did not leave KVM_RUN in time."""


class Guest(Closing):
    """A VM with one megabyte of memory at 0 and one vCPU or more, ready for code at CODE."""

    def __init__(
        self, kvm: api.Kvm, *, irqchip: bool = False, pit: bool = False, vcpus: int = 1, type: int = 0
    ) -> None:
        self.kvm = kvm
        self.vm = kvm.create_vm(type)
        self.vm.set_tss_addr(0xFFFB_D000)
        self.memory = mmap.mmap(-1, MEMORY_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.region(0, 0, MEMORY_SIZE)
        if irqchip:
            self.vm.create_irqchip()
        if pit:
            self.vm.create_pit2()
        self.vcpus = []
        for number in range(vcpus):
            vcpu = self.vm.create_vcpu(number)
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            self.vcpus.append(vcpu)
        self.vcpu = self.vcpus[0] if self.vcpus else None

    @property
    def cpu(self) -> api.Vcpu:
        """The first vCPU."""
        assert self.vcpu is not None
        return self.vcpu

    @property
    def kvm_run(self) -> abi.kvm_run:
        """The first vCPU's shared page."""
        return self.cpu.kvm_run

    def region(self, slot: int, gpa: int, size: int, *, offset: int = 0, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION of a part of the memory."""
        self.vm.set_user_memory_region(
            abi.kvm_userspace_memory_region(
                slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=self.address + offset
            )
        )

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory."""
        self.memory[gpa : gpa + len(data)] = data

    def word(self, gpa: int, size: int = 4) -> int:
        """Read a number from guest memory."""
        return int.from_bytes(self.memory[gpa : gpa + size], "little")

    # --- modes -------------------------------------------------------------------------------------

    def real(self, code: bytes | str, *, rflags: int = abi.X86_EFLAGS_FIXED, vcpu: api.Vcpu | None = None) -> None:
        """Start *code* in real mode with all segments at 0."""
        cpu = vcpu or self.cpu
        self.write(CODE, _bytes(code))
        sregs = cpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        cpu.set_sregs(sregs)
        cpu.set_regs(abi.kvm_regs(rip=CODE, rflags=rflags, rsp=STACK))

    def protected(self, code: bytes | str) -> None:
        """Start *code* in flat 32-bit protected mode without paging."""
        self.write(CODE, _bytes(code))
        sregs = self.cpu.get_sregs()
        _flat(sregs, long=False)
        sregs.cr0 |= abi.X86_CR0_PE
        self.cpu.set_sregs(sregs)
        self.cpu.set_regs(abi.kvm_regs(rip=CODE, rflags=abi.X86_EFLAGS_FIXED, rsp=STACK))

    def long(self, code: bytes | str, *, rflags: int = abi.X86_EFLAGS_FIXED) -> None:
        """Start *code* in 64-bit mode with the first 4 GiB mapped one to one."""
        self.write(CODE, _bytes(code))
        self.identity_map()
        sregs = self.cpu.get_sregs()
        _flat(sregs, long=True)
        sregs.cr3 = TABLES
        sregs.cr4 |= abi.X86_CR4_PAE | abi.X86_CR4_OSFXSR
        sregs.efer |= abi.EFER_LME | abi.EFER_LMA
        sregs.cr0 |= abi.X86_CR0_PE | abi.X86_CR0_PG
        self.cpu.set_sregs(sregs)
        self.cpu.set_regs(abi.kvm_regs(rip=CODE, rflags=rflags, rsp=STACK))

    def identity_map(self) -> None:
        """Write four-level tables of 2 MiB pages for the first 4 GiB at TABLES."""
        entry = (TABLES + PAGE) | 7
        self.write(TABLES, entry.to_bytes(8, "little"))
        for gib in range(4):
            directory = TABLES + (2 + gib) * PAGE
            self.write(TABLES + PAGE + gib * 8, (directory | 7).to_bytes(8, "little"))
            pages = b"".join(((gib << 30 | n << 21) | 0x87).to_bytes(8, "little") for n in range(512))
            self.write(directory, pages)

    def ivt(self, vector: int, ip: int) -> None:
        """Point a real-mode vector to 0:*ip*."""
        self.write(vector * 4, ip.to_bytes(4, "little"))

    # --- running -----------------------------------------------------------------------------------

    def run(self, vcpu: api.Vcpu | None = None, *, timeout_s: float = TIMEOUT_S) -> int:
        """KVM_RUN; returns the exit reason. Raises Hang when a kick had to end it."""
        cpu = vcpu or self.cpu
        with watchdog(cpu, timeout_s) as barked:
            try:
                cpu.run()
            except InterruptedError:
                if barked.is_set():
                    raise Hang(f"no exit in {timeout_s} s at rip={cpu.get_regs().rip:#x}") from None
                raise
        return int(cpu.kvm_run.exit_reason)

    def expect(self, reason: int, vcpu: api.Vcpu | None = None) -> abi.kvm_run:
        """KVM_RUN that has to end with *reason*; returns the shared page."""
        cpu = vcpu or self.cpu
        got = self.run(cpu)
        assert got == reason, f"{describe(cpu.kvm_run)}, expected {abi.EXIT_REASON_NAMES[reason]}"
        return cpu.kvm_run

    def close(self) -> None:
        """Give everything back."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()


@contextmanager
def watchdog(vcpu: api.Vcpu, timeout_s: float) -> Iterator[threading.Event]:
    """Kick *vcpu* after a while; the event tells whether that happened."""
    barked = threading.Event()

    def bark() -> None:
        barked.set()
        vcpu.kick()

    timer = threading.Timer(timeout_s, bark)
    timer.start()
    try:
        yield barked
    finally:
        timer.cancel()
        timer.join()


def describe(run: abi.kvm_run) -> str:
    """Say what an exit was."""
    text = abi.EXIT_REASON_NAMES.get(run.exit_reason, str(run.exit_reason))
    if run.exit_reason == abi.KVM_EXIT_INTERNAL_ERROR:
        text += f" suberror {run.internal.suberror} data {[hex(n) for n in run.internal.data[: run.internal.ndata]]}"
    if run.exit_reason == abi.KVM_EXIT_IO:
        text += f" port {run.io.port:#x} direction {run.io.direction} size {run.io.size} count {run.io.count}"
    if run.exit_reason == abi.KVM_EXIT_MMIO:
        text += f" at {run.mmio.phys_addr:#x} len {run.mmio.len} write {run.mmio.is_write}"
    return text


def pio_data(vcpu: api.Vcpu) -> bytes:
    """The bytes of a KVM_EXIT_IO."""
    run = vcpu.kvm_run
    start = run.io.data_offset
    return bytes(vcpu.shared[start : start + run.io.size * run.io.count])


def set_pio_data(vcpu: api.Vcpu, data: bytes) -> None:
    """Answer a KVM_EXIT_IO for IN."""
    start = vcpu.kvm_run.io.data_offset
    vcpu.shared[start : start + len(data)] = data


def refused(expected: int | tuple[int, ...], call: Callable[[], object]) -> str:
    """Assert that *call* fails with an errno; return what it says."""
    allowed = expected if isinstance(expected, tuple) else (expected,)
    with pytest.raises(OSError) as caught:
        call()
    names = [errno.errorcode[e] for e in allowed]
    assert caught.value.errno in allowed, f"{errno.errorcode.get(caught.value.errno or 0)}, expected one of {names}"
    return str(caught.value)


def _bytes(code: bytes | str) -> bytes:
    return bytes.fromhex(code) if isinstance(code, str) else code


def _flat(sregs: abi.kvm_sregs, *, long: bool) -> None:
    """Load flat segments without a descriptor table behind them."""
    sregs.cs = abi.kvm_segment(
        limit=0xFFFF_FFFF, selector=CODE_SELECTOR, type=11, present=1, s=1, g=1, db=not long, l=long
    )
    data = abi.kvm_segment(limit=0xFFFF_FFFF, selector=DATA_SELECTOR, type=3, present=1, s=1, g=1, db=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)


# --- what a host cannot do -------------------------------------------------------------------------


def _paging_outside_long_mode(guest: Guest) -> bool:
    guest.write(TABLES, (0x83).to_bytes(4, "little"))
    guest.protected("b801000000 f4")  # mov eax, 1; hlt
    sregs = guest.cpu.get_sregs()
    sregs.cr3, sregs.cr4, sregs.cr0 = TABLES, sregs.cr4 | abi.X86_CR4_PSE, sregs.cr0 | abi.X86_CR0_PG
    guest.cpu.set_sregs(sregs)
    return guest.run() == abi.KVM_EXIT_HLT


def _supervisor_sse(guest: Guest) -> bool:
    guest.long("0f57c0 f4")  # xorps xmm0, xmm0; hlt
    return guest.run() == abi.KVM_EXIT_HLT


def _hypercall(guest: Guest) -> bool:
    guest.long("b863000000 0f01c1 f4")  # mov eax, 99; vmcall; hlt
    return guest.run() == abi.KVM_EXIT_HLT


def _long_mode_exception(guest: Guest) -> bool:
    guest.long("cc f4")  # int3 without an IDT: #DF, then shutdown
    return guest.run() == abi.KVM_EXIT_SHUTDOWN


def _real_mode_interrupts(guest: Guest) -> bool:
    guest.ivt(0x40, CODE + 3)
    guest.real("cd40 f4 b80100 f4")  # int 0x40; hlt; handler: mov ax, 1; hlt
    return guest.run() == abi.KVM_EXIT_HLT and guest.cpu.get_regs().rax == 1


def _hardware_breakpoints(guest: Guest) -> bool:
    guest.long("90 90 f4")
    _break_at(guest, CODE + 1, 0x402)
    return guest.run() == abi.KVM_EXIT_DEBUG


def _watchpoints(guest: Guest) -> bool:
    guest.long("c6042500600000 11 f4")  # mov byte [0x6000], 0x11; hlt
    _break_at(guest, 0x6000, 0x402 | 1 << 16)
    return guest.run() == abi.KVM_EXIT_DEBUG


def _break_at(guest: Guest, address: int, dr7: int) -> None:
    request = abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP)
    request.arch.debugreg[0], request.arch.debugreg[7] = address, dr7
    guest.cpu.set_guest_debug(request)


def _nmi_after_iret(guest: Guest) -> bool:
    guest.ivt(2, CODE + 0x100)
    guest.write(CODE + 0x100, bytes.fromhex("e6e9 fec3 cf"))  # out 0xe9, al; inc bl; iret
    guest.real("90 f4")
    guest.cpu.nmi()
    guest.run()
    guest.cpu.nmi()
    return guest.run() == abi.KVM_EXIT_IO


def _interrupt_windows(guest: Guest) -> bool:
    guest.real("fb 90 90 f4")  # sti; nop; nop; hlt
    guest.kvm_run.request_interrupt_window = 1
    return guest.run() == abi.KVM_EXIT_IRQ_WINDOW_OPEN


def _steps_over_emulation(guest: Guest) -> bool:
    guest.real("e6e9 90 f4")  # out 0xe9, al; nop; hlt
    guest.cpu.set_guest_debug(abi.kvm_guest_debug(control=abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP))
    guest.run()
    return guest.run() == abi.KVM_EXIT_DEBUG and guest.kvm_run.debug.arch.pc == CODE + 2


def _in_service(guest: Guest) -> bool:
    with Guest(guest.kvm, irqchip=True) as chips:
        lapic = chips.cpu.get_lapic()
        lapic.regs[0xF0:0xF2] = [0xFF, 1]  # SPIV: enabled
        chips.cpu.set_lapic(lapic)
        chips.ivt(0x41, CODE + 0x100)
        chips.write(CODE + 0x100, bytes.fromhex("e6e9"))  # out 0xe9, al
        chips.real("f4 ebfd", rflags=abi.X86_EFLAGS_FIXED | abi.X86_EFLAGS_IF)
        chips.vm.signal_msi(abi.kvm_msi(address_lo=0xFEE0_0000, data=0x41))
        return chips.run() == abi.KVM_EXIT_IO and chips.cpu.get_lapic().regs[0x120] == 2  # ISR, vectors 0x40 to 0x5f


def _tpr_reports(guest: Guest) -> bool:
    with Guest(guest.kvm, irqchip=True) as chips:
        chips.cpu.tpr_access_reporting(1)
        chips.long("bf8000e0fe 8b07 e6e9")  # mov edi, 0xfee00080; mov eax, [rdi]; out 0xe9, al
        return chips.run() == abi.KVM_EXIT_TPR_ACCESS


def _tsc_offsets(guest: Guest) -> bool:
    guest.cpu.set_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, 12345)
    return guest.cpu.get_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET) == 12345


ABILITIES: dict[str, Callable[[Guest], bool]] = {
    "paging outside long mode": _paging_outside_long_mode,
    "SSE at privilege level 0": _supervisor_sse,
    "hypercalls": _hypercall,
    "exceptions in long mode": _long_mode_exception,
    "interrupts in real mode": _real_mode_interrupts,
    "interrupts in service until their EOI": _in_service,
    "requests between emulated instructions": _tpr_reports,
    "TSC offsets": _tsc_offsets,
    "hardware breakpoints": _hardware_breakpoints,
    "watchpoints": _watchpoints,
    "a second NMI in real mode": _nmi_after_iret,
    "interrupt windows in real mode": _interrupt_windows,
    "single steps over emulated instructions": _steps_over_emulation,
}

_KNOWN: dict[tuple[str, str], bool] = {}


def require(kind: str, ability: str) -> None:
    """Skip a test on a device whose host lacks *ability*; the software side has to have them all."""
    if (kind, ability) not in _KNOWN:
        with KVMS[kind]() as kvm, Guest(kvm) as guest:
            try:
                _KNOWN[kind, ability] = ABILITIES[ability](guest)
            except (Hang, OSError):
                _KNOWN[kind, ability] = False
    if not _KNOWN[kind, ability]:
        assert kind != "soft", f"the software side lacks {ability}"
        pytest.skip(f"this host's /dev/kvm cannot run {ability}")
