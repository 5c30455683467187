# SPDX-License-Identifier: Apache-2.0
"""What a vCPU is at: registers, the bytes of its code and its stack, as ``lkvm debug`` has them."""

from __future__ import annotations

from typing import Any, Final

from softkvm import api
from softkvm.vmm.debug.paging import MemoryFault
from softkvm.vmm.debug.report import CallChains
from softkvm.vmm.debug.virtual import translate
from softkvm.vmm.machine import Machine
from softkvm.vmm.memory import PAGE_SIZE, GuestMemory

GENERAL: Final = (
    "rip", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
CODE_BEFORE: Final = 43
CODE_SIZE: Final = 64
STACK_SIZE: Final = 128
_CR0_PE: Final = 1
_RFLAGS_VM: Final = 1 << 17
_EFER_LMA: Final = 1 << 10


def dump(machine: Machine, timeout_s: float = 2.0) -> list[dict[str, Any]]:
    """Return what every vCPU is at, with all of them standing; StateError if they don't come to that.

    With the task and the call chain of each where a Linux kernel in memory tells of them.
    """
    chains = CallChains(machine.memory)
    with machine.pausing.still(timeout_s):
        return [
            {
                **dump_vcpu(thread.index, thread.vcpu, machine.memory),
                "task": chains.task(thread.index),
                "calls": [{"address": frame.address, "text": frame.text} for frame in chains.of(thread.vcpu)],
            }
            for thread in machine.vcpus
        ]


def dump_vcpu(index: int, vcpu: api.Vcpu, memory: GuestMemory) -> dict[str, Any]:
    """Return what one vCPU, which stands, is at."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    long_mode = bool(sregs.efer & _EFER_LMA and sregs.cs.l)
    code = (0 if long_mode else sregs.cs.base) + regs.rip
    stack = (0 if long_mode else sregs.ss.base) + regs.rsp
    begin = max(code - CODE_BEFORE, 0)
    return {
        "id": index,
        "mp_state": vcpu.get_mp_state().mp_state,
        "mode": _mode(regs.rflags, sregs.cr0, long_mode=long_mode, is_32=bool(sregs.cs.db)),
        "registers": {name: getattr(regs, name) for name in GENERAL},
        "segments": {
            name: {
                "selector": segment.selector,
                "base": segment.base,
                "limit": segment.limit,
                "type": segment.type,
                "present": segment.present,
                "dpl": segment.dpl,
                "db": segment.db,
                "s": segment.s,
                "l": segment.l,
                "g": segment.g,
            }
            for name, segment in ((name, getattr(sregs, name)) for name in SEGMENTS)
        },
        "tables": {
            name: {"base": table.base, "limit": table.limit} for name, table in (("gdt", sregs.gdt), ("idt", sregs.idt))
        },
        "control": {name: getattr(sregs, name) for name in CONTROL},
        "code": {"address": begin, "at": code - begin, "bytes": read_virtual(vcpu, memory, begin, CODE_SIZE).hex()},
        "stack": {"address": stack, "bytes": read_virtual(vcpu, memory, stack, STACK_SIZE).hex()},
    }


def _mode(rflags: int, cr0: int, *, long_mode: bool, is_32: bool) -> str:
    if not cr0 & _CR0_PE:
        return "real mode"
    if long_mode:
        return "64-bit"
    if rflags & _RFLAGS_VM:
        return "virtual-8086"
    return "32-bit" if is_32 else "16-bit"


def read_virtual(vcpu: api.Vcpu, memory: GuestMemory, address: int, size: int) -> bytes:
    """Return what the vCPU finds at linear *address*, up to the first byte that is no RAM or not mapped."""
    found = bytearray()
    while size > 0:
        piece = min(size, PAGE_SIZE - address % PAGE_SIZE)
        try:
            found += memory.read(translate(vcpu, memory, address & (1 << 64) - 1), piece)
        except (OSError, IndexError, MemoryFault):
            break
        address += piece
        size -= piece
    return bytes(found)


def lines(vcpu: dict[str, Any]) -> list[str]:
    """Return what :func:`dump_vcpu` found, for people."""
    regs, control = vcpu["registers"], vcpu["control"]
    task = f", task {vcpu['task']}" if vcpu.get("task") else ""
    out = [f"vCPU {vcpu['id']}: {vcpu['mode']}{task}", f"  rip {regs['rip']:016x}   rflags {regs['rflags']:08x}"]
    names = GENERAL[2:]
    out += ["  " + "   ".join(f"{name:3} {regs[name]:016x}" for name in names[at : at + 4]) for at in range(0, 16, 4)]
    out.append("  " + "   ".join(f"{name} {control[name]:x}" for name in CONTROL))
    for name, segment in vcpu["segments"].items():
        out.append(
            f"  {name:3} {segment['selector']:04x}  base {segment['base']:016x}  limit {segment['limit']:08x}  "
            f"type {segment['type']:x} s {segment['s']} dpl {segment['dpl']} p {segment['present']} "
            f"db {segment['db']} l {segment['l']} g {segment['g']}"
        )
    out += [f"  {name} base {table['base']:016x}  limit {table['limit']:04x}" for name, table in vcpu["tables"].items()]
    code, at = bytes.fromhex(vcpu["code"]["bytes"]), vcpu["code"]["at"]
    shown = " ".join(f"<{byte:02x}>" if place == at else f"{byte:02x}" for place, byte in enumerate(code))
    out.append(f"  code {vcpu['code']['address']:016x}: {shown or 'not mapped'}")
    stack = bytes.fromhex(vcpu["stack"]["bytes"])
    if not stack:
        out.append(f"  stack {vcpu['stack']['address']:016x}: not mapped")
    for place in range(0, len(stack) & ~7, 32):
        words = [stack[word : word + 8][::-1].hex() for word in range(place, min(place + 32, len(stack) & ~7), 8)]
        out.append(f"  stack {vcpu['stack']['address'] + place:016x}: {' '.join(words)}")
    out += [f"  call {call['address']:016x}: {call['text']}" for call in vcpu.get("calls", [])]
    return out
