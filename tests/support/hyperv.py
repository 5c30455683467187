# SPDX-License-Identifier: Apache-2.0
"""A small guest of Hyper-V's on either KVM: it accesses MSRs and makes hypercalls in 64-bit mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from tests.support.conformance import GDT, IDT, TABLES, Guest
from tests.support.segments import enter_ring_3

from softkvm import abi, api

#: Where things are, behind what :class:`Guest` has.
HANDLERS = 0x2000
HYPERCALL_PAGE = 0x3000
INPUT = 0x4000
MESSAGES, EVENTS, TSC_PAGE, ASSIST = 0x20000, 0x21000, 0x22000, 0x23000
TSS = 0x24000
LINUX = abi.HV_LINUX_VENDOR_ID << 48

_DONE, _GP, _UD = 0xEA, 0xE9, 0xE8
_CODE = 0x5000
_CODE_SIZE = 0x200
_STACK = 0x7000
_RING_0_STACK = 0x7800
_IRR, _ISR, _SPIV = 0x200, 0x100, 0xF0


class GeneralProtection(Exception):
    """The guest had a #GP."""


class InvalidOpcode(Exception):
    """The guest had an #UD."""


class Left(Exception):
    """The guest left KVM_RUN in the middle, with this reason."""

    def __init__(self, reason: int) -> None:
        super().__init__(abi.EXIT_REASON_NAMES.get(reason, reason))
        self.reason = reason


