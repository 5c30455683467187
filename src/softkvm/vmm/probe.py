# SPDX-License-Identifier: Apache-2.0
"""Whether a KVM can run an operating system, found out by letting it run something.

That a device opens and has capabilities says little: inside of some virtual machines and containers ``/dev/kvm`` is
there, and emulates every instruction, refuses long mode or delivers no interrupts. So a small guest does what an
operating system's first millisecond does: CPUID, MSRs, page tables, SSE, a few million instructions, the timer of the
local APIC, HLT until its interrupt comes, a port.
"""

from __future__ import annotations

import contextlib
import struct
import threading

from softkvm import abi, api
from softkvm.vmm.boot.cpustate import CODE_SELECTOR, enter_long_mode
from softkvm.vmm.cpuid import vcpu_cpuid
from softkvm.vmm.memory import MIB, GuestMemory

CAPABILITIES = ("IRQCHIP", "USER_MEMORY", "PIT2", "IMMEDIATE_EXIT")
"""What :class:`softkvm.vmm.machine.Machine` cannot do without."""

INSTRUCTIONS = 5_000_000
TIMEOUT_S = 1.0
"""A processor needs a few milliseconds for them, the software CPU tens."""

_CODE = 0x10000
_STACK = 0x18000
_IDT = 0x19000
_STAGE = 0x1A000
_VECTOR = 0x40
_PORT = 0xE9
_DONE = 3

# RSI points to the stage byte, EDI is the number of rounds.
_PROGRAM = bytes.fromhex(
    "b801000000 0fa2"  # mov eax, 1; cpuid
    "b9800000c0 0f32 0f30"  # mov ecx, EFER; rdmsr; wrmsr
    "0f20d8 0f22d8"  # mov rax, cr3; mov cr3, rax
    "0f28c8"  # movaps xmm1, xmm0
    "c60601"  # mov byte [rsi], 1
    "89f9 ffc9 75fc"  # mov ecx, edi; dec ecx; jnz $-2
    "c60602"  # mov byte [rsi], 2
    "bb0000e0fe"  # mov ebx, 0xfee00000
    "c783f0000000ff010000"  # mov dword [rbx + 0xf0], 0x1ff: enabled
    "c7832003000040000000"  # mov dword [rbx + 0x320], 0x40: timer, one-shot
    "c783e00300000b000000"  # mov dword [rbx + 0x3e0], 0xb: divide by 1
    "c7838003000000100000"  # mov dword [rbx + 0x380], 0x1000: start
    "fb f4 fa"  # sti; hlt; cli
    "b003 e6e9"  # mov al, 3; out 0xe9, al
    "f4 ebfd"  # hlt; jmp $-1
)
_HANDLER = bytes.fromhex(
    "c60603"  # mov byte [rsi], 3
    "c783b000000000000000"  # mov dword [rbx + 0xb0], 0: end of interrupt
    "48cf"  # iretq
)
_STUCK = {
    0: "cannot run 64-bit code",
    1: f"is slow: {INSTRUCTIONS:,} instructions took more than {TIMEOUT_S:g} s",
    2: "delivers no timer interrupt",
    _DONE: "does not come back from an interrupt",
}
"""What the guest did not do, by the stage it had reached."""


def missing_capabilities(kvm: api.Kvm) -> list[str]:
    """Return the capabilities that a machine needs and *kvm* has not got."""
    return [name for name in CAPABILITIES if not kvm.check_extension(getattr(abi, f"KVM_CAP_{name}"))]


def probe(kvm: api.Kvm, timeout_s: float = TIMEOUT_S) -> str | None:
    """Let a guest run on *kvm*; return in a few words what is wrong, None if nothing is."""
    missing = missing_capabilities(kvm)
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        with contextlib.ExitStack() as stack:
            return _run(kvm, timeout_s, stack)
    except OSError as error:
        return f"refuses a guest: {error.strerror or error}"


def _run(kvm: api.Kvm, timeout_s: float, stack: contextlib.ExitStack) -> str | None:
    memory = GuestMemory(2 * MIB)
    stack.callback(memory.close)
    vm = stack.enter_context(kvm.create_vm())
    vm.set_tss_addr(0xFFFB_D000)
    vm.create_irqchip()
    memory.attach(vm)
    vcpu = stack.enter_context(vm.create_vcpu(0))
    vcpu.set_cpuid2(vcpu_cpuid(kvm.get_supported_cpuid(), 0, 1, deadline_timer=False))
    _load(vcpu, memory)
    timer = threading.Timer(timeout_s, vcpu.kick)
    timer.daemon = True
    timer.start()
    try:
        vcpu.run()
    except InterruptedError:
        return _STUCK.get(memory.read(_STAGE, 1)[0], "destroys its guest's memory")
    finally:
        timer.cancel()
        timer.join()
    run = vcpu.kvm_run
    if run.exit_reason != abi.KVM_EXIT_IO:
        return f"cannot run 64-bit code: {abi.EXIT_REASON_NAMES.get(run.exit_reason, run.exit_reason)}"
    if run.io.port != _PORT or vcpu.shared[run.io.data_offset] != memory.read(_STAGE, 1)[0]:
        return "runs 64-bit code wrongly"
    return None


def _load(vcpu: api.Vcpu, memory: GuestMemory) -> None:
    memory.write(_CODE, _PROGRAM + _HANDLER)
    enter_long_mode(vcpu, memory, abi.kvm_regs(rip=_CODE, rsp=_STACK, rsi=_STAGE, rdi=INSTRUCTIONS // 2))
    handler = _CODE + len(_PROGRAM)
    gate = struct.pack("<HHBBHII", handler & 0xFFFF, CODE_SELECTOR, 0, 0x8E, handler >> 16 & 0xFFFF, 0, 0)
    memory.write(_IDT + 16 * _VECTOR, gate)
    sregs = vcpu.get_sregs()
    sregs.idt.base, sregs.idt.limit = _IDT, 16 * (_VECTOR + 1) - 1
    sregs.cr4 |= abi.X86_CR4_OSFXSR
    vcpu.set_sregs(sregs)
