# SPDX-License-Identifier: Apache-2.0
"""What a vCPU looks like, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from softkvm import abi, api
from softkvm.vmm.debug.registers import Registers
from softkvm.vmm.debug.virtual import MemoryFault, read_virtual
from softkvm.vmm.linux.errors import KernelError
from softkvm.vmm.linux.kernel import Kernel, spell
from softkvm.vmm.linux.orc import Frame, Unwinder
from softkvm.vmm.memory import GuestMemory

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

_EFER_LMA: Final = 1 << 10
_CODE_BEFORE, _CODE_BEHIND = 16, 31
_STACK_BYTES: Final = 128
_CHAIN_REGISTERS: Final = (
    *("rip", "rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi"),
    *(f"r{n}" for n in range(8, 16)),
)
_MP_STATES: Final = {
    abi.KVM_MP_STATE_RUNNABLE: "running",
    abi.KVM_MP_STATE_UNINITIALIZED: "not started yet",
    abi.KVM_MP_STATE_INIT_RECEIVED: "waits for its start-up IPI",
    abi.KVM_MP_STATE_HALTED: "halted",
    abi.KVM_MP_STATE_SIPI_RECEIVED: "starts",
}

_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_GENERAL: Final = (
    ("rip", "rsp", "rbp"),
    ("rax", "rbx", "rcx"),
    ("rdx", "rsi", "rdi"),
    ("r8", "r9", "r10"),
    ("r11", "r12", "r13"),
    ("r14", "r15", "rflags"),
)


def registers_text(registers: Registers) -> str:
    """Return the general registers, segments with their hidden parts, tables and control registers, as lines."""
    regs, sregs = registers.regs, registers.sregs
    lines = ["  ".join(f"{name:6} {getattr(regs, name):016x}" for name in row) for row in _GENERAL]
    lines.append("       selector base             limit     type")
    for name in _SEGMENTS:
        segment = getattr(sregs, name)
        kind = f"{segment.type:x}{' S' if segment.s else ''}{' L' if segment.l else ''}{' D' if segment.db else ''}"
        state = (
            "unusable" if segment.unusable else f"{kind} DPL {segment.dpl}{'' if segment.present else ' not present'}"
        )
        lines.append(f"{name:6} {segment.selector:04x}     {segment.base:016x} {segment.limit:08x}  {state}")
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        lines.append(f"{name:6}          {table.base:016x} {table.limit:08x}")
    lines.append("  ".join(f"{name} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3")))
    lines.append("  ".join(f"{name} {getattr(sregs, name):016x}" for name in ("cr4", "cr8")))
    lines.append(f"efer {sregs.efer:016x}  k_gs_base {registers['k_gs_base']:016x}  apic_base {sregs.apic_base:016x}")
    return "\n".join(lines) + "\n"


class CallChains:
    """Call chains and tasks of vCPUs, if a Linux kernel in *memory* tells of itself; else ``reason`` says why not.

    To make it takes a moment, and the guest may run meanwhile; :meth:`of` is for vCPUs that stand.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.kernel: Kernel | None = None
        self.reason = ""
        self._unwinder: Unwinder | None = None
        try:
            self.kernel = Kernel(memory)
            self._unwinder = Unwinder(self.kernel)
        except (KernelError, MemoryFault, KeyError) as error:
            self.reason = f"{'no call chains' if self.kernel else 'no symbols'}: {error}"

    def of(self, vcpu: api.Vcpu) -> list[Frame]:
        """Return a vCPU's call chain; empty outside of the kernel, and where none is known."""
        regs = vcpu.get_regs()
        if self._unwinder is None or not regs.rip >> 63:
            return []
        return list(self._unwinder.chain({name: getattr(regs, name) for name in _CHAIN_REGISTERS}))

    def task(self, index: int) -> str:
        """Return the name and number of the task that a processor runs; empty if that isn't known."""
        if self._unwinder is None or self.kernel is None:
            return ""
        try:
            task = self.kernel.current(index)
            return f"{task.comm.string_()} ({int(task.pid)})"
        except (KernelError, MemoryFault):
            return ""


def machine_text(machine: Machine) -> str:
    """Return what each vCPU of a machine looks like, which stands for that: registers, code, stack, call chain.

    With symbols and call chains if a Linux kernel in memory tells of itself. StateError if it doesn't come to stand.
    """
    chains = CallChains(machine.memory)
    lines = [chains.reason or f"Linux {chains.kernel.release if chains.kernel else ''}"]
    with machine.pausing.still():
        for thread in machine.vcpus:
            task = chains.task(thread.index)
            lines += ["", f"vCPU {thread.index}: {vcpu_state(thread.vcpu)}{f', task {task}' if task else ''}"]
            try:
                lines += _vcpu_lines(machine, thread.vcpu, chains)
            except OSError as error:
                lines.append(f"its registers cannot be read: {error}")
    return "\n".join(lines) + "\n"


def vcpu_state(vcpu: api.Vcpu) -> str:
    """Say what a vCPU does."""
    state = vcpu.get_mp_state().mp_state
    return _MP_STATES.get(state, f"in state {state}")


def _vcpu_lines(machine: Machine, vcpu: api.Vcpu, chains: CallChains) -> Iterator[str]:
    kernel = chains.kernel if not chains.reason else None
    registers = Registers(vcpu)
    regs, sregs = registers.regs, registers.sregs
    yield registers_text(registers).rstrip("\n")
    long_mode = bool(sregs.efer & _EFER_LMA)
    code = regs.rip + (0 if long_mode and sregs.cs.l else sregs.cs.base)
    stack = regs.rsp + (0 if long_mode else sregs.ss.base)
    yield f"code at {code:#x}{_named(kernel, code)}:"
    before = _bytes(machine, vcpu, code - _CODE_BEFORE, _CODE_BEFORE)
    here, behind = _bytes(machine, vcpu, code, 1), _bytes(machine, vcpu, code + 1, _CODE_BEHIND)
    yield f"  {before}<{here.strip()}> {behind.strip()}"
    yield f"stack at {stack:#x}:"
    for at in range(stack, stack + _STACK_BYTES, 8):
        try:
            word = int.from_bytes(read_virtual(vcpu, machine.memory, at, 8), "little")
        except MemoryFault:
            yield f"  {at:016x}  ?"
            break
        yield f"  {at:016x}  {word:016x}{_named(kernel, word)}"
    frames = chains.of(vcpu)
    if frames:
        yield "call chain:"
    yield from (f"  {frame.address:016x}  {frame.text}" for frame in frames)


def _named(kernel: Kernel | None, address: int) -> str:
    """Return a symbol's name behind a blank, if the address is in one."""
    if kernel is None or not address >> 63:
        return ""
    found = kernel.symbols.at(address)
    return "" if found is None else f"  {spell(found)}"


def _bytes(machine: Machine, vcpu: api.Vcpu, address: int, size: int) -> str:
    """Return memory as hexadecimal digits, ``??`` where there is none."""
    text = ""
    for at in range(address, address + size):
        try:
            text += f"{read_virtual(vcpu, machine.memory, at & (1 << 64) - 1, 1)[0]:02x} "
        except MemoryFault:
            text += "?? "
    return text