class HypervGuest:
    """A VM with in-kernel chips whose vCPUs have Hyper-V's leaves.

    *leaves* replaces registers of leaves, by function: ``{0x40000003: {"eax": 0}}``.
    """

    def __init__(
        self,
        make: Callable[..., Guest],
        *,
        vcpus: int = 1,
        irqchip: bool = True,
        synic: bool = True,
        leaves: Mapping[int, Mapping[str, int]] | None = None,
        enforce: bool = False,
    ) -> None:
        self.guest = guest = make(irqchip=irqchip, vcpus=vcpus)
        if not guest.vm.check_extension(abi.KVM_CAP_HYPERV_CPUID):
            pytest.skip("this KVM has no Hyper-V interfaces")
        for vcpu in guest.vcpus:
            if synic:
                vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC2, 0)
            vcpu.enable_cap(abi.KVM_CAP_HYPERV_ENFORCE_CPUID, int(enforce))
            self.set_cpuid(vcpu, leaves or {})
        descriptors = (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
        guest.write(GDT, b"".join(entry.to_bytes(8, "little") for entry in descriptors))
        guest.identity_map()
        self.handler(abi.GP_VECTOR, bytes([0xE6, _GP, 0xF4]))
        self.handler(abi.UD_VECTOR, bytes([0xE6, _UD, 0xF4]))

    def set_cpuid(self, vcpu: api.Vcpu, leaves: Mapping[int, Mapping[str, int]]) -> None:
        """KVM_SET_CPUID2: all that there is, with Hyper-V's leaves in place of KVM's."""
        offered = vcpu.get_supported_hv_cpuid()
        for entry in offered:
            for register, value in leaves.get(entry.function, {}).items():
                setattr(entry, register, value)
        own = [e for e in self.guest.kvm.get_supported_cpuid() if not 0x40000000 <= e.function < 0x40000100]
        vcpu.set_cpuid2(own + offered)

    def handler(self, vector: int, code: bytes) -> None:
        """Let an interrupt or exception of the guest execute up to 16 bytes of *code*."""
        assert len(code) <= 16
        at = HANDLERS + 16 * vector
        self.guest.write(at, code)
        gate = at & 0xFFFF | 8 << 16 | 0x8E << 40 | (at >> 16 & 0xFFFF) << 48
        self.guest.write(IDT + 16 * vector, gate.to_bytes(16, "little"))

    # --- execution -----------------------------------------------------------------------------------

    def start(self, code: bytes | str, *, vcpu: int = 0, rflags: int = 2, **registers: int) -> None:
        """Let a vCPU stand before *code* in 64-bit mode, with some general registers."""
        guest, cpu = self.guest, self.guest.vcpus[vcpu]
        at = _CODE + vcpu * _CODE_SIZE
        guest.write(at, bytes.fromhex(code) if isinstance(code, str) else code)
        sregs = cpu.get_sregs()
        if not sregs.efer & abi.EFER_LMA:
            sregs.cs = abi.kvm_segment(limit=0xFFFF_FFFF, selector=8, type=11, present=1, s=1, g=1, l=1)
            data = abi.kvm_segment(limit=0xFFFF_FFFF, selector=16, type=3, present=1, s=1, g=1, db=1)
            for name in ("ds", "es", "fs", "gs", "ss"):
                setattr(sregs, name, data)
            sregs.gdt.base, sregs.gdt.limit = GDT, 23
            sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
            sregs.cr3, sregs.cr4 = TABLES, sregs.cr4 | abi.X86_CR4_PAE | abi.X86_CR4_OSFXSR
            sregs.efer |= abi.EFER_LME | abi.EFER_LMA
            sregs.cr0 |= abi.X86_CR0_PE | abi.X86_CR0_PG
            cpu.set_sregs(sregs)
            cpu.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
        cpu.set_regs(abi.kvm_regs(rip=at, rflags=rflags, rsp=_STACK - vcpu * 0x400, **registers))

    def enter_ring_3(self) -> None:
        """Let the first vCPU, in 64-bit mode already, be at user's level, and have a stack for its exceptions."""
        sregs = self.guest.cpu.get_sregs()
        enter_ring_3(sregs)
        sregs.tr = abi.kvm_segment(base=TSS, limit=0x67, selector=24, type=11, present=1)
        self.guest.write(TSS + 4, _RING_0_STACK.to_bytes(8, "little"))
        self.guest.cpu.set_sregs(sregs)

    def finish(self, vcpu: int = 0) -> abi.kvm_regs:
        """Run to the end of what was started; the registers then. Raises what the guest had, or left for."""
        cpu = self.guest.vcpus[vcpu]
        reason = self.guest.run(cpu)
        if reason != abi.KVM_EXIT_IO:
            raise Left(reason)
        port = cpu.kvm_run.io.port
        if port == _GP:
            raise GeneralProtection
        if port == _UD:
            raise InvalidOpcode
        assert port == _DONE
        return cpu.get_regs()

    def execute(self, code: bytes | str, *, vcpu: int = 0, rflags: int = 2, **registers: int) -> abi.kvm_regs:
        """Execute *code*."""
        body = bytes.fromhex(code) if isinstance(code, str) else code
        self.start(body + bytes([0xE6, _DONE, 0xF4]), vcpu=vcpu, rflags=rflags, **registers)
        return self.finish(vcpu)

    def rdmsr(self, msr: int, *, vcpu: int = 0) -> int:
        """RDMSR by the guest."""
        regs = self.execute("0f32", vcpu=vcpu, rcx=msr)
        return int((regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF)

    def wrmsr(self, msr: int, value: int, *, vcpu: int = 0) -> None:
        """WRMSR by the guest. The exit that a SynIC's registers have behind them is taken."""
        try:
            self.execute("0f30", vcpu=vcpu, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
        except Left as left:
            if left.reason != abi.KVM_EXIT_HYPERV:
                raise
            self.finish(vcpu)

    def enable_hypercalls(self) -> None:
        """Tell what the guest is, and have the page of hypercalls."""
        self.wrmsr(abi.HV_X64_MSR_GUEST_OS_ID, LINUX)
        self.wrmsr(abi.HV_X64_MSR_HYPERCALL, HYPERCALL_PAGE | abi.HV_X64_MSR_HYPERCALL_ENABLE)

    def hypercall(
        self, control: int, ingpa: int = 0, outgpa: int = 0, *, vcpu: int = 0, xmm: Sequence[int] = ()
    ) -> int:
        """A hypercall by way of its page; *xmm* are halves of XMM registers."""
        cpu = self.guest.vcpus[vcpu]
        fpu = cpu.get_fpu()
        for at, half in enumerate(xmm):
            fpu.xmm[at // 2][8 * (at % 2) : 8 * (at % 2) + 8] = list(half.to_bytes(8, "little"))
        cpu.set_fpu(fpu)
        regs = self.execute("ffd0", vcpu=vcpu, rax=HYPERCALL_PAGE, rcx=control, rdx=ingpa, r8=outgpa)
        return int(regs.rax)

    def fast(self, code: int, *words: int, var: int = 0, rep: int = 0, vcpu: int = 0) -> int:
        """A hypercall whose input, *words*, is in registers."""
        control = code | abi.HV_HYPERCALL_FAST_BIT | var << 17 | rep << 32
        given = [*words, 0, 0][: max(len(words), 2)]
        return self.hypercall(control, given[0], given[1], xmm=given[2:], vcpu=vcpu)

    def slow(self, code: int, *words: int, var: int = 0, rep: int = 0, at: int = INPUT) -> int:
        """A hypercall whose input is in memory."""
        self.guest.write(at, b"".join(word.to_bytes(8, "little") for word in words))
        return self.hypercall(code | var << 17 | rep << 32, at)

    # --- the local APIC --------------------------------------------------------------------------------

    def enable_apic(self, vcpu: int = 0) -> None:
        """Let a local APIC accept interrupts."""
        cpu = self.guest.vcpus[vcpu]
        lapic = cpu.get_lapic()
        registers = memoryview(lapic.regs).cast("B")
        registers[_SPIV : _SPIV + 4] = (0x1FF).to_bytes(4, "little")
        cpu.set_lapic(lapic)

    def vectors(self, vcpu: int = 0, *, in_service: bool = False) -> list[int]:
        """The vectors that are requested, or in service."""
        registers = bytes(self.guest.vcpus[vcpu].get_lapic().regs)
        base = _ISR if in_service else _IRR
        return [v for v in range(256) if registers[base + v // 32 * 16 + v % 32 // 8] >> v % 8 & 1]
